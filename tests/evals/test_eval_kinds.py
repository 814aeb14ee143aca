"""Multi-label, compositional, probe and bag tasks through the harness: real data, random weights, broken items."""

from __future__ import annotations

import hashlib
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from dualenc.config import Recipe
from dualenc.errors import ConfigError, DataError
from dualenc.model import build_bundle
from dualenc_evals.catalog import load_task
from dualenc_evals.harness import evaluate, print_table
from dualenc_evals.kinds.probes import ProbeTask
from dualenc_evals.pages.models import write_comparison
from dualenc_evals.pages.run import render, write_report
from dualenc_evals.read.shards import read_rows

sys.path.insert(0, str(Path(__file__).parent))
from _pixels import Pixels, plain
from _shared import DATA as SHARED_DATA
from test_eval_tasks import picture

SHARED = SHARED_DATA
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason=f"the real data are not below {SHARED}")


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setenv("DUALENC_DATA", str(SHARED))


@pytest.fixture(scope="module")
def random_model() -> Any:
    """A small model of ours with random weights, as the trainer would build it."""
    encoder = {"name": "own/convnet", "widths": [8, 16]}
    text = {"name": "own/transformer", "width": 32, "layers": 1, "heads": 2}
    recipe = {
        "name": "random",
        "modalities": {
            "image": {"input": {"size": 32}, "encoder": encoder},
            "text": {"input": {"tokenizer": "clip-bpe:1024", "context_length": 16}, "encoder": text},
        },
        "embed_dim": 16,
        "data": {"sources": [{"name": "x", "shards": "x.tar"}]},
        "batch": {"size": 8},
        "budget": {"steps": 1},
    }
    return build_bundle(Recipe.model_validate(recipe)).embedder()


@pytest.fixture(scope="module")
def driving_model() -> Any:
    """Towers of ours for pictures, points and text, with random weights: what a camera/LiDAR recipe would build."""
    lidar = {"name": "own/pillars", "cell": 4.0, "pillar_width": 8, "widths": [8, 16]}
    text = {"name": "own/transformer", "width": 32, "layers": 1, "heads": 2}
    recipe = {
        "name": "driving",
        "modalities": {
            "camera": {"kind": "image", "input": {"size": 32}, "encoder": {"name": "own/convnet", "widths": [8, 16]}},
            "lidar": {"input": {"range": [0, -40, -4, 80, 40, 8]}, "encoder": lidar},
            "text": {"input": {"tokenizer": "clip-bpe:1024", "context_length": 16}, "encoder": text},
        },
        "pairs": [["camera", "lidar"], ["lidar", "text"], ["camera", "text"]],
        "embed_dim": 16,
        "data": {"sources": [{"name": "x", "shards": "x.tar"}]},
        "batch": {"size": 8},
        "budget": {"steps": 1},
    }
    return build_bundle(Recipe.model_validate(recipe)).embedder()


class Sensors(Pixels):
    """Points by their moments, sounds by their spectrum, cameras by their pixels: no training."""

    modalities = ("image", "text", "audio", "camera", "lidar")  # type: ignore[assignment]

    def embed(self, modality: str, items: Sequence[Any], batch_size: int = 64) -> torch.Tensor:
        if modality in ("image", "camera", "text"):
            return super().embed("text" if modality == "text" else "image", items, batch_size)
        row = self._points if modality == "lidar" else self._sound
        x = torch.stack([row(i) for i in items])
        mixed = x @ torch.randn(x.shape[1], 64, generator=torch.Generator().manual_seed(1))
        return torch.nn.functional.normalize(mixed, dim=1)

    def _points(self, raw: bytes) -> torch.Tensor:
        p = torch.from_numpy(np.load(io.BytesIO(raw), allow_pickle=False))
        return torch.cat([p.mean(0), p.std(0, correction=0), p.amax(0), torch.ones(1)])

    def _sound(self, raw: bytes) -> torch.Tensor:
        soundfile = pytest.importorskip("soundfile", reason="soundfile is not installed")
        wave, _ = soundfile.read(io.BytesIO(raw), dtype="float32", always_2d=True)
        frames = wave[: len(wave) // 512 * 512, 0].reshape(-1, 512)
        bands = np.log(np.abs(np.fft.rfft(frames)).mean(0) + 1e-4)
        return torch.from_numpy(bands - bands.mean()).float()


def go(name: str | Path, embedder: Any = None, limit: int | None = None, **options: Any) -> dict[str, Any]:
    task = load_task(name)
    if isinstance(task, ProbeTask):
        task = task.model_copy(
            update={"probe": task.probe.model_copy(update={"episodes": min(50, task.probe.episodes)})}
        )
    if limit is not None:
        task = task.model_copy(update={"source": task.source.model_copy(update={"limit": limit})})
    results = evaluate(embedder or Pixels(), [task], progress=False, **options)
    got: dict[str, Any] = results["tasks"][task.name]
    for metric, (low, high) in got["ci"].items():
        assert low <= high, metric
    for metric, value in got["metrics"].items():
        if not metric.startswith(("modality_gap", "alignment", "mean_offdiagonal", "uniformity")):
            assert value >= 0, metric
    return got


def own(tmp: Path, **fields: Any) -> Path:
    (tmp / "own.yaml").write_text(yaml.safe_dump(fields))
    return tmp / "own.yaml"


# --- real data, random weights ------------------------------------------------------------------------------------


@needs_shared
def test_tags_of_real_photos(random_model: Any) -> None:
    got = go("fashion_attributes", random_model, limit=200)
    assert got["n"]["image"] == 200
    low, high = got["ci"]["mAP"]
    assert low < got["metrics"]["mAP"] < high
    # Random weights find about what chance does; several labels an item make chance more than one in all classes.
    assert 1 / got["n"]["classes"] < got["chance"]["mAP"] < 0.3
    details = got["details"]
    precision = [v for v in details["per_class"]["average_precision"] if v is not None]
    assert got["metrics"]["mAP"] == pytest.approx(np.mean(precision), abs=1e-5)
    assert sum(details["per_class"]["n"]) > 2 * 200  # kind, colour and use


@needs_shared
def test_probes_of_real_photos(random_model: Any) -> None:
    got = go("cifar10_probe", random_model)
    assert got["n"] == {"image": 200, "training": 800, "classes": 10}
    assert set(got["metrics"]) == set(load_task("cifar10_probe").wanted())
    for name in ("knn_top1", "linear_top1"):  # even a random convolution net knows more than chance
        assert got["ci"][name][0] > got["chance"][name] == 0.1
    assert got["chance"]["opta1_top1"] == 0.2
    assert got["settings"]["5-shot"] == {"ways": 5, "queries": 15, "episodes": 50}
    assert got["notes"] == []


@needs_shared
def test_bags_of_real_photos(random_model: Any) -> None:
    got = go("fashion_bags", random_model, limit=300)
    for size in (3, 5, 7):
        assert got["chance"][f"image_to_text_bag{size}_R@1"] == pytest.approx(1 / size, abs=1e-6)
        assert got["metrics"][f"both_ways_bag{size}_all_correct"] <= got["metrics"][f"image_to_text_bag{size}_R@1"]
        assert got["n"][f"bags of {size}"] > 10
    near = go("flickr8k_bags", random_model, limit=60)
    assert near["n"]["bags of 3"] >= 15


class Knows(Pixels):
    """Gives a picture the features of the caption it is told."""

    def __init__(self, captions: dict[bytes, str]) -> None:
        super().__init__()
        self.captions = captions

    def _picture(self, raw: bytes) -> torch.Tensor:
        return self._words(self.captions[raw])

    def _words(self, text: str) -> torch.Tensor:
        seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")
        return torch.randn(64, generator=torch.Generator().manual_seed(seed))


@needs_shared
def test_pictures_of_a_drawing_program(random_model: Any) -> None:
    """A model that knows the captions is right everywhere, one that knows the next picture's nearly nowhere,
    random weights stand in the middle."""
    rows = read_rows(load_task("tuxpaint")).rows[:150]
    pictures = [r.contents["image"][0].read() for r in rows]
    captions = [str(r.contents["text"][0].text) for r in rows]
    knows = go("tuxpaint", Knows(dict(zip(pictures, captions, strict=True))), limit=150)
    assert knows["n"]["image"] == 150
    assert 100 < knows["n"]["text"] < 150  # equal captions are one
    for way in ("image_to_text", "text_to_image"):
        assert knows["metrics"][f"{way}_R@1"] == 1.0
        assert knows["ci"][f"{way}_median_rank"] == [1.0, 1.0]
    shifted = go("tuxpaint", Knows(dict(zip(pictures, captions[1:] + captions[:1], strict=True))), limit=150)
    assert shifted["metrics"]["image_to_text_R@1"] < 0.1
    guesses = go("tuxpaint", random_model, limit=150)
    low, high = guesses["ci"]["image_to_text_median_rank"]
    assert 0.25 < low / guesses["n"]["text"] < high / guesses["n"]["text"] < 0.75


@needs_shared
def test_calibration_needs_the_models_temperature(random_model: Any) -> None:
    got = go("cifar10", random_model, limit=300)
    assert 0 <= got["metrics"]["calibration_error"] <= 1
    assert got["settings"]["logit_scale"] == pytest.approx(next(iter(random_model.describe()["logit_scale"].values())))
    assert "calibration_error" not in go("cifar10", Pixels(), limit=100)["metrics"]


@needs_shared
def test_selective_prediction_is_on_request(random_model: Any) -> None:
    whole = load_task("cifar10")
    said = {**whole.model_dump(), "metrics": ["top1", "AURC", "top1@50%", "top1@99%"]}
    task = type(whole).model_validate(said | {"source": {**said["source"], "limit": 300}})

    def measured(embedder: Any) -> dict[str, Any]:
        results: dict[str, Any] = evaluate(embedder, [task], progress=False)["tasks"]["cifar10"]
        return results

    got = measured(random_model)
    assert set(got["metrics"]) == set(said["metrics"])
    assert abs(got["metrics"]["top1@99%"] - got["metrics"]["top1"]) < 0.02
    assert 0 < got["metrics"]["AURC"] <= 1
    curve = got["details"]["risk_coverage"]
    assert np.mean(curve["risk"]) == pytest.approx(got["metrics"]["AURC"], abs=0.02)
    assert curve["risk"][-1] == curve["best"][-1] == pytest.approx(1 - got["metrics"]["top1"], abs=1e-6)
    run = {"name": "a", "recipe": "", "metrics": [], "results": {"tasks": {"a": got}}, "environment": {}, "lost": []}
    page = render(run)
    assert "<figcaption>Risk and coverage</figcaption>" in page
    assert "best possible order" in page
    none = measured(Pixels())
    assert "risk_coverage" not in none["details"]
    assert set(none["metrics"]) == {"top1"}
    assert "The model reports no logit scale for this pair, so there is no top1@50%." in none["notes"]
    with pytest.raises(ValueError, match="has no metric 'top1@0%'"):
        type(whole).model_validate(said | {"metrics": ["top1@0%"]})


@needs_shared
@pytest.mark.parametrize(
    ("name", "n"),
    [
        ("kitti_frames", {"camera": 11, "lidar": 11}),
        ("kitti_lidar_classes", {"lidar": 31, "classes": 8}),
        ("kitti_camera_classes", {"camera": 31, "classes": 8}),
    ],
)
def test_driving_tasks_run(name: str, n: dict[str, int]) -> None:
    got = go(name, Sensors())
    assert got["n"] == n
    assert got["skipped"]["count"] == 0


@needs_shared
@pytest.mark.slow
@pytest.mark.parametrize("name", ["kitti_frames", "kitti_objects", "kitti_lidar_classes", "kitti_camera_classes"])
def test_driving_tasks_run_on_towers_of_ours(name: str, driving_model: Any, tmp_path: Path) -> None:
    out = tmp_path / "a.json"
    results = evaluate(driving_model, [load_task(name)], progress=False, out=out)
    got = results["tasks"][name]
    assert got["skipped"]["count"] == 0
    assert np.isfinite(list(got["metrics"].values())).all()
    main = "camera_to_lidar_R@1" if "classes" not in name else "top1"
    assert 0 < got["chance"][main] < 0.5
    page = write_comparison([out], tmp_path / "page.html").read_text()
    if "lidar" in load_task(name).modalities:  # points are drawn over what the camera saw
        drawn = [i for k, i in got["details"]["items"].items() if k.endswith("/lidar")]
        assert any(i["picture"] in page for i in drawn)


@needs_shared
@pytest.mark.slow
def test_points_of_objects_are_probed_with_towers_of_ours(driving_model: Any) -> None:
    got = go("scene0523_probe", driving_model, limit=160, details=False)
    assert {"lidar", "camera"} >= {k.split("_")[0] for k in got["chance"]} - {"knn", "linear", "prototype1", "opta1"}
    assert np.isfinite(list(got["metrics"].values())).all()


@needs_shared
@pytest.mark.slow
def test_one_object_seen_twice_is_no_wrong_answer() -> None:
    got = go("scene0523_objects", Sensors(), limit=120, details=False)
    # 120 objects of fewer instances: chance is above one in 120.
    assert got["chance"]["camera_to_lidar_R@1"] > 1.5 / 120


@needs_shared
def test_sound_tasks_run() -> None:
    got = go("esc10_titles", Sensors(), limit=60, details=False)
    assert got["metrics"]["text_to_audio_mAP@10"] <= got["metrics"]["text_to_audio_MRR"]
    assert got["chance"]["audio_to_text_mAP@10"] == pytest.approx(sum(1 / i for i in range(1, 11)) / 60, rel=0.2)
    probe = go("esc10_probe", Sensors(), limit=80, details=False)
    assert probe["ci"]["knn_top1"][0] > 0.1  # a spectrum tells rain from a rooster


# --- broken items, empty classes, typos ---------------------------------------------------------------------------


def folder(tmp: Path, part: str, counts: dict[str, int]) -> None:
    for name, n in counts.items():
        place = tmp / "f" / part / name
        place.mkdir(parents=True)
        for i in range(n):
            (place / f"{i}.png").write_bytes(picture((len(name) * 40 % 256, i, ord(name[0]))))


PROBE = {"kind": "probe", "source": {"kind": "folder", "path": "./f", "split": "test"}, "train": {"split": "train"}}


def test_a_probe_with_an_empty_class_a_new_class_and_a_broken_picture(tmp_path: Path) -> None:
    folder(tmp_path, "train", {"cat": 12, "horse": 12, "eel": 0})
    folder(tmp_path, "test", {"cat": 12, "horse": 12, "newt": 1})
    (tmp_path / "f/train/cat/3.png").write_bytes(b"no picture")
    (tmp_path / "f/test/horse/5.png").write_bytes(picture((1, 2, 3))[:40])
    got = go(own(tmp_path, **PROBE, probe={"episodes": 20, "ways": 2, "queries": 3}))
    assert got["n"] == {"image": 24, "training": 23, "classes": 3}
    assert got["skipped"]["count"] == 2
    assert {s["id"] for s in got["skipped"]["items"]} == {"cat/3.png", "horse/5.png"}
    notes = " ".join(got["notes"])
    assert "The class folder 'eel' is empty" in notes
    assert "Training: No items of class 'newt'" in notes
    assert "test items are also training items, byte for byte" in notes
    assert got["metrics"]["knn_top1"] == pytest.approx(23 / 24, abs=1e-6)  # the newt has no training items
    assert plain({"environment": {}, "tasks": got}) == plain({"environment": {}, "tasks": go(tmp_path / "own.yaml")})


def test_a_probe_with_too_few_items_says_which_number_is_missing(tmp_path: Path) -> None:
    folder(tmp_path, "train", {"cat": 3, "horse": 3})
    folder(tmp_path, "test", {"cat": 3, "horse": 3})
    got = go(own(tmp_path, **PROBE, probe={"episodes": 5}))
    assert "prototype5_top1" not in got["metrics"]
    assert got["metrics"]["prototype1_top1"] >= 0
    assert "Fewer than two classes have 5 training items and a test item: no 5-shot number." in got["notes"]


def test_a_broken_part_leaves_the_whole_puzzle_out(tmp_path: Path) -> None:
    rows = [{"a": f"{i}a.png", "b": f"{i}b.png", "x": f"one {i}", "y": f"two {i}"} for i in range(20)]
    rows[4]["y"] = ""
    (tmp_path / "l.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    for i in range(20):
        for side in "ab":
            (tmp_path / f"{i}{side}.png").write_bytes(picture((i * 9, ord(side), 7)))
    (tmp_path / "7b.png").write_bytes(b"no picture")
    source = {"kind": "jsonl", "path": "./l.jsonl", "members": {"image": ["file:a+file:b"], "text": ["x+y"]}}
    got = go(own(tmp_path, kind="compositional", source=source))
    assert got["n"] == {"puzzles": 18, "image": 36, "text": 36}
    reasons = {s["id"]: s["reason"] for s in got["skipped"]["items"]}
    assert reasons["4a.png"] == "has 1 text, the other puzzles have 2"
    assert reasons["7a.png"].startswith("image 7b.png: ")
    single = {**source, "members": {"image": ["file:a"], "text": ["x"]}}
    with pytest.raises(DataError, match="a puzzle needs at least one image and two text"):
        go(own(tmp_path, kind="compositional", source=single))


def test_tags_with_a_typo_an_unused_class_and_a_broken_picture(tmp_path: Path) -> None:
    rows = [{"image": f"{i}.png", "tags": ["red", "round"] if i % 2 else "red;old"} for i in range(12)]
    (tmp_path / "l.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    for i in range(12):
        (tmp_path / f"{i}.png").write_bytes(picture((i * 20, 3, 7)) if i != 6 else b"no picture")
    source = {"kind": "jsonl", "path": "./l.jsonl", "separator": ";"}
    fields = {"kind": "multilabel", "source": source, "label": "tags", "templates": ["{}"]}
    got = go(own(tmp_path, **fields, classes=["red", "round", "old", "blue"]))
    assert got["n"] == {"image": 11, "classes": 4}
    assert got["notes"][0] == "No items of class 'blue': left out of the mean."
    assert got["skipped"]["items"][0]["id"] == "6.png"
    with pytest.raises(ConfigError, match=r"label 'round', which is not a class. Did you mean 'rund'"):
        go(own(tmp_path, **fields, classes=["red", "rund", "old"]))


def test_keys_of_the_new_kinds_are_checked(tmp_path: Path) -> None:
    pairs = {"kind": "retrieval", "source": {"kind": "shards", "path": "./x.tar"}}
    for fields, message in (
        ({**PROBE, "probe": {"way": 3}}, r"probe\.way: unknown key .*Did you mean 'ways'\?"),
        ({**PROBE, "metrics": ["knn_top5"]}, r"has no metric 'knn_top5'. Did you mean 'knn_top1'\?"),
        ({k: v for k, v in PROBE.items() if k != "train"}, "train: say where the training items come from"),
        (
            {**PROBE, "templates": ["{}"]},
            "templates: not a key of a probe task, only of classification, dense and multilabel",
        ),
        ({**pairs, "bags": {"by": "k", "size": [3]}}, r"bags\.size: unknown key .*Did you mean 'sizes'\?"),
        ({**pairs, "bags": {"by": "k", "sizes": [1]}}, r"bags\.sizes"),
        ({**pairs, "metrics": ["mAP@0"]}, "has no metric 'mAP@0'"),
        ({**pairs, "kind": "compositional", "metrics": ["group_scor"]}, r"Did you mean 'group_score'\?"),
        ({**pairs, "kind": "multilabel", "templates": ["{}"]}, "label: say where a shards row has its class"),
        (
            {"kind": "retrieval", "source": {"kind": "csv", "path": "./x", "subset": "a"}},
            "subset: only sources of kind hf have this key",
        ),
        (
            {**PROBE, "reference": [{"model": "m", "metric": "top1", "value": 1.0, "source": "s"}]},
            "reference: m's 'top1' is not a metric of this task",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            load_task(own(tmp_path, **fields))


def test_every_kind_has_its_place_in_table_and_report(tmp_path: Path) -> None:
    folder(tmp_path, "train", {"cat": 6, "horse": 6})
    folder(tmp_path, "test", {"cat": 6, "horse": 6})
    rows = [{"image": f"f/test/cat/{i}.png", "tags": ["red"], "x": f"{i} a", "y": f"{i} b"} for i in range(6)]
    (tmp_path / "l.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    lists = {"kind": "jsonl", "path": "./l.jsonl"}
    every = {
        "probe": {**PROBE, "probe": {"episodes": 5}},
        "multilabel": {"kind": "multilabel", "source": lists, "label": "tags", "templates": ["{}"]},
        "compositional": {"kind": "compositional", "source": {**lists, "members": {"text": ["x+y"]}}},
        "bags": {
            "kind": "retrieval", "source": {**lists, "members": {"text": ["x"]}}, "bags": {"by": "tags", "sizes": [3]},
            "metrics": ["R@1", "mAP@10", "nDCG@5"],
        },
    }  # fmt: skip
    tasks = []
    for name, fields in every.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(fields))
        tasks.append(load_task(tmp_path / f"{name}.yaml"))
    results = evaluate(Pixels(), tasks, progress=False)
    from rich.console import Console

    console = Console(width=160, record=True, file=io.StringIO())
    print_table(results, console)
    text = console.export_text()
    for part in ("image → class", "image and text", "knn top1 %", "mAP %", "text score %", "mAP@10 %", "nDCG@5 %"):
        assert part in text, part
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text("name: x\n")
    (run / "results.json").write_text(json.dumps(results))
    page = write_report(run).read_text(encoding="utf-8")
    for part in ("multilabel", "compositional", "linear top1", "bag3"):
        assert part in page, part
