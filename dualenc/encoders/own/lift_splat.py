"""Images lifted into the scene and summed in a BEV grid (lift-splat; Philion & Fidler 2020, arXiv 2008.05711).

Every place of a picture's feature map has a distribution over depths; its feature, weighted by it, falls into the cells
along its ray. The sum over depths is taken one depth at a time, forward and backward, so the frustum of N × depths
features of the textbook version never exists.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from dualenc.config import Component, Positive
from dualenc.encoders.families import own_towers
from dualenc.encoders.own.bev import BEVBackbone, BEVGrid, PooledMap
from dualenc.encoders.own.images_within import MapTrunk, image_component
from dualenc.encoders.own.lidar_pillars import BEVSettings, BEVTower, build_local, check_width
from dualenc.encoders.tower import build_head

_Positive = Annotated[float, Field(gt=0)]


class _Splat(torch.autograd.Function):
    """Σ over depths and places, into cells; keeps the features, the weights and the cells, nothing larger."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, weights: Tensor, cells: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(features, weights, cells)
        out = features.new_zeros(size, features.shape[1])
        for d in range(weights.shape[1]):
            index, weight = _at(weights, cells, d)
            out.scatter_add_(0, index.expand_as(features), features * weight)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        features, weights, cells = ctx.saved_tensors
        to_features, to_weights = torch.zeros_like(features), torch.zeros_like(weights)
        for d in range(weights.shape[1]):
            index, weight = _at(weights, cells, d)
            back = grads[0][index[:, 0]]
            to_features.addcmul_(back, weight)
            to_weights[:, d] = (back * features).sum(1) * (cells[:, d] >= 0)
        return to_features, to_weights, None, None


def _at(weights: Tensor, cells: Tensor, d: int) -> tuple[Tensor, Tensor]:
    """Depth d's cells [P, 1] and weights [P, 1]; what falls outside goes to the first cell with weight zero."""
    cell = cells[:, d, None]
    return cell.clamp(min=0), torch.where(cell < 0, 0.0, weights[:, d, None])


def splat(features: Tensor, weights: Tensor, cells: Tensor, size: int) -> Tensor:
    """Σ_{p, d: cells[p, d] = c} weights[p, d] · features[p], for every cell c.

    Args:
        features: [P, C], one row a place of a picture; weights: [P, D], of its depths.
        cells: int64 [P, D], where each falls; −1: nowhere.
        size: number of cells.

    Returns:
        [size, C]. Time P·D·C; memory P·C above the inputs and the result, also for the backward.
    """
    out: Tensor = _Splat.apply(features, weights, cells, size)
    return out


def depth_bins(low: float, high: float, count: int, device: torch.device | None = None) -> Tensor:
    """[count]: the middle of each of ``count`` equal bins of depth between ``low`` and ``high`` metres."""
    step = (high - low) / count
    return low + step * (torch.arange(count, device=device) + 0.5)


def frustum(
    shape: tuple[int, int], picture: tuple[int, int], intrinsics: Tensor, extrinsics: Tensor, depths: Tensor
) -> Tensor:
    """Places [..., h, w, D, 3] in the model frame of every depth of every place of a feature map.

    Args:
        shape: (h, w) of the map; picture: (H, W) in pixels.
        intrinsics: [..., 3, 3]; extrinsics: [..., 4, 4] camera → model frame; depths: [D] along the optical axis.
    """
    (h, w), (height, width) = shape, picture
    # A map's place covers a block of pixels; its ray goes through the middle of the block.
    v = (torch.arange(h, device=depths.device) + 0.5) * (height / h) - 0.5
    u = (torch.arange(w, device=depths.device) + 0.5) * (width / w) - 0.5
    pixels = torch.stack([u.expand(h, w), v[:, None].expand(h, w), torch.ones(h, w, device=depths.device)], -1)
    rays = pixels @ torch.linalg.inv(intrinsics)[..., None, :, :].transpose(-1, -2)
    at = rays[..., None, :] * depths[:, None]
    R, t = extrinsics[..., None, None, :3, :3], extrinsics[..., None, None, None, :3, 3]
    out: Tensor = at @ R.transpose(-1, -2) + t
    return out


@own_towers.register("lift_splat")
class LiftSplat(BEVTower):
    """Any convolutional image tower's map → features and depths → cells of the ground → BEV backbone → pooling."""

    kinds: ClassVar[tuple[str, ...]] = ("camera",)

    class Config(BEVSettings):
        """Settings of own/lift_splat."""

        image: Component = Field(
            Component.model_validate({"name": "own/convnet", "widths": [32, 64, 128]}),
            description="an image tower with a map: own/convnet, timm/…",
        )
        range: tuple[float, float, float, float, float, float] = Field(
            (-50.0, -50.0, -5.0, 50.0, 50.0, 3.0), description="x, y, z from, x, y, z to (m); as in the LiDAR's input"
        )
        depth_range: tuple[_Positive, _Positive] = Field((2.0, 58.0), description="metres along the optical axis")
        depth_bins: Positive = Field(default=56, description="depths that a pixel is spread over")
        channels: Positive = Field(64, description="width of a feature before it is lifted")

        @model_validator(mode="after")
        def _ordered(self) -> Any:
            if self.depth_range[0] >= self.depth_range[1]:
                raise ValueError(f"depth_range {list(self.depth_range)} must give the nearer depth first")
            return self

    def __init__(self, config: Config, describe: Mapping[str, Any], embed_dim: int) -> None:
        super().__init__()
        width = config.widths[-1]
        check_width("own/lift_splat", config.head, width, embed_dim)
        self.grid = BEVGrid.over(config.range, config.cell)
        self.low_z, self.high_z = config.range[2], config.range[5]
        self.trunk = MapTrunk(config.image, describe, "encoder.image")
        self.lift = nn.Conv2d(self.trunk.width, config.depth_bins + config.channels, 1)
        self.bins, self.channels = config.depth_bins, config.channels
        self.depth_range = config.depth_range
        self.backbone = BEVBackbone(config.channels, config.widths, config.depth)
        self.pool = PooledMap(width, config.heads, self.grid)
        self.head = build_head(config.head, width, embed_dim)
        self.local = build_local(width, config.local_dim)
        kept = config.model_dump(mode="json") | {"image": image_component(self.trunk.tower)}
        self.component = Component(name="own/lift_splat", **kept)
        self.embed_dim, self.bev_width = embed_dim, width

    def splatted(self, x: Mapping[str, Tensor]) -> Tensor:
        """Collated rigs → [n, channels, nx, ny], before the backbone."""
        n, _, _, height, width = x["image"].shape
        y = self.lift(self.trunk(x["image"].flatten(0, 1)))
        h, w = y.shape[2:]
        weights, features = y[:, : self.bins].softmax(1), y[:, self.bins :]
        cells = self.cells(x, (h, w), (height, width))
        rows = torch.arange(n, device=y.device).view(n, 1, 1, 1, 1) * self.grid.cells
        cells = torch.where(cells < 0, -1, cells + rows).view(-1, self.bins)
        flat = splat(
            features.permute(0, 2, 3, 1).reshape(-1, self.channels).float(),
            weights.permute(0, 2, 3, 1).reshape(-1, self.bins).float(), cells, n * self.grid.cells,
        )  # fmt: skip
        return flat.view(n, *self.grid.shape, self.channels).permute(0, 3, 1, 2)

    def cells(self, x: Mapping[str, Tensor], shape: tuple[int, int], picture: tuple[int, int]) -> Tensor:
        """int64 [n, N, h, w, D]: the cell in which each depth of each place lies; −1 outside and where no camera is."""
        with torch.no_grad(), torch.autocast(x["image"].device.type, enabled=False):
            depths = depth_bins(*self.depth_range, self.bins, x["image"].device)
            at = frustum(shape, picture, x["intrinsics"].float(), x["extrinsics"].float(), depths)
            cell = self.grid.index(at[..., :2])
            seen = (x["present"] & x["known"])[:, :, None, None, None]
            return torch.where(seen & (at[..., 2] >= self.low_z) & (at[..., 2] < self.high_z), cell, -1)

    def bev(self, x: Mapping[str, Tensor]) -> Tensor:
        """Collated rigs → [n, W, X, Y]."""
        out: Tensor = self.backbone(self.splatted(x))
        return out

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Passed on to the image tower."""
        self.trunk.tower.set_grad_checkpointing(enable)
