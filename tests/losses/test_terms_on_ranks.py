"""Every registered loss on 1, 2 and 4 real ranks, whole and in micro-batches, against one process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
import _term_jobs
from _spawn import spawn
from gradcheck import LIMIT

from dualenc.distributed.world import World
from dualenc.losses import losses

torch.set_num_threads(1)


def check(found: dict[str, object], expected: int) -> None:
    off = _term_jobs.differences(found)
    assert len(off) == expected
    wrong = {case: cell for case, cell in off.items() if not cell[0] <= LIMIT}
    assert not wrong, wrong


def test_one_rank_in_micro_batches() -> None:
    check(_term_jobs.sweep(World(), ["single"]), 2 * len(_term_jobs.names()))


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.extra)])
def test_ranks_give_what_one_process_gives(ranks: int) -> None:
    found = spawn(_term_jobs.__file__, "sweep", ranks, {"engines": ["DDP"]}, timeout_s=400)[0]
    check(found, 2 * len(_term_jobs.names()))


@pytest.mark.dist
@pytest.mark.extra
def test_engines_that_cut_parameters_or_optimizer_state() -> None:
    """What losses train is sharded and reduced like the towers."""
    found = spawn(_term_jobs.__file__, "sweep", 2, {"engines": ["FSDP2", "ZeRO 1", "ZeRO 2"]}, timeout_s=900)[0]
    check(found, 6 * len(_term_jobs.names()))


def test_every_loss_is_in_a_table() -> None:
    assert _term_jobs.ELSEWHERE | {*_term_jobs.names()} == {n for n in losses if losses.source(n) == "dualenc"}


@pytest.mark.dist
def test_statistics_of_one_rank_would_be_seen() -> None:
    """The check has teeth: with each rank's own mean, variance and correlation BarLIP is far off."""
    found = spawn(_term_jobs.__file__, "sweep_own_statistics", 2)[0]
    assert all(cell[0] > 1e-3 for cell in _term_jobs.differences(found).values())
