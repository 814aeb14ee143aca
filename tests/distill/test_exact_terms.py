"""Any number of ranks, engine and micro-batch: the gradient of the whole batch, heads and temperature included."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
sys.path.insert(0, str(Path(__file__).parent))
import _distill_jobs as jobs
from _distill_naive import CASES
from _spawn import spawn

from dualenc.distributed.world import World

torch.set_num_threads(1)
HERE = Path(__file__).parent
LIMIT = 1e-5
USES_HEADS = {"feature", "cosine", "interactive", "gradient"}


def worst(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """Largest difference of any parameter, relative to that parameter's largest entry, or to 1e-2 of the largest of
    all: a gradient that is nearly 0 by cancellation has no digits of its own."""
    top = max(float(g.abs().max()) for g in want.values())
    return max(float((got[n] - g).abs().max()) / max(float(g.abs().max()), 1e-2 * top) for n, g in want.items())


@pytest.mark.parametrize("case", CASES)
def test_one_process_with_and_without_micro_batches(case: str) -> None:
    want = jobs.reference(case)
    head = max(float(g.abs().max()) for n, g in want.items() if n.startswith("heads."))
    assert (head > 0) == (case in USES_HEADS)
    for micro in (None, 4, 5):
        assert worst(jobs.gradients(World(), "single", case, micro), want) <= LIMIT


@pytest.mark.dist
@pytest.mark.slow
def test_two_ranks_under_ddp() -> None:
    """Every term; slots without a modality, without a teacher, lost ones, shared ids across ranks, micro-batches."""
    cases = list(CASES)
    got = spawn(HERE / "_distill_jobs.py", "sweep", 2, {"engines": ["DDP"], "cases": cases, "micros": [None, 4]})[0]
    assert len(got) == 2 * len(cases)
    wrong = {k: d for k, g in got.items() if not (d := worst(g, jobs.reference(k.split("/")[1]))) <= LIMIT}
    assert not wrong


@pytest.mark.dist
@pytest.mark.slow
def test_engines_that_cut_parameters() -> None:
    """Heads are parameters of the trained module: FSDP2 and ZeRO shard and reduce them like all others."""
    cases = ["gradient", "dcd_kl"]
    engines = ["FSDP2", "ZeRO 2", "ZeRO 3"]
    got = spawn(HERE / "_distill_jobs.py", "sweep", 2, {"engines": engines, "cases": cases, "micros": [4]})[0]
    assert len(got) == 6
    wrong = {k: d for k, g in got.items() if not (d := worst(g, jobs.reference(k.split("/")[1]))) <= LIMIT}
    assert not wrong
