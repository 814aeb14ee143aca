"""Real keyframes of KITTI and nuScenes, whole and broken."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dualenc.data.driving import Keyframe, kitti_object, nuscenes

FOLDER = Path(__file__).parents[3] / "shared" / "data" / "camera_lidar"
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
