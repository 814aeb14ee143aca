"""Dense zero-shot on street scenes: what towers say of the cells of an image, by prompts, by prototypes, and trained.

    python -m benchmarks.dense [--data DATA] [--seeds 0 1 2] [--out build/dense]

DATA holds ``camera_lidar/nuscenes_scene-0523`` and ``camera_lidar/kitti_object``. Each camera image is cut into squares
of 448 px (KITTI: 370) along its lower half, and every square into 7 × 7 cells. A cell's class is that of most of the
LiDAR points seen in it: a labelled box, the road, or anything else that stands; a cell with fewer than three points has
none. Training: the first 14 keyframes of the drive. Test: its last five, and KITTI's frames, another car's.

Prints a table: mIoU and accuracy of the most frequent class, of prototypes of the released image tower, of prompts
before training, and of prompts after ``recipes/camera_text/dense.yaml``, with and without the decoder on the texts.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dualenc.data.driving.geometry import inverse, moved, project, seen
from dualenc.data.driving.keyframes import CameraView, Keyframe, kitti_object, nuscenes
from dualenc.data.driving.regions import ground
from dualenc_evals.studies.region_probes import CLASSES

GRID, SIZE, LEAST = 7, 224, 3
ROAD, OTHER = "road", "building"
NAMES = {"car": "a car", "large vehicle": "a truck or a bus", "two-wheeler": "a bicycle", "person": "a person",
         "obstacle": "a traffic cone or a barrier", ROAD: "the road", OTHER: "a building or trees"}  # fmt: skip
"""Class of a cell → how the model is told of it."""


def class_of(label: str) -> str | None:
    """The class of a labelled box; None for one that is none of them."""
    return next((name for name, begins in CLASSES.items() if label.startswith(begins)), None)


def named_points(key: Keyframe) -> tuple[np.ndarray, np.ndarray]:
    """The sweep in ego [n, 3], and the class of each point [n]."""
    points = moved(key.points()[:, :3], key.lidar_to_ego)
    names = np.where(ground(points), ROAD, OTHER).astype(object)
    names[(np.abs(points[:, :2]) < 2.5).all(1)] = ""  # the car itself
    for box in key.boxes:
        name = class_of(box.cls)
        inside = box.inside(points) & (names == OTHER)
        names[inside] = name or ""
    return points, names


def squares(key: Keyframe, view: CameraView) -> Iterator[dict[str, Any]]:
    """The squares of one image as rows: jpg bytes and the classes of its cells."""
    points, names = named_points(key)
    with Image.open(view.path) as file:
        image = file.convert("RGB")
    uv, depth = project(points, inverse(view.to_ego), view.intrinsics)
    there = seen(uv, depth, image.size) & (names != "")
    uv, names = uv[there], names[there]
    side = min(448, image.height)
    top = min(int(0.4 * image.height), image.height - side)
    for left in range(0, image.width - side + 1, side):
        cell = np.floor((uv - (left, top)) / side * GRID).astype(int)
        inside = ((cell >= 0) & (cell < GRID)).all(1)
        cells = [""] * GRID**2
        for number in range(GRID**2):
            own = names[inside & (cell[:, 1] * GRID + cell[:, 0] == number)]
            if len(own) >= LEAST:
                found, counts = np.unique(own.astype(str), return_counts=True)
                cells[number] = str(found[counts.argmax()])
        if any(cells):
            data = io.BytesIO()
            image.crop((left, top, left + side, top + side)).resize((SIZE, SIZE)).save(data, "JPEG", quality=92)
            yield {"key": f"{key.id}-{view.name}-{left}", "jpg": data.getvalue(), "cells": cells}


def write(rows: list[dict[str, Any]], folder: Path) -> None:
    """Images, and a list of them: cells as a string for tasks, as numbers for training, and the classes as texts."""
    folder.mkdir(parents=True, exist_ok=True)
    order = list(NAMES)
    with (folder / "cells.jsonl").open("w", encoding="utf-8") as out:
        for row in rows:
            name = row["key"].replace("/", "_") + ".jpg"
            (folder / name).write_bytes(row["jpg"])
            cells = row["cells"]
            seen_here = sorted({c for c in cells if c}, key=order.index)
            line = {
                "image": name,
                "caption": "a street with " + ", ".join(NAMES[c] for c in seen_here),
                "cells": ",".join(cells),
                "places": [order.index(c) if c else len(order) for c in cells],
                "classes": list(NAMES.values()),
            }
            out.write(json.dumps(line) + "\n")


def make_data(data: Path, out: Path) -> dict[str, int]:
    """Write the three parts; how many squares each has."""
    keys = list(nuscenes(data / "camera_lidar" / "nuscenes_scene-0523"))
    parts = {
        "train": keys[:14],
        "test": keys[15:],
        "kitti": list(kitti_object(data / "camera_lidar" / "kitti_object" / "training")),
    }
    counts = {}
    for name, some in parts.items():
        rows = [row for key in some for view in key.views for row in squares(key, view)]
        write(rows, out / name)
        counts[name] = len(rows)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("build/dense"))
    args = parser.parse_args()
    print(make_data(args.data, args.out / "data"))


if __name__ == "__main__":
    main()
