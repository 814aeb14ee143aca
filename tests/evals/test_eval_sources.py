"""Every layout that the shipped tasks name, on a stand-in of it; driving sources against an independent loader."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from dualenc.data.driving.camera_frames import frames_of
from dualenc.data.driving.corruption import Corruption
from dualenc.data.driving.geometry import MIN_DEPTH
from dualenc.data.driving.keyframes import kitti_object, nuscenes
from dualenc.errors import ConfigError, DataError
from dualenc_evals.catalog import load_task, task_files
from dualenc_evals.harness import evaluate
from dualenc_evals.read.shards import read_rows
from dualenc_evals.task import Task, paths_of

sys.path.insert(0, str(Path(__file__).parent))
from _pixels import Pixels
from _shared import DATA as SHARED_DATA
from test_eval_tasks import picture

SHARED = SHARED_DATA
needs_driving = pytest.mark.skipif(
    not (SHARED / "camera_lidar").exists(), reason=f"the driving data are not below {SHARED}"
)
needs_audio = pytest.mark.skipif(not (SHARED / "audio_text").exists(), reason=f"the sounds are not below {SHARED}")


def shipped(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> Task:
    monkeypatch.setenv("DUALENC_DATA", str(root))
    return load_task(name)


def put(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def table(path: Path, head: list[str], rows: list[list[Any]], header: bool = True) -> None:
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerows([head, *rows] if header else rows)
    put(path, out.getvalue())


def own(tmp: Path, **fields: Any) -> Task:
    (tmp / "own.yaml").write_text(yaml.safe_dump(fields))
    return load_task(tmp / "own.yaml")


# --- lists --------------------------------------------------------------------------------------------------------


def test_xm3600_by_language(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = ["000a", "000b"]
    lines = [
        {
            "image/key": k,
            "image/locale": "de",
            "de": {"caption": [f"Bild {k}", "noch eins"]},
            "ja": {"caption": ["絵" + k]},
        }
        for k in keys
    ]
    put(tmp_path / "xm3600/captions.jsonl", "\n".join(json.dumps(x) for x in lines))
    for k in keys:
        put(tmp_path / f"xm3600/images/{k}.jpg", picture((1, 2, 3)))
    rows = read_rows(shipped("xm3600_de", tmp_path, monkeypatch)).rows
    assert [[c.text for c in r.contents["text"]] for r in rows] == [[f"Bild {k}", "noch eins"] for k in keys]
    assert rows[1].contents["image"][0].read() == picture((1, 2, 3))
    japanese = read_rows(shipped("xm3600_ja", tmp_path, monkeypatch)).rows
    assert [r.contents["text"][0].text for r in japanese] == ["絵000a", "絵000b"]
    with pytest.raises(ConfigError, match=r"source\.members\.text: there is no column 'fr\.caption'"):
        read_rows(shipped("xm3600_fr", tmp_path, monkeypatch))
    assert sum(n.startswith("xm3600_") for n in task_files()) == 36


def test_sugarcrepe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {str(i): {"filename": f"{i}.jpg", "caption": f"a{i}", "negative_caption": f"b{i}"} for i in (0, 3)}
    put(tmp_path / "sugarcrepe/swap_obj.json", json.dumps(rows))
    for i in (0, 3):
        put(tmp_path / f"coco/val2017/{i}.jpg", picture((i * 50, 2, 3)))
    task = shipped("sugarcrepe_swap_obj", tmp_path, monkeypatch)
    got = read_rows(task).rows
    assert [[c.text for c in r.contents["text"]] for r in got] == [["a0", "b0"], ["a3", "b3"]]
    result = evaluate(Pixels(), [task], progress=False)["tasks"]["sugarcrepe_swap_obj"]
    assert list(result["metrics"]) == ["text_score"]
    assert result["chance"] == {"text_score": 0.5}
    assert result["n"] == {"puzzles": 2, "image": 2, "text": 4}


@pytest.mark.parametrize(
    ("name", "listing", "head", "rows", "files", "labels"),
    [
        (
            "esc50", "audio/ESC-50/meta/esc50.csv", ["filename", "fold", "target", "category"],
            [["1-a.wav", 1, 0, "dog"], ["5-b.wav", 5, 14, "chirping_birds"]],
            ["audio/ESC-50/audio/1-a.wav", "audio/ESC-50/audio/5-b.wav"], ["dog", "chirping_birds"],
        ),
        (
            "urbansound8k", "audio/UrbanSound8K/metadata/UrbanSound8K.csv", ["slice_file_name", "fold", "class"],
            [["7-3.wav", 5, "dog_bark"]], ["audio/UrbanSound8K/audio/fold5/7-3.wav"], ["dog_bark"],
        ),
        (
            "vggsound", "audio/vggsound/vggsound.csv", [],
            [["--0Pq", 30, "people whistling", "test"], ["xyz", 5, "cat purring", "train"]],
            ["audio/vggsound/audio/--0Pq_000030.wav"], ["people whistling"],
        ),
    ],
)  # fmt: skip
def test_sound_classes_from_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, listing: str, head: list[str], rows: list[list[Any]],
    files: list[str], labels: list[str],
) -> None:  # fmt: skip
    table(tmp_path / listing, head, rows, header=bool(head))
    for f in files:
        put(tmp_path / f, b"RIFF " + f.encode())
    got = read_rows(shipped(name, tmp_path, monkeypatch)).rows
    assert [r.label for r in got] == labels
    assert [r.contents["audio"][0].read() for r in got] == [b"RIFF " + f.encode() for f in files]


def test_gtzan_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for genre in ("blues", "rock"):
        put(tmp_path / f"audio/gtzan/genres_original/{genre}/{genre}.00000.wav", b"RIFF")
    put(tmp_path / "audio/gtzan/genres_original/rock/notes.txt", b"no sound")
    assert [r.label for r in read_rows(shipped("gtzan", tmp_path, monkeypatch)).rows] == ["blues", "rock"]


def test_fsd50k_has_several_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / "audio/FSD50K"
    table(base / "FSD50K.ground_truth/eval.csv", ["fname", "labels", "mids"], [["37199", "Guitar,Music", "/m/1,/m/2"]])
    put(base / "FSD50K.eval_audio/37199.wav", b"RIFF")
    row = read_rows(shipped("fsd50k", tmp_path, monkeypatch)).rows[0]
    assert row.labels == ("Guitar", "Music")
    assert row.contents["audio"][0].read() == b"RIFF"


def test_clotho_has_five_columns_and_audiocaps_five_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = ["file_name", *(f"caption_{i}" for i in range(1, 6))]
    rows = [["a b.wav", *(f"says {i}" for i in range(1, 6))]]
    table(tmp_path / "audio/clotho/clotho_captions_evaluation.csv", head, rows)
    put(tmp_path / "audio/clotho/evaluation/a b.wav", b"RIFF")
    row = read_rows(shipped("clotho", tmp_path, monkeypatch)).rows[0]
    assert [c.text for c in row.contents["text"]] == [f"says {i}" for i in range(1, 6)]
    assert len({c.id for c in row.contents["text"]}) == 5
    head = ["audiocap_id", "youtube_id", "start_time", "caption"]
    table(
        tmp_path / "audio/audiocaps/test.csv", head,
        [[i, "xy"[i % 2], 30, f"heard {i}"] for i in range(6)],
    )  # fmt: skip
    for name in "xy":
        put(tmp_path / f"audio/audiocaps/test/{name}.wav", b"RIFF")
    got = read_rows(shipped("audiocaps", tmp_path, monkeypatch)).rows
    assert [[c.text for c in r.contents["text"]] for r in got] == [
        [f"heard {i}" for i in (0, 2, 4)],
        [f"heard {i}" for i in (1, 3, 5)],
    ]
    assert [len(r.contents["audio"]) for r in got] == [1, 1]


def test_lists_that_are_broken_are_named(tmp_path: Path) -> None:
    source = {"kind": "json", "path": "./x.json", "members": {"image": ["file:i"], "text": ["t"]}}
    put(tmp_path / "x.json", "[1, 2]")
    with pytest.raises(DataError, match=r"x\.json must hold a list of objects"):
        read_rows(own(tmp_path, kind="retrieval", source=source))
    put(tmp_path / "x.json", "{")
    with pytest.raises(DataError, match=r"x\.json is not JSON"):
        read_rows(own(tmp_path, kind="retrieval", source=source))
    put(tmp_path / "x.csv", 'i,t\n"a')
    with pytest.raises(DataError, match=r"x\.csv is not a valid CSV table"):
        read_rows(own(tmp_path, kind="retrieval", source={**source, "kind": "csv", "path": "./x.csv"}))
    put(tmp_path / "x.json", '[{"i": "../a.png", "t": "x"}]')
    with pytest.raises(DataError, match="paths must stay inside the list's folder"):
        read_rows(own(tmp_path, kind="retrieval", source={**source, "files": "./pictures"}))
    with pytest.raises(ConfigError, match=r"source\.group: there is no column 'k'"):
        read_rows(own(tmp_path, kind="retrieval", source={**source, "group": "k"}))


# --- Hugging Face data sets ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set in the layout that the hub stores: parquet files of a split, typed columns."""
    datasets = pytest.importorskip("datasets", reason="the datasets library is not installed")
    folder = tmp_path_factory.mktemp("hub") / "small"
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0)]
    features = datasets.Features(
        {
            "image_0": datasets.Image(), "image_1": datasets.Image(), "caption_0": datasets.Value("string"),
            "caption_1": datasets.Value("string"), "captions": datasets.List(datasets.Value("string")),
            "kind": datasets.ClassLabel(names=["warm", "cold"]),
        }
    )  # fmt: skip
    rows = {
        "image_0": [{"bytes": picture(c), "path": None} for c in colours],
        "image_1": [{"bytes": picture(c[::-1]), "path": None} for c in colours],
        "caption_0": [f"first {i}" for i in range(4)],
        "caption_1": [f"second {i}" for i in range(4)],
        "captions": [[f"x{i}", f"y{i}"] for i in range(4)],
        "kind": [0, 1, 1, 0],
    }
    (folder / "data").mkdir(parents=True)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / "data" / "test-00000-of-00001.parquet"))
    return folder


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = sys.modules.get("datasets")
    if datasets is not None:
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def test_a_hub_data_set_as_each_kind_of_task(hub: Path, tmp_path: Path) -> None:
    source = {"kind": "hf", "path": str(hub), "split": "test", "members": {"image": ["image_0"], "text": ["captions"]}}
    rows = read_rows(own(tmp_path, kind="retrieval", source=source)).rows
    assert [c.text for c in rows[2].contents["text"]] == ["x2", "y2"]
    assert rows[0].contents["image"][0].read() == picture((200, 0, 0))
    by_name = own(tmp_path, kind="classification", source=source, label="kind", templates=["{}"])
    assert [r.label for r in read_rows(by_name).rows] == ["warm", "cold", "cold", "warm"]
    by_number = own(
        tmp_path, kind="classification", source=source, label="kind", templates=["{}"], classes=["hot", "icy"]
    )
    assert evaluate(Pixels(), [by_number], progress=False)["tasks"]["own"]["details"]["classes"] == ["hot", "icy"]
    cold = own(tmp_path, kind="retrieval", source={**source, "where": {"kind": "cold"}})
    assert [r.id for r in read_rows(cold).rows] == ["test:1", "test:2"]
    pairs = {**source, "members": {"image": ["image_0+image_1"], "text": ["caption_0+caption_1"]}}
    result = evaluate(Pixels(), [own(tmp_path, kind="compositional", source=pairs)], progress=False)["tasks"]["own"]
    assert result["n"] == {"puzzles": 4, "image": 8, "text": 8}
    assert result["chance"] == {"text_score": 0.25, "image_score": 0.25, "group_score": pytest.approx(1 / 6, abs=1e-6)}


def test_winoground_names_its_columns(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = load_task("winoground")
    stand_in = task.model_copy(update={"source": task.source.model_copy(update={"path": str(hub)})})
    row = read_rows(stand_in).rows[1]
    assert [c.text for c in row.contents["text"]] == ["first 1", "second 1"]
    assert [c.read() for c in row.contents["image"]] == [picture((0, 200, 0)), picture((0, 200, 0))]


def test_what_a_hub_data_set_lacks_is_said(hub: Path, tmp_path: Path) -> None:
    source = {"kind": "hf", "path": str(hub), "split": "test", "members": {"image": ["image_2"], "text": ["captions"]}}
    with pytest.raises(ConfigError, match=r"no column 'image_2'\. Did you mean 'image_"):
        read_rows(own(tmp_path, kind="retrieval", source=source))
    with pytest.raises(DataError, match=r"the data set .* cannot be read"):
        read_rows(own(tmp_path, kind="retrieval", source={**source, "split": "nowhere"}))
    with pytest.raises(DataError, match=r"the data set .*gone cannot be read"):
        read_rows(own(tmp_path, kind="retrieval", source={**source, "path": str(tmp_path / "gone")}))
    with pytest.raises(ConfigError, match="split: name the split"):
        own(tmp_path, kind="retrieval", source={**source, "split": None})


# --- driving ------------------------------------------------------------------------------------------------------


@needs_driving
@pytest.mark.parametrize(
    ("name", "source", "objects"),
    [("kitti_objects", "kitti_object", 31), ("scene0523_objects", "nuscenes_scene-0523", 384)],
)
def test_calibration_and_objects_equal_the_golden_pairs(
    name: str, source: str, objects: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answers come from a loader that shares no code with this one."""
    lines = [json.loads(x) for x in (SHARED / "camera_lidar/golden_pairs.jsonl").read_text().splitlines()]
    golden = {Path(g["image"]).stem: g for g in lines if g["source"] == source}
    task = shipped(name, SHARED, monkeypatch)
    root, split = paths_of(task)[0], task.source.split
    keys = kitti_object(Path(root, split or "")) if "kitti" in name else nuscenes(root, split)
    frames = list(frames_of(keys, Corruption()))
    assert {f.id for f in frames} == set(golden)
    assert sum(len(g["crops"]) for g in golden.values()) == objects
    # Every third of the large set: each frame's sweep is read and projected.
    for frame in frames if len(frames) < 20 else frames[::3]:
        want = golden[frame.id]
        to_picture = frame.view.intrinsics @ (np.linalg.inv(frame.view.to_ego) @ frame.key.lidar_to_ego)[:3]
        assert np.allclose(to_picture, np.array(want["P"])[:, :4] @ np.array(want["lidar_to_cam"]), atol=1e-2)
        points = frame.points()
        seen = points[frame.seen(points)]
        assert (len(points), len(seen)) == (want["n_points"], want["n_in_image"])
        # KITTI's P2 moves the camera by a few millimetres; that is part of our camera's pose, not of theirs.
        assert seen[:, 2].mean() == pytest.approx(want["mean_depth_in_image"], abs=1e-2)
        found = [(b, frame.visible(b, seen)) for b in frame.boxes]
        got = sorted((b.cls, [round(v, 1) for v in box], int(b.inside(seen[:, :3]).sum())) for b, box in found if box)
        assert got == sorted((c["cls"], c["box2d"], c["n_points"]) for c in want["crops"])


@needs_driving
def test_what_a_driving_item_is(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = read_rows(shipped("kitti_frames", SHARED, monkeypatch)).rows
    assert [r.id for r in rows][:2] == ["000000", "000001"]
    points = np.load(io.BytesIO(rows[0].contents["lidar"][0].read()), allow_pickle=False)  # type: ignore[arg-type]
    assert points.dtype == np.float32
    assert points.shape == (20285, 4)
    assert points[:, 0].min() > MIN_DEPTH  # forward first
    assert 0 <= points[:, 3].min() <= points[:, 3].max() <= 1
    row = next(r for r in read_rows(shipped("kitti_lidar_classes", SHARED, monkeypatch)).rows if r.label == "Car")
    car = np.load(io.BytesIO(row.contents["lidar"][0].read()), allow_pickle=False)  # type: ignore[arg-type]
    assert np.ptp(car[:, 2]) < 2.5  # no car is higher
    instances = read_rows(shipped("scene0523_objects", SHARED, monkeypatch)).rows
    assert len({r.label for r in instances}) < len(instances) == 384


def test_driving_folders_that_are_broken_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        DataError, match=r"task kitti_frames: kitti\.path: there is no folder .*kitti_object\. How to get it"
    ):
        read_rows(shipped("kitti_frames", tmp_path, monkeypatch))
    base = tmp_path / "camera_lidar/kitti_object/training"
    base.mkdir(parents=True)
    with pytest.raises(DataError, match="there are no images in"):
        read_rows(shipped("kitti_frames", tmp_path, monkeypatch))
    put(base / "image_2/000000.png", picture((1, 2, 3)))
    put(base / "calib/000000.txt", "P2: 1 2 3\n")
    with pytest.raises(DataError, match=r"000000\.txt must give P2 with 12 numbers"):
        read_rows(shipped("kitti_frames", tmp_path, monkeypatch))
    (tmp_path / "camera_lidar/nuscenes").mkdir()
    with pytest.raises(DataError, match=r"There is no file .*v1\.0-mini/.*\.json"):
        read_rows(shipped("nuscenes_frames", tmp_path, monkeypatch))


# --- the sounds at hand -------------------------------------------------------------------------------------------


@needs_audio
@pytest.mark.parametrize(
    ("name", "n", "check"),
    [
        ("esc10", 240, lambda r: len({x.label for x in r}) == 10),
        ("esc10_titles", 240, lambda r: sum(len(x.contents["text"]) for x in r) == 239),
        ("esc10_probe", 80, lambda r: len({x.label for x in r}) == 10),
        ("fsdd", 400, lambda r: len({x.label for x in r}) == 10),
        ("fsdd_probe", 108, lambda r: len({x.label for x in r}) == 10),
        ("asterisk", 300, lambda r: r[0].contents["text"][0].text == "Activated."),
        ("tuxpaint_audio", 200, lambda r: all(x.contents["audio"][0].read() for x in r[:5])),
    ],
)
def test_tasks_on_real_sounds(name: str, n: int, check: Callable[[Any], bool], monkeypatch: pytest.MonkeyPatch) -> None:
    task = shipped(name, SHARED, monkeypatch)
    rows = read_rows(task).rows
    assert len(rows) == n
    assert check(rows)
    assert rows[0].contents["audio"][0].read()
    if task.kind == "probe":
        other = read_rows(task.at(task.train)).rows
        assert {r.label for r in other} == {r.label for r in rows}
        assert not {r.id for r in other} & {r.id for r in rows}
