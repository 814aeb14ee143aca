"""Any image tower on each of several cameras, pooled with the geometry of each camera."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from dualenc.config import Component, Positive, Section
from dualenc.encoders.families import own_towers
from dualenc.encoders.own.bev import AttentionPool
from dualenc.encoders.own.images_within import image_component, image_tower
from dualenc.encoders.own.lidar_pillars import check_width
from dualenc.encoders.tower import HeadKind, Tower, build_head

_NUMBERS = 13


def view_numbers(intrinsics: Tensor, extrinsics: Tensor, picture: tuple[int, int]) -> Tensor:
    """[..., 13] of a camera: where it stands (in 10 m), its axes ahead and down, its opening and principal point."""
    height, width = picture
    size = intrinsics.new_tensor([width, height])
    focal = torch.diagonal(intrinsics, dim1=-2, dim2=-1)[..., :2] * 2 / size
    point = intrinsics[..., :2, 2] * 2 / size - 1
    axes = nn.functional.normalize(extrinsics[..., :3, 1:3], dim=-2).transpose(-1, -2).flatten(-2)
    return torch.cat([extrinsics[..., :3, 3] / 10, axes, 1 / focal, point], -1)


@own_towers.register("cameras")
class Cameras(Tower):
    """Image tower per camera → plus an embedding of its geometry → attention over the cameras that are there."""

    kinds: ClassVar[tuple[str, ...]] = ("camera",)

    class Config(Section):
        """Settings of own/cameras."""

        image: Component = Field(Component(name="own/convnet"), description="an image tower of any family")
        width: Positive = Field(256, description="width of each camera's feature when they are pooled")
        heads: Positive = Field(default=4, description="attention heads of the pooling")
        geometry: bool = Field(True, description="false: pool cameras without their geometry")
        head: HeadKind = Field(default="linear", description="from the pooled feature to the shared space")

        @model_validator(mode="after")
        def _divisible(self) -> Any:
            if self.width % self.heads:
                raise ValueError(f"width ({self.width}) must be a multiple of heads ({self.heads})")
            return self

    def __init__(self, config: Config, describe: Mapping[str, Any], embed_dim: int) -> None:
        super().__init__()
        check_width("own/cameras", config.head, config.width, embed_dim)
        self.image, own = image_tower(config.image, describe, "encoder.image")
        self.project = nn.Linear(own, config.width)
        geometry = [nn.Linear(_NUMBERS, config.width), nn.GELU(), nn.Linear(config.width, config.width)]
        self.geometry = nn.Sequential(*geometry) if config.geometry else None
        self.pool = AttentionPool(config.width, config.heads)
        self.head = build_head(config.head, config.width, embed_dim)
        kept = config.model_dump(mode="json") | {"image": image_component(self.image)}
        self.component = Component(name="own/cameras", **kept)
        self.embed_dim = embed_dim

    def pooled(self, x: Mapping[str, Tensor]) -> Tensor:
        """``{"image": uint8 [n, N, 3, H, W], "intrinsics", "extrinsics", "present", "known", …}`` → [n, W]."""
        n, cameras, _, height, width = x["image"].shape
        y = self.project(self.image.pooled(x["image"].flatten(0, 1))).view(n, cameras, -1)
        if self.geometry is not None:
            numbers = view_numbers(x["intrinsics"].float(), x["extrinsics"].float(), (height, width))
            known = x["known"][..., None]
            y = y + torch.where(known, self.geometry(torch.where(known, numbers, 0.0)), 0.0)
        out: Tensor = self.pool(y, x["present"])
        return out

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Passed on to the image tower."""
        self.image.set_grad_checkpointing(enable)
