"""What soft-target losses are made of: target builders, functions of a tile's logits, and the row loss of both.

With z = s · a_i·b_j, for a row i over all columns j

    ℓ_i = log Σ_j exp(push_ij) − Σ_j T̄_ij pull_ij,    T̄_ij = (1 − ε) T_ij / Σ_k T_ik + ε/|V_i|

T comes from a :class:`Targets`, ``push`` (the denominator's logits; −inf takes a column out) and ``pull`` from
functions of a tile; both are z unless said otherwise. V_i are the columns in row i's denominator. With pull = push the
gradient at a logit is softmax − T̄, so a learned scale is safe; if they differ, see the loss at hand (``dcl``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dualenc.losses.blockwise.row_loss import INF, Kind, LogSumExp, Mean, Reduction, RowLoss, Side, Sum, Tile


class Targets(ABC):
    """A target builder: how much each column of a tile is wanted by each row.

    Rows need not sum to 1; every row must want something, its own pair at least. Nothing that has a gradient is used.
    """

    log: ClassVar[bool] = False
    """Whether the builder gives log T, for targets that are a softmax."""

    @abstractmethod
    def __call__(self, tile: Tile) -> Tensor:
        """T ≥ 0 [h, w], or its logarithm."""


class SamePair(Targets):
    """T = 1 where the pair ids are equal: InfoNCE."""

    def __call__(self, tile: Tile) -> Tensor:
        """See the class."""
        return tile.positive.to(tile.logits.dtype)


TileFunction = Callable[[Tile], Tensor]
"""Logits [h, w] from a tile, differentiable; −inf takes an entry out of the denominator."""


@dataclass(frozen=True, slots=True)
class SoftTarget(RowLoss):
    """The loss of the module, for one direction.

    Attributes:
        targets: T; push, pull: functions of the logits, None: the logits; smoothing: ε.
        excess: show ``excess``, ℓ minus the entropy of T̄ (a KL divergence; without smoothing).
        divergence: the loss is that KL divergence instead of ℓ; the gradient is the same.
    """

    targets: Targets
    push: TileFunction | None = None
    pull: TileFunction | None = None
    smoothing: float = 0.0
    excess: bool = False
    divergence: bool = False

    @property
    def kinds(self) -> Sequence[Kind]:
        """See the base class."""
        wanted: list[Kind] = [Mean] if self.targets.log else [Sum, Sum]
        smooth: list[Kind] = [Sum, Sum] if self.smoothing else []
        entropy: list[Kind] = ([LogSumExp, Mean] if self.targets.log else [Sum]) if self._entropy else []
        return [LogSumExp, *wanted, *smooth, *entropy]

    def sums(self, tile: Tile) -> Sequence[Reduction | None]:
        """See the base class."""
        with torch.no_grad():
            target = self.targets(tile)
        push = tile.logits if self.push is None else self.push(tile)
        pull = tile.logits if self.pull is None else self.pull(tile)
        out: list[Reduction | None] = [LogSumExp(push)]
        if self.targets.log:
            out.append(Mean(pull, target))
        else:
            out += [Sum(target * pull), None if tile.backward else Sum(target)]
        if self.smoothing:
            there = ~push.isneginf()
            out += [Sum(torch.where(there, push, 0.0)), None if tile.backward else Sum(there.to(push.dtype))]
        if self._entropy and self.targets.log:
            finite = torch.where(target.isneginf(), 0.0, target)
            out += [None, None] if tile.backward else [LogSumExp(target), Mean(finite, target)]
        elif self._entropy:
            out.append(None if tile.backward else Sum(torch.xlogy(target, target)))
        return out

    def loss(self, sums: Sequence[Tensor], rows: Side, scale: Tensor) -> Tensor:
        """See the base class."""
        return self._excess(sums) if self.divergence else self._cross_entropy(sums)

    def metrics(self, sums: Sequence[Tensor], rows: Side, scale: Tensor) -> dict[str, Tensor]:
        """See the base class."""
        return {"excess": self._excess(sums)} if self.excess else {}

    @property
    def _entropy(self) -> bool:
        return self.excess or self.divergence

    def _cross_entropy(self, sums: Sequence[Tensor]) -> Tensor:
        wanted = sums[1] if self.targets.log else sums[1] / sums[2]
        if self.smoothing:
            k = 2 if self.targets.log else 3
            wanted = (1 - self.smoothing) * wanted + self.smoothing * sums[k] / sums[k + 1]
        return sums[0] - wanted

    def _excess(self, sums: Sequence[Tensor]) -> Tensor:
        entropy = sums[-2] - sums[-1] if self.targets.log else sums[2].log() - sums[-1] / sums[2]
        return self._cross_entropy(sums) - entropy


def without(mask: Callable[[Tile], Tensor]) -> TileFunction:
    """A function of the logits that takes the columns of a mask out of the denominator, positives excepted."""

    def push(tile: Tile) -> Tensor:
        return tile.logits.masked_fill(mask(tile) & ~tile.positive, -INF)

    return push
