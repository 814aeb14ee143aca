"""Dense zero-shot on street scenes: what towers say of places, by prototypes, prompts, and trained by ``loss: dense``.

    python -m benchmarks.streets [--data DATA] [--seeds 0 1 2] [--out build/streets]

DATA holds ``camera_lidar/nuscenes_scene-0523`` and ``camera_lidar/kitti_object``. Each camera image is cut into squares
of 448 px (KITTI: 375) along its lower part. A pixel that a LiDAR point falls on has the point's class: the labelled box
that it is in, the road, or anything else that stands; no other pixel has one. For training a square has 7 × 7 cells of
the class that most of their points have. Training: the first 14 keyframes of the drive. Test: its last five, and
KITTI's frames, from another car in another city.

Prints mean IoU over the classes and the share of right pixels: of the most frequent class, of prototypes of places of
the training squares in the released image tower, and of prompts after ``recipes/finetune/dense.yaml``, without and with
the decoder on the texts.
"""

from __future__ import annotations

import argparse
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from PIL import Image

from dualenc.api.runs import train
from dualenc.config import load_recipe
from dualenc.data.arrays import npy_bytes
from dualenc.data.driving.geometry import moved
from dualenc.data.driving.keyframes import Keyframe, kitti_object, nuscenes
from dualenc.data.driving.regions import ground
from dualenc.files import write_atomically
from dualenc.model import build_bundle, load_model
from dualenc.model.start_from import completed
from dualenc_data_tools.build import build
from dualenc_evals.catalog import parse_task
from dualenc_evals.harness import evaluate
from dualenc_evals.metrics.scores import Ints
from dualenc_evals.read.box_masks import UNKNOWN, box_mask
from dualenc_evals.studies.region_probes import CLASSES

GRID, SIZE, LEAST = 7, 224, 3
NAMES = {"car": "a car", "large vehicle": "a truck or a bus", "two-wheeler": "a bicycle", "person": "a person",
         "obstacle": "a traffic cone or a barrier", "road": "the road", "other": "a building or trees"}  # fmt: skip
"""Class → how the model is told of it; its number is its place."""
ROAD, OTHER = list(NAMES).index("road"), list(NAMES).index("other")


def class_numbers(key: Keyframe, points: np.ndarray) -> Ints:
    """[n] of ``points [n, 3]`` in ego: their classes; ``UNKNOWN`` on the car itself and in boxes of other classes."""
    out = np.where(ground(points), ROAD, OTHER).astype(np.int64)
    for box in key.boxes:
        inside = box.inside(points) & (out == OTHER)
        out[inside] = next((k for k, begins in enumerate(CLASSES.values()) if box.cls.startswith(begins)), UNKNOWN)
    out[(np.abs(points[:, :2]) < 2.5).all(1)] = UNKNOWN
    return out


def cells_of(mask: np.ndarray) -> list[int]:
    """The class of each cell of a square mask, row by row; one more than the last where less than LEAST points are."""
    out = []
    for rows in np.array_split(mask, GRID):
        for cell in np.array_split(rows, GRID, axis=1):
            counts = np.bincount(cell[cell != UNKNOWN], minlength=len(NAMES))
            out.append(int(counts.argmax()) if counts.sum() >= LEAST else len(NAMES))
    return out


def squares(key: Keyframe) -> Iterator[dict[str, Any]]:
    """The squares of a keyframe's images: jpg bytes, the mask, the cells."""
    points = moved(key.points()[:, :3], key.lidar_to_ego)
    numbers = class_numbers(key, points)
    known = numbers != UNKNOWN
    for view in key.views:
        with Image.open(view.path) as file:
            image = file.convert("RGB")
        mask = box_mask(view, points[known], numbers[known], image.size)
        side = min(448, image.height)
        top = min(int(0.4 * image.height), image.height - side)
        for left in range(0, image.width - side + 1, side):
            own = mask[top : top + side, left : left + side]
            data = io.BytesIO()
            image.crop((left, top, left + side, top + side)).save(data, "JPEG", quality=92)
            yield {"name": f"{key.id}-{view.name}-{left}".replace("/", "_"), "jpg": data.getvalue(), "mask": own}


def write(rows: list[dict[str, Any]], folder: Path) -> None:
    """Images and masks, and a list of them with what training reads."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for row in rows:
        (folder / f"{row['name']}.jpg").write_bytes(row["jpg"])
        (folder / f"{row['name']}.npy").write_bytes(npy_bytes(row["mask"]))
        cells = cells_of(row["mask"])
        there = [list(NAMES.values())[c] for c in sorted(set(cells)) if c < len(NAMES)]
        lines.append(
            {
                "image": f"{row['name']}.jpg",
                "mask": f"{row['name']}.npy",
                "caption": "a street with " + ", ".join(there),
                "cells": cells,
                "classes": list(NAMES.values()),
            }
        )
    write_atomically(folder / "squares.jsonl", "".join(json.dumps(x) + "\n" for x in lines))


def make_data(data: Path, out: Path) -> None:
    """Write the three parts, and the shards of the first."""
    keys = list(nuscenes(data / "camera_lidar" / "nuscenes_scene-0523"))
    kitti = list(kitti_object(data / "camera_lidar" / "kitti_object" / "training"))
    for name, some in {"train": keys[:14], "test": keys[15:], "kitti": kitti}.items():
        if not (out / name / "squares.jsonl").exists():
            write([row for key in some for row in squares(key)], out / name)
    if not (out / "shards").exists():
        build("jsonl", out / "shards", {"path": str(out / "train" / "squares.jsonl"), "caption": "caption"})


def tasks(out: Path) -> list[Any]:
    """Both test parts by prompts, and by prototypes of the training squares."""
    made = []
    for part in ("test", "kitti"):
        source = {
            "kind": "jsonl",
            "path": str(out / part / "squares.jsonl"),
            "members": {"image": ["file:image"], "mask": ["file:mask"]},
        }
        common = {"kind": "dense", "source": source, "classes": dict(enumerate(NAMES.values()))}
        support = {"path": str(out / "train" / "squares.jsonl")}
        made += [
            parse_task({**common, "name": f"{part}_prompts", "templates": ["{}"]}),
            parse_task({**common, "name": f"{part}_prototypes", "prototypes": {"support": support, "each": 3}}),
        ]
    return made


def measured(model: Any, wanted: list[Any]) -> dict[str, tuple[float, float]]:
    """Task → (mIoU, share of right pixels) in percent."""
    found = evaluate(model, wanted, progress=False, details=False)["tasks"]
    return {k: tuple(100 * t["metrics"][m] for m in ("mIoU", "pixel_accuracy")) for k, t in found.items()}


def most_frequent(out: Path, part: str) -> tuple[float, float]:
    """(mIoU, share of right pixels) of the class that most training pixels have, whatever the image."""

    def counts(name: str) -> Ints:
        masks = [np.load(p) for p in sorted((out / name).glob("*.npy"))]
        return np.bincount(np.concatenate([m[m != UNKNOWN] for m in masks]), minlength=len(NAMES))

    own, best = counts(part), int(counts("train").argmax())
    return 100 * own[best] / own.sum() / int((own > 0).sum()), 100 * own[best] / own.sum()


def main() -> None:
    """Make the data, measure, train and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("DUALENC_DATA", "../shared/data")))
    parser.add_argument("--out", type=Path, default=Path("build/streets"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    data = args.out / "data"
    make_data(args.data, data)
    table: dict[str, dict[str, list[tuple[float, float]]]] = {
        "the most frequent class": {part: [most_frequent(data, part)] for part in ("test", "kitti")}
    }
    recipe = load_recipe("finetune/dense", ["modalities.image.lock=trunk"], completed)
    released = measured(build_bundle(recipe).embedder(), [t for t in tasks(data) if t.name.endswith("prototypes")])
    table["prototypes, released tower"] = {part: [released[f"{part}_prototypes"]] for part in ("test", "kitti")}
    for seed in args.seeds:
        for name, context in (("prompts, trained", 0), ("prompts, trained with the decoder", 2)):
            run = args.out / f"context{context}-seed{seed}"
            given = [f"data.sources.0.shards={data}/shards/train-*.tar", f"loss.0.context={context}"]
            train("finetune/dense", [*given, f"seed={seed}", f"out={run}"])
            found = measured(load_model(str(run)).embedder(), tasks(data))
            for by in ("prompts", "prototypes"):
                row = table.setdefault(name.replace("prompts", by), {})
                for part in ("test", "kitti"):
                    row.setdefault(part, []).append(found[f"{part}_{by}"])
    print("| | nuScenes mIoU | pixels right | KITTI mIoU | pixels right |\n|---|---|---|---|---|")
    for name, parts in table.items():
        cells = []
        for part in ("test", "kitti"):
            for values in zip(*parts[part], strict=True):
                cells.append(f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else ""))
        print(f"| {name} | {' | '.join(cells)} |")
    write_atomically(args.out / "streets.json", json.dumps(table))


if __name__ == "__main__":
    main()
