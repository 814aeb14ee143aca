"""A plain stack of convolutions over log-mel frames whose weights, not activations, are normalised: little data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from dualenc.config import Component, Positive, Section
from dualenc.encoders.audio_front import FrontEnd
from dualenc.encoders.families import own_towers
from dualenc.encoders.own.audio_cnn import mean_and_maximum
from dualenc.encoders.tower import HeadKind, Tower, build_head
from dualenc.errors import ConfigError

_RELU_GAIN = 1.7139
"""√(2 / (1 − 1/π)): what a ReLU of unit Gaussians takes from their standard deviation (Brock et al. 2021)."""


class StandardConv(nn.Conv2d):
    """A convolution whose filters have mean 0 and norm 1, times a learned gain each: weight standardisation (Qiao et
    al. 2019, arXiv 1903.10520) with the scale of Brock et al. 2021 (arXiv 2101.08692).

    Activations keep their scale from layer to layer as with batch norm, and no row sees another one.
    """

    def __init__(self, before: int, width: int, stride: int = 1) -> None:
        super().__init__(before, width, 3, stride=stride, padding=1)
        self.gain = nn.Parameter(torch.ones(width, 1, 1, 1))
        assert self.bias is not None
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[n, C, F, M] → [n, width, F', M']."""
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        w = w * torch.rsqrt(w.square().sum((1, 2, 3), keepdim=True) + 1e-4) * (self.gain * _RELU_GAIN)
        return nn.functional.conv2d(x, w.to(x.dtype), self.bias, self.stride, self.padding)


@own_towers.register("audio_vgg")
class AudioVGG(Tower):
    """Convolutions over (time, band) that each halve the map, then mean and maximum over time of each group of bands.

    own/audio_cnn normalises each place over its channels, which makes the silence between two barks as loud as they
    are. Here levels reach the pooling; with few clips that matters (docs/results.md, Audio). The log-mel should have
    mean 0 and standard deviation 1 over the training clips, roughly: ``input.features.mean`` and ``std``.

    What lies beyond a clip's end is set to zero before every convolution, so a clip in a batch with longer ones gives
    the features it gives alone.
    """

    kinds: ClassVar[tuple[str, ...]] = ("audio",)

    class Config(Section):
        """Settings of own/audio_vgg."""

        widths: list[Positive] = Field([16, 32, 64, 64], min_length=1, description="channels of each convolution")
        bands: Positive = Field(4, description="groups of mel bands that are pooled separately, which keeps the pitch")
        channels_last: bool = Field(default=True, description="memory layout of the maps")
        dropout: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.0, description="before the head")
        head: HeadKind = Field(default="linear", description="from the pooled feature to the shared space")

    def __init__(self, config: Config, describe: Mapping[str, Any], embed_dim: int) -> None:
        super().__init__()
        if describe["config"]["features"]["kind"] != "mel" or describe["config"]["long"] == "fusion":
            raise ConfigError("own/audio_vgg: it needs input.features.kind: mel and input.long: crop.")
        self.front = FrontEnd(describe)
        places = self.front.width
        for _ in config.widths:
            places = -(-places // 2)
        if places % config.bands:
            raise ConfigError(f"own/audio_vgg: bands: {config.bands} must divide the last map's {places} bands.")
        width = 2 * config.widths[-1] * config.bands
        if config.head == "none" and width != embed_dim:
            raise ConfigError(f"own/audio_vgg: head: none needs 2 · widths[-1] · bands ({width}) = {embed_dim}.")
        before = [1, *config.widths[:-1]]
        pairs = zip(before, config.widths, strict=True)
        self.stages = nn.ModuleList(_Halving(i, o, strided=k == 0) for k, (i, o) in enumerate(pairs))
        if config.channels_last:
            self.stages.to(memory_format=torch.channels_last)
        self.channels_last, self.bands = config.channels_last, config.bands
        self.norm, self.drop = nn.LayerNorm(width), nn.Dropout(config.dropout)
        self.head = build_head(config.head, width, embed_dim)
        self.component = Component(name="own/audio_vgg", **config.model_dump(mode="json"))
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


class _Halving(nn.Module):
    """Convolution, ReLU, and half the frames and bands: by its stride in the first (a quarter of the work), by the
    maximum in the others. Frames beyond a clip's end stay zero, which no maximum of a ReLU notices."""

    def __init__(self, before: int, width: int, strided: bool) -> None:
        super().__init__()
        self.conv = StandardConv(before, width, 2 if strided else 1)
        self.strided = strided

    def forward(self, y: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """[n, C, F, M] and bool [n, F] → half of both."""
        y = self.conv(y).relu()
        if self.strided:
            mask = mask[:, ::2]
        y = y * mask[:, None, :, None]
        if not self.strided:
            y, mask = nn.functional.max_pool2d(y, 2, ceil_mode=True), mask[:, ::2]
        return y, mask
