"""KITTI and nuScenes as published → shards: geometry survive, broken records are dropped by reason, pages show both."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1] / "data"))
from _rigs import FOLDER, KITTI, NUSCENES, golden, here

from dualenc.data.driving.geometry import project, seen
from dualenc.data.driving.places import read_regions
from dualenc.data.modalities.camera import CameraConfig, CameraInput
from dualenc.data.modalities.lidar import LidarConfig, LidarInput
from dualenc.data.modalities.picture import open_picture
from dualenc.data.shards.reader import iter_samples
from dualenc.errors import ConfigError, DataError
from dualenc_data_tools.build import build
from dualenc_data_tools.check import check
from dualenc_data_tools.view import view

pytestmark = here

CAMERA, LIDAR = CameraInput(CameraConfig()), LidarInput(LidarConfig(features=["intensity"]))
WANTED = {"camera": CAMERA.default_members[:1], "lidar": LIDAR.default_members[:1], "boxes": ["json:boxes"]}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole keyframes of both sets, and pairs of nuScenes."""
    out = tmp_path_factory.mktemp("driving")
    options: dict[str, Any] = {"progress": False, "verify": False}
    assert build("kitti", out / "kitti", path=str(KITTI), **options).samples == 11
    assert build("nuscenes", out / "nuscenes", path=str(NUSCENES), limit=3, **options).written == {"train": 3}
    few = {"unit": "cameras", "cameras": ["CAM_FRONT", "CAM_BACK"], "limit": 4}
    assert build("nuscenes", out / "pairs", few, path=str(NUSCENES), **options).samples == 4
    return out


def tar(folder: Path) -> str:
    return str(folder / "train-000000.tar")


@pytest.mark.parametrize("name", ["kitti", "nuscenes", "pairs"])
def test_shards_hold_the_golden_geometry(name: str, shards: Path) -> None:
    checked = 0
    for key, found in iter_samples(tar(shards / name), WANTED):
        assert not isinstance(found, Exception), key
        cloud = LIDAR.decode(found.values["lidar"])
        views = found.values["camera"]["json:cameras"]["views"]
        for view_, shot in zip(views, CAMERA.decode(found.values["camera"]), strict=True):
            to_camera = np.linalg.inv(shot.to_ego) @ cloud.to_ego
            uv, depth = project(cloud.points[:, :3].astype(np.float64), to_camera, shot.intrinsics)
            ok = seen(uv, depth, tuple(view_["size"]))
            same = [
                r for r in golden().values()
                if abs(int(ok.sum()) - r["n_in_image"]) <= 2
                and np.abs(uv[ok].mean(0) - [r["mean_u"], r["mean_v"]]).max() < 0.3
            ]  # fmt: skip
            assert len(same) == 1, f"{key} {view_['name']}: no golden pair, or several"
            if name == "pairs":
                assert len(ok) - int(ok.sum()) <= 2, "a pair has only the points inside its image"
                assert cloud.points[:, 0].min() > 0.4, "ahead of the camera"
            checked += 1
        assert cloud.points[:, 3].max() <= 1
    assert checked == {"kitti": 11, "nuscenes": 18, "pairs": 4}[name]


def test_check_and_page(shards: Path, tmp_path: Path) -> None:
    for name, pictures in (("kitti", 2), ("nuscenes", 2), ("pairs", 2)):
        report = check(tar(shards / name), progress=False)
        assert report.ok, report.stats.examples
        page = view(tar(shards / name), tmp_path / f"{name}.html", n=pictures).read_text()
        assert page.count("class='wide'") == pictures
        assert page.count("src='data:image/webp") == pictures
        assert "points; inside: " in page
        assert "regions of" not in page
    counts = dict(re.findall(r"(CAM_[A-Z_]+) ([\d,]+)", page))
    assert counts.keys() <= {"CAM_FRONT", "CAM_BACK"}


def copied_kitti(folder: Path, frames: list[str]) -> Path:
    for part, ending in (("image_2", "png"), ("velodyne", "bin"), ("calib", "txt"), ("label_2", "txt")):
        (folder / part).mkdir(parents=True)
        for f in frames:
            shutil.copy(KITTI / part / f"{f}.{ending}", folder / part / f"{f}.{ending}")
            (folder / part / f"{f}.{ending}").chmod(0o644)
    return folder


def empty(folder: Path) -> None:
    (folder / "velodyne" / "000001.bin").write_bytes(b"")


def half(folder: Path) -> None:
    path = folder / "velodyne" / "000001.bin"
    path.write_bytes(path.read_bytes()[:-5])


def not_finite(folder: Path) -> None:
    path = folder / "velodyne" / "000001.bin"
    points = np.fromfile(path, np.float32)
    points[4:6] = np.nan
    points.tofile(path)


def singular(folder: Path) -> None:
    path = folder / "calib" / "000001.txt"
    path.write_text(re.sub(r"(?m)^P2: \S+", "P2: 0.0", path.read_text()))


def no_sweep(folder: Path) -> None:
    (folder / "velodyne" / "000001.bin").unlink()


def another_drive(folder: Path) -> None:
    """Frame 1's calibration (1242×375) is put beside the picture of frame 0's camera (1224×370)."""
    shutil.copy(KITTI / "image_2" / "000000.png", folder / "image_2" / "000003.png")


@pytest.mark.parametrize(
    ("spoil", "reason", "detail"),
    [
        (empty, "broken sensor", "has 0 bytes"),
        (half, "broken sensor", "not a whole number of points"),
        (not_finite, "numbers not finite", "1 of "),
        (singular, "singular intrinsics", "camera image_2: singular intrinsics (focal lengths 0"),
        (no_sweep, "file missing", "There is no file"),
        (another_drive, "calibration of another drive", "its calibration is for 1242×375"),
    ],
)
def test_broken_frames_are_dropped_by_reason(
    spoil: Callable[[Path], None], reason: str, detail: str, tmp_path: Path
) -> None:
    folder = copied_kitti(tmp_path / "k", ["000001", "000002", "000003"])
    spoil(folder)
    report = build("kitti", tmp_path / "out", path=str(folder), max_dropped_share=0.5, progress=False)
    assert report.written == {"train": 2}
    assert report.dropped == {reason: 1}
    assert report.dropped_file is not None
    assert detail in json.loads(report.dropped_file.read_text())["detail"]


def nuscenes_with(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The real tables, changed; pictures and sweeps by link."""
    folder.mkdir()
    (folder / "samples").symlink_to(NUSCENES / "samples")
    (folder / "v1").mkdir()
    tables = {p.stem: json.loads(p.read_text()) for p in NUSCENES.glob("*/*.json")}
    change(tables)
    for name, rows in tables.items():
        (folder / "v1" / f"{name}.json").write_text(json.dumps(rows))
    return folder


def first_camera(tables: dict[str, Any]) -> dict[str, Any]:
    """The front camera's picture of the first keyframe."""
    return next(r for r in tables["sample_data"] if "/CAM_FRONT/" in r["filename"])


def flat(tables: dict[str, Any]) -> None:
    for row in tables["calibrated_sensor"]:
        if row["token"] == first_camera(tables)["calibrated_sensor_token"]:
            row["camera_intrinsic"][0][0] = 0.0


def elsewhere(tables: dict[str, Any]) -> None:
    for row in tables["ego_pose"]:
        if row["token"] == first_camera(tables)["ego_pose_token"]:
            row["translation"][0] += 400.0


def other_scene(tables: dict[str, Any]) -> None:
    """One keyframe is said to be of another drive, with the calibration of the first."""
    tables["scene"].append({**tables["scene"][0], "token": "other", "name": "scene-0001"})
    token = first_camera(tables)["sample_token"]
    for row in tables["sample"]:
        if row["token"] == token:
            row["scene_token"] = "other"


def no_picture(tables: dict[str, Any]) -> None:
    first_camera(tables)["filename"] = "samples/CAM_FRONT/nothing.jpg"


@pytest.mark.parametrize(
    ("change", "reason", "dropped"),
    [
        (flat, "singular intrinsics", 20),
        (elsewhere, "calibration of another drive", 1),
        (other_scene, "calibration of another drive", 1),
        (no_picture, "camera missing", 1),
    ],
)
def test_broken_tables_drop_their_keyframes(
    change: Callable[[dict[str, Any]], None], reason: str, dropped: int, tmp_path: Path
) -> None:
    folder = nuscenes_with(tmp_path / "n", change)
    options: dict[str, Any] = {"path": str(folder), "max_dropped_share": 1.0, "verify": False}
    if dropped == 20:
        with pytest.raises(DataError, match=f"20 × {reason}"):
            build("nuscenes", tmp_path / "out", options, boxes=False, progress=False)
        return
    report = build("nuscenes", tmp_path / "out", options, boxes=False, progress=False)
    assert (report.samples, report.dropped) == (19, {reason: 1})


def test_objects_are_the_golden_crops(tmp_path: Path) -> None:
    """Numbers, classes, points and edges as an independent loader found them; the points are those of the box."""
    build("kitti", tmp_path, path=str(KITTI), unit="objects", progress=False)
    found: dict[str, list[tuple[str, int, tuple[int, int]]]] = {}
    wanted = {"lidar": ["json:lidar+lidar.npy"], "picture": ["cam.png"], "class": ["json:class"]}
    for key, got in iter_samples(tar(tmp_path), wanted):
        assert not isinstance(got, Exception), key
        points = LIDAR.decode(got.values["lidar"]).points
        assert (points[:, 0] > 0).all(), "in front of the camera"
        size = open_picture(got.values["picture"]).size
        found.setdefault(Path(key).name.rsplit("_", 1)[0], []).append((got.values["class"], len(points), size))
    rows = {Path(k).stem: row["crops"] for k, row in golden().items() if "kitti" in k and row["crops"]}
    assert found.keys() == rows.keys()
    for frame, crops in rows.items():
        assert len(crops) == len(found[frame])
        for crop, (cls, n, (width, height)) in zip(crops, found[frame], strict=True):
            assert crop["cls"] == cls
            assert abs(crop["n_points"] - n) <= 2
            left, top, right, bottom = crop["box2d"]
            assert abs(width - (right - left)) <= 1.5
            assert abs(height - (bottom - top)) <= 1.5
    with pytest.raises(ConfigError, match="unit=objects needs the labelled boxes"):
        build("kitti", tmp_path / "none", path=str(KITTI), unit="objects", boxes=False, progress=False)


def test_what_cannot_be_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="kept as they are"):
        build("kitti", tmp_path, path=str(KITTI), size=64, progress=False)
    with pytest.raises(DataError, match="11 × camera missing"):
        build("kitti", tmp_path, path=str(KITTI), cameras=["image_3"], progress=False)
    with pytest.raises(DataError, match="has 0 folders of tables"):
        build("nuscenes", tmp_path, path=str(KITTI), progress=False)
    with pytest.raises(DataError, match=r"contains no drive \(a folder with velodyne_points\)"):
        build("kitti_raw", tmp_path, path=str(FOLDER), progress=False)


def test_regions_are_drawn(tmp_path: Path) -> None:
    options = {"path": str(NUSCENES), "regions": True, "limit": 1, "boxes": False, "verify": False}
    build("nuscenes", tmp_path, options, progress=False)
    page = view(tar(tmp_path), tmp_path / "page.html").read_text()
    (_, found), *_ = iter_samples(tar(tmp_path), {"regions": ["regions.npy"]})
    assert not isinstance(found, Exception)
    regions = read_regions({"regions.npy": found.values["regions"]})[:, 3]
    told = re.search(r"([\d,]+) regions of ([\d,]+) places", page)
    assert told is not None
    assert int(told[1]) == len({r for r in regions if r >= 0}) > 20
    assert int(told[2].replace(",", "")) == int((regions >= 0).sum())
