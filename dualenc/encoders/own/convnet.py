"""A small residual convolutional net (He et al. 2016; pre-activation order) that trains on a CPU.

There is no batch norm: statistics of the batch would make a row's gradient depend on which other rows its rank and
micro-batch hold. Each place is normalised over its channels instead (layer norm, as in ConvNeXt, Liu et al. 2022).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from dualenc.config import Component, Positive, Section
from dualenc.encoders.families import own_towers
from dualenc.encoders.image_regions import REGIONS, Grids, RegionTower, check_grids, said_settings
from dualenc.encoders.tower import HeadKind, build_head
from dualenc.errors import ConfigError


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of [n, C, H, W]; free of copies where the memory is channels-last."""

    def forward(self, x: Tensor) -> Tensor:
        """[n, C, H, W] → the same shape."""
        y = nn.functional.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return y.permute(0, 3, 1, 2)


class ResidualBlock(nn.Module):
    """x + conv3(relu(conv3(norm x))); the second convolution starts at zero, so the block starts as the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.act = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        nn.init.kaiming_normal_(self.conv1.weight, nonlinearity="relu")
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """[n, C, H, W] → the same shape."""
        out: Tensor = x + self.conv2(self.act(self.conv1(self.norm(x))))
        return out


def residual_stages(first: nn.Conv2d, widths: list[int], depths: list[int]) -> nn.Sequential:
    """``first`` gives ``widths[0]`` channels; then ``depths[i]`` blocks of ``widths[i]``, at half the size each."""
    layers: list[nn.Module] = [first]
    for i, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        if i > 0:
            layers += [ChannelNorm(widths[i - 1]), nn.Conv2d(widths[i - 1], width, 2, stride=2)]
        layers += [ResidualBlock(width) for _ in range(depth)]
    return nn.Sequential(*layers)


class GridTrunk(nn.Module):
    """A map, its mean over the parts of a ``grid`` × ``grid``, a norm.

    Attributes:
        layers: what makes the map, as :func:`residual_stages` gives it.
    """

    layers: nn.Sequential
    norm: nn.LayerNorm
    grid: int

    def maps(self, x: Tensor) -> Tensor:
        """[n, 3, S, S] → the last map [n, W, h, w]."""
        out: Tensor = self.layers(x)
        return out

    def pool(self, maps: Tensor) -> Tensor:
        """[n, W, h, w] → [n, grid²·W]."""
        out: Tensor = self.norm(nn.functional.adaptive_avg_pool2d(maps, self.grid).flatten(1))
        return out

    def forward(self, x: Tensor) -> Tensor:
        """[n, 3, S, S] → [n, grid²·W]."""
        return self.pool(self.maps(x))


class ConvTrunk(GridTrunk):
    """Images [n, 3, S, S] → features at strides ``stem``, 2·stem, 4·stem, … → mean over cells → [n, grid²·W]."""

    def __init__(self, widths: list[int], depths: list[int], stem: int, grid: int) -> None:
        super().__init__()
        first = nn.Conv2d(3, widths[0], 2 * stem - 1, stride=stem, padding=stem - 1)
        self.layers = residual_stages(first, widths, depths)
        self.grid = grid
        self.norm = nn.LayerNorm(widths[-1] * grid**2)


class ResidualTower(RegionTower):
    """A tower around a :class:`GridTrunk`."""

    def blocks(self) -> list[nn.Module]:
        """The residual blocks; a stride between two counts with what stands before it, so it has its own place."""
        return [m for m in self.trunk.get_submodule("layers").children() if not isinstance(m, ChannelNorm)][1:]


@own_towers.register("convnet")
class ConvNet(ResidualTower):
    """Residual convolutional net for small images."""

    kinds: ClassVar[tuple[str, ...]] = ("image",)

    class Config(Section):
        """Settings of own/convnet."""

        widths: list[Positive] = Field([48, 96, 192], min_length=1, description="channels of each stage")
        depths: list[Annotated[int, Field(ge=0)]] | None = Field(
            None, description="residual blocks of each stage; default: one, two in the last"
        )
        stem: Annotated[int, Field(ge=1)] = Field(4, description="stride of the first convolution")
        grid: Annotated[int, Field(ge=1)] = Field(
            1, description="pool to grid × grid cells before the head: more than 1 keeps the image's layout"
        )
        channels_last: bool = Field(default=True, description="memory layout of the maps")
        head: HeadKind = Field(default="linear", description="from the pooled feature to the shared space")
        regions: Grids = REGIONS

        @model_validator(mode="after")
        def _same_length(self) -> Any:
            if self.depths is not None and len(self.depths) != len(self.widths):
                raise ValueError(f"depths ({self.depths}) must have as many stages as widths ({self.widths})")
            return self

    def __init__(self, config: Config, describe: Mapping[str, Any], embed_dim: int) -> None:
        size, stride = int(describe["config"]["size"]), config.stem * 2 ** (len(config.widths) - 1)
        if size < stride:
            raise ConfigError(f"own/convnet: images of {size} pixels are smaller than its stride {stride}.")
        if (size // stride) % config.grid:
            raise ConfigError(f"own/convnet: grid: {config.grid} must divide the last map's {size // stride} cells.")
        width = config.widths[-1] * config.grid**2
        if config.regions is not None:
            if config.grid > 1:
                raise ConfigError(f"own/convnet: regions pools each box to its mean: leave out grid: {config.grid}.")
            check_grids(config.regions, (size // stride,) * 2, "own/convnet")
        if config.head == "none" and width != embed_dim:
            raise ConfigError(f"own/convnet: head: none needs widths[-1] · grid² ({width}) = embed_dim ({embed_dim}).")
        trunk = ConvTrunk(
            config.widths, config.depths or [1] * (len(config.widths) - 1) + [2], config.stem, config.grid
        )
        if config.channels_last:
            trunk = trunk.to(memory_format=torch.channels_last)
        head = build_head(config.head, width, embed_dim)
        super().__init__(trunk, head, describe, config.channels_last, config.regions)
        self.component = Component(name="own/convnet", **said_settings(config))
        self.embed_dim = embed_dim
