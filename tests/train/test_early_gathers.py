"""Features travel while something is computed: the first tower's gather beside the second tower, the ring's next block
beside the present one. No number changes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
from _runs import ENGINES, build
from _spawn import spawn

from dualenc.distributed import gather
from dualenc.distributed.ring import circulate
from dualenc.distributed.world import World
from dualenc.losses.early import EarlyGathers
from dualenc.train.step import train_step

HERE = Path(__file__)
STEPS = 3
LOSSES = {
    "info_nce": ["loss=info_nce"],
    "two losses": ["loss=[dcl, {name: info_nce, weight: 0.5, label_smoothing: 0.1}]"],
    "tiled": ["loss={name: info_nce, impl: tiled}"],
    "ring": ["loss={name: info_nce, columns: ring}"],
}


class Sends(TorchDispatchMode):
    """Notes collectives and messages in the order in which they are begun."""

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self.events = events

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, name = func._schema.name.split("::")
        if space == "c10d":
            self.events.append(name)
        return func(*args, **(kwargs or {}))


def steps(world: World, out: str, overrides: list[str], early: bool) -> tuple[dict[str, Any], list[str]]:
    """Losses and weights after a few steps of the quickstart, and what happened in the last one, in order."""
    run = build(world, [f"budget.steps={STEPS + 1}", *overrides, f"out={out}"])
    p, events, losses = run.parts, [], []
    if not early:
        p.loss.gathers = lambda *_: ()
    text = p.bundle.model.tower("text")
    text.register_forward_pre_hook(lambda *_: events.append("text begins"))
    text.register_forward_hook(lambda *_: events.append("text ends"))
    real = gather.Begun.wait

    def wait(begun: gather.Begun) -> Tensor:
        events.append("wait")
        return real(begun)

    gather.Begun.wait = wait  # type: ignore[method-assign]
    try:
        for _, batch in zip(range(STEPS), p.loader, strict=False):
            events.clear()
            with Sends(events):
                losses.append(train_step(p.engine, batch, p.recipe.pairs, p.loss).loss)
    finally:
        gather.Begun.wait = real  # type: ignore[method-assign]
    run.close()
    return {"losses": torch.stack(losses), **p.engine.model_state()}, [
        e for e in events if e.startswith(("text", "wait", "_allgather"))
    ]


def everything(world: World, out: str, engines: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {"ring": ring(world)}
    for engine in engines:
        for name, loss in (LOSSES if engine == "DDP" else {"info_nce": LOSSES["info_nce"]}).items():
            where = f"{out}/{engine}-{name}".replace(" ", "-")
            given = [*ENGINES[engine], *loss]
            (now, events), (before, others) = (steps(world, f"{where}-{k}", given, k == 0) for k in range(2))
            same = all(torch.equal(x, before[k]) for k, x in now.items())
            found[f"{engine}/{name}"] = {"same": same, "events": events, "before": others}
    return found


def ring(world: World) -> list[str]:
    events: list[str] = []

    def visit(fixed: Sequence[Tensor], block: Tensor) -> None:
        events.append("compute")
        block += fixed[0]

    with Sends(events):
        circulate(visit, [torch.ones(3)], torch.zeros(3))
    return events


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "engines"), [(2, ["DDP", "FSDP2", "ZeRO 3"]), (4, ["DDP"])])
def test_the_first_towers_features_travel_while_the_second_runs(ranks: int, engines: list[str], tmp_path: Path) -> None:
    for found in spawn(HERE, "everything", ranks, {"out": str(tmp_path), "engines": engines}):
        order = found.pop("ring")
        for k in range(ranks - 1):  # the next block is under way before the present one is computed
            assert order[:3] == ["send", "recv_", "compute"], (k, order)
            assert sorted(order[3:5]) == ["recv_", "send"]  # what was found goes on after the visit
            order = order[5:]
        assert order[0] == "compute"
        for case, got in found.items():
            assert got["same"], case
            if "FSDP2" in case or "ZeRO 3" in case:
                continue  # these gather weights too, so the features' gathers are not told apart
            events, before = got["events"], got["before"]
            assert events.count("_allgather_base_") == before.count("_allgather_base_")
            begins, ends = events.index("text begins"), events.index("text ends")
            early = "info_nce" in case or "two losses" in case
            assert ("_allgather_base_" in events[:begins]) is early, (case, events)
            assert ("wait" in events) is early
            if early:
                assert events.index("wait") > ends
            assert "_allgather_base_" not in before[: before.index("text begins")]


def test_one_rank_and_a_loss_that_gathers_later_begin_nothing(tmp_path: Path) -> None:
    run = build(World(), ["budget.steps=2", f"out={tmp_path}"])
    batch = next(iter(run.parts.loader))
    assert not EarlyGathers(run.parts.bundle.model, batch, run.parts.recipe.pairs, run.parts.loss).wanted
    assert list(run.parts.loss.gathers(32, torch.device("cpu"))) == ["a", "b"]
    assert not dist.is_initialized() or dist.get_world_size() == 1
    run.close()
