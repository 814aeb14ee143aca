"""Real keyframes of KITTI and nuScenes, whole and broken."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from _shared import DATA as SHARED_DATA
from PIL import Image

from dualenc.data.driving.keyframes import Keyframe, kitti_object, nuscenes

FOLDER = SHARED_DATA / "camera_lidar"
KITTI, NUSCENES = FOLDER / "kitti_object" / "training", FOLDER / "nuscenes_scene-0523"
GOLDEN = FOLDER / "golden_pairs.jsonl"

here = pytest.mark.skipif(not GOLDEN.is_file(), reason=f"the driving data are not in {FOLDER}")


def golden() -> dict[str, dict[str, Any]]:
    """Picture's path below the data's folder → what an independent loader found."""
    return {row["image"]: row for row in map(json.loads, GOLDEN.read_text().splitlines())}


def keyframes() -> Iterator[Keyframe]:
    yield from kitti_object(KITTI)
    yield from nuscenes(NUSCENES)


def npy(points: Any) -> bytes:
    out = io.BytesIO()
    np.save(out, np.asarray(points, np.float32))
    return out.getvalue()


def rig_of(key: Keyframe, pictures: dict[str, bytes] | None = None) -> dict[str, Any]:
    """A camera item: real calibration, real pictures unless others are given."""
    views, members = [], {}
    for v in key.views:
        raw = (pictures or {}).get(v.name) or v.path.read_bytes()
        member = f"cam_{v.name.lower()}{v.path.suffix}"
        members[member] = raw
        with Image.open(io.BytesIO(raw)) as image:
            views.append(
                {"name": v.name, "member": member, "size": list(image.size), "drive": v.drive,
                 "intrinsics": v.intrinsics.tolist(), "to_ego": v.to_ego.tolist()}
            )  # fmt: skip
    return {"json:cameras": {"drive": key.drive, "views": views}, **members}


def sweep_of(key: Keyframe) -> dict[str, Any]:
    about = {"drive": key.drive, "columns": list(key.columns), "to_ego": key.lidar_to_ego.tolist()}
    return {"json:lidar": about, "lidar.npy": npy(key.points())}
