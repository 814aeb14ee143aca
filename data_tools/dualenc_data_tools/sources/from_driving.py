"""KITTI and nuScenes as published → shards of keyframes, or of single images with the points inside them.

A sample of ``unit=keyframes``::

    KEY.lidar.npy        float32 [n, C], as measured (the sensor's frame), intensity in 0 … 1
    KEY.regions.npy      float32 [m, 4], with regions=true: places x, y, z in ego, and the region each is in (−2: none)
    KEY.cam_front.jpg …  the images, unchanged: the calibration is for these pixels
    KEY.json             {"drive", "frame",
                          "lidar":   {"drive", "columns": ["x", "y", "z", "intensity", …], "to_ego": [4, 4]},
                          "cameras": {"drive", "views": [{"name", "member", "size": [width, height],
                                      "intrinsics": [3, 3], "to_ego": [4, 4], "drive"}, …]},
                          "ego_pose": [4, 4] ego → world, where the data set has it,
                          "boxes": [{"class", "instance", "center": [3], "axes": [3, 3], "half": [3]}, …] in ego}

``to_ego`` takes a sensor's points to ego: x forward, y left, z up (the Velodyne's own frame in KITTI). With
``unit=cameras`` every image is a sample, ``KEY.cam.jpg``; its points are those inside it, and ego is the camera's frame
rotated to x forward (the pairs of LidarCLIP, Hess et al. 2022, arXiv 2212.06858). With ``unit=objects`` every labelled
object that is visible enough is one: ``KEY.cam.png`` shows it, ``KEY.lidar.npy`` holds the points in its box, and the
.json has its ``class`` and ``instance`` (with ``data.sources.N.same: json:instance`` an object is not its own
negative).

Every record is read as training would read it; one that training would refuse is dropped, with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from dualenc.data.arrays import npy_bytes
from dualenc.data.driving.geometry import F64, inverse, moved, project, seen
from dualenc.data.driving.keyframes import CameraView, Keyframe, kitti_object, kitti_raw, nuscenes, part_seen
from dualenc.data.driving.places import MEMBER
from dualenc.data.driving.regions import region_places
from dualenc.data.modalities import DecodeError
from dualenc.data.modalities.camera import CameraConfig, CameraInput
from dualenc.data.modalities.lidar import LidarConfig, LidarInput
from dualenc.data.modalities.picture import cut_out, open_picture
from dualenc.data.sources import sources as layouts
from dualenc.data.sources.driving import kitti_drives, kitti_folder
from dualenc.data.sources.opened import need_folder
from dualenc.errors import ConfigError, DataError
from dualenc_data_tools.sources.source import Dropped, Record, SourceConfig, SourceKind, sources

MAX_BASELINE = 10.0
"""Most metres between a car's camera and its LiDAR; with more, the two poses are from different moments or drives."""
FORWARD = np.array([[0, 0, 1.0, 0], [-1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
"""A camera's frame → one with x forward, y left, z up, in the same place."""
_REASONS = {
    "not finite": "numbers not finite",
    "empty": "empty cloud",
    "has no image": "camera missing",
    "singular": "singular intrinsics",
    "calibration is of": "calibration of another drive",
    "calibration is for": "calibration of another drive",
    "apart": "calibration of another drive",
    "There is no file": "file missing",
}


class DrivingConfig(SourceConfig):
    """Settings of all driving sources."""

    unit: Literal["keyframes", "cameras", "objects"] = Field(
        "keyframes",
        description="cameras: every image is a sample, with the points inside it; objects: every labelled object",
    )
    cameras: list[str] | None = Field(None, description="only these cameras; a keyframe that lacks one is dropped")
    boxes: bool = Field(True, description="labelled boxes go into the .json member")
    regions: bool = Field(False, description="add a member with object-like regions of the sweep, found without labels")
    min_points: int = Field(1, ge=1, description="unit=cameras: images with fewer points inside are dropped")


class KittiConfig(DrivingConfig):
    """``path=kitti/training``: image_2, velodyne, calib and label_2 of the 3D object set."""

    path: str = Field(description="the folder with image_2, velodyne, calib (and label_2)")


class KittiRawConfig(DrivingConfig):
    """``path=2011_09_26/2011_09_26_drive_0001_sync``: a synced drive; its day's calibration is one folder up."""

    path: str = Field(description="the drive's folder, or its day's: all drives in it")


class NuScenesConfig(DrivingConfig):
    """``path=nuscenes``: the folder with samples/ and the tables; the devkit is not needed."""

    path: str = Field(description="the folder that holds samples/")
    tables: str | None = Field(None, description="folder of the JSON tables in it: v1.0-mini; default: the only one")


def kitti_records(cfg: KittiConfig) -> Iterator[Record | Dropped]:
    """Records of KITTI's 3D object set."""
    yield from to_records(cfg, kitti_object(kitti_folder(cfg.path), cfg.boxes))


def kitti_raw_records(cfg: KittiRawConfig) -> Iterator[Record | Dropped]:
    """Records of one drive of KITTI's raw data, or of all of a day."""
    numbers = tuple(c.removeprefix("image_") for c in cfg.cameras) if cfg.cameras else ("02", "03")
    for drive in kitti_drives(cfg.path):
        yield from to_records(cfg, kitti_raw(drive, numbers))


def nuscenes_records(cfg: NuScenesConfig) -> Iterator[Record | Dropped]:
    """Records of the samples of nuScenes that have a sweep."""
    yield from to_records(cfg, nuscenes(need_folder(cfg.path, "nuscenes.path"), cfg.tables, cfg.boxes))


def to_records(cfg: DrivingConfig, keys: Iterable[Keyframe]) -> Iterator[Record | Dropped]:
    """Every keyframe, or every image of it, as a record, or as a Dropped if training would refuse it."""
    if cfg.regions and cfg.unit != "keyframes":
        raise ConfigError("regions: only whole keyframes have regions; leave out either unit or regions")
    if cfg.unit == "objects" and not cfg.boxes:
        raise ConfigError("boxes: unit=objects needs the labelled boxes; leave out boxes=false")
    if cfg.size is not None or cfg.encode != "keep":
        raise ConfigError(
            "size, encode: leave them out; driving images are kept as they are, because their calibration is for "
            "these pixels"
        )
    sizes: dict[tuple[float, ...], tuple[int, int]] = {}
    for key in keys:
        views = [v for v in key.views if cfg.cameras is None or v.name in cfg.cameras]
        lacking = set(cfg.cameras or ()) - {v.name for v in views}
        if lacking:
            yield Dropped(key.id, "camera missing", f"there is no {', '.join(sorted(lacking))}")
            continue
        try:
            points = key.points()
            if not len(views):
                raise DataError("the keyframe has no image")
            if cfg.unit == "keyframes":
                yield _keyframe(cfg, key, views, points, sizes)
                continue
        except DataError as e:
            yield _dropped(key.id, e)
            continue
        for view in views:
            try:
                if cfg.unit == "objects":
                    yield from _objects(cfg, key, view, points, sizes)
                else:
                    yield _picture(cfg, key, view, points, sizes)
            except DataError as e:
                yield _dropped(view.path.stem, e)


def _dropped(name: str, e: DataError) -> Dropped:
    return Dropped(name, next((r for part, r in _REASONS.items() if part in str(e)), "broken sensor"), str(e))


def _keyframe(
    cfg: DrivingConfig,
    key: Keyframe,
    views: list[CameraView],
    points: F64,
    sizes: dict[tuple[float, ...], tuple[int, int]],
) -> Record:
    media = {f"cam_{_slug(v.name)}{v.path.suffix.lower()}": _picture_bytes(v) for v in views}
    described = [_described(key, v, m, raw, sizes) for v, (m, raw) in zip(views, media.items(), strict=True)]
    lidar = {"drive": key.drive, "columns": list(key.columns), "to_ego": key.lidar_to_ego.tolist()}
    fields: dict[str, Any] = {"drive": key.drive, "frame": key.id, "lidar": lidar}
    fields["cameras"] = {"drive": key.drive, "views": described}
    if key.ego_pose is not None:
        fields["ego_pose"] = key.ego_pose.tolist()
    if cfg.boxes:
        fields["boxes"] = [
            {"class": b.cls, "instance": b.instance, "center": b.center.tolist(), "axes": b.axes.tolist(),
             "half": b.half.tolist()} for b in key.boxes
        ]  # fmt: skip
    members = {"lidar.npy": as_npy(points)}
    if cfg.regions:
        members[MEMBER] = as_npy(region_places(moved(points[:, :3], key.lidar_to_ego)))
    return _checked(Record(key.id, dict(media), fields=fields, members=members), cfg.verify)


def _picture(
    cfg: DrivingConfig, key: Keyframe, view: CameraView, points: F64, sizes: dict[tuple[float, ...], tuple[int, int]]
) -> Record:
    raw = _picture_bytes(view)
    described = _described(key, view, f"cam{view.path.suffix.lower()}", raw, sizes)
    inside = _inside(key, view, points, described["size"])
    if len(inside) < cfg.min_points:
        raise DataError(f"the part of the cloud inside the image is empty: {len(inside)} of {len(points):,} points")
    inside[:, :3] = moved(inside[:, :3], FORWARD)
    described["to_ego"] = FORWARD.tolist()
    fields = {
        "drive": key.drive,
        "frame": key.id,
        "camera": view.name,
        "lidar": {"drive": key.drive, "columns": list(key.columns), "to_ego": np.eye(4).tolist()},
        "cameras": {"drive": key.drive, "views": [described]},
    }
    members = {"lidar.npy": as_npy(inside)}
    return _checked(Record(view.path.stem, {described["member"]: raw}, fields=fields, members=members), cfg.verify)


def _inside(key: Keyframe, view: CameraView, points: F64, size: tuple[int, int]) -> F64:
    """The points inside the image, in the camera's frame."""
    to_camera = inverse(view.to_ego) @ key.lidar_to_ego
    inside = points[seen(*project(points[:, :3], to_camera, view.intrinsics), size)]
    inside[:, :3] = moved(inside[:, :3], to_camera)
    return inside


def _objects(
    cfg: DrivingConfig, key: Keyframe, view: CameraView, points: F64, sizes: dict[tuple[float, ...], tuple[int, int]]
) -> Iterator[Record]:
    raw = _picture_bytes(view)
    size = _described(key, view, "", raw, sizes)["size"]
    inside, picture = _inside(key, view, points, size), open_picture(raw)
    for n, box in enumerate(b.moved(inverse(view.to_ego)) for b in key.boxes):
        edges = part_seen(box, inside, view.intrinsics, size)
        if edges is None:
            continue
        own = inside[box.inside(inside[:, :3])]
        own[:, :3] = moved(own[:, :3], FORWARD)
        fields = {
            "drive": key.drive, "frame": key.id, "camera": view.name, "class": box.cls, "instance": box.instance,
            "lidar": {"drive": key.drive, "columns": list(key.columns), "to_ego": np.eye(4).tolist()},
        }  # fmt: skip
        members = {"lidar.npy": as_npy(own)}
        _LIDAR.decode({"json:lidar": fields["lidar"], **members})
        yield Record(f"{view.path.stem}_{n}", {"cam.png": cut_out(picture, edges)}, fields=fields, members=members)


def _described(
    key: Keyframe, view: CameraView, member: str, raw: bytes, sizes: dict[tuple[float, ...], tuple[int, int]]
) -> dict[str, Any]:
    size = open_picture(raw).size
    # A calibration without a size of its own belongs to the size it was first seen with.
    expected = view.size or sizes.setdefault(tuple(view.intrinsics.ravel()), size)
    apart = float(np.linalg.norm(view.to_ego[:3, 3] - key.lidar_to_ego[:3, 3]))
    if apart > MAX_BASELINE:
        raise DataError(
            f"camera {view.name} and the LiDAR are {apart:.0f} m apart: their poses belong to different moments"
        )
    return {
        "name": view.name, "member": member, "size": list(expected), "intrinsics": view.intrinsics.tolist(),
        "to_ego": view.to_ego.tolist(), "drive": view.drive,
    }  # fmt: skip


_CAMERAS = CameraInput(CameraConfig())
_LIDAR = LidarInput(LidarConfig(features=[]))


def _checked(record: Record, verify: bool) -> Record:
    """The record, if training would accept it.

    Raises:
        DecodeError: why not.
    """
    _LIDAR.decode({"json:lidar": record.fields["lidar"], **record.members})
    for shot in _CAMERAS.decode({"json:cameras": record.fields["cameras"], **record.media}):
        if verify and shot.picture is not None:
            shot.picture.rgb()
    return record


def _picture_bytes(view: CameraView) -> bytes:
    try:
        return view.path.read_bytes()
    except OSError as e:
        raise DecodeError(f"camera {view.name} has no image: {view.path} ({e.strerror})") from e


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9_]+", "_", name.lower()).removeprefix("cam_")


def as_npy(points: npt.NDArray[Any]) -> bytes:
    """``points [n, C]`` as the bytes of a .npy, float32."""
    return npy_bytes(points.astype(np.float32))


for _name, _config, _records in (
    ("kitti", KittiConfig, kitti_records), ("kitti_raw", KittiRawConfig, kitti_raw_records),
    ("nuscenes", NuScenesConfig, nuscenes_records),
):  # fmt: skip
    sources.register(_name)(SourceKind(_config, _records, layouts[_name].about))
