"""Masks for dense tasks out of driving keyframes: the pixels that a LiDAR point falls on, by the box it is in.

Nothing is drawn between points, so no pixel has a class that was not measured: a point above the ground in a labelled
box has the box's class, one in no box is background; all other pixels, and the ground below an object, are left out.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from dualenc.data.arrays import Array, npy_bytes
from dualenc.data.driving.geometry import F64, inverse, moved, project, seen
from dualenc.data.driving.keyframes import CameraView, Keyframe
from dualenc.data.driving.regions import ground
from dualenc_evals.metrics.scores import Ints

UNKNOWN = 255
"""Pixels without a point."""


def point_classes(key: Keyframe, points: F64, classes: Mapping[str, Sequence[str]]) -> Ints:
    """[n] of ``points [n, 3]`` in ego: 0 in no box, k in a box of the k-th class (counted from 1), else UNKNOWN.

    Args:
        classes: name → beginnings of the boxes' labels that belong to it.
    """
    out = np.zeros(len(points), dtype=np.int64)
    solid = ~ground(points)
    for box in key.boxes:
        inside = box.inside(points)
        number = next((k for k, begins in enumerate(classes.values(), 1) if box.cls.startswith(tuple(begins))), UNKNOWN)
        out[inside] = np.where(solid[inside], number, UNKNOWN)
    return out


def box_mask(view: CameraView, points: F64, numbers: Ints, size: tuple[int, int]) -> Array:
    """[H, W] numbers of the points' pixels in one image of ``size`` (width, height); of two points on one pixel the
    nearer one counts.

    Args:
        points: [n, 3] in ego; numbers: [n].
    """
    uv, depth = project(points, inverse(view.to_ego), view.intrinsics)
    shown = np.flatnonzero(seen(uv, depth, size))
    shown = shown[np.argsort(-depth[shown], kind="stable")]
    mask = np.full((size[1], size[0]), UNKNOWN, dtype=np.uint8)
    u, v = np.minimum(np.rint(uv[shown]).astype(np.int64), np.array(size) - 1).T
    mask[v, u] = numbers[shown]
    return mask


def write_box_masks(keys: Iterable[Keyframe], classes: Mapping[str, Sequence[str]], folder: Path) -> Path:
    """Write images and masks of keyframes, and a list of them that a dense task reads (``kind: jsonl``, members
    ``image`` and ``mask``, ``where`` on ``drive``, ``camera`` and ``keyframe``); returns the list."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for key in keys:
        points = moved(key.points()[:, :3], key.lidar_to_ego)
        numbers = point_classes(key, points, classes)
        for view in key.views:
            if view.size is None:
                continue
            name = f"{key.id}_{view.name}"
            mask = box_mask(view, points, numbers, view.size)
            (folder / f"{name}.npy").write_bytes(npy_bytes(mask))
            shutil.copyfile(view.path, folder / f"{name}{view.path.suffix}")
            row = {"image": f"{name}{view.path.suffix}", "mask": f"{name}.npy"}
            rows.append({**row, "keyframe": key.id, "camera": view.name, "drive": key.drive})
    out = folder / "masks.jsonl"
    out.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return out
