"""What a tower's blocks say on the way: their outputs at some depths, pooled to a row for each sample; of the last
block also place by place."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dualenc.encoders.tower import ImageTower, Tower, channels_last
from dualenc.errors import ConfigError


class PlaceStates(NamedTuple):
    """States [n, L, W] of the places of each row, and which of these there are, bool [n, L]; None: all."""

    states: Tensor
    there: Tensor | None

    def first(self, n: int) -> PlaceStates:
        """Those of the first n rows."""
        return PlaceStates(self.states[:n], None if self.there is None else self.there[:n])


class Hidden:
    """Keeps the outputs of a tower's blocks at ``depths`` (shares of its depth: 1 is the last block) during a forward.

    Raises:
        ConfigError: the tower has no repeated blocks.
    """

    def __init__(self, tower: Tower, depths: Sequence[float], modality: str) -> None:
        self._blocks, self._of_images = tower.blocks(), isinstance(tower, ImageTower)
        if not self._blocks:
            raise ConfigError(
                f"loss: modalities.{modality}.encoder has no repeated blocks whose outputs could be used; "
                "leave layers or caption out, or use a transformer"
            )
        self.modality, self.said = modality, {}  # type: str, dict[float, list[tuple[Tensor, Tensor | None]]]
        self.depths: list[float] = []
        self._hooked: set[float] = set()
        self._keeps_places = False
        self._places: PlaceStates | None = None
        self.pool(depths)

    def pool(self, depths: Sequence[float]) -> None:
        """Let :meth:`take` give the states at these depths too."""
        self.depths += [depth for depth in dict.fromkeys(depths) if depth not in self.depths]
        for depth in self.depths:
            self._hook(depth)

    def keep_places(self) -> None:
        """Let :meth:`take` keep the last block's states for :meth:`take_places`."""
        self._keeps_places = True
        self._hook(_LAST)

    def _hook(self, depth: float) -> None:
        if depth in self._hooked:
            return
        self._hooked.add(depth)
        blocks = self._blocks
        block = blocks[min(max(round(depth * len(blocks)), 1), len(blocks)) - 1]
        # A bound method and no closure: a copy of the tower then tells the copy of this object.
        block.register_forward_hook(partial(self._keep, depth))

    def _keep(self, depth: float, _: nn.Module, given: tuple[Any, ...], out: Any) -> None:
        y = out[0] if isinstance(out, tuple) else out
        if self._of_images and channels_last(y):
            y = y.permute(0, 3, 1, 2)
        masks = (x for x in given if isinstance(x, Tensor) and x.dtype == torch.bool and x.shape == y.shape[:2])
        self.said.setdefault(depth, []).append((y, next(masks, None)))

    def begin(self) -> None:
        """Forget what blocks said since, as when a backward ran them again."""
        self.said, self._places = {}, None

    def take(self, x: Any) -> dict[float, Tensor]:
        """Depth → [n, W] of the forward that just ran on the collated rows ``x``, fp32; forgets them."""
        mask = x["mask"] if isinstance(x, dict) and "mask" in x else None
        if not self.said:
            raise ConfigError(
                f"loss: the outputs of the blocks of modalities.{self.modality}.encoder are not seen; layers and "
                "caption cannot be used with engine.compile"
            )
        once: dict[float, tuple[Tensor, Tensor | None]] = {}
        for depth, kept in self.said.items():
            if len(kept) > 1:
                raise ConfigError(
                    f"loss: the blocks of modalities.{self.modality}.encoder run more than once for a batch, so their "
                    "outputs cannot be told apart; leave layers or caption out"
                )
            y, given = kept[0]  # a block that is given which places are real knows better than the rows
            once[depth] = y, mask if given is None else given
        self.said = {}
        if self._keeps_places:
            self._places = by_place(*once[_LAST])
        return {depth: pooled(*once[depth]) for depth in self.depths}

    def take_places(self) -> PlaceStates | None:
        """The last block's states of the forward whose outputs were taken, once; None without :meth:`keep_places`."""
        places, self._places = self._places, None
        return places


_LAST = 1.0


def pooled(y: Tensor, mask: Tensor | None) -> Tensor:
    """Hidden states [n, L, W] (mean over the places of ``mask`` [n, L], where it is of their length) or maps
    [n, W, H, W'] → [n, W], fp32."""
    y = y.float()
    if y.ndim == 4:
        return y.mean((2, 3))
    if y.ndim == 2:
        return y
    if mask is None or mask.shape != y.shape[:2]:
        return y.mean(1)
    weight = mask.to(y.dtype).unsqueeze(-1)
    return torch.where(weight > 0, y * weight, 0.0).sum(1) / weight.sum(1).clamp(min=1)


def by_place(y: Tensor, mask: Tensor | None) -> PlaceStates:
    """Hidden states [n, L, W], maps [n, W, H, W'] or rows [n, W] → their places, one after another."""
    if y.ndim == 4:
        y = y.flatten(2).transpose(1, 2)
    elif y.ndim == 2:
        y = y.unsqueeze(1)
    return PlaceStates(y, mask if mask is not None and mask.shape == y.shape[:2] else None)
