"""What an image tower says of places: the features of the cells of its last map or of its last block's tokens, each put
through all that comes after them, as if it were the whole image.

For a CLIP that pools by attention or by its class token this is what MaskCLIP (Zhou et al. 2022, arXiv 2112.01071) and
DenseCLIP (Rao et al. 2022, arXiv 2112.01518) score against texts; for a tower that averages its map and maps the mean
linearly, the mean over the places is the feature of the image.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from dualenc.encoders.tower import ImageTower, Tower
from dualenc.errors import ConfigError


@runtime_checkable
class SaysMaps(Protocol):
    """A tower with a map before its pooling."""

    head: nn.Module

    def pixels(self, x: Tensor) -> Tensor:
        """uint8 [n, 3, S, S] → what the trunk takes."""

    def maps(self, pixels: Tensor) -> Tensor:
        """What the trunk takes → its last map [n, C, h, w], or tokens [n, L, W]."""

    def pool(self, maps: Tensor) -> Tensor:
        """A map or a box of it, [n, C, h, w] → [n, W]."""


class PlacesOf:
    """The places of one image tower.

    Args:
        where: dotted key of the encoder, for messages.

    Raises:
        ConfigError: the modality is not one of images.
    """

    def __init__(self, tower: Tower, where: str) -> None:
        if not isinstance(tower, ImageTower):
            raise ConfigError(f"{where}: {tower.component.name} says nothing of places; that takes an image tower")
        self.tower, self.where = tower, where

    def __call__(self, x: Tensor) -> Tensor:
        """uint8 [n, 3, S, S] → features [n, K, D] of the K = h · w places row by row, not normalised.

        Raises:
            ConfigError: the tower has neither a map nor a square of tokens.
        """
        tower: Any = self.tower
        if isinstance(tower, SaysMaps):
            maps = tower.maps(tower.pixels(x))
            if maps.ndim == 4:
                cells = maps.flatten(2).transpose(1, 2).flatten(0, 1)[:, :, None, None]
                try:
                    features: Tensor = tower.head(tower.pool(cells))
                except RuntimeError as e:  # channels last, as timm's Swin has them
                    raise ConfigError(self._none()) from e
                return features.view(maps.shape[0], -1, features.shape[1])
        return self._of_tokens(x)

    def _of_tokens(self, x: Tensor) -> Tensor:
        """The last block's states of each place go once more through what comes after the blocks."""
        blocks = self.tower.blocks()
        if not blocks:
            raise ConfigError(self._none())
        said: list[Any] = []
        handle = blocks[-1].register_forward_hook(lambda _, __, out: said.append(out))
        try:
            self.tower(x)
        finally:
            handle.remove()
        states = said[0][0] if isinstance(said[0], tuple) else said[0]
        if len(said) > 1 or states.ndim != 3 or states.shape[0] != x.shape[0]:
            raise ConfigError(self._none())
        n, length, width = states.shape
        side = math.isqrt(length)
        others = length - side * side  # a class token, registers
        places = states[:, others:].reshape(-1, 1, width)
        # As many times as there are tokens that a mean would leave out, and once more.
        alone = places.expand(-1, others + 1, -1)
        with _leading_to(blocks, (alone, *said[0][1:]) if isinstance(said[0], tuple) else alone):
            features: Tensor = self.tower(x)["features"]
        if features.shape[0] != n * side * side:
            raise ConfigError(self._none())
        return features.view(n, side * side, -1)

    def _none(self) -> str:
        return (
            f"{self.where}: {self.tower.component.name} has neither a map before its pooling nor a square of tokens "
            "after its last block, so it says nothing of places; use a plain ViT, own/convnet, or a "
            "convolutional model of timm"
        )


@contextmanager
def _leading_to(blocks: Sequence[nn.Module], last: Any) -> Iterator[None]:
    """Let blocks pass on what they are given, and the last one give ``last``. Their hooks rest: those of learned prompts
    and of kept states would count a second time, and those of engines would fetch weights that nobody uses."""

    def passing(states: Any, *_: Any, **__: Any) -> Any:
        return (states, *last[1:]) if isinstance(last, tuple) else states

    kept = [(block.__dict__.get("forward"), *(getattr(block, name) for name in _HOOKS)) for block in blocks]
    for block in blocks:
        block.forward = passing  # type: ignore[method-assign]
        for name in _HOOKS:
            setattr(block, name, OrderedDict())
    blocks[-1].forward = lambda *_, **__: last  # type: ignore[method-assign]
    try:
        yield
    finally:
        for block, (forward, *hooks) in zip(blocks, kept, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward  # type: ignore[method-assign]
            for name, own in zip(_HOOKS, hooks, strict=True):
                setattr(block, name, own)


_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


def at_centres(places: int, cells: int) -> Tensor:
    """int64 [cells]: the place, of ``places`` in a square, under the centre of each of ``cells`` cells of a square over
    the same image.

    Raises:
        ConfigError: either is not the area of a square.
    """
    h, g = math.isqrt(places), math.isqrt(cells)
    if h * h != places or g * g != cells:
        raise ConfigError(f"places: {places} and {cells} must both be the cells of a square")
    at = ((torch.arange(g) * 2 + 1) * h) // (2 * g)
    return (at[:, None] * h + at).flatten()
