"""Image towers that take each image in its aspect ratio, as a grid of patches (NaFlex: SigLIP 2, arXiv 2502.14786)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dualenc.encoders.tower import ImageTower
from dualenc.errors import ConfigError

TYPE = "siglip2_vision_model"
"""transformers' model_type of it."""


class NaflexTower(ImageTower):
    """Patches uint8 [n, N, p · p · 3] and grids [n, 2] → normalised on the device → ``trunk`` → ``head`` → [n, D].

    Patches after a picture's last are masked: its features do not depend on N.
    """

    def __init__(self, trunk: nn.Module, head: nn.Module, describe: Mapping[str, Any], patch: int, where: str) -> None:
        config = describe["config"]
        if config["resize"] != "naflex" or int(config["patch"]) != patch:
            raise ConfigError(
                f"{where}: the tower takes patches of {patch} px in each image's aspect ratio; write input: {{resize: "
                f"naflex, patch: {patch}}}, got resize: {config['resize']}, patch: {config['patch']}."
            )
        super().__init__(trunk, head, describe, channels_last=False)

    def pooled(self, x: Mapping[str, Tensor]) -> Tensor:  # type: ignore[override]
        """``patches`` and ``grid`` → [n, W]."""
        patches, grid = x["patches"], x["grid"]
        y = patches.to(self.mean.dtype).reshape(*patches.shape[:2], -1, 3) / 255
        y = ((y - self.mean.view(3)) / self.std.view(3)).flatten(-2)
        real = torch.arange(patches.shape[1], device=patches.device) < grid.prod(-1, keepdim=True)
        out: Tensor = self.trunk(y, pixel_attention_mask=real.long(), spatial_shapes=grid)
        return out


def check_grid(tower: nn.Module, describe: Mapping[str, Any], where: str) -> None:
    """Refuse a grid of patches for a tower that takes images of one size.

    Raises:
        ConfigError: naming ``input.resize``.
    """
    if describe["config"].get("resize") == "naflex" and not isinstance(tower, NaflexTower):
        raise ConfigError(
            f"{where}: input.resize: naflex needs one of SigLIP 2's NaFlex towers; use shortest or squash."
        )
