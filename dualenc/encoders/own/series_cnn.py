"""Residual convolutions over time for multichannel series (the ResNet of Wang et al. 2017, without batch norm)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from dualenc.config import Component, Positive, Section
from dualenc.encoders.families import own_towers
from dualenc.encoders.tower import HeadKind, Tower, build_head
from dualenc.errors import ConfigError


@own_towers.register("series_cnn")
class SeriesCNN(Tower):
    """Stages that halve the time, then mean and maximum over time.

    What lies beyond a series' end is zero before every convolution and left out of both pools, so a series in a batch
    with longer ones gives the features it gives alone. Layer norm over channels in place of batch norm, for the same
    reason.
    """

    kinds: ClassVar[tuple[str, ...]] = ("series",)

    class Config(Section):
        """Settings of own/series_cnn."""

        widths: list[Positive] = Field([64, 128, 128], min_length=1, description="channels of each stage")
        kernel: Positive = Field(7, description="times that a convolution sees; odd")
        dropout: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.0, description="before the head")
        head: HeadKind = Field(default="linear", description="from the pooled feature to the shared space")

    def __init__(self, config: Config, describe: Mapping[str, Any], embed_dim: int) -> None:
        super().__init__()
        if config.kernel % 2 == 0:
            raise ConfigError(f"own/series_cnn: kernel: {config.kernel} must be odd; use {config.kernel + 1}")
        width = 2 * config.widths[-1]
        if config.head == "none" and width != embed_dim:
            raise ConfigError(f"own/series_cnn: head: none needs 2 · widths[-1] ({width}) = embed_dim ({embed_dim})")
        before = int(describe["config"]["channels"])
        stages = []
        for stage, channels in enumerate(config.widths):
            stages.append(_Stage(before, channels, config.kernel, first=stage == 0))
            before = channels
        self.stages = nn.ModuleList(stages)
        self.norm, self.drop = nn.LayerNorm(width), nn.Dropout(config.dropout)
        self.head = build_head(config.head, width, embed_dim)
        self.component = Component(name="own/series_cnn", **config.model_dump(mode="json"))
        self.embed_dim = embed_dim

    def pooled(self, x: Mapping[str, Tensor]) -> Tensor:
        """``{"values": [n, C, T], "length": [n]}`` → [n, W]."""
        y = x["values"]
        mask = torch.arange(y.shape[2], device=y.device)[None] < x["length"][:, None]
        for stage in self.stages:
            y, mask = stage(y, mask)
        real = mask[:, None]
        mean = (y * real).sum(2) / real.sum(2)
        top = y.masked_fill(~real, -torch.inf).amax(2)
        out: Tensor = self.drop(self.norm(torch.cat([mean, top], 1)))
        return out


class _Stage(nn.Module):
    """A convolution that halves the time (the first keeps it), then x + conv(relu(conv(norm x)))."""

    def __init__(self, before: int, width: int, kernel: int, first: bool) -> None:
        super().__init__()
        self.stride = 1 if first else 2
        self.down = nn.Conv1d(before, width, kernel, stride=self.stride, padding=kernel // 2)
        self.norm = nn.LayerNorm(width)
        self.conv1 = nn.Conv1d(width, width, kernel, padding=kernel // 2)
        self.conv2 = nn.Conv1d(width, width, kernel, padding=kernel // 2)
        nn.init.kaiming_normal_(self.conv1.weight, nonlinearity="relu")
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]

    def forward(self, y: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """[n, C, T], bool [n, T] → the same at half the time."""
        y = self.down(y * mask[:, None])
        mask = mask[:, :: self.stride]
        real = mask[:, None]
        z = self.norm(y.transpose(1, 2)).transpose(1, 2)
        out: Tensor = y + self.conv2(torch.relu(self.conv1(z * real)) * real)
        return out, mask
