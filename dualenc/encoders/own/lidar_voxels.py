"""Sparse voxels through spconv, where it is installed: a 3D convolutional net that only computes where points are.

The layout is SECOND's (Yan et al. 2018): submanifold convolutions, strided sparse ones, then the height folded into the
channels of a bird's-eye-view map. Layer norm instead of batch norm, as everywhere here. On a CPU spconv 2.3.8 computes
the forward only: train this on CUDA.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from dualenc.config import Component, Positive
from dualenc.encoders.families import own_towers
from dualenc.encoders.own.bev import BEVBackbone, BEVGrid, PooledMap, scatter_sum
from dualenc.encoders.own.lidar_pillars import BEVSettings, BEVTower, build_local, check_width
from dualenc.encoders.tower import build_head
from dualenc.errors import ConfigError

_Positive = Annotated[float, Field(gt=0)]


def _spconv() -> Any:
    try:
        import spconv.pytorch as spconv
    except ImportError as e:
        raise ConfigError(
            "own/voxels: spconv is not installed. pip install spconv (spconv-cu126 for CUDA 12.6), or use own/pillars."
        ) from e
    return spconv


def voxel_means(points: Tensor, count: Tensor, low: Tensor, size: Tensor, shape: tuple[int, int, int]) -> Any:
    """[n, M, C], [n] → the mean of each voxel's points [v, C] and its place int32 [v, 4]: row, then z, y, x."""
    place = torch.floor((points[..., :3] - low) / size).long()
    there = torch.arange(points.shape[1], device=points.device)[None] < count[:, None]
    inside = there & (place >= 0).all(-1) & (place < torch.tensor(shape, device=points.device)).all(-1)
    row, at = inside.nonzero(as_tuple=True)
    x, y, z = place[row, at].unbind(1)
    nx, ny, nz = shape
    voxel = ((row * nz + z) * ny + y) * nx + x
    used, inverse = torch.unique(voxel, return_inverse=True)
    kept = points[row, at]
    sums = scatter_sum(torch.cat([kept, kept.new_ones(len(kept), 1)], 1), inverse, len(used))
    where = torch.stack([used // (nx * ny * nz), used // (nx * ny) % nz, used // nx % ny, used % nx], 1)
    return sums[:, :-1] / sums[:, -1:], where.int()


@own_towers.register("voxels")
class Voxels(BEVTower):
    """Sparse 3D convolutions → BEV backbone → attention pooling."""

    kinds: ClassVar[tuple[str, ...]] = ("lidar",)

    class Config(BEVSettings):
        """Settings of own/voxels. ``cell`` is that of the BEV map: a voxel's side is half of it for each sparse stage
        after the first."""

        sparse_widths: list[Positive] = Field([16, 32, 64], min_length=1, description="channels of each sparse stage")
        cell_z: _Positive = Field(0.2, description="height of a voxel in metres")

    def __init__(self, config: Config, describe: Mapping[str, Any], embed_dim: int) -> None:
        super().__init__()
        spconv = _spconv()
        given = describe["config"]
        width = config.widths[-1]
        check_width("own/voxels", config.head, width, embed_dim)
        self.grid = BEVGrid.over(given["range"], config.cell)
        fold = 2 ** (len(config.sparse_widths) - 1)
        nz = max(1, round((given["range"][5] - given["range"][2]) / config.cell_z / fold)) * fold
        self.shape = (self.grid.shape[0] * fold, self.grid.shape[1] * fold, nz)
        size = torch.tensor([config.cell / fold] * 2 + [(given["range"][5] - given["range"][2]) / nz])
        self.register_buffer("size", size, persistent=False)
        self.register_buffer("low", torch.tensor(given["range"][:3], dtype=torch.float32), persistent=False)
        # Its other algorithms ask for a CUDA stream even where the tensors are on the CPU, and there a bias is refused.
        algo = None if torch.cuda.is_available() else spconv.ConvAlgo.Native
        stages: list[nn.Module] = []
        before = 3 + len(given["features"])
        for i, channels in enumerate(config.sparse_widths):
            conv = (
                spconv.SubMConv3d(before, channels, 3, indice_key=f"s{i}", algo=algo, bias=False)
                if i == 0
                else spconv.SparseConv3d(before, channels, 2, stride=2, algo=algo, bias=False)
            )
            more = spconv.SubMConv3d(channels, channels, 3, indice_key=f"s{i}", algo=algo, bias=False)
            stages += [conv, nn.LayerNorm(channels), nn.ReLU(), more, nn.LayerNorm(channels), nn.ReLU()]
            before = channels
        self.sparse = spconv.SparseSequential(*stages)
        self.backbone = BEVBackbone(before * (nz // fold), config.widths, config.depth)
        self.pool = PooledMap(width, config.heads, self.grid)
        self.head = build_head(config.head, width, embed_dim)
        self.local = build_local(width, config.local_dim)
        self.component = Component(name="own/voxels", **config.model_dump(mode="json"))
        self.embed_dim, self.bev_width = embed_dim, width

    low: Tensor
    size: Tensor

    def bev(self, x: Mapping[str, Tensor]) -> Tensor:
        """``{"points": [n, M, C], "count": [n], …}`` → [n, W, X, Y]."""
        spconv = _spconv()
        nx, ny, nz = self.shape
        with torch.autocast(x["points"].device.type, enabled=False):
            points = x["points"].float()
            features, where = voxel_means(points, x["count"], self.low, self.size, self.shape)
            reach = self.size[:3] * features.new_tensor(self.shape)
            features = torch.cat([(features[:, :3] - self.low) / reach * 2 - 1, features[:, 3:]], 1)
            sparse = spconv.SparseConvTensor(features, where, [nz, ny, nx], len(points))
            dense = self.sparse(sparse).dense()  # [n, C, z, y, x]
        out: Tensor = self.backbone(dense.flatten(1, 2).transpose(2, 3))
        return out
