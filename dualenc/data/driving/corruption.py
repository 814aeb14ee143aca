"""Failing cameras and LiDAR: silent beams, black images, a wrong calibration, fog-like noise.

The kinds of Robo3D (Kong et al. 2023, arXiv 2303.17597) and of the robustness tables of CALICO and BEVFusion, as simple
models of the sensor, not of the weather. Every draw is derived from the name of the image, so all models meet the same
failures in every run.
"""

from __future__ import annotations

import hashlib
from typing import Annotated

import numpy as np
from pydantic import Field

from dualenc.config import Section
from dualenc.data.driving.geometry import F64

BEAMS = 64
"""Beams assumed for a sweep without ring numbers: bands of equal elevation between its lowest and highest points."""
BACKSCATTER = 0.5
"""Share of the beams lost in fog that come back from the fog itself."""
_NEAR, _THICK = 1.0, 20.0


class Corruption(Section):
    """Simulated sensor failures; what is drawn depends only on the image's name."""

    beams: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="share of the LiDAR's beams that are silent"
    )
    pictures: Annotated[float, Field(ge=0, le=1)] = Field(default=0.0, description="share of the images that are black")
    turned_deg: Annotated[float, Field(ge=0)] = Field(
        default=0.0,
        description="standard deviation of the camera calibration's rotation error about each axis, in degrees",
    )
    fog: Annotated[float, Field(ge=0)] = Field(
        default=0.0,
        description="density of fog-like noise on the LiDAR: 1 / the metres after which 63 % of a beam are lost",
    )


def rng_of(name: str, kind: str) -> np.random.Generator:
    """The generator for one kind of failure of one image."""
    return np.random.default_rng(int.from_bytes(hashlib.blake2b(f"{kind}\0{name}".encode(), digest_size=8).digest()))


def sweep(points: F64, columns: tuple[str, ...], corrupt: Corruption, name: str) -> F64:
    """``points [n, C]`` in the sensor's frame (x, y, z, intensity, …) after silent beams and fog; never empty."""
    if corrupt.beams:
        points = _silent(points, columns, corrupt.beams, rng_of(name, "beams"))
    if corrupt.fog:
        points = _fog(points, corrupt.fog, rng_of(name, "fog"))
    return points


def _silent(points: F64, columns: tuple[str, ...], share: float, rng: np.random.Generator) -> F64:
    if "ring" in columns:
        beam = points[:, columns.index("ring")].astype(np.int64)
    else:
        height = np.arctan2(points[:, 2], np.hypot(points[:, 0], points[:, 1]))
        low, high = np.quantile(height, [0.001, 0.999])
        beam = np.clip((height - low) / max(high - low, 1e-9) * BEAMS, 0, BEAMS - 1).astype(np.int64)
    there = np.unique(beam)
    kept = rng.permutation(there)[: max(1, round(len(there) * (1 - share)))]
    return np.asarray(points[np.isin(beam, kept)])


def _fog(points: F64, thickness: float, rng: np.random.Generator) -> F64:
    """Beer-Lambert both ways: a return from r metres is lost with probability 1 − exp(−2 r · thickness). Of the lost
    returns, the share ``BACKSCATTER`` is reflected, weakly, by the fog on the way."""
    r = np.linalg.norm(points[:, :3], axis=1)
    lost = rng.random(len(points)) >= np.exp(-2 * thickness * r)
    scattered = lost & (rng.random(len(points)) < BACKSCATTER) & (r > _NEAR)
    at = rng.uniform(_NEAR, np.clip(r, _NEAR + 1e-6, _THICK))
    points = points.copy()
    points[scattered, :3] *= (at / np.maximum(r, 1e-9))[scattered, None]
    points[scattered, 3] *= 0.2
    keep = ~lost | scattered
    keep[np.argmin(r)] = True
    return np.asarray(points[keep])


def turn(degrees: float, name: str) -> F64:
    """[4, 4]: a rotation by normal errors of ``degrees`` about x, y and z: the calibration's error."""
    out = np.eye(4)
    for axis, angle in enumerate(np.radians(rng_of(name, "turned").normal(0, degrees, 3))):
        i, j = (axis + 1) % 3, (axis + 2) % 3
        one = np.eye(4)
        one[i, i] = one[j, j] = np.cos(angle)
        one[j, i], one[i, j] = np.sin(angle), -np.sin(angle)
        out = out @ one
    return out


def is_black(share: float, name: str) -> bool:
    """Whether this image is one of the black ones; those of a smaller share are also black for a larger one."""
    return bool(rng_of(name, "pictures").random() < share)
