"""Camera and LiDAR from KITTI's and nuScenes' folders as published: frames, or the objects labelled in them.

A LiDAR item is the bytes of a ``.npy``, float32 [n, 4]: x forward, y left, z up of the camera in metres, and intensity
in 0 … 1. A frame's points are those inside its image (as in LidarCLIP), so a sweep gives one item per camera, and
both data sets give the same kind of item; an object's points are those inside its box. A camera item is the image file
itself, or the part of it that shows the object.

KITTI: Geiger et al. 2012. nuScenes: Caesar et al. 2020, arXiv 1903.11027. Objects too small to recognise are left out
(:func:`dualenc.data.driving.keyframes.part_seen`); shards of ``unit=objects`` hold the same ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Literal

import numpy as np

from dualenc.data.arrays import npy_bytes
from dualenc.data.driving import corruption
from dualenc.data.driving.corruption import Corruption
from dualenc.data.driving.geometry import F64, Bools, checked_intrinsics, inverse, moved, project, seen
from dualenc.data.driving.keyframes import Box, CameraView, Keyframe, part_seen
from dualenc.data.modalities.picture import Picture, black_picture, cut_out, open_picture
from dualenc.data.show import points_over, webp_uri
from dualenc.data.sources.item import Content, Item
from dualenc.data.sources.opened import open_binary
from dualenc.errors import DataError

DRAWN_PX = 480


@dataclass(frozen=True, eq=False)
class CameraFrame:
    """One image with the sweep around it; boxes are in the camera's frame."""

    id: str
    view: CameraView
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
        """[n]: which points are inside the image."""
        return seen(*project(points[:, :3], np.eye(4), self.view.intrinsics), self.size)

    def visible(self, box: Box, points: F64) -> tuple[float, float, float, float] | None:
        """(left, top, right, bottom) of the box in the image; None when too little of it is visible."""
        return part_seen(box, points, self.view.intrinsics, self.size)


def frames_of(keys: Iterable[Keyframe], corrupt: Corruption) -> Iterator[CameraFrame]:
    """Every image of every keyframe.

    Raises:
        DataError: an image or calibration that is missing or broken.
    """
    return (frame_of(key, view, corrupt) for key in keys for view in key.views)


def frame_of(key: Keyframe, view: CameraView, corrupt: Corruption) -> CameraFrame:
    """One image of a keyframe.

    Raises:
        DataError: the image or its calibration is missing or broken.
    """
    checked_intrinsics(view.intrinsics, f"{key.id}, camera {view.name}")
    try:
        size = view.size or open_picture(view.path.read_bytes()).size
    except OSError as e:
        raise DataError(f"camera {view.name} has no image: {view.path.name} ({e.strerror})") from e
    boxes = tuple(b.moved(inverse(view.to_ego)) for b in key.boxes)
    return CameraFrame(view.path.stem, view, key, size, boxes, corrupt)


def items_of(keys: Iterable[Keyframe], corrupt: Corruption, unit: Literal["frames", "objects"]) -> Iterator[Item]:
    """Every frame, or every labelled object that is seen well enough.

    A frame with a broken image is an item that cannot be read, so it is counted and named. Which objects a broken
    frame shows is not known: it ends the reading of objects.
    """
    for key in keys:
        for view in key.views:
            try:
                frame = frame_of(key, view, corrupt)
            except DataError as e:
                if unit == "objects":
                    raise
                name = view.path.stem
                contents = {m: [Content(f"{name}/{m}", error=str(e))] for m in ("camera", "lidar")}
                yield Item(name, contents, {"frame": name, "camera": view.name})
                continue
            yield from _items(frame, unit)


def _items(frame: CameraFrame, unit: Literal["frames", "objects"]) -> Iterator[Item]:
    if unit == "objects":
        yield from _objects(frame)
        return
    fields = {"frame": frame.id, "camera": frame.view.name}
    picture = Content(f"{frame.id}/camera", path=str(frame.view.path))
    if corruption.is_black(frame.corrupt.pictures, frame.id):
        picture = Content(f"{frame.id}/camera", load=partial(black_picture, frame.size))
    cloud = Content(f"{frame.id}/lidar", load=partial(_frame_points, frame), shown=partial(_frame_drawn, frame))
    yield Item(frame.id, {"camera": [picture], "lidar": [cloud]}, fields)


def _objects(frame: CameraFrame) -> Iterator[Item]:
    # The choice of objects does not depend on which sensors fail.
    points = _points(replace(frame, corrupt=Corruption()))
    for n, box in enumerate(frame.boxes):
        box2d = frame.visible(box, points)
        if box2d is None:
            continue
        name = f"{frame.id}/{n}"
        fields = {"frame": frame.id, "camera": frame.view.name, "class": box.cls, "instance": box.instance}
        picture = Content(f"{name}/camera", load=partial(_crop, str(frame.view.path), box2d))
        if corruption.is_black(frame.corrupt.pictures, frame.id):
            picture = Content(f"{name}/camera", load=partial(black_picture, frame.size))
        cloud = Content(
            f"{name}/lidar", load=partial(_box_points, frame, box), shown=partial(_box_drawn, frame, box, box2d)
        )
        yield Item(name, {"camera": [picture], "lidar": [cloud]}, fields, label=box.cls)


# The objects of a frame come one after another: without these caches each would read its sweep and image again.
@lru_cache(maxsize=2)
def _points(frame: CameraFrame) -> F64:
    """[n, 4]: the points inside the image."""
    points = frame.points()
    return points[frame.seen(points)]


@lru_cache(maxsize=2)
def _picture(path: str) -> Picture:
    with open_binary(path) as f:
        return open_picture(f.read())


def _frame_points(frame: CameraFrame) -> bytes:
    return as_npy(_points(frame))


def _box_points(frame: CameraFrame, box: Box) -> bytes:
    points = _points(frame)
    inside = points[box.inside(points[:, :3])]
    if not len(inside):  # failing sensors lost the object: only its position is known
        inside = np.array([[*box.center, 0.0]])
    return as_npy(inside)


def _crop(path: str, box: tuple[float, float, float, float]) -> bytes:
    return cut_out(_picture(path), box)


def _frame_drawn(frame: CameraFrame) -> dict[str, str]:
    points = _points(frame)
    image = points_over(_picture(str(frame.view.path)).rgb(), frame.pixels(points[:, :3]), points[:, 2], DRAWN_PX)
    return {"picture": webp_uri(image)}


def _box_drawn(frame: CameraFrame, box: Box, edges: tuple[float, float, float, float]) -> dict[str, str]:
    points = _points(frame)[:, :3]
    points = points[box.inside(points)]
    if not len(points):
        points = box.center[None]
    depth = points[:, 2] - points[:, 2].min()
    image = open_picture(_crop(str(frame.view.path), edges)).rgb()
    # The nearest point in the box is red: coloured by its distance from the car, it would have a single colour.
    at = frame.pixels(points) - np.array(edges[:2])
    return {
        "picture": webp_uri(points_over(image, at, depth, DRAWN_PX // 2, far=max(float(depth.max()), 1.0), dot=1.5))
    }


def as_npy(points: F64) -> bytes:
    """``points [n, 4]`` of the camera's frame (right, down, forward) as float32 (forward, left, up), as a .npy."""
    turned = np.stack([points[:, 2], -points[:, 0], -points[:, 1], points[:, 3]], axis=1).astype(np.float32)
    return npy_bytes(turned)
