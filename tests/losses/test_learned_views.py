"""AutoTCL's learned view: five steps against a loop in fp64 with torch's Adam; ranks, engines, micro-batches and a
resume change nothing; what its network says does not depend on padding."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, normalize

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
sys.path.insert(0, str(Path(__file__).parent))
from _memory_jobs import write_down
from _spawn import spawn
from gradcheck import CLIP, ENGINES, LR, MOMENTUM, OPTIM

from dualenc.checkpoint.ranges import InMemory, stored
from dualenc.config import Component, EngineConfig, LogitScale
from dualenc.data.batch import Batch
from dualenc.distributed.world import World, barrier
from dualenc.encoders import DualEncoder, Tower
from dualenc.engine import build_engine
from dualenc.errors import ConfigError
from dualenc.losses import build_loss
from dualenc.losses.autotcl import TEMPERATURE, AutoTCL, Factors, uniform
from dualenc.memory import RunShape
from dualenc.train.learned_views import ViewLearner
from dualenc.train.memory import Memory
from dualenc.train.step import train_step

SIZE, CHANNELS, DIM, STEPS, MIDDLE, SAMPLES = 12, 3, 6, 5, 3, 29
PAIRS = [("series", "text"), ("series", "view")]
LOSS: dict[str, Any] = {
    "name": "autotcl", "width": 4, "kernel": 3, "lr": 0.03, "every": 2, "keep": 0.3, "keep_weight": 0.7,
    "smooth_weight": 0.4, "tau": 0.3,
}  # fmt: skip
ORDERS = {"before": {}, "after": {"held_back": True, "every": 1}}

torch.set_num_threads(1)


class Summed(Tower):
    """A tower that takes a series as a sum over its times."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.embed_dim = DIM
        self.inner, self.head = nn.Linear(channels, 8), nn.Linear(8, DIM)

    def pooled(self, x: Any) -> Tensor:
        real = torch.arange(x["values"].shape[2])[None] < x["length"][:, None]
        return (torch.tanh(self.inner(x["values"].transpose(1, 2))) * real[..., None]).sum(1)


def model() -> DualEncoder:
    torch.manual_seed(3)
    towers = {"series": Summed(CHANNELS), "text": Summed(1)}
    return DualEncoder(towers, PAIRS, LogitScale(init=5.0), shared={"view": "series"})


def batch_of(step: int, rank: int = 0, world_size: int = 1) -> Batch:
    """Series of 4 to 9 times; slot 4 lacks its series, 7 its text, 2 is lost, 1 and 8 are one pair id."""
    g = torch.Generator().manual_seed(step)
    slots = torch.arange(SIZE)
    numbers = (slots * 5 + step * 7) % SAMPLES
    ids = numbers.clone()
    ids[8], ids[2] = ids[1].item(), -1
    length = torch.randint(4, 10, (SIZE,), generator=g)
    values = torch.randn(SIZE, CHANNELS, 9, generator=g) * (torch.arange(9) < length[:, None])[:, None]
    words = torch.randn(SIZE, 1, 3, generator=g)
    mine = slots[rank::world_size]
    inputs: dict[str, Any] = {}
    rows: dict[str, Tensor] = {}
    for m, lost in (("series", 4), ("view", 4), ("text", 7)):
        keep = mine[mine != lost]
        rows[m] = (keep - rank) // world_size
        cut = int(length[keep].max())
        series = {"values": values[keep][:, :, :cut], "length": length[keep]}
        inputs[m] = {"values": words[keep], "length": torch.full((len(keep),), 3)} if m == "text" else series
        if m == "view":
            inputs[m] = {k: torch.zeros_like(x) for k, x in series.items()}  # is made anew
    return Batch(len(mine), inputs, rows, ids[mine], [f"s/{j}" for j in mine.tolist()], step, numbers=numbers[mine])


def memory_of(order: str, net: DualEncoder, world: World, micro: int | None) -> tuple[AutoTCL, Memory]:
    loss = build_loss(Component.model_validate({**LOSS, **ORDERS[order]}))
    assert isinstance(loss, AutoTCL)
    torch.manual_seed(4)
    (asked,) = loss.views(PAIRS).values()
    learner = ViewLearner(asked, net, batch_of(0).inputs["series"], world.device)
    run = RunShape(DIM, PAIRS, SAMPLES, world.rank, world.world_size)
    return loss, Memory(loss, {}, run, micro, views={"factors": learner})


def trained(
    world: World, order: str, engine: str = "single", chunks: int = 1, begin: str | None = None, save: str | None = None
) -> dict[str, Tensor]:
    """The model, and network and moments, after STEPS steps; ``begin``: a folder that ``save`` wrote after MIDDLE."""
    net = model()
    micro = None if chunks == 1 else SIZE // world.world_size // chunks
    loss, memory = memory_of(order, net, world, micro)
    saved = None if begin is None else torch.load(Path(begin) / "rest.pt", weights_only=True)
    if saved is not None:
        net.load_state_dict(saved["model"])
    built = build_engine(EngineConfig(**ENGINES[engine]), OPTIM, net, world)
    if saved is not None and begin is not None:
        built.load_optimizer_state(InMemory(saved["optimizer"]), saved["info"])
        memory.load(stored(Path(begin), "memory"))
    for step in range(0 if saved is None else MIDDLE, STEPS):
        batch = memory.recall(batch_of(step, world.rank, world.world_size), built.module)
        assert batch.inputs["view"]["values"].any()
        done = train_step(built, batch, PAIRS, loss, micro=micro)
        memory.keep(built.module, done.skipped)
        if save is not None and step + 1 == MIDDLE:
            write_down(world, Path(save), memory)
            tensors, info = built.optimizer_state()
            rest = {"model": built.model_state(), "optimizer": tensors, "info": info}
            if world.rank == 0:
                torch.save(rest, Path(save) / "rest.pt")
            barrier(world)
    return {**built.model_state(), **{f"view/{k}": x.clone() for k, x in memory.views["factors"].now.now.items()}}


# --- one process, in fp64 ------------------------------------------------------------------------------------------


def factors(net: Factors, x: Tensor, number: int, step: int) -> tuple[Tensor, Tensor]:
    """The view of one series [C, T] without padding, and its mask [T]."""
    inner = torch.relu(conv1d(x[None], net.inner.weight, net.inner.bias, padding=1))
    said = conv1d(inner, net.outer.weight, net.outer.bias, padding=1)[0]
    u = uniform(step, torch.tensor([number]), x.shape[1])[0]
    soft = torch.sigmoid((torch.log(u) - torch.log(1 - u) + said[0]) / TEMPERATURE) * 1.2 - 0.1
    soft = soft.clamp(0, 1)
    keep = (soft > 0.5).double() + (soft - soft.detach())
    return torch.sigmoid(said[1:]) * keep * x, keep


def nce(a: Tensor, b: Tensor, ids: list[int], scale: Tensor) -> Tensor:
    """Both directions, row by row."""
    total = torch.zeros((), dtype=torch.float64)
    for x, y in ((a, b), (b, a)):
        for i in range(len(ids)):
            z = scale * (y @ x[i])
            own = [j for j in range(len(ids)) if ids[j] == ids[i]]
            total = total + z.logsumexp(0) - z[own].mean()
    return total / len(ids) / 2


def bound(a: Tensor, b: Tensor, ids: list[int], masks: list[Tensor]) -> Tensor:
    """The network's objective, up to a constant."""
    total = torch.zeros((), dtype=torch.float64)
    for x, y in ((a, b), (b, a)):
        for i in range(len(ids)):
            z = (y @ x[i]) / LOSS["tau"]
            own = [j for j in range(len(ids)) if ids[j] == ids[i]]
            other = [j for j in range(len(ids)) if j not in own]
            total = total + z[own].mean() - z[other].logsumexp(0)
    kept = torch.stack([h.mean() for h in masks]).mean()
    jumps = torch.stack([(h[1:] - h[:-1]).abs().sum() / len(h) for h in masks]).mean()
    cost = LOSS["keep_weight"] * torch.relu(kept - LOSS["keep"]) + LOSS["smooth_weight"] * jumps
    return total / len(ids) / 2 + cost


def reference(order: str) -> dict[str, Tensor]:
    net = model()
    _, memory = memory_of(order, net, World(), None)
    made = memory.views["factors"].network
    assert isinstance(made, Factors)
    net.double(), made.double()
    sgd = torch.optim.SGD(net.parameters(), lr=LR, momentum=MOMENTUM)
    settings = {**LOSS, **ORDERS[order]}
    adam = torch.optim.Adam(made.parameters(), lr=settings["lr"])

    def encode(m: str, values: Tensor) -> Tensor:
        one = {"values": values[None].double(), "length": torch.tensor([values.shape[1]])}
        return normalize(net.tower(m).encode(one)[0], dim=0)

    for step in range(STEPS):
        batch = batch_of(step)
        series = dict(zip(batch.rows["series"].tolist(), range(SIZE), strict=False))
        text = dict(zip(batch.rows["text"].tolist(), range(SIZE), strict=False))
        there = [j for j in range(SIZE) if j in series and int(batch.ids[j]) >= 0]
        given = batch.inputs["series"]
        x = {j: given["values"][k, :, : int(given["length"][k])].double() for j, k in series.items()}

        def learn(there: list[int] = there, x: dict[int, Tensor] = x, batch: Batch = batch, step: int = step) -> None:
            views = {j: factors(made, x[j], int(batch.numbers[j]), step) for j in there}
            a = torch.stack([encode("series", x[j]) for j in there]).detach()
            b = torch.stack([encode("series", views[j][0]) for j in there])
            value = bound(a, b, [int(batch.ids[j]) for j in there], [views[j][1] for j in there])
            adam.zero_grad()
            for p, g in zip(made.parameters(), torch.autograd.grad(value, list(made.parameters())), strict=True):
                p.grad = g
            adam.step()

        due = step % settings["every"] == 0
        if due and order == "before":
            learn()
        views = {j: factors(made, x[j], int(batch.numbers[j]), step)[0].detach() for j in there}
        both = [j for j in there if j in text]
        scale = {k: v.exp() for k, v in net.logit_scale.items()}
        a, b = (torch.stack([encode("series", s[j]) for j in there]) for s in (x, views))
        value = nce(a, b, [int(batch.ids[j]) for j in there], scale["series-view"])
        words = torch.stack([encode("text", batch.inputs["text"]["values"][text[j]]) for j in both])
        rows = torch.stack([a[there.index(j)] for j in both])
        value = value + nce(rows, words, [int(batch.ids[j]) for j in both], scale["series-text"])
        sgd.zero_grad()
        (value / 2).backward()
        nn.utils.clip_grad_norm_(net.parameters(), CLIP)
        sgd.step()
        if due and order == "after":
            learn()
    out = {f"view/{k}": p.detach() for k, p in made.named_parameters()}
    for k, p in made.named_parameters():
        out |= {f"view/first/{k}": adam.state[p]["exp_avg"], f"view/second/{k}": adam.state[p]["exp_avg_sq"]}
    return {**net.state_dict(), **out}


def off(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """The largest difference of any tensor of ``want``, relative to its largest entry."""
    assert not set(want) - set(got)
    return max(float((got[k].double() - x).abs().max() / x.abs().max().clamp(min=1e-4)) for k, x in want.items())


@pytest.mark.parametrize("order", ORDERS)
def test_five_steps_are_those_of_a_loop_in_fp64(order: str, tmp_path: Path) -> None:
    got = trained(World(), order, save=str(tmp_path))
    assert off(got, reference(order)) <= 2e-5
    assert float(got["view/steps"]) == (3 if order == "before" else 5)
    assert off(trained(World(), order, chunks=3), got) <= 1e-5
    again = trained(World(), order, begin=str(tmp_path))
    assert [k for k, x in got.items() if not torch.equal(again[k], x)] == []
    other = trained(World(), "after" if order == "before" else "before")
    assert off(other, {k: x for k, x in got.items() if k.startswith("view/inner")}) > 1e-3


def on_ranks(world: World, alone: str, folder: str) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for order in ORDERS:
        own = f"{folder}/{order}"
        out[f"{order}/DDP in micro-batches"] = trained(world, order, "DDP", chunks=2, save=own)
        out[f"{order}/FSDP2 from one process"] = trained(world, order, "FSDP2", begin=f"{alone}/{order}")
    if world.world_size > 2:
        out["before/ZeRO 3"] = trained(world, "before", "ZeRO 3")
    return out


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.extra)])
def test_ranks_engines_and_another_world_size(ranks: int, tmp_path: Path) -> None:
    alone = {order: trained(World(), order, save=str(tmp_path / "alone" / order)) for order in ORDERS}
    found = spawn(__file__, "on_ranks", ranks, {"alone": str(tmp_path / "alone"), "folder": str(tmp_path)})
    got = dict(found[0])
    got |= {f"{order}/one process from DDP": trained(World(), order, begin=str(tmp_path / order)) for order in ORDERS}
    worst = {name: off(x, alone[name.partition("/")[0]]) for name, x in got.items()}
    assert {name: x for name, x in worst.items() if not x <= 1e-5} == {}
    for name, x in found[0].items():
        kept = {k: y for k, y in x.items() if k.startswith("view/")}
        assert all(torch.equal(y, found[1][name][k]) for k, y in kept.items()), name


# --- the network ---------------------------------------------------------------------------------------------------


def test_the_network_keeps_everything_or_nothing_and_sees_no_padding() -> None:
    torch.manual_seed(0)
    net = Factors(CHANNELS, 4, 3)
    x = torch.randn(2, CHANNELS, 8)
    rows = {"values": x, "length": torch.tensor([8, 8])}
    for bias, wanted in ((100.0, x), (-100.0, torch.zeros_like(x))):
        nn.init.zeros_(net.outer.weight)
        nn.init.constant_(net.outer.bias, bias)
        view, about = net(rows, torch.tensor([3, 4]), 0)
        torch.testing.assert_close(view["values"], wanted)
        torch.testing.assert_close(about[:, 0], torch.full((2,), float(bias > 0)))
        assert not about[:, 1].any()
    net = Factors(CHANNELS, 4, 3)
    alone = {"values": x[:1, :, :5], "length": torch.tensor([5])}
    padded = {"values": torch.cat([nn.functional.pad(alone["values"], (0, 3)), x[1:]]), "length": torch.tensor([5, 8])}
    one, two = (net(r, torch.tensor([3, 4])[: len(r["length"])], 7) for r in (alone, padded))
    torch.testing.assert_close(two[0]["values"][:1, :, :5], one[0]["values"])
    assert not two[0]["values"][:1, :, 5:].any()
    torch.testing.assert_close(two[1][:1], one[1])


def test_what_is_random_is_uniform_and_a_function_of_step_sample_and_time() -> None:
    u = uniform(5, torch.arange(2000), 50)
    counts = torch.histc(u.float(), 20, 0, 1)
    chi_square = float(((counts - 5000) ** 2 / 5000).sum())
    assert chi_square < 45  # 19 degrees of freedom: p = 0.0007
    assert abs(float(torch.corrcoef(torch.stack([u[:, :-1].flatten(), u[:, 1:].flatten()]))[0, 1])) < 0.015
    assert torch.equal(uniform(5, torch.tensor([7]), 9)[0], u[7, :9])
    assert not (uniform(6, torch.arange(2000), 50) == u).any()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kernel": 4}, r"loss\.kernel: 4 must be odd; use 5"),
        ({"into": "text"}, r"write modalities\.text\.shares: series"),
    ],
)
def test_what_does_not_fit_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        loss = build_loss(Component.model_validate({**LOSS, **settings}))
        (asked,) = loss.views(PAIRS).values()
        ViewLearner(asked, model(), batch_of(0).inputs["series"], "cpu")
