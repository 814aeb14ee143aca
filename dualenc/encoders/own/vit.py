"""A plain vision transformer (Dosovitskiy et al. 2021): small, for pictures from random weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from dualenc.config import Component, Positive, Section
from dualenc.encoders.families import own_towers
from dualenc.encoders.image_regions import REGIONS, Grids, RegionTower, check_grids, said_settings
from dualenc.encoders.own.transformer import Rate, Transformer
from dualenc.encoders.tower import HeadKind, build_head
from dualenc.errors import ConfigError


class ViTTrunk(nn.Module):
    """Pictures [n, 3, S, S] → patches → transformer → mean over patches → [n, W].

    ``patch_dropout`` (FLIP, Li et al. 2023) keeps a random subset of the patches of each picture in training.
    """

    def __init__(self, size: int, patch: int, width: int, layers: int, heads: int, drop: float, patches: float) -> None:
        super().__init__()
        self.grid = size // patch
        self.patch_dropout = patches
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.positions = nn.Parameter(torch.empty(self.grid**2, width))
        nn.init.normal_(self.positions, std=0.02)
        self.transformer = Transformer(width, layers, heads, 4.0, drop)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """[n, 3, S, S] → [n, W]."""
        out: Tensor = self.norm(self.tokens(x).mean(1))
        return out

    def maps(self, x: Tensor) -> Tensor:
        """[n, 3, S, S] → all patches as a map [n, W, S/patch, S/patch]."""
        y = self.tokens(x)
        side = math.isqrt(y.shape[1])  # not always the grid's: see dualenc.encoders.places
        return y.transpose(1, 2).reshape(y.shape[0], -1, side, side)

    def pool(self, maps: Tensor) -> Tensor:
        """[n, W, h, w] → [n, W]."""
        out: Tensor = self.norm(maps.flatten(2).transpose(1, 2).mean(1))
        return out

    def tokens(self, x: Tensor) -> Tensor:
        """[n, 3, S, S] → [n, patches, W]."""
        y = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        if self.training and self.patch_dropout > 0:
            keep = max(1, round(y.shape[1] * (1 - self.patch_dropout)))
            order = torch.rand(y.shape[:2], device=y.device).argsort(1)[:, :keep]
            y = y.gather(1, order.unsqueeze(-1).expand(-1, -1, y.shape[2]))
        out: Tensor = self.transformer(y, causal=False)
        return out

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward."""
        self.transformer.grad_checkpointing = enable


@own_towers.register("vit")
class ViT(RegionTower):
    """Plain ViT, pre-norm, mean pooling, learned positions."""

    kinds: ClassVar[tuple[str, ...]] = ("image",)

    class Config(Section):
        """Settings of own/vit."""

        patch: Positive = Field(default=8, description="side of a patch in px")
        width: Positive = Field(default=192, description="width of a token")
        layers: Positive = Field(default=6, description="transformer blocks")
        heads: Positive = Field(default=3, description="attention heads")
        dropout: Rate = Field(default=0.0, description="in the blocks")
        patch_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
            default=0.0, description="share of patches left out in training (FLIP)"
        )
        head: HeadKind = Field(default="linear", description="from the pooled feature to the shared space")
        regions: Grids = REGIONS

        @model_validator(mode="after")
        def _divisible(self) -> Any:
            if self.width % self.heads:
                raise ValueError(f"width ({self.width}) must be a multiple of heads ({self.heads})")
            if self.regions is not None and self.patch_dropout:
                raise ValueError(f"regions needs every patch: set patch_dropout to 0, not {self.patch_dropout:g}")
            return self

    def __init__(self, config: Config, describe: Mapping[str, Any], embed_dim: int) -> None:
        size = int(describe["config"]["size"])
        if size % config.patch:
            raise ConfigError(f"own/vit: patch ({config.patch}) must divide the input's size ({size}).")
        if config.head == "none" and config.width != embed_dim:
            raise ConfigError(f"own/vit: head: none needs width ({config.width}) = embed_dim ({embed_dim}).")
        if config.regions is not None:
            check_grids(config.regions, (size // config.patch,) * 2, "own/vit")
        trunk = ViTTrunk(
            size, config.patch, config.width, config.layers, config.heads, config.dropout, config.patch_dropout
        )
        head = build_head(config.head, config.width, embed_dim)
        super().__init__(trunk, head, describe, channels_last=False, grids=config.regions)
        self.component = Component(name="own/vit", **said_settings(config))
        self.embed_dim = embed_dim
