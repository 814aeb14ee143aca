"""LiDAR sweeps → ragged points in a frame with x forward, and the pose that leads from it back to ego.

A row's points are in a *model frame*: ego (or the sensor's own), rotated, scaled and mirrored in training. ``to_ego``
takes them back. A camera row has one too, so the geometry between the two holds whatever was done to either, and
neither knows the other: a point p of the LiDAR row is at inv(extrinsics) · inv(camera.to_ego) · lidar.to_ego · p.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor

from dualenc.config import Positive, Section
from dualenc.data.arrays import read_bin, read_npy, read_npz, read_pcd
from dualenc.data.driving.geometry import F64, checked_pose, ground_motion, moved
from dualenc.data.driving.places import MEMBER, Places, PlacesConfig, collated, draw, nothing, read_regions
from dualenc.data.modalities.modality import DecodeError, modalities, npy_of
from dualenc.errors import DataError

F32 = npt.NDArray[np.float32]
Extra = Literal["intensity", "ring", "time"]
_XYZ = ("x", "y", "z")
_BARE = ("x", "y", "z", "intensity", "ring")
_MAX_POINTS = 5_000_000
_Positive = Annotated[float, Field(gt=0)]


class Motion(Section):
    """Rotate (about z, up to ± degrees), scale, mirror the scene: flip_x front and back, flip_y left and right."""

    rotate_deg: Annotated[float, Field(ge=0, le=180)] = Field(
        default=0.0, description="largest angle about z, in degrees"
    )
    scale: tuple[_Positive, _Positive] = Field(default=(1.0, 1.0), description="range of a factor")
    flip_x: bool = Field(default=False, description="mirror front and back in half of the scenes")
    flip_y: bool = Field(default=False, description="mirror left and right in half of the scenes")

    def draw(self, rng: np.random.Generator) -> F64:
        """[4, 4]."""
        return ground_motion(rng, self.rotate_deg, self.scale, self.flip_x, self.flip_y)


class LidarAugment(Motion):
    """Training only: the motion, then a random share of the points, up to ``drop``, is left out."""

    drop: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.0, description="largest share of points left out")


class LidarConfig(Section):
    """How a sweep becomes a row."""

    features: list[Extra] = Field(
        default=["intensity"], description="columns after x, y, z; a sweep that lacks one is refused"
    )
    frame: Literal["ego", "sensor"] = Field(
        default="ego", description="coordinates: the vehicle's (ego) or the sensor's"
    )
    range: tuple[float, float, float, float, float, float] = Field(
        default=(-50.0, -50.0, -5.0, 50.0, 50.0, 3.0),
        description="[x, y, z minimum, x, y, z maximum] in metres; points outside are left out",
    )
    center: bool = Field(default=False, description="move the mean of the points to the origin (for single objects)")
    min_distance: Annotated[float, Field(ge=0)] = Field(
        default=0.0,
        description="leave out points closer to the sensor than this many metres: returns from the car itself",
    )
    max_points: Positive = Field(
        default=60_000, description="larger sweeps are subsampled: at random in training, else evenly"
    )
    bin_columns: Annotated[int, Field(ge=3, le=16)] | None = Field(
        default=None,
        description="float32 values per point in .bin members, which have no header: 4 (KITTI), 5 (nuScenes)",
    )
    not_finite: Literal["refuse", "drop"] = Field(
        default="refuse", description="refuse a sweep with NaN or infinite points, or drop those points"
    )
    augment: LidarAugment = Field(default=LidarAugment(), description="training only")
    places: PlacesConfig | None = Field(
        default=None, description="places in the scene that rows list, for region losses (prc, rad)"
    )

    @model_validator(mode="after")
    def _ordered(self) -> LidarConfig:
        if any(a >= b for a, b in zip(self.range[:3], self.range[3:], strict=True)):
            raise ValueError(f"range: {list(self.range)} must give the lower x, y, z before the upper")
        if len(set(self.features)) != len(self.features):
            raise ValueError(f"features: {self.features} lists a column twice")
        return self


@dataclass(frozen=True, slots=True)
class Cloud:
    """A decoded sweep: points float32 [n, 3 + features] in the model frame, the sensor's position in it [3], the pose
    [4, 4] model frame → ego, the array in ``regions.npy`` and the places drawn from it."""

    points: F32
    origin: F64
    to_ego: F64
    regions: F32 | None = None
    places: Places | None = None


@modalities.register("lidar")
class LidarInput:
    """Sweeps as rows; ``collate`` → ``{"points": float32 [B, M, C], "count": int64 [B], "to_ego": float32 [B, 4, 4],
    "origin": float32 [B, 3]}``: C is x, y, z and ``features``, rows are zero beyond ``count``, ``origin`` is the
    sensor's position.

    An item is the bytes of a sweep [n, ≥ 3] (x, y, z, intensity, ring; x forward), or those with ``json:lidar`` =
    ``{"columns": [names], "to_ego": [4, 4], "drive": name}``. A sweep is a ``.npy`` or ``.npz`` of floats or integers,
    a ``.pcd`` (ascii or binary), or with ``bin_columns`` the float32 numbers of a ``.bin``.
    """

    Config: ClassVar[type[BaseModel]] = LidarConfig
    default_members: ClassVar[list[str]] = ["json:lidar+lidar.npy", "lidar.npy", "npy", "npz", "pcd", "bin"]
    prompt: ClassVar[str] = "a {}"

    def __init__(self, config: LidarConfig, base_dir: str | Path | None = None) -> None:
        self.config = config
        if config.places is not None:
            self.default_members = [f"json:lidar+lidar.npy+{MEMBER}"]  # type: ignore[misc]

    # --- the protocol -----------------------------------------------------------------------------------------

    def decode(self, raw: Any) -> Cloud:
        """Read and check the points, and put them into the frame the config names.

        Raises:
            DecodeError: not an array of numbers, no points, points that are not finite, a missing column or pose.
        """
        points, columns, to_ego = read_cloud(raw, self.config.bin_columns)
        for name in self.config.features:
            if name not in columns:
                raise DecodeError(f"the sweep has no column {name!r}, only {', '.join(columns)}")
        points = points[:, [columns.index(c) for c in (*_XYZ, *self.config.features)]]
        finite = np.isfinite(points).all(1)
        if not finite.all():
            lost = len(points) - int(finite.sum())
            if self.config.not_finite == "refuse":
                raise DecodeError(
                    f"{lost:,} of {len(points):,} points are not finite; to leave them out, set input.not_finite: drop"
                )
            points = points[finite]
        far = (np.square(points[:, :3], dtype=np.float64)).sum(1) >= self.config.min_distance**2
        points = points[far]
        if not len(points):
            raise DecodeError("the cloud is empty")
        regions = None
        if self.config.places is not None and isinstance(raw, Mapping) and MEMBER in raw:
            regions = read_regions(raw)
        if self.config.frame == "sensor":
            out = Cloud(points, np.zeros(3), to_ego, regions)
        else:
            points = points.copy()
            points[:, :3] = moved(points[:, :3].astype(np.float64), to_ego)
            out = Cloud(points, to_ego[:3, 3], np.eye(4), regions)
        if self.config.center:
            shift = np.eye(4)
            shift[:3, 3] = -points[:, :3].mean(0, dtype=np.float64)
            out = transformed(out, shift)
        return out

    def placed(self, x: Cloud, rng: np.random.Generator) -> Cloud:
        """The cloud with places drawn, where the config asks for them."""
        if self.config.places is None:
            return x
        if x.regions is None:
            raise DecodeError(f"there is no {MEMBER}: build the shards with regions=true, or leave out input.places")
        return replace(x, places=draw(x.regions, self.config.places, rng))

    def train(self, x: Cloud, rng: np.random.Generator) -> dict[str, Tensor]:
        """The scene moved and subsampled as ``augment`` says; ``to_ego`` undoes the motion."""
        augment = self.config.augment
        x = transformed(x, augment.draw(rng))
        keep = self._inside(x.points)
        most = min(len(keep), self.config.max_points)
        if augment.drop:
            most = min(most, max(1, round(len(keep) * (1 - rng.uniform(0, augment.drop)))))
        if most < len(keep):
            keep = np.sort(rng.choice(keep, most, replace=False))
        return {**_row(x, keep), **self._named(x)}

    def eval(self, x: Cloud) -> dict[str, Tensor]:
        """The points in range, evenly subsampled where there are too many."""
        keep = self._inside(x.points)
        if len(keep) > self.config.max_points:
            keep = keep[np.linspace(0, len(keep) - 1, self.config.max_points).round().astype(np.int64)]
        return _row(x, keep)

    def collate(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Pad to the longest row of the batch."""
        count = torch.tensor([len(r["points"]) for r in rows])
        points = torch.zeros(len(rows), int(count.max()), rows[0]["points"].shape[1])
        for i, row in enumerate(rows):
            points[i, : len(row["points"])] = row["points"]
        more = {k: torch.stack([r[k] for r in rows]) for k in ("to_ego", "origin")}
        return {"points": points, "count": count, **more, **collated(rows)}

    def dummy(self) -> dict[str, Tensor]:
        """One point in the middle of the range."""
        low, high = np.array(self.config.range[:3]), np.array(self.config.range[3:])
        points = np.zeros((1, 3 + len(self.config.features)), np.float32)
        points[0, :3] = (low + high) / 2
        none = None if self.config.places is None else nothing(self.config.places)
        x = Cloud(points, np.zeros(3), np.eye(4), places=none)
        return {**_row(x, np.zeros(1, np.int64)), **self._named(x)}

    def as_raw(self, x: Any, rate: int | None = None) -> Any:
        """Points float [n, ≥ 3] → the bytes of a ``.npy``; a mapping with a calibration as it is."""
        return x if isinstance(x, Mapping) else npy_of(x)

    def describe(self) -> dict[str, Any]:
        """The kind and its settings."""
        return {"kind": "lidar", "config": self.config.model_dump(mode="json")}

    @staticmethod
    def preview(raw: Any) -> dict[str, str]:
        """The sweep seen from above, forward up, brighter where points are denser."""
        from PIL import Image

        points, _, to_ego = read_cloud(raw)
        xy = moved(points[np.isfinite(points).all(1), :3].astype(np.float64), to_ego)[:, :2]
        reach = max(float(np.quantile(np.abs(xy), 0.98)) if len(xy) else 1.0, 1.0)
        counts, *_ = np.histogram2d(-xy[:, 0], -xy[:, 1], bins=192, range=[[-reach, reach], [-reach, reach]])
        grey = (255 * np.minimum(1, np.log1p(counts) / np.log(9))).astype(np.uint8)
        out = io.BytesIO()
        Image.fromarray(grey).save(out, "PNG")
        return {"picture": "data:image/png;base64," + base64.b64encode(out.getvalue()).decode("ascii")}

    # --- parts ------------------------------------------------------------------------------------------------

    def _named(self, x: Cloud) -> dict[str, Any]:
        return {} if x.places is None else x.places.row(x.to_ego, self.config.range)

    def _inside(self, points: F32) -> npt.NDArray[np.int64]:
        low, high = (np.array(v, np.float32) for v in (self.config.range[:3], self.config.range[3:]))
        keep = np.flatnonzero(((points[:, :3] >= low) & (points[:, :3] < high)).all(1))
        if not len(keep):
            raise DecodeError(f"none of {len(points):,} points is within input.range {list(self.config.range)}")
        return keep


def transformed(x: Cloud, by: F64) -> Cloud:
    """The cloud after the linear map ``by [4, 4]``; its ``to_ego`` leads back to where the points were."""
    points = x.points.copy()
    points[:, :3] = moved(points[:, :3].astype(np.float64), by)
    return replace(x, points=points, origin=moved(x.origin[None], by)[0], to_ego=x.to_ego @ np.linalg.inv(by))


def _row(x: Cloud, keep: npt.NDArray[np.int64]) -> dict[str, Tensor]:
    return {
        "points": torch.from_numpy(x.points[keep]),
        "to_ego": torch.from_numpy(x.to_ego.astype(np.float32)),
        "origin": torch.from_numpy(x.origin.astype(np.float32)),
    }


def read_cloud(raw: Any, bin_columns: int | None = None) -> tuple[F32, list[str], F64]:
    """Points float32 [n, C], their columns' names, and the pose sensor → ego (identity by default).

    Raises:
        DecodeError: see :meth:`LidarInput.decode`.
    """
    about: Any = {}
    if isinstance(raw, Mapping):
        about = raw.get("json:lidar") or {}
        raw = next((v for k, v in raw.items() if not k.startswith("json:") and k != MEMBER), b"")
    if not isinstance(about, Mapping):
        raise DecodeError(f"json:lidar must be {{columns, to_ego, drive}}, got {type(about).__name__}")
    said = about.get("columns")
    if said is not None and not (isinstance(said, list) and all(isinstance(c, str) for c in said)):
        raise DecodeError(f"json:lidar: columns must be a list of names, got {said!r:.80}")
    points, own = _sweep(raw, len(said) if said else bin_columns)
    columns = list(said or own or _BARE[: points.shape[1]])
    if len(columns) != points.shape[1] or tuple(columns[:3]) != _XYZ:
        raise DecodeError(f"a point has {points.shape[1]} values, but the columns are {', '.join(columns)}")
    try:
        to_ego = checked_pose(about["to_ego"], "the LiDAR") if "to_ego" in about else np.eye(4)
    except DataError as e:
        raise DecodeError(str(e)) from e
    return points, columns, to_ego


def _sweep(raw: Any, bin_columns: int | None) -> tuple[F32, list[str] | None]:
    """float32 [n, C], and the columns' names where the file says them; the format is recognised by its first bytes."""
    if not isinstance(raw, bytes | bytearray | memoryview):
        raise DecodeError(f"a sweep must be the bytes of a file, got {type(raw).__name__}")
    raw, names = bytes(raw), None
    if raw.startswith(b"\x93NUMPY"):
        out = read_npy(raw)
    elif raw.startswith(b"PK\x03\x04"):
        out = read_npz(raw)
    elif raw.startswith((b"# .PCD", b"VERSION")):
        out, names = read_pcd(raw)
    elif bin_columns is not None:
        out = read_bin(raw, bin_columns)
    else:
        raise DecodeError(
            f"not a .npy, .npz or .pcd ({len(raw):,} bytes); for a .bin set input.bin_columns (KITTI: 4, nuScenes: 5)"
        )
    if out.ndim != 2 or out.shape[1] < 3 or out.dtype.kind not in "fiu":
        raise DecodeError(f"a sweep must be numbers [n, ≥ 3], got {out.dtype} {list(out.shape)}")
    if len(out) == 0:
        raise DecodeError("the cloud is empty")
    if len(out) > _MAX_POINTS:
        raise DecodeError(f"{len(out):,} points are more than {_MAX_POINTS:,}")
    with np.errstate(over="ignore"):  # beyond float32: infinite, which is reported as not finite
        return out.astype(np.float32), names
