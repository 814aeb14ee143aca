"""A source written once: the same module is packed into shards, evaluated as a task, and read for embedding."""

from __future__ import annotations

import gzip
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from dualenc.config import Section
from dualenc.data.driving.keyframes import kitti_object, kitti_raw
from dualenc.data.shards.reader import Found, iter_samples
from dualenc.data.sources import Content, Item, Layout, iter_source, open_layout, sources
from dualenc.data.sources.columns import contents_of
from dualenc.data.sources.driving import kitti_drives
from dualenc.errors import ConfigError, DataError
from dualenc_data_tools.build import build
from dualenc_evals.catalog import load_task, parse_task
from dualenc_evals.harness import definition, evaluate
from dualenc_evals.read.shards import read_rows
from dualenc_evals.task import Task

sys.path.append(str(Path(__file__).parents[1] / "evals"))
from _pixels import Pixels
from _rigs import KITTI, here

COLOURS = {"red": (200, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 200)}


def png(colour: tuple[int, int, int]) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(out, "PNG")
    return out.getvalue()


def task(**fields: Any) -> Task:
    return parse_task({"name": "own", **fields})


# --- one module ---------------------------------------------------------------------------------------------------


class PaintedSettings(Section):
    """``count=3``: pictures of one colour; nothing is on disk."""

    count: int = 3
    part: str = "train"


def painted(cfg: PaintedSettings) -> Iterator[Item]:
    for n, (name, colour) in enumerate(list(COLOURS.items())[: cfg.count]):
        contents = {
            "image": [Content(name, load=lambda c=colour: png(c))],  # type: ignore[misc]
            "text": [Content(f"{name}#0", text=f"a {name} square"), Content(f"{name}#1", text=name)],
        }
        yield Item(name, contents, {"number": n}, split=cfg.part, label=name)


class SheetSettings(Section):
    """``rows=2``: a table of another package."""

    rows: int = 2


def sheet(cfg: SheetSettings) -> Iterator[Item]:
    for n, (name, colour) in enumerate(list(COLOURS.items())[: cfg.rows]):
        yield Item(f"sheet:{n}", fields={"picture": png(colour), "about": {"title": name}}, name=f"sheet-{n}")


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_entries", dict(sources._entries))
    sources.register("painted")(Layout(PaintedSettings, painted, "squares of one colour"))
    sources.register("sheet")(Layout(SheetSettings, sheet, "a table of squares", table=True))


def packed(out: Path, wanted: dict[str, list[str]]) -> dict[str, dict[str, Any]]:
    got = {}
    for key, found in iter_samples(str(out / "*.tar"), wanted):
        assert isinstance(found, Found), found
        got[key.rpartition("/")[2]] = found.values
    return got


@pytest.mark.usefixtures("registered")
def test_one_module_is_packed_evaluated_and_embedded(tmp_path: Path) -> None:
    report = build("painted", tmp_path, {"part": "val", "encode": "keep"}, progress=False)
    assert report.written == {"val": 3}
    got = packed(tmp_path, {"image": ["png"], "text": ["json:captions"], "number": ["json:number"]})
    assert got["green"] == {"image": png(COLOURS["green"]), "text": ["a green square", "green"], "number": 1}

    own = task(kind="classification", source={"kind": "painted", "count": 2}, templates=["a {} square"])
    assert [(r.id, r.label) for r in read_rows(own).rows] == [("red", "red"), ("green", "green")]
    assert evaluate(Pixels(), [own], progress=False)["tasks"]["own"]["n"]["image"] == 2
    pairs = task(kind="retrieval", source={"kind": "painted", "where": {"number": "2"}})
    assert [c.text for c in read_rows(pairs).rows[0].contents["text"]] == ["a blue square", "blue"]

    samples = dict(iter_source("painted", {"count": 1}))
    assert samples == {"red": {"image": png(COLOURS["red"]), "text": ["a red square", "red"]}}


@pytest.mark.usefixtures("registered")
def test_an_item_that_fails_costs_that_item_only(tmp_path: Path) -> None:
    """Whatever a source's own code raises while one item is read."""

    def half(cfg: PaintedSettings) -> Iterator[Item]:
        for item in painted(cfg):
            bad = Content(item.id, load=lambda: bytes({}["green"]))
            yield item if item.id != "green" else Item(item.id, {**item.contents, "image": [bad]}, label="green")

    sources.register("half")(Layout(PaintedSettings, half, "one of them is broken"))
    report = build("half", tmp_path, max_dropped_share=0.5, progress=False)
    assert (report.written, report.dropped) == ({"train": 2}, {"broken image": 1})
    samples = dict(iter_source("half", {}))
    assert str(samples["green"]["image"]) == "KeyError: 'green'"
    assert samples["green"]["text"] == ["a green square", "green"]


@pytest.mark.usefixtures("registered")
def test_a_table_of_another_package_takes_members_in_all_three(tmp_path: Path) -> None:
    members = {"image": ["picture"], "text": ["about.title"]}
    assert build("sheet", tmp_path, {"members": members, "keep": "none"}, progress=False).samples == 2
    assert packed(tmp_path, {"image": ["png"], "text": ["txt"]})["sheet-1"]["text"] == b"green"
    rows = read_rows(task(kind="retrieval", source={"kind": "sheet", "rows": 3, "members": members})).rows
    assert [(r.contents["image"][0].read(), r.contents["text"][0].text) for r in rows] == [
        (png(c), name) for name, c in COLOURS.items()
    ]
    samples = list(iter_source("sheet", {"members": members, "limit": 1}))
    assert samples == [("sheet:0", {"image": png(COLOURS["red"]), "text": "red"})]


@pytest.mark.usefixtures("registered")
def test_wrong_settings_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"painted\.conut: unknown key\. Did you mean 'count'\?"):
        open_layout("painted", {"conut": 1})
    with pytest.raises(ConfigError, match=r"There is no source 'panited'\. Did you mean 'painted'\?"):
        list(iter_source("panited", {}))
    with pytest.raises(ConfigError, match=r"painted\.conut: unknown key .*Did you mean 'count'\?"):
        build("painted", tmp_path, {"conut": 1}, progress=False)
    said = tmp_path / "t.yaml"
    for source, message in (
        ({"kind": "panited"}, r"source\.kind: unknown source\. Did you mean 'painted'\?"),
        ({"kind": "painted", "conut": 1}, r"source\.conut: unknown key of this source\. Did you mean 'count'\?"),
        ({"kind": "jsonl"}, r"source\.path: missing: a jsonl source needs the path of its data"),
    ):
        said.write_text(yaml.safe_dump({"kind": "retrieval", "source": source}))
        with pytest.raises(ConfigError, match=message):
            load_task(said)


# --- one grammar --------------------------------------------------------------------------------------------------


def listing(folder: Path, lines: list[dict[str, Any]], name: str = "list.jsonl") -> Path:
    for line in lines:
        for key in ("image", "file"):
            if key in line:
                (folder / line[key]).parent.mkdir(parents=True, exist_ok=True)
                (folder / line[key]).write_bytes(png((len(line[key]), 0, 0)))
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
    path = folder / name
    path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    return path


@pytest.mark.parametrize("spec", ["file", "file:file", "pictures/{number:03}.png", "missing+also"])
def test_a_column_is_written_alike_in_packing_and_in_tasks(spec: str, tmp_path: Path) -> None:
    path = listing(tmp_path, [{"file": f"pictures/{n:03}.png", "number": n, "title": f"no {n}"} for n in (1, 22)])
    members = {"image": [spec], "text": ["title"]}
    if spec == "missing+also":
        with pytest.raises(ConfigError, match="no field 'missing"):
            build("jsonl", tmp_path / "out", {"path": str(path), "members": members}, progress=False)
        with pytest.raises(ConfigError, match="no column 'missing'"):
            read_rows(task(kind="retrieval", source={"kind": "jsonl", "path": str(path), "members": members}))
        with pytest.raises(ConfigError, match="no column 'missing'"):
            list(iter_source("jsonl", {"path": str(path), "members": members}))
        return
    pictures = [(tmp_path / f"pictures/{n:03}.png").read_bytes() for n in (1, 22)]
    build("jsonl", tmp_path / "new", {"path": str(path), "members": members}, progress=False)
    build("jsonl", tmp_path / "old", {"path": str(path), "image": spec, "caption": "title"}, progress=False)
    wanted = {"image": ["png"], "text": ["json:captions"]}
    for out in ("new", "old"):
        got = packed(tmp_path / out, wanted)
        assert [v["image"] for v in got.values()] == pictures
        assert [v["text"] for v in got.values()] == [["no 1"], ["no 22"]]
    rows = read_rows(task(kind="retrieval", source={"kind": "jsonl", "path": str(path), "members": members})).rows
    assert [r.contents["image"][0].read() for r in rows] == pictures
    assert [v["image"] for _, v in iter_source("jsonl", {"path": str(path), "members": members})] == pictures


def test_members_and_the_old_spelling_do_not_contradict_each_other(tmp_path: Path) -> None:
    path = listing(tmp_path, [{"image": "a.png", "text": "x"}])
    with pytest.raises(ConfigError, match=r"jsonl\.members\.image: jsonl\.image sets this too"):
        build("jsonl", tmp_path / "o", path=str(path), image="image", members={"image": ["image"]}, progress=False)
    with pytest.raises(ConfigError, match=r"rows are packed with image, audio and text, not 'lidar'"):
        build("jsonl", tmp_path / "o", path=str(path), members={"lidar": ["image"]}, progress=False)


def test_packing_and_tasks_read_the_same_file_the_same_way(tmp_path: Path) -> None:
    """A line separator inside a string, a byte order mark, .gz: one reader."""
    lines = [{"image": "a.png", "caption": "one\u2028line"}, {"image": "b.png", "caption": "two"}]
    for name in ("list.jsonl", "list.jsonl.gz"):
        path = listing(tmp_path, lines, name)
        if name == "list.jsonl":
            path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        source = {"kind": "jsonl", "path": str(path)}
        assert len(read_rows(task(kind="retrieval", source=source)).rows) == 2
        assert build("jsonl", tmp_path / name.replace(".", "_"), path=str(path), progress=False).samples == 2
    (tmp_path / "r.csv").write_text("image,caption\na.png,x\nb.png\n")
    for read in (
        lambda: read_rows(task(kind="retrieval", source={"kind": "csv", "path": str(tmp_path / "r.csv")})),
        lambda: build("csv", tmp_path / "out", path=str(tmp_path / "r.csv"), progress=False),
        lambda: list(iter_source("csv", {"path": str(tmp_path / "r.csv")})),
    ):
        with pytest.raises(DataError, match=r"r\.csv:3 has 1 columns, the header has 2: image, caption"):
            read()


def test_paths_of_a_list_stay_inside_its_folder(tmp_path: Path) -> None:
    item = Item("l:1", fields={"image": "../secret.png"}, folder=str(tmp_path))
    with pytest.raises(DataError, match="paths must stay inside the list's folder"):
        contents_of(item, "image", {})
    (tmp_path / "list.jsonl").write_text('{"image": "../secret.png", "text": "x"}\n')
    ((_, values),) = iter_source("jsonl", {"path": str(tmp_path / "list.jsonl")})
    assert isinstance(values["image"], DataError)
    assert values["text"] == "x"


def test_parquet_is_a_task_and_its_pictures_are_read_when_asked_for(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    raw = [png(c) for c in COLOURS.values()]
    table = pa.table(
        {"image": [{"bytes": b, "path": None} for b in raw], "plain": raw, "caption": list(COLOURS), "n": [0, 1, 2]}
    )
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    for column in ("image", "plain"):
        source = {"kind": "parquet", "path": str(tmp_path), "members": {"image": [column]}, "where": {"n": ["0", "2"]}}
        rows = read_rows(task(kind="retrieval", source=source)).rows
        assert [r.contents["image"][0].read() for r in rows] == [raw[0], raw[2]]
        assert [r.contents["text"][0].text for r in rows] == ["red", "blue"]
    samples = dict(iter_source("parquet", {"path": str(tmp_path)}))
    assert list(samples) == ["a:0:0", "a:0:1", "a:1:0"]
    assert samples["a:1:0"] == {"image": raw[2], "text": "blue"}


def test_a_folder_with_texts_beside_the_files_is_a_retrieval_task(tmp_path: Path) -> None:
    for n, name in enumerate(COLOURS):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{n}.png").write_bytes(png(COLOURS[name]))
        (tmp_path / name / f"._{n}.png").write_bytes(b"a Mac's own file")
        if n:
            (tmp_path / name / f"{n}.txt").write_text(f"a {name} square")
    rows = read_rows(task(kind="retrieval", source={"kind": "folder", "path": str(tmp_path)})).rows
    assert [r.id for r in rows] == ["blue/2.png", "green/1.png", "red/0.png"]
    texts = {r.id: r.contents["text"][0] for r in rows}
    assert texts["green/1.png"].read() == "a green square"
    with pytest.raises(DataError, match=r"no caption: neither 0\.json nor 0\.txt"):
        texts["red/0.png"].read()
    classes = task(kind="classification", source={"kind": "folder", "path": str(tmp_path)}, templates=["{}"])
    assert {r.id: r.label for r in read_rows(classes).rows} == {f"{c}/{n}.png": c for n, c in enumerate(COLOURS)}
    loose = tmp_path / "9.png"
    loose.write_bytes(png((1, 1, 1)))
    with pytest.raises(DataError, match=r"label: 9\.png has no class"):
        read_rows(classes)


# --- labels -------------------------------------------------------------------------------------------------------


def labelled(tmp_path: Path, values: list[Any], **fields: Any) -> Task:
    lines = [{"image": f"{n}.png", "label": v} for n, v in enumerate(values)]
    source = {"kind": "jsonl", "path": str(listing(tmp_path, lines))}
    return task(**{"kind": "classification", "label": "label", "templates": ["{}"], **fields}, source=source)


def test_minus_one_means_no_label(tmp_path: Path) -> None:
    values = [0, -1, 2, "-1", 1.0]
    classes = list(COLOURS)
    with pytest.raises(DataError, match=r"list:2 has the label −1, .*leave such items out with other_labels: drop"):
        read_rows(labelled(tmp_path, values, classes=classes))
    dropping = labelled(tmp_path, values, classes=classes, other_labels="drop")
    assert [r.label for r in read_rows(dropping).rows] == ["0", None, "2", None, "1"]
    result = evaluate(Pixels(), [dropping], progress=False)["tasks"]["own"]
    assert result["n"]["image"] == 3
    assert result["details"]["classes"] == classes
    own = labelled(tmp_path, ["-1", "1"], classes={"-1": "below", "1": "above"})
    assert [r.label for r in read_rows(own).rows] == ["-1", "1"], "a class of that name is a class"


def test_one_hot_lists_are_class_numbers(tmp_path: Path) -> None:
    hot = [[0, 0, 1], [1.0, 0.0, 0.0]]
    assert [r.label for r in read_rows(labelled(tmp_path, hot, classes=list(COLOURS))).rows] == ["2", "0"]
    named = {"r": "red", "g": "green", "b": "blue"}
    assert [r.label for r in read_rows(labelled(tmp_path, hot, classes=named)).rows] == ["b", "r"]
    for values, message in (
        ([[0, 1, 1]], "has 2 classes in 'label'; a classification task needs one, use kind: multilabel"),
        ([["red", "blue"]], "has the list .* a classification task needs one class name"),
    ):
        with pytest.raises(DataError, match=message):
            read_rows(labelled(tmp_path, values, classes=list(COLOURS)))
    with pytest.raises(DataError, match="a vector of 3 zeros and ones; name the classes in that order"):
        read_rows(labelled(tmp_path, hot))


def test_multi_hot_lists_and_lists_of_numbers(tmp_path: Path) -> None:
    options: dict[str, Any] = {"kind": "multilabel", "classes": list(COLOURS)}
    got = read_rows(labelled(tmp_path, [[1, 0, 1], [0, 0, 0], [0, 2], ["red"], [0, 1]], **options)).rows
    assert [r.labels for r in got] == [("0", "2"), (), ("0", "2"), ("red",), ("0", "1")]


def test_multi_hot_npy_members(tmp_path: Path) -> None:
    import tarfile

    def npy(values: Any) -> bytes:
        out = io.BytesIO()
        np.save(out, np.array(values))
        return out.getvalue()

    def shard(labels: list[bytes]) -> Task:
        with tarfile.open(tmp_path / "x.tar", "w") as tar:
            for n, label in enumerate(labels):
                for ending, raw in (("png", png((n, 0, 0))), ("npy", label)):
                    info = tarfile.TarInfo(f"{n}.{ending}")
                    info.size = len(raw)
                    tar.addfile(info, io.BytesIO(raw))
        (tmp_path / "index.json").unlink(missing_ok=True)
        return task(
            kind="multilabel", label="npy", templates=["{}"], classes=list(COLOURS),
            source={"kind": "shards", "path": str(tmp_path / "x.tar")},
        )  # fmt: skip

    rows = read_rows(shard([npy([1, 0, 1]), npy([False, True, False])])).rows
    assert [r.labels for r in rows] == [("0", "2"), ("1",)]
    for raw, message in (
        (npy([[1, 0, 1]]), r"has shape \[1, 3\]"),
        (npy([2, 0, 1]), "one row of zeros and ones"),
        (npy([1, 0]), "has 2 numbers for 3 classes"),
        (npy([1, 0, 1])[:40], "is not a readable .npy"),
        (b"\x93NUMPY\x01\x00", "is not a readable .npy"),
    ):
        with pytest.raises(DataError, match=message):
            read_rows(shard([raw]))


# --- KITTI raw ----------------------------------------------------------------------------------------------------


def test_drives_are_found_at_every_level_and_what_is_expected_is_said(tmp_path: Path) -> None:
    drive = tmp_path / "raw" / "2011_09_26" / "2011_09_26_drive_0001_sync"
    (drive / "velodyne_points" / "data").mkdir(parents=True)
    for start in (drive, drive.parent, tmp_path / "raw"):
        assert kitti_drives(str(start)) == [drive]
    with pytest.raises(DataError, match=r"expected are DATE/DRIVE_sync/velodyne_points/data/\*\.bin"):
        kitti_drives(str(tmp_path))
    (drive / "velodyne_points" / "data" / "0.bin").write_bytes(b"\0" * 16)
    with pytest.raises(DataError, match=r"There is no file calib_cam_to_cam\.txt or calib_velo_to_cam\.txt in .*DATE/"):
        next(iter(iter_source("kitti_raw", {"path": str(drive)}, ["lidar"])))


def raw_drive(drive: Path, calibration: Path, data: str) -> None:
    """Frame 0 of the object set, laid out as a raw drive."""
    given = dict(x.split(":", 1) for x in (KITTI / "calib" / "000000.txt").read_text().splitlines() if ":" in x)
    for part, origin, name in (("image_02", "image_2/000000.png", "0.png"),
                               ("velodyne_points", "velodyne/000000.bin", "0.bin")):  # fmt: skip
        (drive / part / data).mkdir(parents=True)
        (drive / part / data / name).symlink_to(KITTI / origin)
    tr = [float(v) for v in given["Tr_velo_to_cam"].split()]
    rotation, shift = [tr[i] for i in (0, 1, 2, 4, 5, 6, 8, 9, 10)], [tr[i] for i in (3, 7, 11)]
    velo = f"R: {' '.join(map(str, rotation))}\nT: {' '.join(map(str, shift))}\n"
    (calibration / "calib_velo_to_cam.txt").write_text(velo)
    cams = [f"R_rect_00: {given['R0_rect']}", f"P_rect_02: {given['P2']}", "S_rect_02: 1.224e+03 3.7e+02"]
    (calibration / "calib_cam_to_cam.txt").write_text("\n".join(cams))


@here
@pytest.mark.parametrize("data", ["data", ""])
def test_a_raw_drive_without_its_day_is_read(data: str, tmp_path: Path) -> None:
    """The calibration lies in the drive, and files directly in the sensors' folders: the same frame, packed as well."""
    drive = tmp_path / "mine"
    drive.mkdir()
    raw_drive(drive, drive, data)
    raw, first = next(iter(kitti_raw(drive, ("02",)))), next(iter(kitti_object(KITTI)))
    np.testing.assert_allclose(raw.views[0].to_ego, first.views[0].to_ego, atol=1e-9)
    assert (raw.drive, raw.views[0].drive) == ("mine", "mine")
    report = build("kitti_raw", tmp_path / "out", path=str(drive), cameras=["image_02"], progress=False)
    assert (report.written, report.dropped) == ({"train": 1}, {})


@here
def test_the_calibration_of_another_day_is_still_refused(tmp_path: Path) -> None:
    drive = tmp_path / "2011_09_26" / "2011_10_03_drive_0027_sync"
    drive.mkdir(parents=True)
    raw_drive(drive, drive.parent, "data")
    with pytest.raises(DataError, match="1 × calibration of another drive"):
        build("kitti_raw", tmp_path / "out", path=str(drive), cameras=["image_02"], progress=False)


@here
def test_a_broken_picture_costs_its_frame_only(tmp_path: Path) -> None:
    for part, ending in (("image_2", "png"), ("velodyne", "bin"), ("calib", "txt")):
        (tmp_path / part).mkdir()
        for frame in ("000000", "000001"):
            (tmp_path / part / f"{frame}.{ending}").write_bytes((KITTI / part / f"{frame}.{ending}").read_bytes())
    (tmp_path / "image_2" / "000000.png").write_bytes(b"not a picture")
    source = {"kind": "kitti", "path": str(tmp_path)}
    rows = read_rows(task(kind="retrieval", modalities=("camera", "lidar"), source=source)).rows
    assert [r.id for r in rows] == ["000000", "000001"]
    with pytest.raises(DataError):
        rows[0].contents["camera"][0].read()
    samples = dict(iter_source("kitti", {"path": str(tmp_path)}, ["camera", "lidar"]))
    assert isinstance(samples["000000"]["camera"], DataError)
    assert isinstance(samples["000001"]["lidar"], bytes)


@here
def test_kitti_is_found_from_the_folder_above_training(tmp_path: Path) -> None:
    """Packing takes the folder that tasks name, and tasks the one that packing named."""
    report = build("kitti", tmp_path, path=str(KITTI.parent), verify=False, limit=1, progress=False)
    assert report.samples == 1
    rows = {
        path: [r.id for r in read_rows(
            task(kind="retrieval", modalities=("camera", "lidar"), source={"kind": "kitti", "path": str(path)})
        ).rows]
        for path in (KITTI, KITTI.parent)
    }  # fmt: skip
    assert rows[KITTI] == rows[KITTI.parent]
    key, values = next(iter_source("kitti", {"path": str(KITTI)}, ["camera", "lidar"]))
    assert key == "000000"
    assert values["camera"] == (KITTI / "image_2" / "000000.png").read_bytes()
    assert np.load(io.BytesIO(values["lidar"]), allow_pickle=False).shape == (20285, 4)


DEFINITIONS = {
    "flickr8k": "fdb20f1a8e46850a28293dbb594e7ccd",
    "esc50": "9b1d2345874fbc16ff78433934005bc2",
    "vggsound": "4f96999a330890cc8358d922e0edd6a3",
    "gtzan": "7aab90d31e5558f5e85a94d21699f9a9",
    "sugarcrepe_swap_obj": "a8a68e5610ef3853ccb2723fce986175",
    "winoground": "859bd340600d8521db494c1cd6572394",
    "kitti_frames": "b97fd215aad1c8ba12a1586b171553f5",
    "nuscenes_objects": "17c8fa6e67596ddc40b1afb9145b653f",
    "xm3600_de": "55a958f832d08a8607a798e29316fc48",
    "fsd50k": "c16e11e7041ef6ff422337a43ebe645a",
    "imagenet1k": "5b9850ff1485d9950fe891033fb8eef3",
    "esc10_probe": "ac632c5a4ff8ed3fafaf194b5cf5a565",
}


def test_shipped_tasks_keep_their_definitions() -> None:
    """The digests that results carry, for one task of every kind of source."""
    assert {name: definition(load_task(name)) for name in DEFINITIONS} == DEFINITIONS
