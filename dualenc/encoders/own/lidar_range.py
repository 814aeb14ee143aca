"""Range-view transformer: the sweep as a picture of azimuth and elevation around its sensor, cut into patches.

Rows and columns as in RangeNet++ (Milioto et al. 2019), the transformer as in RangeViT (Ando et al. 2023,
arXiv 2301.10222), without its convolutional stem and decoder.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from dualenc.config import Component, Positive, Section
from dualenc.encoders.families import own_towers
from dualenc.encoders.own.bev import AttentionPool
from dualenc.encoders.own.lidar_pillars import check_width
from dualenc.encoders.own.transformer import Rate, Transformer
from dualenc.encoders.tower import HeadKind, Tower, build_head

Degrees = Annotated[float, Field(ge=-180, le=180)]


def range_image(
    points: Tensor, count: Tensor, origin: Tensor, shape: tuple[int, int], up: tuple[float, float],
    around: tuple[float, float],
) -> Tensor:  # fmt: skip
    """Points [n, M, C] → pictures [n, C + 2, H, W]: x, y, z from the sensor, the other columns, distance, and 1 where
    there is a point; the nearest point of a pixel wins, then the first.

    Args:
        origin: [n, 3], the sensor's place.
        up, around: degrees of elevation (bottom, top) and azimuth (right, left) that the picture spans.
    """
    n, most, columns = points.shape
    height, width = shape
    rays = points[..., :3] - origin[:, None]
    distance = rays.norm(dim=-1).clamp(min=1e-3)
    pitch = torch.asin((rays[..., 2] / distance).clamp(-1, 1))
    yaw = torch.atan2(rays[..., 1], rays[..., 0])
    bottom, top = (math.radians(v) for v in up)
    right, left = (math.radians(v) for v in around)
    row = torch.floor((top - pitch) / (top - bottom) * height).long()
    column = torch.floor((left - yaw) / (left - right) * width).long()
    there = torch.arange(most, device=points.device)[None] < count[:, None]
    inside = there & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    at, place = inside.nonzero(as_tuple=True)
    pixel = (at * height + row[at, place]) * width + column[at, place]
    far = distance[at, place]
    total = n * height * width
    nearest = far.new_full((total,), torch.inf).scatter_reduce(0, pixel, far, "amin")
    # Of equally near points the first: without this which one is written would depend on threads.
    order = torch.arange(len(far), device=far.device)
    tied = torch.where(far == nearest[pixel], order, len(far))
    first = torch.full((total,), len(far), device=far.device, dtype=torch.long).scatter_reduce(0, pixel, tied, "amin")
    kept = first[pixel] == order
    values = torch.cat([rays, points[..., 3:], distance[..., None], torch.ones_like(distance)[..., None]], -1)
    out = points.new_zeros(total, columns + 2)
    out = out.index_copy(0, pixel[kept], values[at, place][kept])
    return out.view(n, height, width, columns + 2).permute(0, 3, 1, 2)


@own_towers.register("range_vit")
class RangeViT(Tower):
    """Range picture → patches → transformer → attention pooling. Patches without any point are not pooled."""

    kinds: ClassVar[tuple[str, ...]] = ("lidar",)

    class Config(Section):
        """Settings of own/range_vit."""

        height: Positive = Field(32, description="pixels of elevation; about the sensor's number of beams")
        width_px: Positive = Field(512, description="pixels of azimuth")
        elevation: tuple[Degrees, Degrees] = Field((-30.0, 10.0), description="degrees, bottom and top")
        azimuth: tuple[Degrees, Degrees] = Field(
            (-180.0, 180.0), description="degrees, right and left of straight ahead"
        )
        patch: tuple[Positive, Positive] = Field((4, 16), description="pixels of a patch: elevation, azimuth")
        width: Positive = Field(default=192, description="width of a token")
        layers: Positive = Field(default=6, description="transformer blocks")
        heads: Positive = Field(default=3, description="attention heads")
        dropout: Rate = Field(default=0.0, description="in the blocks")
        head: HeadKind = Field(default="linear", description="from the pooled feature to the shared space")

        @model_validator(mode="after")
        def _fits(self) -> Any:
            if self.width % self.heads:
                raise ValueError(f"width ({self.width}) must be a multiple of heads ({self.heads})")
            if self.height % self.patch[0] or self.width_px % self.patch[1]:
                raise ValueError(f"patch {list(self.patch)} must divide height and width_px")
            if self.elevation[0] >= self.elevation[1] or self.azimuth[0] >= self.azimuth[1]:
                raise ValueError("elevation and azimuth must give the lower end first")
            return self

    def __init__(self, config: Config, describe: Mapping[str, Any], embed_dim: int) -> None:
        super().__init__()
        check_width("own/range_vit", config.head, config.width, embed_dim)
        given = describe["config"]
        self.config = config
        # Distances up to about the range come out within ±1.
        reach = max(abs(v) for v in given["range"])
        extra = len(given["features"])
        self.register_buffer("scale", torch.tensor([reach] * 3 + [1.0] * extra + [reach, 1.0]), persistent=False)
        places = (config.height // config.patch[0]) * (config.width_px // config.patch[1])
        self.patches = nn.Conv2d(5 + extra, config.width, config.patch, stride=config.patch)
        self.positions = nn.Parameter(torch.randn(places, config.width) * 0.02)
        self.transformer = Transformer(config.width, config.layers, config.heads, 4.0, config.dropout)
        self.pool = AttentionPool(config.width, config.heads)
        self.head = build_head(config.head, config.width, embed_dim)
        self.component = Component(name="own/range_vit", **config.model_dump(mode="json"))
        self.embed_dim = embed_dim

    scale: Tensor

    def pooled(self, x: Mapping[str, Tensor]) -> Tensor:
        """``{"points": [n, M, C], "count": [n], "origin": [n, 3], …}`` → [n, W]."""
        c = self.config
        with torch.autocast(x["points"].device.type, enabled=False):
            picture = range_image(
                x["points"].float(), x["count"], x["origin"].float(), (c.height, c.width_px), c.elevation, c.azimuth
            )
            hit = nn.functional.max_pool2d(picture[:, -1:], c.patch).flatten(1) > 0
            picture = picture / self.scale[:, None, None]
        tokens = self.patches(picture).flatten(2).transpose(1, 2) + self.positions
        out: Tensor = self.pool(self.transformer(tokens, causal=False), hit)
        return out

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward."""
        self.transformer.grad_checkpointing = enable
