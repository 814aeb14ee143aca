"""Keyframes of driving data sets, read from their own files: images, one sweep, calibration, boxes.

Every sensor carries its own pose to a common frame, ego (:mod:`dualenc.data.driving.geometry`), so nothing that
looks at one sensor has to know another. KITTI (Geiger et al. 2012) has no ego frame of its own: its
Velodyne's is used. nuScenes (Caesar et al. 2020, arXiv 1903.11027): ego is the car's frame at the time of the sweep;
its motion until an image was taken is part of that image's pose.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dualenc.data.driving.geometry import F64, Bools, inverse, pose, project, rotation_of, split_projection
from dualenc.errors import DataError, did_you_mean

MARGIN = 1.05
"""Labels are tight: a point belongs to a box if it is inside the box enlarged by this factor."""
MIN_POINTS, MIN_PX, MIN_INSIDE = 10, 24, 0.7
"""An object with fewer points, fewer pixels in either direction, or a smaller share of its area inside the image is too
small to recognise."""


@dataclass(frozen=True, eq=False)
class Box:
    """A labelled object: its class, which object it is, its centre [3], axes [3, 3] (columns) and half sizes [3]."""

    cls: str
    instance: str
    center: F64
    axes: F64
    half: F64

    def corners(self) -> F64:
        """[8, 3], in the frame that ``center`` is in."""
        signs = np.array([[a, b, c] for a in (-1, 1) for b in (-1, 1) for c in (-1, 1)])
        return np.asarray(self.center + (signs * self.half) @ self.axes.T)

    def inside(self, points: F64) -> Bools:
        """[n]: which of ``points [n, 3]`` are in the box, or just around it."""
        return np.asarray((np.abs((points - self.center) @ self.axes) <= MARGIN * self.half).all(1))

    def moved(self, by: F64) -> Box:
        """The same object in another frame."""
        center = by[:3, :3] @ self.center + by[:3, 3]
        return Box(self.cls, self.instance, center, by[:3, :3] @ self.axes, self.half)


@dataclass(frozen=True, eq=False)
class CameraView:
    """One camera's image.

    Attributes:
        size: (width, height) that the calibration is for; None: not stated.
        intrinsics: [3, 3]; to_ego: [4, 4] camera → ego.
        drive: the drive that the calibration belongs to.
    """

    name: str
    path: Path
    size: tuple[int, int] | None
    intrinsics: F64
    to_ego: F64
    drive: str


@dataclass(frozen=True, eq=False)
class Keyframe:
    """One sweep and the images taken with it.

    Attributes:
        columns: names of a point's values in the file; top: largest intensity.
        lidar_to_ego: [4, 4]; ego_pose: [4, 4] ego → world, where the data set has it.
        boxes: in ego.
    """

    id: str
    drive: str
    sweep: Path
    columns: tuple[str, ...]
    top: float
    lidar_to_ego: F64
    views: tuple[CameraView, ...]
    ego_pose: F64 | None = None
    boxes: tuple[Box, ...] = ()

    def points(self) -> F64:
        """[n, C]: the sweep as it was measured, intensity in 0 … 1. Raises DataError for a broken file."""
        try:
            raw = self.sweep.read_bytes()
        except FileNotFoundError as e:
            raise DataError(_missing(self.sweep)) from e
        except OSError as e:
            raise DataError(f"Cannot read {self.sweep}: {e}") from e
        if not raw or len(raw) % (4 * len(self.columns)):
            raise DataError(
                f"{self.sweep} has {len(raw)} bytes, which is not a whole number of points of {len(self.columns)} "
                "float32 values"
            )
        out = np.frombuffer(raw, dtype="<f4").reshape(-1, len(self.columns)).astype(np.float64)
        out[:, 3] /= self.top
        return out


def part_seen(
    box: Box, points: F64, intrinsics: F64, size: tuple[int, int]
) -> tuple[float, float, float, float] | None:
    """The part of an image that shows an object.

    Args:
        box: in the camera's frame; points: [n, ≥ 3] inside the image, in that frame.
        intrinsics: [3, 3]; size: (width, height) of the image.

    Returns:
        (left, top, right, bottom) in pixels; None when too little of the object is visible.
    """
    corners = box.corners()
    if (corners[:, 2] <= 0).any():
        return None
    uv = project(corners, np.eye(4), intrinsics)[0]
    low, high = uv.min(0), uv.max(0)
    a, b = np.clip(low, 0, size), np.clip(high, 0, size)
    if (b - a < MIN_PX).any() or np.prod(b - a) < MIN_INSIDE * np.prod(high - low):
        return None
    if int(box.inside(points[:, :3]).sum()) < MIN_POINTS:
        return None
    return float(a[0]), float(a[1]), float(b[0]), float(b[1])


# --- KITTI --------------------------------------------------------------------------------------------------------


def kitti_object(folder: str | Path, boxes: bool = True) -> Iterator[Keyframe]:
    """The 3D object set's ``image_2``, ``velodyne``, ``calib`` and ``label_2`` below ``folder`` (``…/training``).

    Raises:
        DataError: a folder or file that is missing or broken.
    """
    folder = Path(folder)
    images = sorted((folder / "image_2").glob("*.png"))
    if not images:
        raise DataError(f"there are no images in {folder / 'image_2'}")
    for path in images:
        given = _kitti_numbers(folder / "calib" / f"{path.stem}.txt", {"P2": 12, "R0_rect": 9, "Tr_velo_to_cam": 12})
        rectified = _rows(given["R0_rect"], 3, 3) @ _rows(given["Tr_velo_to_cam"], 3, 4)
        K, shift = split_projection(given["P2"].reshape(3, 4))
        labels = folder / "label_2" / f"{path.stem}.txt"
        found = _kitti_boxes(labels, path.stem, inverse(rectified)) if boxes and labels.is_file() else []
        view = CameraView("image_2", path, None, K, inverse(shift @ rectified), "")
        sweep = folder / "velodyne" / f"{path.stem}.bin"
        yield Keyframe(path.stem, "", sweep, _KITTI_COLUMNS, 1.0, np.eye(4), (view,), boxes=tuple(found))


def kitti_raw(folder: str | Path, cameras: tuple[str, ...] = ("02", "03")) -> Iterator[Keyframe]:
    """A synced and rectified drive, ``…/2011_09_26/2011_09_26_drive_0001_sync``.

    Its calibration is in its day's folder, or in the drive's own if it was unpacked without the day; sweeps and images
    are in ``data`` folders, or directly in ``velodyne_points`` and ``image_02``.

    Raises:
        DataError: a folder or file that is missing or broken; says what is expected where.
    """
    folder = Path(folder).absolute()
    sweeps = sorted(_kitti_data(folder / "velodyne_points").glob("*.bin"))
    if not sweeps:
        raise DataError(f"there are no sweeps in {folder / 'velodyne_points' / 'data'}")
    beside = _kitti_calibration(folder)
    need = {"R_rect_00": 9} | {f"P_rect_{c}": 12 for c in cameras} | {f"S_rect_{c}": 2 for c in cameras}
    given = _kitti_numbers(beside / "calib_cam_to_cam.txt", need)
    velo = _kitti_numbers(beside / "calib_velo_to_cam.txt", {"R": 9, "T": 3})
    rectified = _rows(given["R_rect_00"], 3, 3) @ pose(velo["R"].reshape(3, 3), velo["T"])
    # A day's drives share a calibration, and a drive's name begins with its day: another day's calibration belongs to
    # another drive. A drive that is not named after a day has the calibration found with it.
    other = beside != folder and _DAY.match(folder.name) and not folder.name.startswith(beside.name)
    drive = beside.name if other else folder.name
    for sweep in sweeps:
        views = []
        for c in cameras:
            K, shift = split_projection(given[f"P_rect_{c}"].reshape(3, 4))
            width, height = (int(v) for v in given[f"S_rect_{c}"])
            path = _kitti_data(folder / f"image_{c}") / f"{sweep.stem}.png"
            views.append(CameraView(f"image_{c}", path, (width, height), K, inverse(shift @ rectified), drive))
        name = f"{folder.name}_{sweep.stem}"
        yield Keyframe(name, folder.name, sweep, _KITTI_COLUMNS, 1.0, np.eye(4), tuple(views))


_DAY = re.compile(r"\d{4}_\d\d_\d\d")


def _kitti_data(folder: Path) -> Path:
    """Where a sensor's files are: in its ``data`` folder, or directly in its own."""
    return folder if folder.is_dir() and not (folder / "data").is_dir() else folder / "data"


def _kitti_calibration(drive: Path) -> Path:
    """The folder that holds a raw drive's calibration."""
    names = ("calib_cam_to_cam.txt", "calib_velo_to_cam.txt")
    found = [p for p in (drive.parent, drive) if any((p / n).is_file() for n in names)]
    if not found:
        raise DataError(
            f"There is no file {names[0]} or {names[1]} in {drive.parent} or {drive}; KITTI's raw data are expected as "
            "DATE/calib_cam_to_cam.txt, DATE/calib_velo_to_cam.txt and DATE/DATE_drive_NNNN_sync/velodyne_points/data/"
            "*.bin (a day's calibration is a separate download), or with both files beside velodyne_points"
        )
    # Both folders may have one of the files: prefer the one with both.
    return next((p for p in found if all((p / n).is_file() for n in names)), found[0])


_KITTI_COLUMNS = ("x", "y", "z", "intensity")


def _rows(numbers: F64, rows: int, columns: int) -> F64:
    """Numbers of a calibration as a pose [4, 4]."""
    out = np.eye(4)
    out[:rows, :columns] = numbers.reshape(rows, columns)
    return out


def _kitti_numbers(path: Path, need: dict[str, int]) -> dict[str, F64]:
    out = {}
    for line in _text(path).splitlines():
        key, colon, numbers = line.partition(":")
        if colon and key.strip() in need:
            try:
                out[key.strip()] = np.array([float(v) for v in numbers.split()])
            except ValueError as e:
                raise DataError(f"{path}: {key} must be numbers: {e}") from e
    for key, n in need.items():
        if len(out.get(key, ())) != n:
            raise DataError(f"{path} must give {key} with {n} numbers")
    return out


def _kitti_boxes(path: Path, frame: str, to_ego: F64) -> list[Box]:
    out = []
    for n, line in enumerate(_text(path).splitlines()):
        cls, *numbers = line.split()
        if cls == "DontCare":
            continue
        try:
            h, w, length, x, y, z, turn = (float(v) for v in numbers[7:14])
        except ValueError as e:
            raise DataError(f"{path}, line {n + 1}, is not a KITTI label: {e}") from e
        c, s = np.cos(turn), np.sin(turn)
        axes = np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])
        # A label's position is the centre of the box's bottom face; y points down.
        box = Box(cls, f"{frame}/{n}", np.array([x, y - h / 2, z]), axes, np.array([length, h, w]) / 2)
        out.append(box.moved(to_ego))
    return out


# --- nuScenes -----------------------------------------------------------------------------------------------------


def nuscenes(root: str | Path, tables: str | None = None, boxes: bool = True) -> Iterator[Keyframe]:
    """Every sample of ``root`` that has a sweep; ``tables`` names the folder of the JSON tables in it (v1.0-mini).

    Raises:
        DataError: no such folder, or a table that is missing or broken.
    """
    folder = Path(root, tables) if tables else _tables_in(Path(root))
    try:
        yield from _nuscenes(Path(root), _Tables(folder), boxes)
    except KeyError as e:
        raise DataError(f"{folder}: a table lacks {e}; the folder must hold all tables of nuScenes") from e


class _Tables:
    """JSON tables of one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def rows(self, name: str) -> list[dict[str, Any]]:
        path = self.folder / f"{name}.json"
        try:
            got = json.loads(_text(path))
        except json.JSONDecodeError as e:
            raise DataError(f"{path} is not valid JSON: {e}") from e
        return got if isinstance(got, list) else []

    def by_token(self, name: str) -> dict[str, dict[str, Any]]:
        return {row["token"]: row for row in self.rows(name)}

    def drives(self) -> dict[str, str]:
        """Sample token → scene's name; "" where the tables lack it."""
        if not (self.folder / "sample.json").is_file() or not (self.folder / "scene.json").is_file():
            return {}
        scenes = self.by_token("scene")
        return {row["token"]: str(scenes[row["scene_token"]]["name"]) for row in self.rows("sample")}


def _tables_in(root: Path) -> Path:
    found = sorted(root.glob("*/sample_data.json"))
    if len(found) != 1:
        raise DataError(f"{root} has {len(found)} folders of tables; name the one to read, such as tables=v1.0-mini")
    return found[0].parent


def _nuscenes(root: Path, tables: _Tables, with_boxes: bool) -> Iterator[Keyframe]:
    sensors, calibrated = tables.by_token("sensor"), tables.by_token("calibrated_sensor")
    poses, drives = tables.by_token("ego_pose"), tables.drives()
    samples: dict[str, dict[str, dict[str, Any]]] = {}
    uses: dict[str, Counter[str]] = {}
    for row in tables.rows("sample_data"):
        if row["is_key_frame"]:
            channel = sensors[calibrated[row["calibrated_sensor_token"]]["sensor_token"]]["channel"]
            samples.setdefault(row["sample_token"], {})[channel] = row
            drive = drives.get(row["sample_token"], "")
            uses.setdefault(row["calibrated_sensor_token"], Counter())[drive] += 1
    # A calibration belongs to one drive: the one that uses it most.
    owner = {token: count.most_common(1)[0][0] for token, count in uses.items()}
    marks = _marks(tables) if with_boxes else {}
    for token, channels in samples.items():
        if "LIDAR_TOP" not in channels:
            continue
        lidar = channels["LIDAR_TOP"]
        ego = _nuscenes_pose(poses[lidar["ego_pose_token"]])
        from_world: F64 = inverse(ego)
        views = []
        for channel, row in sorted(channels.items()):
            if channel.startswith("CAM_"):
                sensor = calibrated[row["calibrated_sensor_token"]]
                # The car moves between the sweep and the image: each has its own pose in the world.
                to_ego = from_world @ _nuscenes_pose(poses[row["ego_pose_token"]]) @ _nuscenes_pose(sensor)
                K = np.array(sensor["camera_intrinsic"], dtype=np.float64)
                size = (int(row["width"]), int(row["height"]))
                views.append(
                    CameraView(channel, root / _inside(row), size, K, to_ego, owner[row["calibrated_sensor_token"]])
                )
        sensor = calibrated[lidar["calibrated_sensor_token"]]
        found = tuple(b.moved(from_world) for b in marks.get(token, []))
        yield Keyframe(
            Path(lidar["filename"]).name.removesuffix(".pcd.bin"), drives.get(token, ""), root / _inside(lidar),
            ("x", "y", "z", "intensity", "ring"), 255.0, _nuscenes_pose(sensor), tuple(views), ego, found,
        )  # fmt: skip


def _marks(tables: _Tables) -> dict[str, list[Box]]:
    """Sample token → its boxes in the world's frame."""
    categories = tables.by_token("category")
    names = {t: categories[r["category_token"]]["name"] for t, r in tables.by_token("instance").items()}
    out: dict[str, list[Box]] = {}
    for row in tables.rows("sample_annotation"):
        width, length, height = row["size"]
        center, half = np.array(row["translation"], dtype=np.float64), np.array([length, width, height]) / 2
        box = Box(names[row["instance_token"]], row["instance_token"], center, rotation_of(row["rotation"]), half)
        out.setdefault(row["sample_token"], []).append(box)
    return out


def _inside(row: dict[str, Any]) -> str:
    name = str(row["filename"])
    if name.startswith("/") or ".." in Path(name).parts:
        raise DataError(f"sample_data names {name!r}: paths must stay inside the data set's folder")
    return name


def _nuscenes_pose(row: dict[str, Any]) -> F64:
    return pose(rotation_of(row["rotation"]), row["translation"])


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as e:
        raise DataError(_missing(path)) from e
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"Cannot read {path}: {e}") from e


def _missing(path: Path) -> str:
    if not path.parent.is_dir():
        return f"There is no file {path}: the folder {path.parent} does not exist."
    return f"There is no file {path}. {did_you_mean(path.name, (p.name for p in path.parent.iterdir()))}"
