"""A small convolutional net over log-mel frames that trains on a CPU, with masks: clips of any length in one batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from dualenc.config import Component, Positive, Section
from dualenc.encoders.audio_front import mel_front
from dualenc.encoders.families import own_towers
from dualenc.encoders.own.convnet import ChannelNorm, ResidualBlock
from dualenc.encoders.tower import HeadKind, Tower, build_head
from dualenc.errors import ConfigError


class AudioMaps(Tower):
    """Stages over (time, band) that each halve the map, then mean and maximum over time of each group of bands.

    What lies beyond a clip's end is zero before the first stage, and each stage keeps it so.

    Args:
        name: of the tower, for messages and checkpoints.
        config: ``widths``, ``bands``, ``channels_last``, ``dropout``, ``head``.
        stages: (maps [n, C, F, M], bool [n, F]) → both at half the size.
    """

    kinds: ClassVar[tuple[str, ...]] = ("audio",)

    def __init__(
        self, name: str, config: Any, describe: Mapping[str, Any], embed_dim: int, stages: Iterable[nn.Module]
    ) -> None:
        super().__init__()
        self.front = mel_front(name, describe)
        places = self.front.width
        for _ in config.widths:
            places = -(-places // 2)
        if places % config.bands:
            raise ConfigError(f"{name}: bands: {config.bands} must divide the last map's {places} bands.")
        width = 2 * config.widths[-1] * config.bands
        if config.head == "none" and width != embed_dim:
            raise ConfigError(f"{name}: head: none needs 2 · widths[-1] · bands ({width}) = {embed_dim}.")
        self.stages = nn.ModuleList(stages)
        if config.channels_last:
            self.stages.to(memory_format=torch.channels_last)
        self.channels_last, self.bands = config.channels_last, config.bands
        self.norm, self.drop = nn.LayerNorm(width), nn.Dropout(config.dropout)
        self.head = build_head(config.head, width, embed_dim)
        self.component = Component(name=name, **config.model_dump(mode="json"))
        self.embed_dim = embed_dim

    def pooled(self, x: Mapping[str, Tensor]) -> Tensor:
        """``{"wave": [n, T], "length": [n], …}`` → [n, W]."""
        heard = self.front(x)
        y, mask = heard.values[:, None] * heard.mask[:, None, :, None], heard.mask
        if self.channels_last:
            y = y.contiguous(memory_format=torch.channels_last)
        for stage in self.stages:
            y, mask = stage(y, mask)
        out: Tensor = self.drop(self.norm(mean_and_maximum(y, mask, self.bands)))
        return out


@own_towers.register("audio_cnn")
class AudioCNN(AudioMaps):
    """Residual convolutions over (time, band), then the mean and the maximum over time of each band's features.

    What lies beyond a clip's end is set to zero before every convolution, so a clip in a batch with longer ones gives
    the features it gives alone. Without batch norm, for the same reason (see own/convnet).
    """

    class Config(Section):
        """Settings of own/audio_cnn."""

        widths: list[Positive] = Field([32, 64, 128], min_length=1, description="channels of each stage")
        depths: list[Annotated[int, Field(ge=0)]] | None = Field(None, description="blocks of each stage; default: one")
        bands: Positive = Field(4, description="groups of mel bands that are pooled separately, which keeps the pitch")
        channels_last: bool = Field(default=True, description="memory layout of the maps")
        dropout: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.0, description="before the head")
        head: HeadKind = Field(default="linear", description="from the pooled feature to the shared space")

        @model_validator(mode="after")
        def _same_length(self) -> Any:
            if self.depths is not None and len(self.depths) != len(self.widths):
                raise ValueError(f"depths ({self.depths}) must have as many stages as widths ({self.widths})")
            return self

    def __init__(self, config: Config, describe: Mapping[str, Any], embed_dim: int) -> None:
        stages = []
        before = 1
        for stage, channels in enumerate(config.widths):
            down: list[nn.Module] = [] if stage == 0 else [ChannelNorm(before)]
            down.append(nn.Conv2d(before, channels, 3, stride=2, padding=1))
            depth = config.depths[stage] if config.depths else 1
            stages.append(_Stage(down, [_Block(channels) for _ in range(depth)]))
            before = channels
        super().__init__("own/audio_cnn", config, describe, embed_dim, stages)


def mean_and_maximum(y: Tensor, mask: Tensor, bands: int) -> Tensor:
    """[n, C, F, M], bool [n, F] → mean and maximum over time of each group of bands' mean, [n, 2 · C · bands]."""
    grouped = y.reshape(*y.shape[:3], bands, -1).mean(-1)
    real = mask[:, None, :, None]
    mean = (grouped * real).sum(2) / real.sum(2)
    top = grouped.masked_fill(~real, -torch.inf).amax(2)
    return torch.cat([mean, top], 1).flatten(1)


class _Stage(nn.Module):
    """Halve time and bands, then blocks; the mask is halved along."""

    def __init__(self, down: list[nn.Module], blocks: list[nn.Module]) -> None:
        super().__init__()
        self.down, self.blocks = nn.ModuleList(down), nn.ModuleList(blocks)

    def forward(self, y: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        for layer in self.down:
            y = layer(y * mask[:, None, :, None])
        mask = mask[:, ::2]
        real = mask[:, None, :, None]
        for block in self.blocks:
            y = block(y, real)
        return y, mask


class _Block(ResidualBlock):
    """The residual block with what is padding kept at zero before both convolutions."""

    def forward(self, x: Tensor, real: Tensor) -> Tensor:  # type: ignore[override]
        """[n, C, F, M], bool [n, 1, F, 1] → [n, C, F, M]."""
        y = self.act(self.conv1(self.norm(x) * real))
        out: Tensor = x + self.conv2(y * real)
        return out
