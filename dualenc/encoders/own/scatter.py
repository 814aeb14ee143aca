"""Fixed wavelets in front of a small trained net: a scattering transform (Bruna & Mallat 2013, arXiv 1203.1513) with an
adapter, for little data, as in ScatSimCLR (Kinakh et al. 2021, arXiv 2108.13939).

Wavelets at scales 2^j, j < J, and L angles π l/L are one Morlet wavelet, stretched and turned:

    ψ(u) = (e^{i ξ u∥} − κ) g(u),   g(u) = e^{−(u∥² + s² u⊥²) / 2σ²},   κ such that the sum of ψ over all pixels is 0,

u∥ along the wave, u⊥ across it, with σ = 0.8 · 2^j, ξ = 3π/4 · 2^−j and s = 4/L, as is usual. φ is a Gaussian of
deviation 0.8 · 2^(J−1) whose sum is 1. Of each channel x

    S0 = x ∗ φ,   S1[j, l] = |x ∗ ψ_jl| ∗ φ,   S2[j, l, j', l'] = ||x ∗ ψ_jl| ∗ ψ_j'l'| ∗ φ for j' > j,

at every 2^J-th pixel: 1 + J·L + L²·J(J−1)/2 numbers. All wavelets are multiplied by the largest number for which
|φ̂(ω)|² + ½ Σ (|ψ̂(ω)|² + |ψ̂(−ω)|²) ≤ 1 at every frequency ω, so no distance between two images grows.
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
from dualenc.encoders.image_regions import REGIONS, Grids, check_grids, said_settings
from dualenc.encoders.own.convnet import ChannelNorm, GridTrunk, ResidualTower, residual_stages
from dualenc.encoders.tower import HeadKind, build_head
from dualenc.errors import ConfigError

_SIGMA, _XI = 0.8, 0.75 * math.pi
_TURNS = (-2.0, -1.0, 0.0, 1.0)
"""Whole turns added to frequencies of [0, 2π): with others the Gaussians are below 1e-13."""


def gaussian(side: int, scales: int) -> Tensor:
    """φ along one axis at the pixels 0 … side − 1, repeated every ``side`` of them: [side] float64, of sum 1."""
    u = torch.arange(side, dtype=torch.float64)[:, None] + side * torch.arange(-8, 9, dtype=torch.float64)
    out: Tensor = (-0.5 * (u / (_SIGMA * 2 ** (scales - 1))).square()).exp().sum(1)
    out /= out.sum()
    return out


def morlet(side: int, scales: int, angles: int) -> Tensor:
    """Discrete Fourier transforms of all wavelets, sampled at whole pixels and repeated every ``side`` of them, which
    are real: [scales, angles, side, side] float64."""
    slant = 4 / angles
    turns = torch.arange(side, dtype=torch.float64)[:, None] / side + torch.tensor(_TURNS, dtype=torch.float64)
    y, x = 2 * math.pi * turns[:, None, :, None], 2 * math.pi * turns[None, :, None, :]
    bank = []
    for j in range(scales):
        sigma, xi = _SIGMA * 2**j, _XI / 2**j
        for a in range(angles):
            c, s = math.cos(math.pi * a / angles), math.sin(math.pi * a / angles)
            along, across = c * x + s * y, (c * y - s * x) / slant
            # Sampling in space adds up frequencies that are whole turns apart.
            wave = (-0.5 * sigma**2 * ((along - xi).square() + across.square())).exp().sum((2, 3))
            bump = (-0.5 * sigma**2 * (along.square() + across.square())).exp().sum((2, 3))
            bank.append(wave - wave[0, 0] / bump[0, 0] * bump)
    out = torch.stack(bank)
    low = torch.fft.fft(gaussian(side, scales)).real
    power = out.square().sum(0)
    power = (power + power.flip(0, 1).roll((1, 1), (0, 1))) / 2
    room = (1 - (low[:, None] * low).square()).flatten()[1:] / power.flatten()[1:]  # frequency 0: φ̂ is 1, wavelets 0
    out *= room.min().sqrt()
    return out.view(scales, angles, side, side)


class Scattering(nn.Module):
    """[n, C, S, S] → orders 0, 1 and 2: [n, C, 1 or J·L or L²·J(J−1)/2, S/2^J, S/2^J], order 2 for J > 1 only.

    Images go on beyond their borders: mirrored for ``margin`` pixels, then again from the other side. Nothing is
    trained or saved: the filters follow from the settings.

    Args:
        side: S, a multiple of 2^J.
        scales: J.
        angles: L.
        margin: a multiple of 2^J, less than S.
    """

    wavelets: Tensor
    smooth: Tensor

    def __init__(self, side: int, scales: int, angles: int, margin: int) -> None:
        super().__init__()
        self.scales, self.angles, self.margin = scales, angles, margin
        self.of_orders = (1, scales * angles, angles**2 * scales * (scales - 1) // 2)
        whole, step = side + 2 * margin, 2**scales
        centres = margin + step * torch.arange(side // step)
        smooth = gaussian(whole, scales)[(centres[:, None] - torch.arange(whole)) % whole]
        self.register_buffer("wavelets", morlet(whole, scales, angles).float(), persistent=False)
        self.register_buffer("smooth", smooth.float(), persistent=False)

    def forward(self, x: Tensor) -> list[Tensor]:
        """See the class."""
        with torch.autocast(x.device.type, enabled=False):
            x = nn.functional.pad(x.float(), (self.margin,) * 4, mode="reflect")
            wavelets, spectrum = self.wavelets.float(), transformed(x)
            orders: list[list[Tensor]] = [[self.low(x)[:, :, None]], [], []]
            for j in range(self.scales):
                for a in range(self.angles):
                    y = modulus(spectrum, wavelets[j, a])
                    orders[1].append(self.low(y)[:, :, None])
                    if j + 1 < self.scales:
                        z = modulus(transformed(y)[:, :, None], wavelets[j + 1 :].flatten(0, 1))
                        orders[2].append(self.low(z))
            return [torch.cat(order, 2) for order in orders if order]

    def low(self, y: Tensor) -> Tensor:
        """[…, S', S'] → y ∗ φ at every 2^J-th pixel of the image."""
        smooth = self.smooth.float()
        return smooth @ y @ smooth.T


def transformed(y: Tensor) -> Tensor:
    """[…, S, S] → its Fourier transform as pairs of real numbers […, S, S, 2]: the exporter of ONNX graphs knows little
    of complex ones."""
    return torch.view_as_real(torch.fft.fft2(y))


def modulus(spectrum: Tensor, wavelets: Tensor) -> Tensor:
    """The transform of y […, S, S, 2], and real ones of wavelets […, S, S] → |y ∗ ψ|."""
    found = torch.view_as_real(torch.fft.ifft2(torch.view_as_complex(spectrum * wavelets[..., None])))
    return found.square().sum(-1).clamp(min=1e-20).sqrt()  # a root has no gradient at 0


class ScatterTrunk(GridTrunk):
    """Images [n, 3, S, S] → scattering coefficients → convolutions at strides 2^J, 2^(J+1), … → mean over cells.

    Each order is smaller than the one before by a factor of about eight, so orders 1 and 2 have a norm over channels
    each; the local means, order 0, go on as they are.
    """

    def __init__(self, front: Scattering, widths: list[int], depths: list[int], grid: int) -> None:
        super().__init__()
        self.front = front
        self.norms = nn.ModuleList(ChannelNorm(3 * count) for count in front.of_orders[1:] if count)
        self.layers = residual_stages(nn.Conv2d(3 * sum(front.of_orders), widths[0], 1), widths, depths)
        self.grid = grid
        self.norm = nn.LayerNorm(widths[-1] * grid**2)

    def maps(self, x: Tensor) -> Tensor:
        """[n, 3, S, S] → the last map [n, W, h, w]."""
        low, *orders = self.front(x)
        normed = [norm(y.flatten(1, 2)) for norm, y in zip(self.norms, orders, strict=True)]
        out: Tensor = self.layers(torch.cat([low.flatten(1, 2), *normed], 1))
        return out


@own_towers.register("scatter")
class Scatter(ResidualTower):
    """A fixed scattering transform, then 1×1 and residual 3×3 convolutions without batch norm: for few images."""

    kinds: ClassVar[tuple[str, ...]] = ("image",)

    class Config(Section):
        """Settings of own/scatter."""

        scales: Positive = Field(2, description="J, octaves of wavelets; the map has a cell for 2^J × 2^J pixels")
        angles: Annotated[int, Field(ge=2)] = Field(8, description="L, directions of wavelets")
        widths: list[Positive] = Field([64, 128], min_length=1, description="channels of each stage of the trained net")
        depths: list[Annotated[int, Field(ge=0)]] | None = Field(
            None, description="residual blocks of each stage; default: one"
        )
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
        size, step = int(describe["config"]["size"]), 2**config.scales
        stride = step * 2 ** (len(config.widths) - 1)
        if size % step or size <= step:
            raise ConfigError(
                f"own/scatter: images of {size} pixels cannot be cut into cells of {step} × {step} (scales: "
                f"{config.scales}); set input.size to a multiple of {step} above it, or fewer scales."
            )
        if size < stride:
            raise ConfigError(f"own/scatter: images of {size} pixels are smaller than its stride {stride}.")
        if (size // stride) % config.grid:
            raise ConfigError(f"own/scatter: grid: {config.grid} must divide the last map's {size // stride} cells.")
        if config.regions is not None:
            if config.grid > 1:
                raise ConfigError(f"own/scatter: regions pools each box to its mean: leave out grid: {config.grid}.")
            check_grids(config.regions, (size // stride,) * 2, "own/scatter")
        width = config.widths[-1] * config.grid**2
        if config.head == "none" and width != embed_dim:
            raise ConfigError(f"own/scatter: head: none needs widths[-1] · grid² ({width}) = embed_dim ({embed_dim}).")
        front = Scattering(size, config.scales, config.angles, step)
        trunk = ScatterTrunk(front, config.widths, config.depths or [1] * len(config.widths), config.grid)
        if config.channels_last:
            trunk = trunk.to(memory_format=torch.channels_last)
        head = build_head(config.head, width, embed_dim)
        super().__init__(trunk, head, describe, config.channels_last, config.regions)
        self.component = Component(name="own/scatter", **said_settings(config))
        self.embed_dim = embed_dim
