"""What a step asks of the other ranks and of the device, counted: the list of docs/architecture.md."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
from _runs import build
from _spawn import spawn

from dualenc.distributed.world import World
from dualenc.train.hooks import MOST_STEPS

HERE = Path(__file__)
pytestmark = [pytest.mark.dist]

STEP = {
    "_allgather_base_": 3,  # features of both modalities, and pair ids
    "_reduce_scatter_base_": 2,  # their gradients
    "allreduce_": 4,  # rows that are there; loss and metrics; DDP's gradients, one bucket, and unused parameters
    "broadcast_": 1,  # DDP's buffers (running statistics)
}
"""Of one pair, info_nce, DDP with one bucket, on two ranks."""


class Traffic(TorchDispatchMode):
    """Counts collectives, and readings of the device by the host."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, name = func._schema.name.split("::")
        if space == "c10d":
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


def count(world: World, out: str) -> list[dict[str, int]]:
    """Collectives of each of 40 steps with their hooks, from the second on."""
    run = build(world, ["budget.steps=40", "tracking.log_every=100", "checkpoint.every_minutes=null", f"out={out}"])
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
        assert all({k: v for k, v in s.items() if k != "looking"} == STEP for s in quiet), quiet
        looks = [s for s in later if s["looking"]]
        assert len(looks) >= len(later) // MOST_STEPS
        assert all(s["allreduce_"] == STEP["allreduce_"] + 1 for s in looks), looks  # the flags


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
