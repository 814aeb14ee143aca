"""Camera and LiDAR from KITTI's and nuScenes' folders as published: frames, or the objects that are labelled in them.

A LiDAR item is the bytes of a ``.npy``, float32 [n, 4]: x forward, y left, z up of the camera in metres, and intensity
in 0 … 1. A frame's points are those inside its picture (as LidarCLIP has it), so a sweep gives one item a camera, and
both data sets give the same kind of item; an object's points are those inside its box. A camera item is the picture as
it lies there, or the part of it that shows the object.

KITTI: Geiger et al. 2012. nuScenes: Caesar et al. 2020, arXiv 1903.11027. Objects too small to tell are left out
(:func:`dualenc.data.driving.keyframes.part_seen`); shards of ``unit=objects`` hold the same ones.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from dualenc.data.driving.geometry import F64, Bools, checked_intrinsics, inverse, moved, project, seen
from dualenc.data.driving.keyframes import Box, Keyframe, View, kitti_object, nuscenes, part_seen
from dualenc.data.modalities.image import Picture, black_picture, cut_out, open_picture
from dualenc.data.show import points_over, webp_uri
from dualenc.errors import ConfigError, DataError, did_you_mean
from dualenc_evals.read import corruption
from dualenc_evals.read.files import open_binary
from dualenc_evals.read.rows import Content, Row, Rows, kept, label, label_spec, needed
from dualenc_evals.task import Corruption, Task, paths_of

DRAWN_PX = 480


@dataclass(frozen=True, eq=False)
class Frame:
    """One picture with the sweep around it; boxes are in the camera's frame."""

    id: str
    view: View
    key: Keyframe
    size: tuple[int, int]
    boxes: tuple[Box, ...]
    corrupt: Corruption

    def points(self) -> F64:
        """[n, 4]: the whole sweep in the camera's frame, and intensity in 0 … 1. Raises DataError for a broken file."""
        got = corruption.sweep(self.key.points(), self.key.columns, self.corrupt, self.key.id)
        to_camera = inverse(self.view.to_ego) @ self.key.lidar_to_ego
        if self.corrupt.turned_deg:
            to_camera = corruption.turn(self.corrupt.turned_deg, self.id) @ to_camera
        return np.concatenate([moved(got[:, :3], to_camera), got[:, 3:4]], axis=1)

    def pixels(self, points: F64) -> F64:
        """[n, 2] pixel of ``points [n, 3]`` (in front of the camera)."""
        return project(points, np.eye(4), self.view.intrinsics)[0]

    def seen(self, points: F64) -> Bools:
        """[n]: which points are inside the picture."""
        return seen(*project(points[:, :3], np.eye(4), self.view.intrinsics), self.size)

    def visible(self, box: Box, points: F64) -> tuple[float, float, float, float] | None:
        """(left, top, right, bottom) of the box in the picture; None when too little of it is seen."""
        return part_seen(box, points, self.view.intrinsics, self.size)


def read_driving(task: Task) -> Rows:
    """Rows of frames or objects.

    Raises:
        DataError: a folder, table or file that is missing or broken.
    """
    rows: list[Row] = []
    for root in paths_of(task):
        if not Path(root).is_dir():
            how = f" How to get it: {task.source.obtain}" if task.source.obtain else ""
            raise DataError(f"task {task.name}: there is no folder {root}.{how}")
        for frame in _frames(root, task):
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
    spec = label_spec(task) or ("class" if task.one_class else None)
    return [Row(name, {m: [make[m]] for m in needed(task)}, label(task, spec, get, name))]


def _frame_rows(task: Task, frame: Frame) -> list[Row]:
    values = {"frame": frame.id, "camera": frame.view.name}
    picture = Content(f"{frame.id}/camera", path=str(frame.view.path))
    if corruption.is_black(frame.corrupt.pictures, frame.id):
        picture = Content(f"{frame.id}/camera", load=partial(black_picture, frame.size))
    cloud = Content(f"{frame.id}/lidar", load=partial(_frame_points, frame), shown=partial(_frame_drawn, frame))
    return _row(task, frame.id, values, {"camera": picture, "lidar": cloud})


def _object_rows(task: Task, frame: Frame) -> list[Row]:
    rows: list[Row] = []
    # Which objects are asked about does not depend on what fails.
    points = _points(replace(frame, corrupt=Corruption()))
    for n, box in enumerate(frame.boxes):
        box2d = frame.visible(box, points)
        if box2d is None:
            continue
        name = f"{frame.id}/{n}"
        values = {"frame": frame.id, "camera": frame.view.name, "class": box.cls, "instance": box.instance}
        picture = Content(f"{name}/camera", load=partial(_crop, str(frame.view.path), box2d))
        if corruption.is_black(frame.corrupt.pictures, frame.id):
            picture = Content(f"{name}/camera", load=partial(black_picture, frame.size))
        cloud = Content(
            f"{name}/lidar", load=partial(_box_points, frame, box), shown=partial(_box_drawn, frame, box, box2d)
        )
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
    inside = points[box.inside(points[:, :3])]
    if not len(inside):  # of an object that failing sensors lost, only where it should be is known
        inside = np.array([[*box.center, 0.0]])
    return as_npy(inside)


def _crop(path: str, box: tuple[float, float, float, float]) -> bytes:
    return cut_out(_picture(path), box)


def _frame_drawn(frame: Frame) -> dict[str, str]:
    points = _points(frame)
    image = points_over(_picture(str(frame.view.path)).rgb(), frame.pixels(points[:, :3]), points[:, 2], DRAWN_PX)
    return {"picture": webp_uri(image)}


def _box_drawn(frame: Frame, box: Box, edges: tuple[float, float, float, float]) -> dict[str, str]:
    points = _points(frame)[:, :3]
    points = points[box.inside(points)]
    if not len(points):
        points = box.center[None]
    depth = points[:, 2] - points[:, 2].min()
    image = open_picture(_crop(str(frame.view.path), edges)).rgb()
    # What is near within the box is red: at its distance from the car all of it would have one colour.
    at = frame.pixels(points) - np.array(edges[:2])
    return {
        "picture": webp_uri(points_over(image, at, depth, DRAWN_PX // 2, far=max(float(depth.max()), 1.0), dot=1.5))
    }


def as_npy(points: F64) -> bytes:
    """``points [n, 4]`` of the camera's frame (right, down, forward) as float32 (forward, left, up), as a .npy."""
    turned = np.stack([points[:, 2], -points[:, 0], -points[:, 1], points[:, 3]], axis=1).astype(np.float32)
    out = io.BytesIO()
    np.save(out, turned, allow_pickle=False)
    return out.getvalue()


# --- frames -------------------------------------------------------------------------------------------------------


def _frames(root: str, task: Task) -> Iterator[Frame]:
    objects = task.source.unit == "objects"
    if task.source.kind == "kitti":
        keys = kitti_object(Path(root, task.source.split or "training"), objects)
    else:
        keys = nuscenes(root, task.source.split, objects)
    try:
        for key in keys:
            for view in key.views:
                checked_intrinsics(view.intrinsics, f"{key.id}, camera {view.name}")
                size = view.size or open_picture(view.path.read_bytes()).size
                boxes = tuple(b.moved(inverse(view.to_ego)) for b in key.boxes)
                yield Frame(view.path.stem, view, key, size, boxes, task.source.corrupt or Corruption())
    except DataError as e:
        raise DataError(f"task {task.name}: {e}") from e
