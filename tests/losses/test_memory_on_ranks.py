"""Losses that remember, trained for five steps, one of which is not finite: ranks, micro-batches, engines, and a save
in the middle that another world size or engine resumes change nothing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
sys.path.insert(0, str(Path(__file__).parent))
import _memory_jobs as jobs
from _spawn import spawn
from _term_jobs import REMEMBERING

from dualenc.distributed.world import World
from dualenc.losses import Loss, losses
from dualenc.losses.weighted_sum import WeightedSum
from dualenc.losses.wrapper import Wrapper

torch.set_num_threads(1)
LIMIT = 1e-5


def difference(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """The largest of any tensor, relative to its largest finite entry; infinite where one is not finite alone."""
    assert got.keys() == want.keys()
    worst = 0.0
    for k, x in want.items():
        y, x = got[k].double(), x.double()
        same = (y == x) | (y.isnan() & x.isnan())
        scale = x[x.isfinite()].abs().max().clamp(min=1e-3) if x.isfinite().any() else torch.tensor(1.0)
        off = torch.where(same, 0.0, (y - x).abs() / scale).nan_to_num(nan=float("inf"))
        worst = max(worst, float(off.max()) if off.numel() else 0.0)
    return worst


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("alone")
    return folder, {case: jobs.trained(World(), case, save=str(folder / case)) for case in jobs.CASES}


def test_every_loss_with_a_memory_is_in_the_table() -> None:
    assert {x["name"] for x in jobs.CASES.values()} - {"sum"} == REMEMBERING
    passed_on = {x for c in (Loss, WeightedSum, Wrapper) for x in (c.memory, c.slow)}
    own = {n for n in losses if losses.source(n) == "dualenc" and {losses[n].memory, losses[n].slow} - passed_on}
    assert own == REMEMBERING


@pytest.mark.slow
def test_one_process(alone: tuple[Path, dict[str, dict[str, Tensor]]]) -> None:
    """Micro-batches are exact to 1e-5, a resumed run bit for bit; every memory has moved."""
    folder, unbroken = alone
    for case, want in unbroken.items():
        assert difference(jobs.trained(World(), case, chunks=4), want) <= LIMIT, case
        resumed = jobs.trained(World(), case, begin=str(folder / case))
        assert [k for k, x in want.items() if not torch.equal(resumed[k], x)] == [], case
        kept = [x for k, x in want.items() if k.startswith("memory/")]
        assert kept, case
        assert all(x.isfinite().any() for x in kept), case


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.extra)])
def test_ranks_engines_and_resuming(
    ranks: int, alone: tuple[Path, dict[str, dict[str, Tensor]]], tmp_path: Path
) -> None:
    folder, unbroken = alone
    arguments: dict[str, Any] = {
        "folder": str(tmp_path),
        "alone": str(folder),
        "engines": ["FSDP2", "ZeRO 1"] if ranks == 2 else ["FSDP2"],
        "cases": ["list"],
    }
    found = spawn(jobs.__file__, "on_ranks", ranks, arguments, timeout_s=400)[0]
    off = {name: difference(got, unbroken[name.partition("/")[0]]) for name, got in found.items()}
    assert off.pop("moco/in the order of ranks") > 0.1  # the check has teeth
    assert {name: x for name, x in off.items() if not x <= LIMIT} == {}
    for case in jobs.CASES:
        again, want = found[f"{case}/resumed"], found[f"{case}/unbroken"]
        assert [k for k, x in want.items() if not torch.equal(again[k], x)] == [], case
