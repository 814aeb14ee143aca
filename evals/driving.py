"""Camera and LiDAR from KITTI's and nuScenes' folders as published: frames, or the objects that are labelled in them.

A LiDAR item is the bytes of a ``.npy``, float32 [n, 4]: x forward, y left, z up of the camera in metres, and intensity
in 0 … 1. A frame's points are those inside its picture (as LidarCLIP has it), so a sweep gives one item a camera, and
both data sets give the same kind of item; an object's points are those inside its box. A camera item is the picture as
it lies there, or the part of it that shows the object.

KITTI: Geiger et al. 2012. nuScenes: Caesar et al. 2020, arXiv 1903.11027. Objects too small to tell are left out: less
than ``MIN_POINTS`` points, ``MIN_PX`` pixels in either direction, or ``MIN_INSIDE`` of their area inside the picture.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dualenc.data.crops import crop, open_picture
from dualenc.data.modalities.image import Picture
from dualenc.errors import ConfigError, DataError, did_you_mean
from evals.files import open_binary, read_text
from evals.rows import Content, Row, Rows, kept, label, label_spec, needed
from evals.tasks import Task, paths_of

MIN_POINTS, MIN_PX, MIN_INSIDE = 10, 24, 0.7
MARGIN = 1.05
"""Labels are tight: a box takes in the points of one this much larger."""
MIN_DEPTH = 0.5
"""Metres in front of the camera below which a point is not seen."""

F64 = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Box:
    """A labelled object: its class, which object it is, its centre [3], axes [3, 3] and half sizes [3] (camera)."""

    cls: str
    instance: str
    center: F64
    axes: F64
    half: F64

    def corners(self) -> F64:
        """[8, 3] in the camera's frame."""
        signs = np.array([[a, b, c] for a in (-1, 1) for b in (-1, 1) for c in (-1, 1)])
        return np.asarray(self.center + (signs * self.half) @ self.axes.T)

    def inside(self, points: F64) -> npt.NDArray[np.bool_]:
        """[n]: which of ``points [n, 3]`` are in the box, or just around it."""
        return np.asarray((np.abs((points - self.center) @ self.axes) <= MARGIN * self.half).all(1))


@dataclass(frozen=True, eq=False)
class Frame:
    """One picture with the sweep around it.

    Attributes:
        to_camera: [4, 4] LiDAR → camera (x right, y down, z forward); projection: [3, 4] camera → pixels.
        columns: numbers a point in the file; top: largest intensity.
    """

    id: str
    camera: str
    image: str
    sweep: str
    size: tuple[int, int]
    to_camera: F64
    projection: F64
    boxes: tuple[Box, ...]
    columns: int
    top: float

    def points(self) -> F64:
        """[n, 4]: the whole sweep in the camera's frame, and intensity in 0 … 1. Raises DataError for a broken file."""
        with open_binary(self.sweep) as f:
            raw = f.read()
        if not raw or len(raw) % (4 * self.columns):
            raise DataError(f"{self.sweep} has {len(raw)} bytes, no whole number of points of {self.columns} numbers")
        got = np.frombuffer(raw, dtype="<f4").reshape(-1, self.columns).astype(np.float64)
        xyz = got[:, :3] @ self.to_camera[:3, :3].T + self.to_camera[:3, 3]
        return np.concatenate([xyz, got[:, 3:4] / self.top], axis=1)

    def pixels(self, points: F64) -> F64:
        """[n, 2] pixel of ``points [n, 3]`` (in front of the camera)."""
        uvw = points @ self.projection[:, :3].T + self.projection[:, 3]
        return np.asarray(uvw[:, :2] / uvw[:, 2:])

    def seen(self, points: F64) -> npt.NDArray[np.bool_]:
        """[n]: which points are inside the picture."""
        ahead = points[:, 2] > MIN_DEPTH
        uv = self.pixels(np.where(ahead[:, None], points[:, :3], 1.0))
        return np.asarray(ahead & (uv >= 0).all(1) & (uv < np.array(self.size)).all(1))

    def visible(self, box: Box, points: F64) -> tuple[float, float, float, float] | None:
        """(left, top, right, bottom) of the box in the picture; None when too little of it is seen."""
        corners = box.corners()
        if (corners[:, 2] <= 0).any():
            return None
        uv = self.pixels(corners)
        low, high = uv.min(0), uv.max(0)
        a, b = np.clip(low, 0, self.size), np.clip(high, 0, self.size)
        if (b - a < MIN_PX).any() or np.prod(b - a) < MIN_INSIDE * np.prod(high - low):
            return None
        if int(box.inside(points[:, :3]).sum()) < MIN_POINTS:
            return None
        return float(a[0]), float(a[1]), float(b[0]), float(b[1])


def read_driving(task: Task) -> Rows:
    """Rows of frames or objects.

    Raises:
        DataError: a folder, table or file that is missing or broken.
    """
    read = _kitti if task.source.kind == "kitti" else _nuscenes
    rows: list[Row] = []
    for root in paths_of(task):
        if not Path(root).is_dir():
            how = f" How to get it: {task.source.obtain}" if task.source.obtain else ""
            raise DataError(f"task {task.name}: there is no folder {root}.{how}")
        for frame in read(root, task):
            rows += _frame_rows(task, frame) if task.source.unit == "frames" else _object_rows(task, frame)
    return Rows(rows)


def _value(task: Task, values: dict[str, str]) -> Callable[[str], str]:
    def get(column: str) -> str:
        if column not in values:
            raise ConfigError(f"task {task.name}: there is no column {column!r}. {did_you_mean(column, values)}")
        return values[column]

    return get


def _row(task: Task, name: str, values: dict[str, str], make: dict[str, Content]) -> list[Row]:
    get = _value(task, values)
    if not kept(task, get):
        return []
    for m in needed(task):
        if m not in make:
            raise ConfigError(
                f"task {task.name}: modalities: {task.source.kind} has camera and lidar, not {m!r}. "
                f"{did_you_mean(m, make)}"
            )
    spec = label_spec(task) or ("class" if task.kind in ("classification", "probe") else None)
    return [Row(name, {m: [make[m]] for m in needed(task)}, label(task, spec, get, name))]


def _frame_rows(task: Task, frame: Frame) -> list[Row]:
    values = {"frame": frame.id, "camera": frame.camera}
    picture = Content(f"{frame.id}/camera", path=frame.image)
    cloud = Content(f"{frame.id}/lidar", load=partial(_frame_points, frame))
    return _row(task, frame.id, values, {"camera": picture, "lidar": cloud})


def _object_rows(task: Task, frame: Frame) -> list[Row]:
    rows: list[Row] = []
    points = _points(frame)
    for n, box in enumerate(frame.boxes):
        seen = frame.visible(box, points)
        if seen is None:
            continue
        name = f"{frame.id}/{n}"
        values = {"frame": frame.id, "camera": frame.camera, "class": box.cls, "instance": box.instance}
        picture = Content(f"{name}/camera", load=partial(_crop, frame.image, seen))
        cloud = Content(f"{name}/lidar", load=partial(_box_points, frame, box))
        rows += _row(task, name, values, {"camera": picture, "lidar": cloud})
    return rows


# The objects of a frame follow each other: without these its sweep and picture would be read again for each.
@lru_cache(maxsize=2)
def _points(frame: Frame) -> F64:
    """[n, 4]: the points inside the picture."""
    points = frame.points()
    return points[frame.seen(points)]


@lru_cache(maxsize=2)
def _picture(path: str) -> Picture:
    with open_binary(path) as f:
        return open_picture(f.read())


def _frame_points(frame: Frame) -> bytes:
    return as_npy(_points(frame))


def _box_points(frame: Frame, box: Box) -> bytes:
    points = _points(frame)
    return as_npy(points[box.inside(points[:, :3])])


def _crop(path: str, box: tuple[float, float, float, float]) -> bytes:
    return crop(_picture(path), box)


def as_npy(points: F64) -> bytes:
    """``points [n, 4]`` of the camera's frame (right, down, forward) as float32 (forward, left, up), as a .npy."""
    turned = np.stack([points[:, 2], -points[:, 0], -points[:, 1], points[:, 3]], axis=1).astype(np.float32)
    out = io.BytesIO()
    np.save(out, turned, allow_pickle=False)
    return out.getvalue()


# --- KITTI --------------------------------------------------------------------------------------------------------


def _kitti(root: str, task: Task) -> Iterator[Frame]:
    folder = Path(root, task.source.split or "training")
    images = sorted((folder / "image_2").glob("*.png"))
    if not images:
        raise DataError(f"task {task.name}: there are no pictures in {folder / 'image_2'}")
    for path in images:
        calibration = _kitti_calibration(str(folder / "calib" / f"{path.stem}.txt"))
        rect, velo = np.eye(4), np.eye(4)
        rect[:3, :3] = calibration["R0_rect"].reshape(3, 3)
        velo[:3] = calibration["Tr_velo_to_cam"].reshape(3, 4)
        labels = str(folder / "label_2" / f"{path.stem}.txt")
        boxes = tuple(_kitti_boxes(labels, path.stem)) if task.source.unit == "objects" else ()
        sweep = str(folder / "velodyne" / f"{path.stem}.bin")
        size = open_picture(path.read_bytes()).size
        P = calibration["P2"].reshape(3, 4)
        yield Frame(path.stem, "image_2", str(path), sweep, size, rect @ velo, P, boxes, 4, 1.0)


def _kitti_calibration(path: str) -> dict[str, F64]:
    out = {}
    for line in read_text(path).splitlines():
        key, colon, numbers = line.partition(":")
        if colon:
            try:
                out[key.strip()] = np.array([float(v) for v in numbers.split()])
            except ValueError as e:
                raise DataError(f"{path}: {key} must be numbers: {e}") from e
    for key, n in (("P2", 12), ("R0_rect", 9), ("Tr_velo_to_cam", 12)):
        if len(out.get(key, ())) != n:
            raise DataError(f"{path} must give {key} with {n} numbers")
    return out


def _kitti_boxes(path: str, frame: str) -> Iterator[Box]:
    for n, line in enumerate(read_text(path).splitlines()):
        cls, *numbers = line.split()
        if cls == "DontCare":
            continue
        try:
            h, w, length, x, y, z, turn = (float(v) for v in numbers[7:14])
        except ValueError as e:
            raise DataError(f"{path}, line {n + 1}, is no KITTI label: {e}") from e
        c, s = np.cos(turn), np.sin(turn)
        axes = np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])
        # A label's place is the middle of the box's bottom; y points down.
        yield Box(cls, f"{frame}/{n}", np.array([x, y - h / 2, z]), axes, np.array([length, h, w]) / 2)


# --- nuScenes -----------------------------------------------------------------------------------------------------


def _nuscenes(root: str, task: Task) -> Iterator[Frame]:
    tables = Path(root, task.source.split) if task.source.split else _tables_in(root, task)

    def table(name: str) -> list[dict[str, Any]]:
        path = str(tables / f"{name}.json")
        try:
            got = json.loads(read_text(path))
        except json.JSONDecodeError as e:
            raise DataError(f"{path} is not valid JSON: {e}") from e
        return got if isinstance(got, list) else []

    def by_token(name: str) -> dict[str, dict[str, Any]]:
        return {row["token"]: row for row in table(name)}

    try:
        yield from _nuscenes_frames(root, table, by_token, task.source.unit == "objects")
    except KeyError as e:
        raise DataError(f"{tables}: a table lacks {e}: these are no nuScenes tables, or not all of them") from e


def _tables_in(root: str, task: Task) -> Path:
    found = sorted(Path(root).glob("*/sample_data.json"))
    if len(found) != 1:
        raise DataError(
            f"task {task.name}: {root} has {len(found)} folders of tables; name one: source.split: v1.0-mini"
        )
    return found[0].parent


def _nuscenes_frames(
    root: str,
    table: Callable[[str], list[dict[str, Any]]],
    by_token: Callable[[str], dict[str, dict[str, Any]]],
    objects: bool,
) -> Iterator[Frame]:
    sensors, calibrated, poses = by_token("sensor"), by_token("calibrated_sensor"), by_token("ego_pose")
    samples: dict[str, dict[str, dict[str, Any]]] = {}
    for row in table("sample_data"):
        if row["is_key_frame"]:
            channel = sensors[calibrated[row["calibrated_sensor_token"]]["sensor_token"]]["channel"]
            samples.setdefault(row["sample_token"], {})[channel] = row
    marks: dict[str, list[dict[str, Any]]] = {}
    names: dict[str, str] = {}
    if objects:
        categories = by_token("category")
        names = {t: categories[r["category_token"]]["name"] for t, r in by_token("instance").items()}
        for row in table("sample_annotation"):
            marks.setdefault(row["sample_token"], []).append(row)
    for token, channels in samples.items():
        if "LIDAR_TOP" not in channels:
            continue
        lidar = channels["LIDAR_TOP"]
        world = _pose(poses[lidar["ego_pose_token"]]) @ _pose(calibrated[lidar["calibrated_sensor_token"]])
        for channel, row in sorted(channels.items()):
            if not channel.startswith("CAM_"):
                continue
            camera = calibrated[row["calibrated_sensor_token"]]
            # The car moves between the sweep and the picture: each has its own pose in the world.
            from_world: F64 = np.linalg.inv(_pose(poses[row["ego_pose_token"]]) @ _pose(camera)).astype(np.float64)
            P = np.concatenate([np.array(camera["camera_intrinsic"], dtype=np.float64), np.zeros((3, 1))], axis=1)
            boxes = tuple(_nuscenes_box(m, names[m["instance_token"]], from_world) for m in marks.get(token, []))
            yield Frame(
                Path(row["filename"]).stem, channel, f"{root}/{_inside(row)}", f"{root}/{_inside(lidar)}",
                (int(row["width"]), int(row["height"])), from_world @ world, P, boxes, 5, 255.0,
            )  # fmt: skip


def _inside(row: dict[str, Any]) -> str:
    name = str(row["filename"])
    if name.startswith("/") or ".." in Path(name).parts:
        raise DataError(f"sample_data names {name!r}: paths must stay inside the data set's folder")
    return name


def _pose(row: dict[str, Any]) -> F64:
    out = np.eye(4)
    out[:3, :3] = _rotation(row["rotation"])
    out[:3, 3] = row["translation"]
    return out


def _rotation(q: list[float]) -> F64:
    """[3, 3] from a quaternion w, x, y, z."""
    w, x, y, z = np.asarray(q, dtype=np.float64) / np.linalg.norm(q)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def _nuscenes_box(mark: dict[str, Any], cls: str, from_world: F64) -> Box:
    center = from_world[:3, :3] @ np.array(mark["translation"]) + from_world[:3, 3]
    axes = from_world[:3, :3] @ _rotation(mark["rotation"])
    width, length, height = mark["size"]
    return Box(cls, mark["instance_token"], center, axes, np.array([length, width, height]) / 2)
