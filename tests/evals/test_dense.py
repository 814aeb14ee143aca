"""Class maps: geometry against the real resizing, IoU against scikit-learn, what must equal zero-shot of images."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from sklearn.metrics import jaccard_score

from dualenc.data.arrays import npy_bytes
from dualenc.data.driving.geometry import inverse
from dualenc.data.driving.keyframes import Box, CameraView, Keyframe, nuscenes
from dualenc.data.modalities.image import ImageConfig, ImageInput
from dualenc.errors import ConfigError, DataError
from dualenc_evals.catalog import load_task, parse_task
from dualenc_evals.harness import evaluate
from dualenc_evals.metrics import dense
from dualenc_evals.pages.run import write_report
from dualenc_evals.read.box_masks import UNKNOWN, box_mask, point_classes, write_box_masks
from dualenc_evals.studies.region_probes import CLASSES

sys.path.insert(0, str(Path(__file__).parent))
from _pixels import Pixels
from _shared import DATA as SHARED_DATA
from test_last_blocks import VIT, model

SCENE = SHARED_DATA / "camera_lidar" / "nuscenes_scene-0523"


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize("wh", [(200, 120), (90, 150), (64, 64)])
@pytest.mark.parametrize(
    "config",
    [
        {"resize": "squash"}, {"resize": "shortest"}, {"resize": "longest"},
        {"resize": "shortest", "shortest_edge": 77},
        {"resize": "shortest", "centre": "floor", "shortest_edge": 77}, {"resize": "squash", "shortest_edge": 71},
    ],
    ids=str,
)  # fmt: skip
def test_a_pixel_is_where_the_resizing_puts_it(config: dict[str, Any], wh: tuple[int, int]) -> None:
    given = ImageConfig(size=64, interpolation="bilinear", **config)
    source = ImageInput(given)
    width, height = wh
    y, x = np.mgrid[:height, :width]
    ramp = np.stack([x / width * 250, y / height * 250, 0 * x], -1).round().astype(np.uint8)
    row = source.eval(source.decode(png(ramp))).float()[:2]
    chosen = np.random.default_rng(0).choice(width * height, 400, replace=False)
    x, y = chosen % width, chosen // width
    at = dense.positions(given, width, height, x, y)
    # Near a border that is added, the filter mixes it in.
    inside = (np.abs(at) < 0.93).all(1) & (np.minimum(x, width - x) > 5) & (np.minimum(y, height - y) > 5)
    assert inside.sum() > 100
    got = dense.scores_at(row.permute(1, 2, 0), at[inside])
    assert got.numpy() == pytest.approx(np.stack([x / width, y / height], 1)[inside] * 250, abs=3.5)


def test_scores_between_places_by_hand() -> None:
    maps = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0))
    for at, want in (
        ((-0.75, -2 / 3), maps[0, 0]),  # the centre of the first place of 4 × 3
        ((-1, -1), maps[0, 0]),  # beyond it
        ((0.5, -2 / 3), (maps[0, 2] + maps[0, 3]) / 2),
        ((0.25, 1 / 3), (maps[1, 2] + maps[2, 2]) / 2),
        ((0.375, 2 / 3), maps[2, 2] * 0.75 + maps[2, 3] * 0.25),
    ):
        assert torch.allclose(dense.scores_at(maps, np.array([at]))[0], want, atol=1e-6)
    only = torch.randn(1, 1, 5)
    assert torch.allclose(dense.scores_at(only, np.array([[0.3, -0.9], [1, 1]])), only[0].expand(2, 5))


def test_iou_is_that_of_scikit_learn_and_ties_are_wrong() -> None:
    rng = np.random.default_rng(0)
    scores = torch.from_numpy(rng.random((500, 4))).float()
    truth = rng.integers(0, 3, 500)  # class 3 has no pixel, but is predicted
    images = np.stack([dense.counts(scores[s : s + 100], truth[s : s + 100], 4) for s in range(0, 500, 100)])
    want = jaccard_score(truth, scores.argmax(1).numpy(), labels=[0, 1, 2], average="macro")
    assert dense.mean_iou(images)(np.ones(5)) == pytest.approx(want)
    twice = np.concatenate([images, images[:1]])
    assert dense.mean_iou(images)(np.array([2.0, 1, 1, 1, 1])) == pytest.approx(dense.mean_iou(twice)(np.ones(6)))
    equal = dense.counts(torch.ones(6, 3), np.array([0, 0, 1, 1, 2, 2]), 3)
    assert equal[0].tolist() == [0, 0, 0]
    assert equal[1].sum() == equal[2].sum() == 6
    many = rng.choice(3, 100_000, p=[0.7, 0.2, 0.1])
    guess = dense.counts(torch.from_numpy(rng.random((100_000, 3))), many, 3)
    assert dense.chance_iou(guess[2]) == pytest.approx(dense.mean_iou(guess[None])(np.ones(1)), abs=0.005)


# --- through the harness ------------------------------------------------------------------------------------------


def folder(tmp: Path, n: int = 12) -> Path:
    """Images of two halves, left and right of other colours, with their masks; the top rows have no class."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(n):
        left, right = rng.choice(3, 2, replace=False)
        pixels = np.zeros((32, 32, 3), np.uint8) + rng.integers(0, 30, (32, 32, 3), dtype=np.uint8)
        pixels[:, :16, left], pixels[:, 16:, right] = 220, 220
        mask = np.full((32, 32), 255, np.uint8)
        mask[4:, :16], mask[4:, 16:] = left, right
        (tmp / f"{i}.png").write_bytes(png(pixels))
        (tmp / f"{i}_mask.png").write_bytes(png(mask))
        rows.append({"image": f"{i}.png", "mask": f"{i}_mask.png", "part": "ab"[i % 2], "label": str(left)})
    (tmp / "list.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp


def said(tmp: Path, **more: Any) -> dict[str, Any]:
    members = {"image": ["file:image"], "mask": ["file:mask"]}
    source = {"kind": "jsonl", "path": str(tmp / "list.jsonl"), "members": members}
    return {
        "kind": "dense", "name": "a", "source": source, "classes": {"0": ["red", "scarlet"], "1": "green", "2": "blue"},
        "templates": ["{}", "a {} thing"], **more,
    }  # fmt: skip


def run(embedder: Any, fields: dict[str, Any]) -> dict[str, Any]:
    results: dict[str, Any] = evaluate(embedder, [parse_task(fields)], progress=False, batch_size=5)["tasks"]["a"]
    return results


def test_an_image_of_one_place_is_zero_shot_of_the_image(tmp_path: Path) -> None:
    folder(tmp_path)
    for i in range(12):  # all of an image is its left half's class
        left = json.loads((tmp_path / "list.jsonl").read_text().splitlines()[i])["label"]
        (tmp_path / f"{i}_mask.png").write_bytes(npy_bytes(np.full((32, 32), int(left), np.uint8)))
    embedder = model({**VIT, "patch": 32}, 32)
    got = run(embedder, said(tmp_path))
    plain = {**said(tmp_path), "kind": "classification", "label": "label", "metrics": ["top1"]}
    assert got["metrics"]["pixel_accuracy"] == run(embedder, plain)["metrics"]["top1"]
    assert got["n"] == {"image": 12, "classes": 3, "labelled pixels": 12 * 32 * 32}


def test_prototypes_of_places_find_halves_that_prompts_do_not(tmp_path: Path) -> None:
    embedder = model({"name": "own/convnet", "widths": [8, 16]}, 32)
    fields = said(folder(tmp_path), background=0)
    prompts = run(embedder, fields)
    assert set(prompts["metrics"]) == {"mIoU", "mIoU_foreground", "pixel_accuracy"}
    shown = {**fields, "source": {**fields["source"], "where": {"part": "a"}}}
    shown["prototypes"] = {"support": {"where": {"part": "b"}}, "each": 2, "background": 3}
    got = run(embedder, shown)
    assert got["n"] == {"image": 6, "classes": 3, "labelled pixels": 6 * 28 * 32, "support": 6}
    assert got["settings"]["prototypes"] == 7
    assert got["metrics"]["mIoU"] > 0.7 > prompts["metrics"]["mIoU"]
    assert got["metrics"]["mIoU_foreground"] >= got["metrics"]["mIoU"] - 0.1
    low, high = got["ci"]["mIoU"]
    assert low <= got["metrics"]["mIoU"] <= high
    details = got["details"]["per_class"]
    assert np.mean(details["iou"]) == pytest.approx(got["metrics"]["mIoU"], abs=1e-5)
    assert sum(details["n"]) == 6 * 28 * 32
    (tmp_path / "results.json").write_text(json.dumps({"tasks": {"a": got}}))
    assert "Intersection over union of each class" in write_report(tmp_path).read_text(encoding="utf-8")


def test_masks_without_a_class_but_the_background(tmp_path: Path) -> None:
    embedder = model({"name": "own/convnet", "widths": [8, 16]}, 32)
    fields = said(folder(tmp_path, 2), background=0)
    for i in range(2):
        (tmp_path / f"{i}_mask.png").write_bytes(png(np.zeros((32, 32), np.uint8)))
    got = run(embedder, fields)
    assert set(got["metrics"]) == {"mIoU", "pixel_accuracy"}
    assert got["metrics"]["mIoU"] == got["metrics"]["pixel_accuracy"]  # of one class alone
    assert "No pixel of class 'green': left out of the mean." in got["notes"]
    (tmp_path / "0_mask.png").write_bytes(png(np.full((32, 32), 255, np.uint8)))
    (tmp_path / "1_mask.png").write_bytes(png(np.full((32, 32), 255, np.uint8)))
    with pytest.raises(DataError, match="no pixel that the model saw has one of the numbers in classes"):
        run(embedder, fields)


def test_broken_masks_and_wrong_tasks_are_sentences(tmp_path: Path) -> None:
    embedder = model(VIT, 32)
    fields = said(folder(tmp_path))
    (tmp_path / "3_mask.png").write_bytes(b"no mask")
    got = run(embedder, fields)
    assert got["skipped"]["count"] == 1
    assert "not a readable image" in got["skipped"]["items"][0]["reason"]
    (tmp_path / "3_mask.png").write_bytes(png(np.zeros((30, 32), np.uint8)))
    with pytest.raises(DataError, match=r"3_mask.png has 32 × 30 pixels, its image 32 × 32"):
        run(embedder, fields)
    with pytest.raises(ConfigError, match="dense: only a saved model of ours"):
        run(Pixels(), fields)
    for wrong, why in (
        ({"classes": {"red": "a"}}, "classes: name the numbers in the masks"),
        ({"background": 7}, "background: '7' is not one of the classes' numbers"),
        ({"templates": None}, "templates: give the prompts"),
    ):
        with pytest.raises(ConfigError, match=why):
            parse_task({**fields, **wrong})
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump({**fields, "classes": {0: ["sky", "road"], 1: "car"}, "background": 0}))
    assert load_task(path).wanted() == ["mIoU", "mIoU_foreground", "pixel_accuracy"]


# --- boxes of driving data ----------------------------------------------------------------------------------------


def test_masks_of_boxes_by_hand() -> None:
    forward = np.array([[0.0, 0, 1, 0], [-1, 0, 0, 0], [0, -1, 0, 1.5], [0, 0, 0, 1]])  # camera → ego, 1.5 m high
    view = CameraView("front", Path("x.jpg"), (100, 80), np.array([[50.0, 0, 50], [0, 50, 40], [0, 0, 1]]), forward, "")
    car = Box("vehicle.car", "1", np.array([10.0, 0, 1.5]), np.eye(3), np.array([2.0, 1, 1.5]))
    key = Keyframe("k", "", Path("x.bin"), ("x", "y", "z", "intensity"), 1.0, np.eye(4), (view,), boxes=(car,))
    flat = np.stack([*np.meshgrid(np.linspace(4, 30, 40), np.linspace(-8, 8, 40)), np.zeros((40, 40))], -1).reshape(
        -1, 3
    )
    points = np.concatenate([flat, [[10, 0, 1.5], [20, 0, 1.5], [15, 4, 2.5], [-5, 0, 1.5]]])
    numbers = point_classes(key, points, {"car": ("vehicle.car",)})
    assert numbers[-4:].tolist() == [1, 0, 0, 0]
    below = np.abs((points[:1600] - car.center)[:, :2]).max(1) < 0.9
    assert set(numbers[:1600][below]) == {UNKNOWN}  # the ground under the car
    mask = box_mask(view, points, numbers, (100, 80))
    assert mask.shape == (80, 100)
    assert mask[40, 50] == 1  # the point in the car is nearer than the one behind it
    assert mask[round(40 - 50 / 15), round(50 - 4 * 50 / 15)] == 0
    assert (mask == UNKNOWN).sum() > 80 * 100 - 1604


@pytest.mark.slow
@pytest.mark.skipif(not SCENE.exists(), reason=f"the real data are not below {SHARED_DATA}")
def test_real_cameras_with_boxes_of_the_lidar(tmp_path: Path) -> None:
    keys = [k for i, k in enumerate(nuscenes(SCENE)) if i in (0, 8, 16)]
    names = {n: CLASSES[n] for n in ("car", "large vehicle", "person")}
    listed = write_box_masks(keys, names, tmp_path)
    rows = [json.loads(line) for line in listed.read_text().splitlines()]
    assert len(rows) == 18
    # A car's pixels are inside a car's box as the camera sees it.
    inside = []
    for row in rows[:6]:
        view = next(v for v in keys[0].views if v.name == row["camera"])
        y, x = np.nonzero(np.load(tmp_path / row["mask"]) == 1)
        cars = [b.moved(inverse(view.to_ego)).corners() for b in keys[0].boxes if b.cls == "vehicle.car"]
        shapes = [uv[:, :2] / uv[:, 2:] for c in cars if (c[:, 2] > 0).all() for uv in [c @ view.intrinsics.T]]
        for p in np.stack([x, y], 1):
            inside.append(any((uv.min(0) - 9 <= p).all() and (p <= uv.max(0) + 9).all() for uv in shapes))
    assert len(inside) > 100
    assert np.mean(inside) > 0.95
    source = {"kind": "jsonl", "path": str(listed), "members": {"image": ["file:image"], "mask": ["file:mask"]}}
    fields = {
        "kind": "dense", "name": "a", "templates": ["a photo of a {}."], "background": 0,
        "classes": {"0": ["road", "building", "trees"], "1": "car", "2": ["truck", "bus"], "3": "person"},
        "source": {**source, "where": {"keyframe": keys[2].id}},
    }  # fmt: skip
    embedder = model({"name": "own/convnet", "widths": [8, 16]}, 128)
    by_prompts = run(embedder, fields)
    shown = {**fields, "prototypes": {"support": {"where": {"keyframe": [k.id for k in keys[:2]]}}, "background": 5}}
    by_places = run(embedder, shown)
    for got in (by_prompts, by_places):
        assert got["n"]["labelled pixels"] > 5000
        assert "cut off by the model's input.resize" in " ".join(got["notes"])
        assert np.isfinite(list(got["metrics"].values())).all()
    # With random weights, words say nothing of a place; places of cars look a little like places of cars.
    assert by_places["metrics"]["mIoU_foreground"] > by_places["chance"]["mIoU_foreground"] + 0.05
    assert by_places["metrics"]["mIoU_foreground"] > by_prompts["metrics"]["mIoU_foreground"]
