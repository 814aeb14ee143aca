"""What a step asks of the other ranks and of the device, counted: the list of docs/architecture.md."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
from _runs import build
from _spawn import spawn
from _traffic import Traffic

from dualenc.distributed.world import World
from dualenc.train.hooks import MOST_STEPS

HERE = Path(__file__)
pytestmark = [pytest.mark.dist]

STEP = {
    "_allgather_base_": 3,  # features of both modalities, and pair ids
    "_reduce_scatter_base_": 2,  # their gradients
    "allreduce_": 3,  # rows that are there; loss and metrics; DDP's gradients, one bucket
    "broadcast_": 1,  # DDP's buffers (running statistics)
}
"""Of one pair, info_nce, DDP with one bucket, on two ranks, where every parameter has a gradient."""


LOSSES = {
    "info_nce": [],
    "info_nce, EMA, micro-batches": [
        "optim.ema_samples=100",
        "batch.micro=8",
        "loss={name: info_nce, label_smoothing: 0.1}",
    ],
    "sigmoid": ["loss=sigmoid", "logit_scale={init: 10, bias: -10}"],
    **{name: [f"loss={name}"] for name in ("dcl", "siamlip")},
}


def count(world: World, out: str, steps: int = 40, more: list[str] | None = None) -> list[dict[str, int]]:
    """Collectives and host waits of each step with its hooks; the optimizer is fused and captions are padded, as on a
    GPU."""
    fixed = [f"budget.steps={steps}", "tracking.log_every=100", "checkpoint.every_minutes=null"]
    as_on_gpu = ["optim.fused=true", "modalities.text.length_groups=false"]
    run = build(world, [*fixed, *as_on_gpu, *(more or []), f"out={out}"])
    found = []
    run.log.begin()
    for batch in run.parts.loader:
        with Traffic() as seen:
            now = run._step(batch)
            for hook in run.hooks:
                if hook.due(now) and not now.last:
                    hook.run(now)
        found.append(dict(seen.calls) | {"looking": int(now.looking)})
    run.close()
    return found


def test_collectives_of_a_step_are_those_documented(tmp_path: Path) -> None:
    for steps in spawn(HERE, "count", 2, {"out": str(tmp_path / "run")}):
        later = steps[2:-1]
        quiet = [s for s in later if not s["looking"]]
        assert len(quiet) > len(later) / 2, steps
        assert all({k: v for k, v in s.items() if k not in ("looking", "waits")} == STEP for s in quiet), quiet
        looks = [s for s in later if s["looking"]]
        assert len(looks) >= len(later) // MOST_STEPS
        assert all(s["allreduce_"] == STEP["allreduce_"] + 1 for s in looks), looks  # the flags


def searching(world: World, out: str) -> list[dict[str, int]]:
    return count(world, out, 9, ["engine.find_unused=true"])


def test_looking_for_unused_parameters_costs_a_collective(tmp_path: Path) -> None:
    for steps in spawn(HERE, "searching", 2, {"out": str(tmp_path)}):
        quiet = [s for s in steps[2:-1] if not s["looking"]]
        assert quiet
        assert all(s["allreduce_"] == STEP["allreduce_"] + 1 for s in quiet), quiet


def every_loss(world: World, out: str) -> dict[str, list[dict[str, int]]]:
    return {name: count(world, f"{out}/{k}", 9, more) for k, (name, more) in enumerate(LOSSES.items())}


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_quiet_step_waits_for_nothing(ranks: int, tmp_path: Path) -> None:
    arguments = {"out": str(tmp_path)}
    for found in [every_loss(World(), **arguments)] if ranks == 1 else spawn(HERE, "every_loss", ranks, arguments):
        for name, steps in found.items():
            quiet = [s for s in steps[2:-1] if not s["looking"]]
            assert quiet, name
            assert all(s.get("waits", 0) == 0 for s in quiet), (name, quiet)


def test_the_counter_of_waits_counts() -> None:
    x, mask = torch.arange(4.0), torch.tensor([True, False, True, False])
    ways = [
        lambda: x[0].item(),
        lambda: bool(x[0] > 1),
        lambda: x[mask],
        lambda: torch.nonzero(mask),
        lambda: float(x[0]),
    ]
    for way in ways:
        with Traffic() as seen:
            way()
        assert seen.calls["waits"] == 1
    with Traffic() as seen:
        x[mask] = 0
        x.masked_fill_(mask, 1.0)
        torch.where(mask, x, 0.0).sum()
    assert seen.calls["waits"] <= 1


READS = ("item", "tolist", "__float__", "__bool__", "__int__", "numpy")


def test_a_step_that_neither_logs_nor_saves_reads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way from a tensor to a Python number that the training code might take."""
    run = build(World(), ["budget.steps=9", "tracking.log_every=100", f"out={tmp_path}"])
    read: list[str] = []
    real = {name: getattr(torch.Tensor, name) for name in READS}
    here: list[bool] = [False]
    for name in READS:

        def spy(self: torch.Tensor, *a: Any, _name: str = name, **k: Any) -> Any:
            caller = sys._getframe(1).f_code.co_filename
            if here[0] and "/dualenc/train/" in caller:
                read.append(f"{_name} in {Path(caller).name}")
            return real[_name](self, *a, **k)

        monkeypatch.setattr(torch.Tensor, name, spy)
    looked = []
    for batch in run.parts.loader:
        before = len(read)
        here[0] = True
        now = run._step(batch)
        for hook in run.hooks:
            if hook.due(now) and not now.last:
                hook.run(now)
        here[0] = False
        looked.append((now.looking, before, len(read)))
    run.close()
    assert looked[0][0]  # the first step always looks: the spy is seen to work
    assert read
    quiet = [(b, a) for looking, b, a in looked[1:-1] if not looking]
    assert quiet
    assert all(a == b for b, a in quiet)
