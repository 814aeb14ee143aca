"""Places in the scene that the rows of several sensors share: what region losses compare.

A sample's ``regions.npy`` is float32 [m, 4]: x, y, z in the ego frame and the number of the region the place is in, or
``POOR``. Every modality with ``places`` draws the *same* ones, from (seed, sample id, epoch) without its own name; each
moves them into its own model frame, whatever augmentation it had.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor

from dualenc.config import Positive, Section
from dualenc.data.arrays import read_npy
from dualenc.data.batch import ABSENT
from dualenc.data.driving.geometry import F64, inverse, moved
from dualenc.errors import DecodeError

MEMBER = "regions.npy"
POOR = -2
"""Region number of a place outside all regions."""


class PlacesConfig(Section):
    """How many places a row lists: inside regions (rich) and outside (poor); fewer where a sample has fewer."""

    rich: Positive = Field(default=512, description="places inside regions")
    poor: int = Field(default=512, description="places outside regions")

    @property
    def count(self) -> int:
        """K, the number of places in a row."""
        return self.rich + self.poor


@dataclass(frozen=True, slots=True)
class Places:
    """xyz float64 [K, 3] in ego; region int64 [K], ``ABSENT`` where a place is missing."""

    xyz: F64
    region: npt.NDArray[np.int64]

    def row(self, to_ego: F64, within: tuple[float, ...] | None = None, hidden: Any = None) -> dict[str, Any]:
        """``places`` float32 [K, 2] in the model frame that ``to_ego`` leads back from, and ``labels`` with ``region``.

        Args:
            within: x, y, z minimum, x, y, z maximum: places outside are ``ABSENT``; hidden: bool [K]: so are these.
        """
        xyz = moved(self.xyz, inverse(to_ego))
        region = self.region.copy()
        if within is not None:
            region[(xyz[:, 0] < within[0]) | (xyz[:, 1] < within[1])] = ABSENT
            region[(xyz[:, 0] >= within[3]) | (xyz[:, 1] >= within[4])] = ABSENT
        if hidden is not None:
            region[hidden] = ABSENT
        return {
            "places": torch.from_numpy(xyz[:, :2].astype(np.float32)),
            "labels": {"region": torch.from_numpy(region)},
        }


def read_regions(raw: Any) -> npt.NDArray[np.float32]:
    """The array of ``regions.npy``, [m, 4].

    Raises:
        DecodeError: it is missing, or not such an array.
    """
    data = raw.get(MEMBER) if isinstance(raw, Mapping) else None
    if data is None:
        raise DecodeError(f"there is no {MEMBER}: build the shards with regions=true, or leave out input.places")
    try:
        out = read_npy(bytes(data))
    except DecodeError as e:
        raise DecodeError(f"{MEMBER}: {e}") from e
    if out.ndim != 2 or out.shape[1] != 4 or out.dtype.kind not in "fiu" or not np.isfinite(out).all():
        raise DecodeError(f"{MEMBER} must be finite numbers [m, 4]: x, y, z, region")
    return out.astype(np.float32)


def draw(regions: npt.NDArray[np.float32], config: PlacesConfig, rng: np.random.Generator) -> Places:
    """K places: up to ``rich`` of those in regions, up to ``poor`` of the others, the rest ``ABSENT``."""
    xyz = np.zeros((config.count, 3))
    region = np.full(config.count, ABSENT, np.int64)
    begin = 0
    for most, mask in ((config.rich, regions[:, 3] >= 0), (config.poor, regions[:, 3] < 0)):
        found = np.flatnonzero(mask)
        taken = found if len(found) <= most else np.sort(rng.choice(found, most, replace=False))
        xyz[begin : begin + len(taken)] = regions[taken, :3]
        region[begin : begin + len(taken)] = np.where(regions[taken, 3] >= 0, regions[taken, 3], POOR)
        begin += most
    return Places(xyz, region)


def nothing(config: PlacesConfig) -> Places:
    """The places of a dummy row: all ``ABSENT``."""
    return Places(np.zeros((config.count, 3)), np.full(config.count, ABSENT, np.int64))


def collated(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """``places`` [B, K, 2] and ``labels`` of rows that have them; else an empty dict."""
    if "places" not in rows[0]:
        return {}
    labels = {k: torch.stack([r["labels"][k] for r in rows]) for k in rows[0]["labels"]}
    return {"places": torch.stack([r["places"] for r in rows]), "labels": labels}


def by_slot(labels: Mapping[str, Tensor], rows: Tensor, size: int) -> dict[str, Tensor]:
    """Labels of rows as labels of slots [size, …]; ``ABSENT`` where a slot has none."""
    return {
        name: x.new_full((size, *x.shape[1:]), ABSENT).index_copy(0, rows, x[: len(rows)]) for name, x in labels.items()
    }
