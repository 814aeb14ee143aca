"""A plain stack of convolutions over log-mel frames whose weights, not activations, are normalised: little data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from dualenc.config import Positive, Section
from dualenc.encoders.families import own_towers
from dualenc.encoders.own.audio_cnn import AudioMaps
from dualenc.encoders.tower import HeadKind

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
class AudioVGG(AudioMaps):
    """Convolutions over (time, band) that each halve the map, then mean and maximum over time of each group of bands.

    own/audio_cnn normalises each place over its channels, which makes the silence between two barks as loud as they
    are. Here levels reach the pooling; with few clips that matters (docs/results.md, Audio). The log-mel should have
    mean 0 and standard deviation 1 over the training clips, roughly: ``input.features.mean`` and ``std``.

    What lies beyond a clip's end is set to zero before every convolution, so a clip in a batch with longer ones gives
    the features it gives alone.
    """

    class Config(Section):
        """Settings of own/audio_vgg."""

        widths: list[Positive] = Field([16, 32, 64, 64], min_length=1, description="channels of each convolution")
        bands: Positive = Field(4, description="groups of mel bands that are pooled separately, which keeps the pitch")
        channels_last: bool = Field(default=True, description="memory layout of the maps")
        dropout: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.0, description="before the head")
        head: HeadKind = Field(default="linear", description="from the pooled feature to the shared space")

    def __init__(self, config: Config, describe: Mapping[str, Any], embed_dim: int) -> None:
        pairs = zip([1, *config.widths[:-1]], config.widths, strict=True)
        stages = [_Halving(i, o, strided=k == 0) for k, (i, o) in enumerate(pairs)]
        super().__init__("own/audio_vgg", config, describe, embed_dim, stages)


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
