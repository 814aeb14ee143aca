"""What an image tower says of places: cells of the last block's map, or patches of its sequence.

The features of a place are what the rest of the tower makes of a map in which every cell, or a sequence in which every
token, is this one: the mean of the places is then the place itself, it stands where the class token stood, and
attention pooling sees nothing else. So no architecture has to be known. For a CLIP this is what MaskCLIP (Zhou et al.
2022, arXiv 2112.01071) and DenseCLIP (Rao et al. 2022, arXiv 2112.01518) score against texts; where a tower takes the
mean of its places, an image of a single place has that place's features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dualenc.encoders.tower import ImageTower, Tower, channels_last
from dualenc.errors import ConfigError


@contextmanager
def outputs_of_blocks(blocks: Sequence[nn.Module], given: Tensor | None = None) -> Iterator[list[list[Tensor]]]:
    """What each block says while the tower runs; ``given``: instead of what the last one says."""
    said: list[list[Tensor]] = [[] for _ in blocks]

    def listener(k: int) -> Any:
        def listen(_: nn.Module, _given: Any, out: Any) -> Any:
            said[k].append(out[0] if isinstance(out, tuple) else out)
            if given is None or k < len(blocks) - 1:
                return None
            return (given, *out[1:]) if isinstance(out, tuple) else given

        return listen

    handles = [block.register_forward_hook(listener(k)) for k, block in enumerate(blocks)]
    try:
        yield said
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def heard(tower: Tower, where: str) -> Iterator[list[Tensor]]:
    """What the last block says while the tower runs, for :func:`features_of_places`.

    Raises:
        ConfigError: the tower is not one of images, or has no repeated blocks.
    """
    blocks = tower.blocks()
    if not isinstance(tower, ImageTower) or not blocks:
        raise ConfigError(
            f"{where}: {tower.component.name} says nothing of places; that takes an image tower of repeated blocks"
        )
    with outputs_of_blocks(blocks[-1:]) as said:
        yield said[0]


def features_of_places(tower: Tower, x: Any, said: Sequence[Tensor], elements: int | None = None) -> Tensor:
    """Features [n, h, w, D] of the places of each image, not normalised.

    Args:
        x: the collated images; said: what the last block said of them.
        elements: numbers of the copies of places that are pooled at once; None: all. Ranks with different numbers of
            images would call the tower a different number of times.

    Raises:
        ConfigError: the last block says no square map and no sequence of a square grid of patches.
    """
    if len(said) != 1:
        raise ConfigError(
            f"{tower.component.name}: its blocks run {len(said)} times for a batch, so places cannot be told apart"
        )
    y = said[0]
    states, shape = _states(y, tower)
    n, count, width = states.shape
    side = math.isqrt(count)
    rows = states.flatten(0, 1)
    together = len(rows) if elements is None else max(1, elements // (width * math.prod(shape)))
    blocks, parts = tower.blocks(), []
    one = {k: v[:1] for k, v in x.items() if isinstance(v, Tensor)} if isinstance(x, Mapping) else x[:1]
    for chunk in torch.split(rows, together):
        between = (None,) * len(shape)
        copies = chunk[(slice(None), *between)].expand(-1, *shape, -1)
        if y.ndim == 4 and y.shape[2] == y.shape[3]:
            copies = copies.permute(0, 3, 1, 2)
        with outputs_of_blocks(blocks, copies.contiguous()):  # the blocks run on one image, and nobody hears them
            parts.append(tower.encode(one))
    return torch.cat(parts).view(n, side, side, -1)


def _states(y: Tensor, tower: Tower) -> tuple[Tensor, tuple[int, ...]]:
    """(the state at each place [n, P, W], the shape of the places that the rest of the tower is given)."""
    if y.ndim == 4 and y.shape[2] == y.shape[3]:
        return y.flatten(2).transpose(1, 2), tuple(y.shape[2:])
    if channels_last(y):
        return y.flatten(1, 2), tuple(y.shape[1:3])
    if y.ndim == 3:
        # Class and register tokens come first; there are fewer of them than would make the grid a larger one.
        extra = y.shape[1] - math.isqrt(y.shape[1]) ** 2
        return y[:, extra:], (extra + 1,)
    raise ConfigError(
        f"{tower.component.name}: its last block gives {list(y.shape[1:])} for an image, not a square map"
    )


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
