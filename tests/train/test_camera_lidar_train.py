"""The camera/LiDAR recipe on real keyframes of both data sets (one camera and six), on one and two ranks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "data"))
sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
sys.path.insert(0, str(Path(__file__).parent))
from _rigs import KITTI, NUSCENES, here
from _runs import rows
from _spawn import spawn

from dualenc_data_tools.build import build

pytestmark = here
HERE = Path(__file__).parent


@pytest.mark.dist
@pytest.mark.slow
def test_one_and_two_ranks_and_micro_batches_have_one_curve(tmp_path: Path) -> None:
    """Rigs of one and of six cameras in a batch; the loss curve is the same however the batch is cut."""
    for kind, path in (("kitti", KITTI), ("nuscenes", NUSCENES)):
        build(kind, tmp_path / "s", path=str(path), name=kind, limit=6, boxes=False, verify=False, progress=False)
    curves = {}
    for name, world, more in (("one", 1, []), ("two", 2, ["batch.micro=1"])):
        arguments = {"shards": str(tmp_path / "s" / "*.tar"), "overrides": [f"out={tmp_path / name}", *more]}
        moved = spawn(HERE / "_driving_runs.py", "train", world, arguments)
        still = [k for k, v in moved[0].items() if v == 0 and "bias" not in k]
        assert not still, f"these weights did not move: {still}"
        curves[name] = [r["loss"] for r in rows(tmp_path / name / "metrics.jsonl") if "loss" in r]
    assert len(curves["one"]) == 2
    assert curves["one"] == pytest.approx(curves["two"], rel=2e-4)
