"""The scattering front end against convolutions in a loop, what it leaves unchanged, and the tower around it."""

from __future__ import annotations

import cmath
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from benchmarks.matrix import WORDS, built
from dualenc.config import Component
from dualenc.data.modalities import modalities
from dualenc.encoders import build_tower
from dualenc.encoders.own.scatter import Scattering, gaussian, morlet
from dualenc.engine.protocol import make_contiguous
from dualenc.errors import ConfigError
from dualenc.flop_counter import counting
from dualenc.model import load_model

torch.set_num_threads(1)
Map = npt.NDArray[np.complex128]
SMALL: dict[str, Any] = {"name": "own/scatter", "angles": 2, "widths": [8, 16]}


def tower_of(size: int = 32, **more: Any) -> Any:
    source = modalities["image"](modalities["image"].Config.model_validate({"size": size}))
    torch.manual_seed(0)
    return build_tower("image", Component.model_validate({**SMALL, **more}), source.describe(), 12)


# --- in space, pixel by pixel -------------------------------------------------------------------------------------


def bump(y: float, x: float, sigma: float, slant: float, angle: float) -> float:
    along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    return math.exp(-(along**2 + (slant * across) ** 2) / (2 * sigma**2))


def wavelet(side: int, j: int, angle: float, angles: int) -> Map:
    """The Morlet wavelet by its definition, repeated every ``side`` pixels, of any height."""
    sigma, xi, slant = 0.8 * 2**j, 3 * math.pi / 4 / 2**j, 4 / angles
    wave, hill = np.zeros((side, side), complex), np.zeros((side, side))
    for y, x in itertools.product(range(-2 * side, 2 * side), repeat=2):
        height = bump(y, x, sigma, slant, angle)
        along = x * math.cos(angle) + y * math.sin(angle)
        wave[y % side, x % side] += height * cmath.exp(1j * xi * along)
        hill[y % side, x % side] += height
    area = 2 * math.pi * sigma**2 / slant
    return (wave - wave.sum() / hill.sum() * hill) / area


def convolved(x: npt.NDArray[Any], filter_: npt.NDArray[Any]) -> Map:
    """The circular convolution, a shifted copy for each pixel of the filter."""
    out = np.zeros(x.shape, complex)
    for y, z in itertools.product(range(x.shape[0]), repeat=2):
        out += filter_[y, z] * np.roll(x, (y, z), (0, 1))
    return out


def test_against_convolutions_in_a_loop() -> None:
    """Every coefficient of two channels; the common height of the wavelets from the frame bound, by a naive DFT."""
    scales, angles, size, margin = 2, 3, 8, 4
    side, step = size + 2 * margin, 4
    rng = np.random.default_rng(0)
    images = rng.normal(size=(2, size, size))
    bank = [[wavelet(side, j, math.pi * a / angles, angles) for a in range(angles)] for j in range(scales)]
    low = np.zeros((side, side))
    for y, x in itertools.product(range(-4 * side, 4 * side), repeat=2):
        low[y % side, x % side] += bump(y, x, 0.8 * 2 ** (scales - 1), 1.0, 0.0)
    low /= low.sum()
    turn = np.exp(-2j * math.pi * np.outer(np.arange(side), np.arange(side)) / side)
    spectra = [np.abs(turn @ f @ turn) ** 2 for row in bank for f in row]
    power = sum(p + np.roll(p[::-1, ::-1], (1, 1), (0, 1)) for p in spectra) / 2
    height = math.sqrt(((1 - np.abs(turn @ low @ turn) ** 2).ravel()[1:] / power.ravel()[1:]).min())  # type: ignore[union-attr]
    wants = []
    for image in images:
        x = np.pad(image, margin, mode="reflect")
        kept = slice(margin, margin + size, step)
        orders: list[list[Map]] = [[convolved(x, low)[kept, kept]], [], []]
        for j, a in itertools.product(range(scales), range(angles)):
            first = np.abs(convolved(x, height * bank[j][a]))
            orders[1].append(convolved(first, low)[kept, kept])
            for k, b in itertools.product(range(j + 1, scales), range(angles)):
                second = np.abs(convolved(first, height * bank[k][b]))
                orders[2].append(convolved(second, low)[kept, kept])
        wants.append([torch.from_numpy(np.stack(o).real).float() for o in orders])
    got = Scattering(size, scales, angles, margin)(torch.from_numpy(images)[None])
    assert [tuple(y.shape) for y in got] == [(1, 2, 1, 2, 2), (1, 2, 6, 2, 2), (1, 2, 9, 2, 2)]
    for channel, want in enumerate(wants):
        for y, expected in zip(got, want, strict=True):
            torch.testing.assert_close(y[0, channel], expected, atol=2e-6, rtol=1e-5)


# --- what must hold of any such transform -------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "scales", "angles"), [(40, 2, 8), (48, 3, 4), (24, 2, 2)])
def test_wavelets_have_no_mean_and_are_a_frame_of_bound_one(side: int, scales: int, angles: int) -> None:
    bank, low = morlet(side, scales, angles), torch.fft.fft(gaussian(side, scales)).real
    assert bank[:, :, 0, 0].abs().max() <= 1e-12
    assert low[0] == pytest.approx(1, abs=1e-12)
    power = bank.square().sum((0, 1))
    power = (power + power.flip(0, 1).roll((1, 1), (0, 1))) / 2 + (low[:, None] * low).square()
    assert power.max() == pytest.approx(1, abs=1e-12)
    assert power.min() > 0.05


def test_a_constant_image_has_order_0_alone() -> None:
    low, first, second = Scattering(32, 2, 4, 4)(torch.full((1, 1, 32, 32), 3.0))
    torch.testing.assert_close(low, torch.full((1, 1, 1, 8, 8), 3.0))
    assert max(first.abs().max(), second.abs().max()) <= 1e-5


def images(n: int = 4, size: int = 32) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_no_distance_grows_and_small_shifts_hardly_matter() -> None:
    scattering, x = Scattering(32, 3, 4, 0), images()
    y = x + 0.3 * images().flip(0)

    def front(z: Tensor) -> Tensor:
        return torch.cat([order.flatten(1) for order in scattering(z)], 1)

    moved = (front(x) - front(y)).norm(dim=1) / (x - y).flatten(1).norm(dim=1)
    assert (moved <= 1).all()
    assert (moved > 0).all()

    def change(f: Any, pixels: int) -> float:
        return float((f(x) - f(x.roll(pixels, 3))).norm() / f(x).norm())

    assert change(lambda z: z, 1) > 1.3  # white noise has nothing in common with itself one pixel on
    assert change(front, 1) < 0.1 < change(front, 8)


# --- the tower ----------------------------------------------------------------------------------------------------


def test_the_filters_are_neither_trained_nor_saved(tmp_path: Path) -> None:
    tower = tower_of()
    assert not [n for n, _ in tower.named_parameters() if "front" in n]
    assert not [n for n in tower.state_dict() if "front" in n]
    image = {"input": {"size": 32}, "encoder": {**SMALL, "scales": 3, "regions": [1, 2]}}
    bundle = built(24, image=image, text=WORDS)
    bundle.save(tmp_path / "m")
    again = load_model(str(tmp_path / "m"))
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(again.model.encode("image", pixels), bundle.model.encode("image", pixels))
    assert again.model.tower("image").component == bundle.model.tower("image").component


def test_the_work_of_its_transforms_is_counted() -> None:
    pixels = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    tower = tower_of()
    with torch.no_grad(), counting() as counter:
        tower.encode(pixels)
    inverse = 3 * (4 + 4) * 5 * 40 * 40 * math.log2(40 * 40)  # J·L of order 1 and L² of order 2, for three channels
    assert counter.get_total_flops() > inverse


def test_a_1x1_convolution_is_made_contiguous_for_engines_that_read_bytes() -> None:
    """Its channels-last weight says that it is, with the strides of the other layout."""
    conv = torch.nn.Conv2d(27, 8, 1).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    want = conv.weight.detach().clone()
    assert conv.weight.stride(3) == 27
    make_contiguous(conv)
    assert conv.weight.stride() == (27, 1, 1, 1)
    assert torch.equal(conv.weight, want)


def test_bf16_and_channels_last_change_little() -> None:
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    tower, other = tower_of().eval(), tower_of(channels_last=False).eval()
    torch.testing.assert_close(tower.encode(pixels), other.encode(pixels), atol=1e-5, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        low = tower.encode(pixels).float()
    assert torch.nn.functional.cosine_similarity(low, tower.encode(pixels)).min() > 0.99


def test_what_does_not_fit_says_why() -> None:
    cases: list[tuple[int, dict[str, Any], str]] = [
        (34, {}, r"images of 34 pixels cannot be cut into cells of 4 × 4 \(scales: 2\); set input.size to a multiple"),
        (4, {}, r"images of 4 pixels cannot be cut"),
        (4, {"scales": 1, "widths": [4, 4, 4]}, r"images of 4 pixels are smaller than its stride 8"),
        (32, {"grid": 3}, r"grid: 3 must divide the last map's 4 cells"),
        (32, {"grid": 2, "regions": [1]}, r"leave out grid: 2"),
        (32, {"regions": [5]}, r"use at most 4"),
        (32, {"head": "none"}, r"head: none needs widths"),
        (32, {"depths": [1]}, r"must have as many stages as widths"),
        (32, {"angles": 1}, r"angles"),
    ]
    for size, settings, words in cases:
        with pytest.raises(ConfigError, match=words):
            tower_of(size, **settings)
