"""Camera and LiDAR from KITTI's and nuScenes' folders as published: frames, or the objects labelled in them.

:mod:`dualenc.data.driving.camera_frames` describes the items; :mod:`dualenc_data_tools` packs whole keyframes with
their calibration from the same readers (:mod:`dualenc.data.driving.keyframes`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import AliasChoices, Field

from dualenc.config import Section
from dualenc.data.driving.corruption import Corruption
from dualenc.data.sources.item import Item, Layout, sources
from dualenc.data.sources.opened import need_folder
from dualenc.errors import DataError

if TYPE_CHECKING:
    from dualenc.data.driving.keyframes import Keyframe


class FramesSettings(Section):
    """Settings of all driving sources."""

    unit: Literal["frames", "objects"] = Field("frames", description="one item per image, or per labelled object in it")
    corrupt: Corruption | None = Field(None, description="simulated sensor failures")


class KittiSettings(FramesSettings):
    """``path=kitti``: the 3D object set, or the folder in it with image_2, velodyne, calib and label_2."""

    path: str = Field(description="the folder with image_2, velodyne, calib (and label_2), or the one above it")
    split: str | None = Field(None, description="the folder below path; default: training, where path has no image_2")


class KittiRawSettings(FramesSettings):
    """``path=2011_09_26/2011_09_26_drive_0001_sync``: one synced drive, or a folder of drives or of days."""

    path: str = Field(description="a drive's folder, a day's folder, or the folder with the days")


class NuScenesSettings(FramesSettings):
    """``path=nuscenes``: the folder with samples/ and the tables; the devkit is not needed."""

    path: str = Field(description="the folder that holds samples/")
    tables: str | None = Field(
        None,
        validation_alias=AliasChoices("tables", "split"),
        description="the folder of JSON tables in it, such as v1.0-mini; default: the only one",
    )


def kitti_folder(path: str, split: str | None = None) -> Path:
    """The folder of KITTI's 3D object set that holds image_2."""
    folder = need_folder(path, "kitti.path")
    return folder if split is None and (folder / "image_2").is_dir() else folder / (split or "training")


def kitti_drives(path: str) -> list[Path]:
    """The drives of KITTI's raw data: the folder itself, the drives in it, or those of the days in it.

    Raises:
        DataError: there is no drive; the message says what is expected.
    """
    folder = need_folder(path, "kitti_raw.path")
    if (folder / "velodyne_points").is_dir():
        return [folder]
    for pattern in ("*/velodyne_points", "*/*/velodyne_points"):
        found = sorted(p.parent for p in folder.glob(pattern) if p.is_dir())
        if found:
            return found
    raise DataError(
        f"kitti_raw.path: {folder} contains no drive (a folder with velodyne_points); expected are DATE/DRIVE_sync/"
        "velodyne_points/data/*.bin and image_02/data/*.png, with calib_cam_to_cam.txt and calib_velo_to_cam.txt in "
        "DATE or beside velodyne_points"
    )


def read_kitti(cfg: KittiSettings) -> Iterator[Item]:
    """Frames or objects of KITTI's 3D object set."""
    from dualenc.data.driving.keyframes import kitti_object

    yield from _items(kitti_object(kitti_folder(cfg.path, cfg.split), cfg.unit == "objects"), cfg)


def read_kitti_raw(cfg: KittiRawSettings) -> Iterator[Item]:
    """Frames of KITTI's raw drives; their boxes are not read."""
    from dualenc.data.driving.keyframes import kitti_raw

    if cfg.unit == "objects":
        raise DataError("kitti_raw.unit: tracklets of raw drives are not read; use unit: frames, or source kitti")
    for drive in kitti_drives(cfg.path):
        yield from _items(kitti_raw(drive), cfg)


def read_nuscenes(cfg: NuScenesSettings) -> Iterator[Item]:
    """Frames or objects of nuScenes."""
    from dualenc.data.driving.keyframes import nuscenes

    need_folder(cfg.path, "nuscenes.path")
    yield from _items(nuscenes(cfg.path, cfg.tables, cfg.unit == "objects"), cfg)


def _items(keys: Iterable[Keyframe], cfg: FramesSettings) -> Iterator[Item]:
    from dualenc.data.driving.camera_frames import items_of

    yield from items_of(keys, cfg.corrupt or Corruption(), cfg.unit)


_FORM = "camera and LiDAR keyframes with calibration and boxes"
sources.register("kitti")(Layout(KittiSettings, read_kitti, f"KITTI's 3D object set: {_FORM}"))
sources.register("kitti_raw")(Layout(KittiRawSettings, read_kitti_raw, f"drives of KITTI's raw data: {_FORM}"))
sources.register("nuscenes")(Layout(NuScenesSettings, read_nuscenes, f"nuScenes: {_FORM}"))
