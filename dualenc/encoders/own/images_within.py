"""Image towers as parts of camera towers: any of them for its features, convolutional ones for their maps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dualenc.config import Component
from dualenc.encoders.families import find
from dualenc.encoders.own.convnet import ConvTrunk
from dualenc.encoders.tower import ImageTower
from dualenc.errors import ConfigError


def image_tower(component: Component, describe: Mapping[str, Any], where: str) -> tuple[ImageTower, int]:
    """An image tower without a projection for pictures of the camera input's size, and the width of its features.

    Raises:
        ConfigError: no image tower, or one that does not take pictures of this shape.
    """
    height, width = describe["config"]["size"]
    given = {"kind": "image", "config": {**describe["config"], "size": min(height, width)}}
    family, name, settings = find("image", component, where)
    if "head" in component.settings:
        raise ConfigError(f"{where}.head: leave it out; the camera tower has its own head.")
    for key, need in family.demands("image", name, settings).items():
        if key in ("mean", "std") and not np.allclose(need, describe["config"][key], atol=1e-6):
            raise ConfigError(
                f"input.{key}: the weights of {component.name} were made with {[round(v, 6) for v in need]}, "
                f"got {list(describe['config'][key])}. Use those."
            )
    if component.settings.get("regions") is not None:
        raise ConfigError(f"{where}.regions: leave it out; the camera tower pools the whole image.")
    # Its own projection, to one number, is dropped: head: none would want to be told the width asked for here.
    tower = family.build("image", name, settings, given, 1, where)
    if not isinstance(tower, ImageTower):
        raise ConfigError(f"{where}.name: {component.name} does not take images as uint8 [n, 3, H, W].")
    tower.head = nn.Identity()
    try:
        with torch.no_grad():
            out = tower.eval().pooled(torch.zeros(1, 3, height, width, dtype=torch.uint8))
    except (RuntimeError, AssertionError, ValueError) as e:
        raise ConfigError(
            f"{where}.name: {component.name} does not take images of {height}×{width}: "
            f"set input.size: [{height}, {height}] or use a convolutional tower ({str(e).splitlines()[0][:100]})"
        ) from e
    return tower.train(), int(out.shape[1])


def image_component(tower: ImageTower) -> dict[str, Any]:
    """Name and settings that build the tower again, without its weights and its head."""
    kept = tower.component.model_dump(mode="json")
    return {k: v for k, v in kept.items() if k != "head"}


class MapTrunk(nn.Module):
    """The last feature map of an image tower: uint8 [n, 3, H, W] → [n, width, h, w]."""

    def __init__(self, component: Component, describe: Mapping[str, Any], where: str) -> None:
        super().__init__()
        self.tower, _ = image_tower(component, describe, where)
        height, width = describe["config"]["size"]
        with torch.no_grad():
            self.tower.eval()
            out = self(torch.zeros(1, 3, height, width, dtype=torch.uint8))
            self.tower.train()
        if out.ndim != 4:
            raise ConfigError(f"{where}.name: {component.name} has no feature map; use own/convnet or a timm conv net.")
        self.width = int(out.shape[1])
        # What comes after the map has no use here, and weights without a gradient would stop DDP.
        trunk: Any = self.tower.trunk
        if isinstance(trunk, ConvTrunk):
            trunk.norm = nn.Identity()  # type: ignore[assignment]
        elif "head" in dict(trunk.named_children()):
            trunk.head = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """uint8 [n, 3, H, W] → [n, width, h, w]."""
        t = self.tower
        y = (x.to(t.mean.dtype) / 255 - t.mean) / t.std
        if t.channels_last:
            y = y.contiguous(memory_format=torch.channels_last)
        if isinstance(t.trunk, ConvTrunk):
            out: Tensor = t.trunk.layers(y)
            return out
        # timm's and open_clip's trunks have it; a trunk that is a plain module is its own map
        features: Any = getattr(t.trunk, "forward_features", t.trunk)
        out = features(y)
        return out
