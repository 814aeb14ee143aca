"""A contrastive loss as what it does to one tile of similarities; ``row_sums`` does tiles, ranks and gradients.

A :class:`RowLoss` says, for rows against columns, which sums over the columns it needs (log-sum-exps, sums, means
weighted by a softmax) and what a row's loss is, given them. It sees a :class:`Tile`, so nothing of size B·N exists; its
gradient is autograd's within the tile. Rows and columns carry the values of their slots (labels, frozen features …), so
targets and masks are functions of a tile like the logits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

INF = float("inf")


@dataclass(frozen=True, slots=True)
class Side:
    """The rows (or the columns) of a tile: ``ids`` [n] and values by name, [n, …], of the slots they stand for."""

    ids: Tensor
    values: Mapping[str, Tensor]


class Tile:
    """Rows against columns; everything is computed when it is first asked for.

    Attributes:
        logits: [h, w] scale · cosine; scale: [1]; rows, columns: what belongs to each.
        backward: whether gradients are wanted of what is made of this tile; sums that have none may be left out then.
    """

    def __init__(self, logits: Tensor, scale: Tensor, rows: Side, columns: Side, backward: bool = False) -> None:
        self.logits, self.scale, self.rows, self.columns, self.backward = logits, scale, rows, columns, backward

    @cached_property
    def cosine(self) -> Tensor:
        """[h, w] without the scale; the gradients of scale and features are those of a loss of cosines."""
        return self.logits / self.scale

    @cached_property
    def positive(self) -> Tensor:
        """Bool [h, w]: equal pair ids."""
        return self.rows.ids[:, None] == self.columns.ids

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        """A value of the rows as [h, 1, …] and of the columns as [1, w, …]."""
        return self.rows.values[name][:, None], self.columns.values[name][None]

    def products(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Dot products [h, w] of [h, W] and [w, W], laid out in memory as the logits (a flipped tile is a view)."""
        if self.logits.stride(0) < self.logits.stride(1):
            return (columns @ rows.T).T
        return rows @ columns.T

    def flipped(self) -> Tile:
        """The same tile with the columns as rows; shares what is already computed."""
        out = Tile(self.logits.T, self.scale, self.columns, self.rows, self.backward)
        for name in ("cosine", "positive"):
            if name in self.__dict__:
                out.__dict__[name] = self.__dict__[name].T
        return out


@dataclass(frozen=True, slots=True)
class LogSumExp:
    """log Σ_j exp(of_ij); an entry of −inf takes no part."""

    of: Tensor
    by: ClassVar[None] = None


@dataclass(frozen=True, slots=True)
class Sum:
    """Σ_j of_ij."""

    of: Tensor
    by: ClassVar[None] = None


@dataclass(frozen=True, slots=True)
class Mean:
    """Σ_j softmax_j(by_i)_j · of_ij; 0 for a row whose ``by`` is −inf everywhere."""

    of: Tensor
    by: Tensor


Reduction = LogSumExp | Sum | Mean
Kind = type[LogSumExp] | type[Sum] | type[Mean]


class RowLoss(ABC):
    """A loss of rows against columns; see the module. Both directions of a pair may use one or two of them.

    A subclass has no state of its own that changes, is the same on all ranks, and never writes into a tile.
    """

    @property
    @abstractmethod
    def kinds(self) -> Sequence[Kind]:
        """The kinds of what :meth:`sums` returns."""

    @abstractmethod
    def sums(self, tile: Tile) -> Sequence[Reduction | None]:
        """The sums over a tile's columns that a row's loss is made of.

        In a tile with ``backward`` one without gradient may be None.
        """

    @abstractmethod
    def loss(self, sums: Sequence[Tensor], rows: Side, scale: Tensor) -> Tensor:
        """ℓ_i [n] of n rows, given their sums over all columns, each [n], and the scale [1]."""

    def metrics(self, sums: Sequence[Tensor], rows: Side, scale: Tensor) -> dict[str, Tensor]:
        """Name → [n] of each row, without gradient; the mean over rows is shown as ``NAME_ab`` or ``NAME_ba``."""
        return {}


class State:
    """Sums over the columns seen so far, of n rows.

    Attributes:
        data: [R, n], one tensor that can be sent: two rows for the best positive and negative logit, then for a
            log-sum-exp its maximum and Σ exp(· − maximum), for a sum itself, for a mean all three.
    """

    def __init__(self, data: Tensor, kinds: Sequence[Kind]) -> None:
        self.data, self.kinds = data, kinds

    @staticmethod
    def empty(n: int, kinds: Sequence[Kind], like: Tensor) -> Tensor:
        """``data`` of nothing seen yet."""
        data = like.new_zeros(2 + sum(_HEIGHT[k] for k in kinds), n)
        data[maxima(kinds)] = -INF
        return data

    @property
    def best(self) -> Tensor:
        """[2, n]: the largest logit of a positive and of a negative; −inf where none was seen."""
        return self.data[:2]

    def add(self, where: slice, found: Sequence[Reduction | None]) -> None:
        """Add the sums of a tile, whose rows are ``where``."""
        at = 2
        for kind, reduction in zip(self.kinds, found, strict=True):
            part = self.data[at : at + _HEIGHT[kind], where]
            at += _HEIGHT[kind]
            if not isinstance(reduction, kind):
                raise TypeError(f"a RowLoss promised {kind.__name__} and gave {type(reduction).__name__}")
            if isinstance(reduction, Sum):
                part[0] += reduction.of.sum(1)
                continue
            exponents = reduction.of if isinstance(reduction, LogSumExp) else reduction.by
            m = torch.maximum(part[0], exponents.amax(1))
            finite = m.masked_fill(m.isneginf(), 0)
            e = (exponents - finite[:, None]).exp_()
            part[1:].mul_((part[0] - finite).exp_())
            part[0] = m
            part[1] += e.sum(1)
            if isinstance(reduction, Mean):
                part[2] += e.mul_(reduction.of).sum(1)

    def totals(self) -> tuple[Tensor, Tensor]:
        """The sums [K, n], and [K, n] what the backward needs besides: the log-sum-exp of a mean's weights."""
        totals, shifts, at = [], [], 2
        for kind in self.kinds:
            part = self.data[at : at + _HEIGHT[kind]]
            at += _HEIGHT[kind]
            lse = part[0] if kind is Sum else part[0] + part[1].log()
            totals.append(part[2] / part[1].clamp(min=torch.finfo(part.dtype).tiny) if kind is Mean else lse)
            shifts.append(lse)
        n = self.data.shape[1]
        empty = self.data.new_zeros(0, n)
        return (torch.stack(totals), torch.stack(shifts)) if totals else (empty, empty)


_HEIGHT: dict[Kind, int] = {LogSumExp: 2, Sum: 1, Mean: 3}


def scaled_rows(kinds: Sequence[Kind]) -> list[tuple[int, int]]:
    """(row of a state, row of the maximum it is relative to) of every row that is."""
    out, at = [], 2
    for kind in kinds:
        if kind is not Sum:
            out += [(at + k, at) for k in range(1, _HEIGHT[kind])]
        at += _HEIGHT[kind]
    return out


def maxima(kinds: Sequence[Kind]) -> list[int]:
    """The rows of a state that are maxima."""
    out, at = [0, 1], 2
    for kind in kinds:
        if kind is not Sum:
            out.append(at)
        at += _HEIGHT[kind]
    return out


def only(reduction: Reduction, there: Tensor) -> Reduction:
    """The same sum over the columns ``there`` [w] alone."""
    if isinstance(reduction, Sum):
        return Sum(torch.where(there, reduction.of, 0))
    if isinstance(reduction, LogSumExp):
        return LogSumExp(reduction.of.masked_fill(~there, -INF))
    return Mean(reduction.of, reduction.by.masked_fill(~there, -INF))


def reduce_whole(reduction: Reduction) -> Tensor:
    """A sum [n] over all columns at once, by autograd; for a matrix that is small."""
    if isinstance(reduction, Sum):
        return reduction.of.sum(1)
    exponents = reduction.of if isinstance(reduction, LogSumExp) else reduction.by
    if not exponents.shape[1]:
        return exponents.new_full((len(exponents),), -INF if isinstance(reduction, LogSumExp) else 0.0)
    nothing = exponents.isneginf().all(1)
    # The gradient of a log-sum-exp of nothing is NaN: such a row is computed on zeros and overwritten.
    safe = torch.where(nothing[:, None], 0.0, exponents)
    if isinstance(reduction, LogSumExp):
        return torch.logsumexp(safe, 1).masked_fill(nothing, -INF)
    return (safe.softmax(1) * reduction.of).sum(1).masked_fill(nothing, 0.0)


def gradient_at(reduction: Reduction, upstream: Tensor, total: Tensor, shift: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(tensor of the tile, gradient at it) for a sum, given the gradient at its total over all columns, [h] each."""
    if isinstance(reduction, Sum):
        return [(reduction.of, upstream[:, None].expand_as(reduction.of))]
    exponents = (reduction.of if isinstance(reduction, LogSumExp) else reduction.by).detach()
    shift = shift.masked_fill(shift.isneginf(), 0)
    p = (exponents - shift[:, None]).exp_().mul_(upstream[:, None])
    if isinstance(reduction, LogSumExp):
        return [(reduction.of, p)]
    return [(reduction.of, p), (reduction.by, p * (reduction.of.detach() - total[:, None]))]
