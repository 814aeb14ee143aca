"""Image features that are the maximum over boxes of the map, as a detector's head is pretrained on images with captions
(DITO, Kim et al. 2023, arXiv 2310.00161).

With the last map M of a trunk, its pooling p and the head h, the box B of a k × k grid and the grids K

    f = 1/|K| Σ_{k ∈ K} max_{B of k × k} h(p(M_B)),   the maximum for each channel

Each box goes through the head, so a region alone has a feature in the shared space. DITO takes boxes of a detector at
the levels of its feature pyramid, and sums over levels (here the mean: features are normalised after it); here levels
are grids on one map. Random boxes are left out, as a feature would depend on a draw. So is its learning with shifted
windows, which averages the maps of an image and of the same image rolled by half a window: it is for attention within
fixed windows. own/convnet and own/vit have none, and the windows of timm's Swin are shifted from block to block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Protocol, cast

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn

from dualenc.config import Positive
from dualenc.encoders.tower import ImageTower
from dualenc.errors import ConfigError

Grids = Annotated[list[Positive], Field(min_length=1)] | None
"""Setting of towers that can pool over boxes: the grids, by their side."""
REGIONS: Any = Field(
    default=None,
    description="the feature is the maximum over the boxes of a k × k grid, averaged over these k, such as [1, 2, 4]; "
    "default: the mean over the whole map",
)


class MapsAndPool(Protocol):
    """A trunk whose forward is ``pool(maps(x))``."""

    def maps(self, x: Tensor) -> Tensor:
        """[n, 3, S, S] → [n, C, h, w]."""

    def pool(self, maps: Tensor) -> Tensor:
        """A map or a box of it, [n, C, h, w] → [n, W]."""


class RegionTower(ImageTower):
    """An image tower that can pool over boxes of its map.

    ``pooled`` is always what the trunk says of the whole image. With ``grids``, the features are not the head of that:
    a projector of a stream and a locked trunk's ``frozen`` group know no boxes.

    Args:
        grids: see the module; None: the features are ``head(pooled)``, as of every tower.
    """

    def __init__(
        self,
        trunk: nn.Module,
        head: nn.Module,
        describe: Mapping[str, Any],
        channels_last: bool,
        grids: Sequence[int] | None,
    ) -> None:
        super().__init__(trunk, head, describe, channels_last)
        self.grids = None if grids is None else tuple(grids)

    def maps(self, pixels: Tensor) -> Tensor:
        """What the trunk takes → its last map [n, C, h, w]."""
        return cast(MapsAndPool, self.trunk).maps(pixels)

    def pool(self, maps: Tensor) -> Tensor:
        """A map or a box of it, [n, C, h, w] → [n, W]."""
        return cast(MapsAndPool, self.trunk).pool(maps)

    def outputs(self, x: Any) -> dict[str, Tensor]:
        """See the base class."""
        if self.grids is None:
            return super().outputs(x)
        maps = self.maps(self.pixels(x))
        whole = self.pool(maps)
        return {"features": self.over_boxes(maps, whole), "pooled": whole}

    def features_of(self, pixels: Tensor) -> Tensor:
        """See the base class."""
        if self.grids is None:
            return super().features_of(pixels)
        maps = self.maps(pixels)
        return self.over_boxes(maps, self.pool(maps))

    def over_boxes(self, maps: Tensor, whole: Tensor) -> Tensor:
        """The map [n, C, h, w] and its pooled feature [n, W] → features [n, D]."""
        assert self.grids is not None
        levels = []
        for k in self.grids:
            if k == 1:
                levels.append(self.head(whole))
            else:
                levels.append(self.head(torch.stack([self.pool(box) for box in boxes(maps, k)])).amax(0))
        return torch.stack(levels).mean(0)


def boxes(maps: Tensor, k: int) -> list[Tensor]:
    """The k² boxes [n, C, h', w'] of a map [n, C, h, w], row by row; where k does not divide a side, neighbours share a
    row or column of cells, as the bins of adaptive pooling do."""
    rows, columns = (edges(side, k) for side in maps.shape[2:])
    return [maps[:, :, top:bottom, left:right] for top, bottom in rows for left, right in columns]


def edges(side: int, k: int) -> list[tuple[int, int]]:
    """Where each of k pieces of ``side`` cells begins and ends."""
    return [(i * side // k, -(-(i + 1) * side // k)) for i in range(k)]


def check_grids(grids: Sequence[int], cells: tuple[int, int], where: str) -> None:
    """Refuse a grid with more boxes in a row than the map has cells.

    Raises:
        ConfigError: naming it.
    """
    if max(grids) > min(cells):
        raise ConfigError(
            f"{where}: regions: a grid of {max(grids)} × {max(grids)} boxes is finer than the last map, "
            f"{cells[0]} × {cells[1]} cells; use at most {min(cells)}."
        )


def said_settings(config: BaseModel) -> dict[str, Any]:
    """The settings of a tower for its component, without ``regions`` where there are none: so towers are described as
    they were before it existed."""
    return {k: v for k, v in config.model_dump(mode="json").items() if k != "regions" or v is not None}
