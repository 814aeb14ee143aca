"""What thousands of ranks would send: the formulas against real ranks and against ``dualenc plan``, and the page."""

from __future__ import annotations

import numpy as np
import pytest
from _shared import ROOT

from benchmarks import ranks
from benchmarks.ranks import Machine, Move, loss_moves, passes, reads, scenarios, simulate, step_s

PAGE = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
MACHINE = Machine(25e9, 1e-5, 2e14, 3000)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.extra)])
def test_real_ranks_send_what_the_formulas_say(world: int) -> None:
    for row in ranks.check([world]):
        assert row["equal"], row


def test_features_are_what_the_plan_counts() -> None:
    size = 32 * 512 * 4
    for world in (2, 8, 4096):
        sent = sum(m.sent(world) for m in loss_moves("plain", world, 32, 512) if m.size == size)
        assert sent == 2 * (world - 1) / world * 4 * 32 * world * 512 * 2  # dualenc/plan/wire.py


def test_nobody_is_done_before_the_slowest_rank_has_sent() -> None:
    start = np.array([0.0, 5.0, 0.0, 0.0])
    done = passes(start, Move("gather", 0), 4, MACHINE)
    assert done.tolist() == pytest.approx([5 + 3e-5] * 4, abs=3e-5)
    factors = scenarios(16, np.random.default_rng(0))
    even, slow = (step_s("ring", 16, 32, 512, 4, MACHINE, factors[k]).max() for k in ("even", "slow rank"))
    assert slow - even == pytest.approx(0.5 * 32 / 3000, rel=0.05)


def test_lanes_keep_machines_apart() -> None:
    few = {"batch": 4, "window": 10_000, "shards": 2_000, "samples": 100}
    assert reads(32, 32, **few) == pytest.approx(1, abs=0.1)
    assert reads(32, 1, **few) == pytest.approx(4, rel=0.1)


def test_the_page_shows_what_the_simulation_gives() -> None:
    rows = simulate([8, 64], 32, 512, 151_000_000, MACHINE)
    for line in ranks.table(rows).splitlines():
        assert line in PAGE
    for line in ranks.table(ranks.data_table([8, 64], 32, 1_000_000)).splitlines():
        assert line in PAGE
