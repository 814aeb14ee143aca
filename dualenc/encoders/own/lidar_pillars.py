"""PointPillars with dynamic pillars: no cap on points per pillar or on pillars, nothing is dropped or padded.

Lang et al. 2019 (arXiv 1812.05784) for the features, Zhou et al. 2020 (arXiv 1910.06528) for the dynamic voxels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from dualenc.config import Component, Positive, Section
from dualenc.encoders.families import own_towers
from dualenc.encoders.own.bev import BEVBackbone, BEVGrid, PooledMap, scatter_max, scatter_sum
from dualenc.encoders.tower import HeadKind, Tower, build_head
from dualenc.errors import ConfigError


class PillarScatter(nn.Module):
    """Points → pillar features on a grid: each point's numbers, its offsets to the pillar's mean and centre and its
    distance → linear → norm → ReLU → maximum over the pillar."""

    def __init__(self, columns: int, width: int, grid: BEVGrid, low_z: float, high_z: float) -> None:
        super().__init__()
        self.grid, self.width = grid, width
        self.low_z, self.high_z = low_z, high_z
        self.linear, self.norm = nn.Linear(columns + 6, width), nn.LayerNorm(width)

    def decorated(self, points: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """[n, M, C], [n] → features [m, C + 6] and pillar (row · cells + cell) [m] of the points in the grid."""
        most = points.shape[1]
        cell = self.grid.index(points[..., :2])
        there = torch.arange(most, device=points.device)[None] < count[:, None]
        inside = there & (cell >= 0) & (points[..., 2] >= self.low_z) & (points[..., 2] < self.high_z)
        row, place = inside.nonzero(as_tuple=True)
        kept, cell = points[row, place], cell[row, place]
        pillar = row * self.grid.cells + cell
        # Only the pillars that have points take memory and time here.
        used, inverse = torch.unique(pillar, return_inverse=True)
        ones = kept.new_ones(len(kept), 1)
        sums = scatter_sum(torch.cat([kept[:, :3], ones], 1), inverse, len(used))
        mean = (sums[:, :3] / sums[:, 3:])[inverse]
        center = self.grid.centers(points.device).flatten(0, 1)[cell]
        xyz = kept[:, :3]
        reach = max(abs(v) for v in (*self.grid.low, self.grid.low[0] + self.grid.shape[0] * self.grid.cell))
        scaled = torch.cat([xyz[:, :2] / reach, xyz[:, 2:] / (self.high_z - self.low_z)], 1)
        distance = xyz.norm(dim=1, keepdim=True) / reach
        offsets = torch.cat([xyz - mean, xyz[:, :2] - center], 1) / self.grid.cell
        return torch.cat([scaled, kept[:, 3:], offsets, distance], 1), pillar

    def forward(self, points: Tensor, count: Tensor) -> Tensor:
        """[n, M, C], [n] → [n, width, nx, ny]; a pillar without points is zero."""
        # Metres need fp32: under bf16 autocast a place would be known to a quarter of a metre.
        with torch.autocast(points.device.type, enabled=False):
            features, pillar = self.decorated(points.float(), count)
        y = torch.relu(self.norm(self.linear(features)))
        used, inverse = torch.unique(pillar, return_inverse=True)
        top = scatter_max(y, inverse, len(used))
        flat = y.new_zeros(len(points) * self.grid.cells, self.width)
        flat = flat.index_copy(0, used, top)
        return flat.view(len(points), *self.grid.shape, self.width).permute(0, 3, 1, 2)


class BEVTower(Tower):
    """A tower whose features come from a bird's-eye-view map: :meth:`bev` gives the map, ``grid`` says where it lies.

    Losses on regions and distillation between maps start from these two; ``grid.sample(map, xy)`` reads features at
    places in the row's model frame.
    """

    grid: BEVGrid
    pool: nn.Module
    bev_width: int
    local: nn.Module | None

    def bev(self, x: Any) -> Tensor:
        """Collated rows → [n, bev_width, X, Y] over ``grid``."""
        raise NotImplementedError

    def pooled(self, x: Any) -> Tensor:
        """Collated rows → [n, W]."""
        out: Tensor = self.pool(self.bev(x))
        return out

    def outputs(self, x: Any) -> dict[str, Tensor]:
        """As of every tower; where rows name ``places`` [n, K, 2], also ``local`` [n, K, local_dim], L2-normalised: the
        map there, bilinear, projected."""
        maps = self.bev(x)
        pooled = self.pool(maps)
        out = {"features": self.head(pooled), "pooled": pooled}
        if self.local is not None and "places" in x:
            out["local"] = self.projected(self.grid.sample(maps, x["places"]))
        return out

    @property
    def projects(self) -> bool:
        """As :class:`~dualenc.encoders.own.bev.MapTower` says."""
        return self.local is not None

    def at(self, x: Any, places: Sequence[Tensor], projected: bool = False) -> list[Tensor]:
        """As :class:`~dualenc.encoders.own.bev.MapTower` says."""
        out, maps = [], self.bev(x)
        for row, (to_ego, given) in enumerate(zip(x["to_ego"], places, strict=True)):
            xyz = nn.functional.pad(given[:, :3], (0, 3 - min(given.shape[1], 3)))
            back = torch.linalg.inv(to_ego)
            xy = (xyz @ back[:3, :3].T + back[:3, 3])[None, :, :2]
            values = self.grid.sample(maps[row : row + 1], xy)
            out.append((self.projected(values) if projected else values)[0])
        return out

    def projected(self, at: Tensor) -> Tensor:
        """What the map has at places [n, k, bev_width] → [n, k, local_dim], L2-normalised, fp32."""
        assert self.local is not None
        return nn.functional.normalize(self.local(at).float(), dim=-1)


class BEVSettings(Section):
    """What BEV towers share."""

    cell: Annotated[float, Field(gt=0)] = Field(0.5, description="side of a cell in metres")
    widths: list[Positive] = Field(
        [64, 128, 256], min_length=1, description="channels of each stage; each halves the map"
    )
    depth: Positive = Field(default=1, description="blocks of each stage")
    heads: Positive = Field(default=4, description="attention heads of the pooling")
    local_dim: Positive | None = Field(
        None, description="width of the projected features at positions, for losses on regions"
    )
    head: HeadKind = Field(default="linear", description="from the pooled feature to the shared space")

    @model_validator(mode="after")
    def _divisible(self) -> Any:
        if self.widths[-1] % self.heads:
            raise ValueError(f"widths[-1] ({self.widths[-1]}) must be a multiple of heads ({self.heads})")
        return self


def build_local(width: int, dim: int | None) -> nn.Module | None:
    """The projector of features at places: one hidden layer."""
    if dim is None:
        return None
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, dim))


def check_width(name: str, head: HeadKind, width: int, embed_dim: int) -> None:
    """Refuse ``head: none`` where it does not fit.

    Raises:
        ConfigError: saying so.
    """
    if head == "none" and width != embed_dim:
        raise ConfigError(f"{name}: head: none needs a last width of embed_dim ({embed_dim}), got {width}.")


@own_towers.register("pillars")
class Pillars(BEVTower):
    """Dynamic pillars → BEV backbone → attention pooling."""

    kinds: ClassVar[tuple[str, ...]] = ("lidar",)

    class Config(BEVSettings):
        """Settings of own/pillars."""

        pillar_width: Positive = Field(default=64, description="width of a pillar's feature")

    def __init__(self, config: Config, describe: Mapping[str, Any], embed_dim: int) -> None:
        super().__init__()
        given = describe["config"]
        width = config.widths[-1]
        check_width("own/pillars", config.head, width, embed_dim)
        self.grid = BEVGrid.over(given["range"], config.cell)
        self.scatter = PillarScatter(
            3 + len(given["features"]), config.pillar_width, self.grid, given["range"][2], given["range"][5]
        )
        self.backbone = BEVBackbone(config.pillar_width, config.widths, config.depth)
        self.pool = PooledMap(width, config.heads, self.grid)
        self.head = build_head(config.head, width, embed_dim)
        self.local = build_local(width, config.local_dim)
        self.component = Component(name="own/pillars", **config.model_dump(mode="json"))
        self.embed_dim, self.bev_width = embed_dim, width

    def bev(self, x: Mapping[str, Tensor]) -> Tensor:
        """``{"points": [n, M, C], "count": [n], …}`` → [n, W, X, Y]."""
        out: Tensor = self.backbone(self.scatter(x["points"], x["count"]))
        return out
