"""Rows to plan with: of each modality the largest row that a batch may hold, made without reading any data."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dualenc.data.modalities.audio import AudioInput
from dualenc.data.modalities.camera import CameraInput
from dualenc.data.modalities.image import ImageInput
from dualenc.data.modalities.lidar import LidarInput
from dualenc.data.modalities.modality import ModalityInput
from dualenc.data.modalities.series import SeriesInput
from dualenc.data.modalities.text import TextInput

CAMERAS = 6
"""Cameras of a rig where the recipe does not list them, as in nuScenes."""


def widest(source: ModalityInput, count: int) -> Any:
    """``count`` collated rows of the largest size that training may see: text that fills its context, audio of
    ``max_s``, a series of ``length``, a sweep of ``max_points``, every camera. Another modality gives its dummy row."""
    return source.collate([_widest(source)] * count)


def _widest(source: ModalityInput) -> Any:
    if isinstance(source, TextInput):
        return source.eval(source.decode("dog " * source.context_length))
    if isinstance(source, ImageInput):
        return _image(source)
    row = source.dummy()
    if isinstance(source, AudioInput):
        wave: Tensor = row["wave"]
        return {**row, "wave": wave.repeat(-(-source.samples // len(wave)))[: source.samples]}
    if isinstance(source, SeriesInput):
        return np.zeros((source.config.channels, source.config.length), np.float32)
    if isinstance(source, LidarInput):
        return {**row, "points": _sweep(source)}
    if isinstance(source, CameraInput):
        cameras = len(source.config.cameras or ()) or CAMERAS
        by_camera = ("image", "intrinsics", "extrinsics", "present", "known")
        return {k: x.repeat(cameras, *[1] * (x.ndim - 1)) if k in by_camera else x for k, x in row.items()}
    return row


def _image(source: ImageInput) -> Any:
    row = source.dummy()
    if source.config.resize != "naflex":
        return row
    edge = round(source.config.max_patches**0.5)
    return torch.zeros(edge, edge, row.shape[-1], dtype=row.dtype)


def _sweep(source: LidarInput) -> Tensor:
    config = source.config
    low, high = np.array(config.range[:3]), np.array(config.range[3:])
    points = np.zeros((config.max_points, 3 + len(config.features)), np.float32)
    points[:, :3] = np.random.default_rng(0).uniform(low, high, (config.max_points, 3))
    return torch.from_numpy(points)
