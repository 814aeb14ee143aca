"""Training without padding, the default on a CPU: on one rank and on two it is the padded run but for rounding."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
import _runs
from _spawn import spawn

from dualenc.distributed.world import World

STEPS = ["budget.steps=6", "batch.size=256", "batch.micro=128"]


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_groups_change_rounding_only(tmp_path: Path) -> None:
    outs = {name: tmp_path / name for name in ("plain", "grouped", "two")}
    grouped_text = {"plain": "false", "grouped": "auto", "two": "auto"}
    said = {n: [*STEPS, f"out={outs[n]}", f"modalities.text.length_groups={g}"] for n, g in grouped_text.items()}
    _runs.segments(World(), [said["plain"], said["grouped"]])
    spawn(_runs.__file__, "segments", 2, {"parts": [[*said["two"], "engine.parallel=ddp"]]})
    plain, grouped, two = (_runs.losses(out) for out in outs.values())
    assert len(plain) == 6
    assert plain[0] == pytest.approx(grouped[0], rel=1e-6)
    assert plain == pytest.approx(grouped, rel=1e-5)
    assert plain == pytest.approx(two, rel=1e-5)
    assert plain != grouped  # something was packed
