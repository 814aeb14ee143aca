"""Places and regions written as loops, a model of towers that say something of places, and what the ranks run."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
from _tiny import Block
from gradcheck import CLIP, ENGINES, LR, MOMENTUM, OPTIM

from dualenc.config import Component, EngineConfig, LogitScale
from dualenc.data.batch import ABSENT, Batch
from dualenc.data.driving.places import POOR
from dualenc.distributed.world import World
from dualenc.encoders import DualEncoder, Tower
from dualenc.engine import build_engine
from dualenc.losses import build_loss
from dualenc.train.step import train_step

SIZE, K, STEPS, WIDTH, DIM = 4, 7, 2, 16, 5
PAIR = ("view_a", "view_b")


class Spotted(Tower):
    """A tower with features of rows and of places in them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_dim = DIM
        self.stack = nn.ModuleList([Block(WIDTH, 0.0)])
        self.head, self.local = nn.Linear(WIDTH, DIM), nn.Linear(WIDTH, DIM)

    def outputs(self, x: Any) -> dict[str, Tensor]:
        y = x["x"]
        for block in self.stack:
            y = block(y)
        local = nn.functional.normalize(self.local(y[:, None] + x["places"]), dim=-1)
        return {"features": self.head(y), "pooled": y, "local": local}


def model(kind: str) -> DualEncoder:
    """Two views of one tower, or for RAD two towers of which the second is locked."""
    torch.manual_seed(0)
    if kind == "rad":
        return DualEncoder({m: Spotted() for m in PAIR}, [PAIR], LogitScale(init=7.0), lock=[PAIR[1]])
    return DualEncoder({PAIR[0]: Spotted()}, [PAIR], LogitScale(init=7.0), shared={PAIR[1]: PAIR[0]})


def make_batch(step: int) -> Batch:
    """Regions in unequal numbers: slots 2 and 3 (a second rank) have one, or none; slot 1 lost a place in view_b."""
    g = torch.Generator().manual_seed(step)
    inputs = {
        m: {
            "x": torch.randn(SIZE, WIDTH, generator=g),
            "places": torch.randn(SIZE, K, WIDTH, generator=g),
        }
        for m in PAIR
    }
    region = torch.tensor(
        [
            [0, 0, 1, 2, 2, POOR, POOR],
            [0, 0, 0, 1, POOR, ABSENT, ABSENT],
            [0, 0, POOR, POOR, POOR, POOR, ABSENT],
            [POOR, POOR, ABSENT, ABSENT, ABSENT, ABSENT, ABSENT],
        ]
    )
    if step % 2:  # the second of two ranks has no region at all
        region[2] = POOR
    other = region.clone()
    other[1, 1] = ABSENT
    rows = {m: torch.arange(SIZE) for m in PAIR}
    extras = {"region": {PAIR[0]: region, PAIR[1]: other}}
    return Batch(SIZE, inputs, rows, torch.arange(SIZE) + 100 * step, [f"s{i}" for i in range(SIZE)], extras=extras)


def share_of(batch: Batch, rank: int, world: int) -> Batch:
    mine = slice(rank * SIZE // world, (rank + 1) * SIZE // world)
    n = SIZE // world
    return Batch(
        n,
        {m: {k: v[mine] for k, v in x.items()} for m, x in batch.inputs.items()},
        {m: torch.arange(n) for m in PAIR},
        batch.ids[mine],
        batch.keys[mine],
        extras={k: {m: v[mine] for m, v in x.items()} for k, x in batch.extras.items()},
    )


def naive(a: Tensor, b: Tensor, region: list[tuple[int, int]], scale: Tensor, kind: str, alpha: float = 0.5) -> Tensor:
    """The module's formulas, place by place.

    Args:
        a, b: [M, D] of all places that are there, in one order; region: (sample, region) of each, region < 0: in none.
    """
    n = len(region)

    def one_way(q: Tensor, k: Tensor) -> Tensor:
        total = torch.zeros((), dtype=q.dtype)
        rich = [i for i in range(n) if region[i][1] >= 0]
        sizes = {r: sum(x == r for x in region) for r in region}
        names = {region[i] for i in rich}
        for i in rich if kind != "point_contrast" else range(n):
            e = [(scale * (q[i] * k[j]).sum()).squeeze().exp() for j in range(n)]
            own = [j for j in rich if region[j] == region[i]]
            everything = torch.stack(e).sum()
            plrc = -sum(torch.log(e[j] / everything) for j in own) / max(len(own), 1)
            rapc = -torch.log(e[i] / (e[i] + sum((e[j] for j in range(n) if j not in own), torch.zeros(()))))
            if kind == "prc":
                total = total + (alpha * plrc + (1 - alpha) * rapc) / len(rich)
            elif kind == "point_contrast":
                total = total - torch.log(e[i] / everything) / n
            else:
                total = total + plrc / (len(names) * sizes[region[i]])
        return total

    if kind == "rad":
        return one_way(a, b.detach())
    return (one_way(a, b) + one_way(b, a)) / 2


def whole_batch_loss(twin: DualEncoder, batch: Batch, kind: str) -> Tensor:
    local = twin(batch.inputs)["local"]
    ra, rb = (batch.extras["region"][m] for m in PAIR)
    there = [(s, k) for s in range(SIZE) for k in range(K) if ra[s, k] != ABSENT and rb[s, k] != ABSENT]
    a, b = (torch.stack([local[m][s, k] for s, k in there]).double() for m in PAIR)
    region = [(s, int(ra[s, k])) for s, k in there]
    return naive(a, b, region, torch.tensor([7.0], dtype=torch.float64), kind)


def reference(kind: str) -> dict[str, Tensor]:
    """Parameters after STEPS SGD steps of one process on whole batches."""
    twin = model(kind)
    trained = [p for p in twin.parameters() if p.requires_grad]
    sgd = torch.optim.SGD(trained, lr=LR, momentum=MOMENTUM)
    for step in range(STEPS):
        sgd.zero_grad()
        whole_batch_loss(twin, make_batch(step), kind).backward()
        for p in trained:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        nn.utils.clip_grad_norm_(trained, CLIP)
        sgd.step()
    return {name: p.detach() for name, p in twin.named_parameters()}


def run(world: World, engine: str, kind: str, micro: int | None) -> dict[str, Tensor]:
    """The same by the real step, with the temperature held; whole on rank 0."""
    built = build_engine(EngineConfig(**ENGINES[engine]), OPTIM, held(model(kind)), world)
    loss = build_loss(Component.model_validate({"name": kind, "strip_mb": 1e-6}))
    for step in range(STEPS):
        batch = share_of(make_batch(step), world.rank, world.world_size)
        train_step(built, batch, [PAIR], loss, micro=micro)
    return built.model_state()


def held(m: DualEncoder) -> DualEncoder:
    m.logit_scale.requires_grad_(False)
    return m


def sweep(world: World, engines: list[str]) -> dict[str, Any]:
    """Rank 0: case → largest relative difference from the reference of any parameter, and its name."""
    out = {}
    for kind in ("prc", "point_contrast", "rad"):
        want = reference(kind) if world.rank == 0 else {}
        for engine in engines:
            for micro in (None, 1):
                got = run(world, engine, kind, micro)
                off = {
                    k: float((got[k] - p).abs().max() / p.abs().max().clamp(min=1e-12))
                    for k, p in want.items()
                    if not k.startswith("logit_scale")
                }
                worst = max(off, key=lambda k: off[k], default="")
                out[f"{engine}/{kind}/{micro}"] = [off.get(worst, 0.0), worst]
                assert all(math.isfinite(v) for v in off.values())
    return out


def nothing_anywhere(world: World) -> float:
    """No place in any region on any rank: a value of zero, gradients of zero, nobody hangs."""
    batch = share_of(make_batch(0), world.rank, world.world_size)
    for m in PAIR:
        batch.extras["region"][m] = torch.full_like(batch.extras["region"][m], POOR)
    before = model("prc").state_dict()
    built = build_engine(EngineConfig(**ENGINES["DDP"]), OPTIM, held(model("prc")), world)
    result = train_step(built, batch, [PAIR], build_loss(Component(name="prc")))
    after = built.model_state()
    assert not result.skipped
    assert all(torch.equal(before[k], v) for k, v in after.items())
    return result.loss
