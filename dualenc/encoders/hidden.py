"""What a tower's blocks say on the way: their outputs at some depths, pooled to a row for each sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dualenc.encoders.tower import Tower
from dualenc.errors import ConfigError


class Hidden:
    """Keeps the outputs of a tower's blocks at ``depths`` (shares of its depth: 1 is the last block) during a forward.

    Raises:
        ConfigError: the tower has no repeated blocks.
    """

    def __init__(self, tower: Tower, depths: Sequence[float], modality: str) -> None:
        blocks = tower.blocks()
        if not blocks:
            raise ConfigError(
                f"loss: modalities.{modality}.encoder has no repeated blocks whose outputs could be contrasted; "
                "leave layers out, or use a transformer"
            )
        self.modality, self.said = modality, {}  # type: str, dict[float, list[tuple[Tensor, Tensor | None]]]
        for depth in depths:
            block = blocks[min(max(round(depth * len(blocks)), 1), len(blocks)) - 1]
            block.register_forward_hook(self._keeper(depth))

    def _keeper(self, depth: float) -> Any:
        def keep(_: nn.Module, given: tuple[Any, ...], out: Any) -> None:
            y = out[0] if isinstance(out, tuple) else out
            masks = (x for x in given if isinstance(x, Tensor) and x.dtype == torch.bool and x.shape == y.shape[:2])
            self.said.setdefault(depth, []).append((y, next(masks, None)))

        return keep

    def begin(self) -> None:
        """Forget what blocks said since, as when a backward ran them again."""
        self.said = {}

    def take(self, x: Any) -> dict[float, Tensor]:
        """Depth → [n, W] of the forward that just ran on the collated rows ``x``, fp32; forgets them."""
        mask = x["mask"] if isinstance(x, dict) and "mask" in x else None
        if not self.said:
            raise ConfigError(
                f"loss: the outputs of the blocks of modalities.{self.modality}.encoder are not seen; layers cannot be "
                "used with engine.compile"
            )
        out = {}
        for depth, kept in self.said.items():
            if len(kept) > 1:
                raise ConfigError(
                    f"loss: the blocks of modalities.{self.modality}.encoder run more than once for a batch, so their "
                    "outputs cannot be told apart; leave layers out"
                )
            y, given = kept[0]  # a block that is given which places are real knows better than the rows
            out[depth] = pooled(y, mask if given is None else given)
        self.said = {}
        return out


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
