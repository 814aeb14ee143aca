"""Sensors that fail, on real sweeps: what is lost, that it is always the same, and the command from model to page."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

sys.path.append(str(Path(__file__).parents[1] / "data"))
from _rigs import FOLDER, here, keyframes

from dualenc.cli import app
from dualenc.config import load_recipe
from dualenc.data.driving import corruption
from dualenc.data.driving.corruption import Corruption
from dualenc.data.driving.keyframes import Keyframe
from dualenc.data.modalities.picture import black_picture as picture
from dualenc.model import build_bundle
from dualenc_evals.catalog import parse_task
from dualenc_evals.read.shards import read_rows
from dualenc_evals.task import Task

pytestmark = here


def sweeps() -> list[Keyframe]:
    """One that says its rings (nuScenes), one that does not (KITTI)."""
    every = list(keyframes())
    return [every[0], every[-1]]


def task(**source: object) -> Task:
    where = {"kind": "kitti", "path": str(FOLDER / "kitti_object"), "split": "training", **source}
    return parse_task(
        {"name": "t", "kind": "retrieval", "modalities": ["camera", "lidar"], "same": "instance", "source": where}
        if source.get("unit") == "objects"
        else {"name": "t", "kind": "retrieval", "modalities": ["camera", "lidar"], "source": where}
    )


def test_silent_beams_take_whole_beams_and_fog_takes_what_is_far() -> None:
    for key in sweeps():
        points = key.points()
        assert corruption.sweep(points, key.columns, Corruption(), "a") is points
        half = corruption.sweep(points, key.columns, Corruption(beams=0.5), "a")
        assert 0.2 < len(half) / len(points) < 0.8
        if "ring" in key.columns:
            assert len(np.unique(half[:, 4])) == len(np.unique(points[:, 4])) // 2
        again, other = (corruption.sweep(points, key.columns, Corruption(beams=0.5), n) for n in "ab")
        assert np.array_equal(half, again)
        assert not np.array_equal(half, other)
        sizes = [len(corruption.sweep(points, key.columns, Corruption(fog=f), "a")) for f in (0.005, 0.02, 0.1)]
        assert len(points) > sizes[0] > sizes[1] > sizes[2] > 0
        near = np.linalg.norm(points[:, :3], axis=1)
        left = np.linalg.norm(corruption.sweep(points, key.columns, Corruption(fog=0.02), "a")[:, :3], axis=1)
        # exp(−2 · 0.02 · r): 96 % of what is at 1 m, 14 % of what is at 50 m
        assert (left > 40).sum() / (near > 40).sum() < 0.25
        assert (left < 3).sum() / (near < 3).sum() > 0.85


def test_a_wrong_calibration_is_a_rotation_of_the_size_asked_for() -> None:
    turns = np.stack([corruption.turn(2.0, str(i))[:3, :3] for i in range(400)])
    np.testing.assert_allclose(turns @ turns.transpose(0, 2, 1), np.broadcast_to(np.eye(3), turns.shape), atol=1e-12)
    np.testing.assert_allclose(np.linalg.det(turns), 1)
    angles = np.degrees(np.arccos((np.trace(turns, axis1=1, axis2=2) - 1) / 2))
    # the length of three normal errors of 2 degrees: mean 2 · sqrt(8 / π)
    assert angles.mean() == pytest.approx(2 * np.sqrt(8 / np.pi), rel=0.08)


@pytest.mark.parametrize("unit", ["frames", "objects"])
def test_the_items_stay_the_same_whatever_fails(unit: str) -> None:
    whole = read_rows(task(unit=unit)).rows
    black = picture((1, 1))[:8]
    for kind, level in (("beams", 0.9), ("pictures", 0.4), ("turned_deg", 5.0), ("fog", 0.2)):
        failed = read_rows(task(unit=unit, corrupt={kind: level})).rows
        assert [r.id for r in failed] == [r.id for r in whole]
        changed = {m: [a.contents[m][0].read() != b.contents[m][0].read() for a, b in zip(whole, failed, strict=True)]
                   for m in ("camera", "lidar")}  # fmt: skip
        assert any(changed["camera" if kind == "pictures" else "lidar"])
        assert not any(changed["lidar" if kind == "pictures" else "camera"])
        if kind == "pictures":
            assert 0 < sum(changed["camera"]) < len(whole)
            assert all(
                r.contents["camera"][0].read()[:8] == black for r, c in zip(failed, changed["camera"], strict=True) if c
            )


def test_from_a_model_to_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUALENC_DATA", str(FOLDER.parent))
    overrides = ["modalities.camera.encoder={name: own/convnet}", "modalities.camera.lock=false"]
    build_bundle(load_recipe("recipes/camera_lidar/objects.yaml", overrides)).save(tmp_path / "model")
    command = ["robustness", str(tmp_path / "model"), "--tasks", "kitti_objects", "--device", "cpu"]
    done = CliRunner().invoke(app, [*command, "--kinds", "beams,fog", "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "out" / "robustness.json").read_text())
    assert [len(result["curves"][k]) for k in ("beams", "fog")] == [3, 4]
    assert all(p["metrics"].keys() == result["clean"].keys() for k in result["curves"].values() for p in k)
    assert "<svg" in (tmp_path / "out" / "robustness.html").read_text()
    wrong = CliRunner().invoke(app, [*command[:3], "cifar10", "--out", str(tmp_path / "no")])
    assert "source.kind is jsonl; sensor failures need kitti or nuscenes" in str(wrong.exception) + wrong.output
