"""Bird's-eye-view maps: the grid, scattering into it, sampling from it, a backbone over it, and pooling by attention.

Nothing here normalises over the batch (see own/convnet).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from dualenc.encoders.own.convnet import ChannelNorm, ResidualBlock


@dataclass(frozen=True, slots=True)
class BEVGrid:
    """Square cells over x (forward) and y (left): ``low`` metres up to ``low + cell · shape``."""

    low: tuple[float, float]
    cell: float
    shape: tuple[int, int]

    @classmethod
    def over(cls, box: tuple[float, ...] | list[float], cell: float) -> BEVGrid:
        """The grid over (x, y, z, X, Y, Z): as many whole cells as cover it."""
        nx, ny = (max(1, round((box[3 + i] - box[i]) / cell)) for i in (0, 1))
        return cls((float(box[0]), float(box[1])), cell, (nx, ny))

    @property
    def cells(self) -> int:
        """How many there are."""
        return self.shape[0] * self.shape[1]

    def index(self, xy: Tensor) -> Tensor:
        """int64 [...]: the cell (x · ny + y) of places [..., 2]; −1 outside."""
        place = torch.floor((xy - xy.new_tensor(self.low)) / self.cell).long()
        nx, ny = self.shape
        inside = (place[..., 0] >= 0) & (place[..., 0] < nx) & (place[..., 1] >= 0) & (place[..., 1] < ny)
        return torch.where(inside, place[..., 0] * ny + place[..., 1], -1)

    def centers(self, device: torch.device | None = None) -> Tensor:
        """[nx, ny, 2]: the middle of each cell in metres."""
        x, y = (self.low[i] + self.cell * (torch.arange(self.shape[i], device=device) + 0.5) for i in (0, 1))
        return torch.stack(torch.meshgrid(x, y, indexing="ij"), -1)

    def sample(self, maps: Tensor, xy: Tensor) -> Tensor:
        """Features [n, k, C] of maps [n, C, nx', ny'] over this grid at places [n, k, 2], bilinear; zero outside.

        The maps may be coarser than the grid, as a backbone leaves them.
        """
        extent = xy.new_tensor(self.shape) * self.cell
        at = 2 * (xy - xy.new_tensor(self.low)) / extent - 1
        # grid_sample wants (column, row): columns of the map are y, rows x.
        got = nn.functional.grid_sample(maps, at.flip(-1)[:, :, None].to(maps.dtype), align_corners=False)
        return got[..., 0].transpose(1, 2)


@runtime_checkable
class MapTower(Protocol):
    """What some towers can do more: say what is at a place of the world."""

    @property
    def projects(self) -> bool:
        """Whether the tower was trained with a projector of features at places (``local_dim``)."""
        ...

    def at(self, x: Any, places: Sequence[Tensor], projected: bool = False) -> list[Tensor]:
        """What the map says at places.

        Args:
            x: collated rows [n, …], with ``to_ego`` [n, 4, 4].
            places: for each row x, y (and more, which is not looked at) in the ego frame, in metres: [k, ≥ 2].
            projected: through the projector, L2-normalised; else the map itself.

        Returns:
            For each row [k, W], bilinear; zero outside the map.
        """
        ...


def scatter_sum(values: Tensor, index: Tensor, size: int) -> Tensor:
    """[size, C]: the sum of the rows of ``values [m, C]`` at each ``index [m]``."""
    out = values.new_zeros(size, values.shape[1])
    return out.scatter_add(0, index[:, None].expand_as(values), values)


def scatter_max(values: Tensor, index: Tensor, size: int) -> Tensor:
    """[size, C]: the largest of each column of ``values [m, C]`` at each ``index [m]``; zero where there is none.

    Where several are equal they share the gradient.
    """
    out = values.new_zeros(size, values.shape[1])
    return out.scatter_reduce(0, index[:, None].expand_as(values), values, "amax", include_self=False)


class BEVBackbone(nn.Module):
    """Maps [n, C, X, Y] → [n, widths[-1], X', Y']: each stage but the first halves the map."""

    def __init__(self, channels: int, widths: list[int], depth: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, widths[0], 3, padding=1)]
        for i, width in enumerate(widths):
            if i > 0:
                # A map with an odd number of cells keeps its last row: ceil mode by padding.
                layers += [ChannelNorm(widths[i - 1]), nn.Conv2d(widths[i - 1], width, 3, stride=2, padding=1)]
            layers += [ResidualBlock(width) for _ in range(depth)]
        self.layers = nn.Sequential(*layers, ChannelNorm(widths[-1])).to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        """[n, C, X, Y] → [n, W, X', Y']."""
        out: Tensor = self.layers(x.contiguous(memory_format=torch.channels_last))
        return out


class AttentionPool(nn.Module):
    """Tokens [n, L, W] → [n, W]: one learned query attends over them (as in LidarCLIP), with an optional mask."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.randn(1, 1, width) * width**-0.5)
        self.norm, self.key_value, self.out = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.last = nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[n, L, W], bool [n, L] (True: there) → [n, W]. A row in which nothing is there pools as zeros would."""
        n, length, width = x.shape
        keys, values = self.key_value(self.norm(x)).view(n, length, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        query = self.query.expand(n, 1, width).view(n, 1, self.heads, -1).transpose(1, 2).to(keys.dtype)
        seen = None
        if mask is not None:
            values = values * mask[:, None, :, None].to(values.dtype)
            seen = (mask | ~mask.any(1, keepdim=True))[:, None, None, :]
        y = nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=seen)
        out: Tensor = self.last(self.out(y.transpose(1, 2).reshape(n, width)))
        return out


class PooledMap(nn.Module):
    """Maps over a grid → [n, W]: every cell is a token with its place, pooled by attention."""

    def __init__(self, width: int, heads: int, grid: BEVGrid) -> None:
        super().__init__()
        self.pool = AttentionPool(width, heads)
        # Places as numbers in −1 … 1: a learned table would fix the size of the map.
        self.place = nn.Sequential(nn.Linear(3, width), nn.GELU(), nn.Linear(width, width))
        self.grid = grid

    def forward(self, maps: Tensor) -> Tensor:
        """[n, W, X, Y] → [n, W]."""
        shape = maps.shape[2:]
        x, y = (torch.linspace(-1 + 1 / s, 1 - 1 / s, s, device=maps.device) for s in shape)
        xy = torch.stack(torch.meshgrid(x, y, indexing="ij"), -1).flatten(0, 1)
        extent = xy.new_tensor(self.grid.shape) * self.grid.cell / 2
        middle = xy.new_tensor(self.grid.low) + extent
        far = (xy * extent + middle).norm(dim=-1, keepdim=True) / extent.max()
        tokens = maps.flatten(2).transpose(1, 2)
        out: Tensor = self.pool(tokens + self.place(torch.cat([xy, far], 1)).to(tokens.dtype))
        return out
