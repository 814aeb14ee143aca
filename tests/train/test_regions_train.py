"""CALICO's two stages through the command line on real keyframes: PRC, then RAD from its tower, then what maps know."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "data"))
sys.path.insert(0, str(Path(__file__).parent))
from _rigs import NUSCENES, here, sweep_of
from _runs import ROOT, environment, rows

from dualenc.data.driving.keyframes import nuscenes
from dualenc.errors import ConfigError
from dualenc.model import load_model
from dualenc_data_tools.build import build
from dualenc_evals.studies.region_probes import at, evaluate_regions

pytest.importorskip("sklearn", reason="scikit-learn (extra: tools) is not installed")
pytestmark = [here, pytest.mark.dist, pytest.mark.slow]

SMALL = {
    "prc": ["modalities.view_a.input.max_points=4000", "modalities.view_b.input.max_points=4000"],
    "rad": [
        "modalities.camera.input.size=[32,64]",
        "modalities.camera.encoder.image.widths=[8,16]",
        "modalities.camera.encoder.widths=[8,16]",
        "modalities.camera.encoder.cell=3.2",
        "modalities.camera.encoder.channels=8",
        "modalities.camera.encoder.depth_bins=12",
        "modalities.lidar.input.max_points=4000",
    ],
}
TOWER = ["pillar_width=8", "widths=[8,16]", "cell=3.2", "local_dim=64"]


def train(kind: str, folder: Path, *more: str) -> Path:
    which = "view_a" if kind == "prc" else "lidar"
    common = [f"data.sources=[{{name: driving, shards: '{folder}/s/*.tar'}}]", "engine.threads=1", "budget.steps=3"]
    tower = [f"modalities.{which}.encoder.{x}" for x in TOWER]
    every = [*SMALL[kind], *tower, *common, "tracking.log_every=1", f"out={folder / kind}", *more]
    recipe = ROOT / "recipes" / "camera_lidar" / f"{kind}.yaml"
    done = subprocess.run(
        [sys.executable, "-m", "dualenc", "train", str(recipe), *every],
        cwd=folder, env=environment(), capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / kind


def test_two_stages_and_what_comes_of_them(tmp_path: Path) -> None:
    options = {"path": str(NUSCENES), "regions": True, "limit": 4, "verify": False, "boxes": False}
    build("nuscenes", tmp_path / "s", options, progress=False)
    prc = train("prc", tmp_path)
    losses = [r["loss"] for r in rows(prc / "metrics.jsonl") if "loss" in r]
    assert len(losses) == 3
    assert np.isfinite(losses).all()
    rad = train("rad", tmp_path, f"modalities.lidar.init_from={prc}#view_a")
    stage1, stage2 = load_model(str(prc)), load_model(str(rad))
    # One tower for two views, kept once; and the teacher is that tower, bit for bit.
    assert not [k for k in stage1.model.state_dict() if k.startswith("towers.view_b")]
    teacher = stage2.model.tower("lidar").state_dict()
    assert all(torch.equal(v, teacher[k]) for k, v in stage1.model.tower("view_a").state_dict().items())
    assert stage1.model.tower("view_b") is stage1.model.tower("view_a")

    keys = list(nuscenes(NUSCENES))[-2:]
    items, places = [sweep_of(k) for k in keys], [np.array([[10.0, 2.0], [200.0, 0.0]]), np.zeros((0, 2))]
    one = at(stage1.embedder(), "view_a", items, places, projected=True)
    two = at(stage2.embedder(), "lidar", items, places, projected=True)
    assert [tuple(x.shape) for x in one] == [(2, 64), (0, 64)]
    assert torch.equal(one[0], two[0])
    assert (at(stage1.embedder(), "view_a", items, places)[0][1] == 0).all()  # outside of the map
    with pytest.raises(ConfigError, match="has no bird's-eye-view map"):
        at(stage1.embedder(), "image", items, places)

    got = evaluate_regions(stage2.embedder(), keys, list(nuscenes(NUSCENES))[:2])
    assert got["n"]["regions"] > 20
    for name in (
        "view_region_R@1",
        "hard_view_region_control_R@1",
        "class_top1",
        "occupancy_top1",
        "camera_to_lidar_R@1",
    ):
        assert 0 <= got["metrics"][name] <= 1, name
    assert evaluate_regions(stage2.embedder(), keys, list(nuscenes(NUSCENES))[:2]) == got
    json.dumps(got)


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    options = {"path": str(NUSCENES), "limit": 2, "verify": False, "boxes": False}
    build("nuscenes", tmp_path / "s", options, progress=False)
    with pytest.raises(AssertionError, match="no member for view_a"):
        train("prc", tmp_path)
    with pytest.raises(AssertionError, match="shares: 'nobody' has no tower of its own"):
        train("prc", tmp_path, "modalities.view_b.shares=nobody")
