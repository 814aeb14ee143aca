"""The sums of a :class:`~dualenc.losses.blockwise.row_loss.RowLoss` over all columns of all ranks, a tile at a time.

Both directions of a pair share a tile: one matrix product in the forward, three in the backward, which computes each
tile again and differentiates within it. Kept are a few numbers a row. Columns come gathered or around the ring, and
carry the values of their slots and, in the backward, what their own rank knows of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from dualenc.distributed.world import world_size
from dualenc.losses.blockwise.row_loss import RowLoss, Side, State, Tile, gradient_at, maxima, scaled_rows
from dualenc.losses.blockwise.sweeps import How, Valid, merge_gradients, sweep
from dualenc.losses.blockwise.tiled import FeatureBlock, Scratch, add_gradients, positive_tiles, tiles

Losses = tuple[RowLoss | None, RowLoss | None]


@dataclass(frozen=True, slots=True)
class FurtherColumns:
    """Further columns of this rank: they are compared with the rows of one side, and are no rows themselves.

    Attributes:
        x: [M, D] L2-normalised features, with gradient; M is equal on all ranks.
        ids: [M] pair ids: a column is a positive of the rows with its id; ``NO_PAIR``: of none; −1: it is not there.
        side: the side they extend; those of "b" are seen by rows of ``a``.
        values: by name [M, …], those that the row loss reads.
        shared: every rank has the same ones (a queue): they are not gathered, and no gradient reaches them.
    """

    x: Tensor
    ids: Tensor
    side: Literal["a", "b"] = "b"
    values: Mapping[str, Tensor] = field(default_factory=dict)
    shared: bool = False


NO_PAIR = 1 << 62
"""Id of a further column that is nobody's positive."""


@dataclass(frozen=True, slots=True)
class SumPlan:
    """What is summed, besides the tensors that have gradients: see ``contrast``."""

    ids: Tensor
    values: dict[str, Tensor]
    ab: RowLoss
    ba: RowLoss | None
    columns: tuple[FurtherColumns, ...]
    row_values: dict[str, Tensor] = field(default_factory=dict)

    def of(self, extra: FurtherColumns) -> RowLoss | None:
        """The loss of the rows that see these columns."""
        return self.ab if extra.side == "b" else self.ba


def tiled_sums(
    a: Tensor, b: Tensor, scale: Tensor, plan: SumPlan, how: How, further: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sums of this rank's n valid rows, [K, n] of ``a`` and of ``b``, and how many rows of each are hits.

    Args:
        a, b: [B, D]; scale: [1]; further: the features of ``plan.columns``.
    """
    of_a, of_b, hits_a, hits_b = _Sums.apply(a, b, scale, plan, how, *further)
    return of_a, of_b, hits_a, hits_b


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, scale: Tensor, plan: SumPlan, how: How, *further: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows_a, rows_b = (_rows(x, plan) for x in (a, b))
        kinds_b = () if plan.ba is None else plan.ba.kinds
        of_a = State(State.empty(len(rows_a), plan.ab.kinds, a), plan.ab.kinds)

        def add(columns: FeatureBlock, found: Tensor) -> None:
            to_columns = None if plan.ba is None else State(found, kinds_b)
            _add_sums(rows_a, columns, scale, plan, (plan.ab, plan.ba), (of_a, to_columns), how.tile_mb)

        given = [b, plan.ids, *plan.values.values()]
        found = sweep(how.ring, add, given, lambda n: State.empty(n, kinds_b, b), 1, lambda data: _merge(data, kinds_b))
        of_b = State(Valid(plan.ids).of(found, 1).contiguous(), kinds_b)
        for extra, x in zip(plan.columns, further, strict=True):
            rows, state = (rows_a, of_a) if extra.side == "b" else (rows_b, of_b)
            if (row_loss := plan.of(extra)) is not None:
                add_further = _adding(rows, scale, plan, row_loss, state, how.tile_mb)
                _visit_further(plan, extra, x, how, add_further, 1, lambda found: found)
        (total_a, shift_a), (total_b, shift_b) = of_a.totals(), of_b.totals()
        ctx.save_for_backward(a, b, scale, total_a, shift_a, total_b, shift_b, *further)
        ctx.plan, ctx.how = plan, how
        hits = [(s.best[0] > s.best[1]).sum().to(a.dtype) for s in (of_a, of_b)]
        ctx.mark_non_differentiable(*hits)
        return total_a, total_b, hits[0], hits[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, up_a: Tensor, up_b: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        a, b, scale, total_a, shift_a, total_b, shift_b, *further = ctx.saved_tensors
        plan: SumPlan = ctx.plan
        how: How = ctx.how
        # What a tile needs of its rows: the upstream gradient, the total and the shift of each sum, [n, 3K].
        known_a, known_b = (torch.cat(x).T.contiguous() for x in ((up_a, total_a, shift_a), (up_b, total_b, shift_b)))
        rows_a, rows_b = _rows(a, plan, known_a), _rows(b, plan, known_b)
        grad_a, grad_b, grad_scale = torch.zeros_like(rows_a.x), torch.zeros_like(rows_b.x), torch.zeros_like(scale)

        def add(columns: FeatureBlock, found: Tensor) -> None:
            grad_scale.add_(
                _add_gradients(rows_a, columns, scale, plan, (plan.ab, plan.ba), (grad_a, found), how.tile_mb)
            )

        valid = Valid(plan.ids)
        given = [b, plan.ids, *plan.values.values(), valid.spread(known_b, len(b))]
        to_b = sweep(how.ring, add, given, lambda n: b.new_zeros(n, b.shape[1]), 0, merge_gradients)
        to_further: list[Tensor | None] = []
        for extra, x in zip(plan.columns, further, strict=True):
            rows, to_rows = (rows_a, grad_a) if extra.side == "b" else (rows_b, grad_b)
            to_x = None
            if (row_loss := plan.of(extra)) is not None:
                add_further = _differentiating(rows, scale, plan, row_loss, (to_rows, grad_scale), how.tile_mb)
                to_x = _visit_further(plan, extra, x, how, add_further, x.shape[1], merge_gradients)
            to_further.append(None if extra.shared else to_x)
        return (
            valid.spread(grad_a, len(a)),
            to_b + valid.spread(grad_b, len(b)),
            grad_scale,
            None,
            None,
            *to_further,
        )


def _rows(x: Tensor, plan: SumPlan, *known: Tensor) -> FeatureBlock:
    """This rank's valid rows with their values and, last, what is already known of them [n, …]."""
    valid = Valid(plan.ids)
    values = (*plan.values.values(), *plan.row_values.values())
    return FeatureBlock(valid.of(x), valid.of(plan.ids), (*map(valid.of, values), *known))


def _side(block: FeatureBlock, plan: SumPlan, *own: str) -> Side:
    """The values of a block; ``own``: those that only rows have, after the others."""
    return Side(block.ids, dict(zip((*plan.values, *own), block.terms, strict=False)))


def _adding(
    rows: FeatureBlock, scale: Tensor, plan: SumPlan, row_loss: RowLoss, state: State, mb: float
) -> Callable[[FeatureBlock, Tensor], None]:
    """For ``sweep``: further columns are added to the state of the rows that see them; nothing is found about them."""

    def add(columns: FeatureBlock, found: Tensor) -> None:
        _add_sums(rows, columns, scale, plan, (row_loss, None), (state, None), mb)

    return add


def _differentiating(
    rows: FeatureBlock,
    scale: Tensor,
    plan: SumPlan,
    row_loss: RowLoss,
    grads: tuple[Tensor, Tensor],
    mb: float,
) -> Callable[[FeatureBlock, Tensor], None]:
    """For ``sweep``: the gradients of further columns are found, those of rows and scale added to ``grads``."""
    grad_rows, grad_scale = grads

    def add(columns: FeatureBlock, found: Tensor) -> None:
        grad_scale.add_(_add_gradients(rows, columns, scale, plan, (row_loss, None), (grad_rows, found), mb))

    return add


def _visit_further(
    plan: SumPlan,
    extra: FurtherColumns,
    x: Tensor,
    how: How,
    add: Callable[[FeatureBlock, Tensor], None],
    width: int,
    merge: Callable[[Tensor], Tensor],
) -> Tensor:
    """``sweep`` over further columns; what is found about them is [M, ``width``]."""
    given = [x, extra.ids, *(extra.values[k] for k in plan.values)]
    if not extra.shared:
        return sweep(how.ring, add, given, lambda n: x.new_zeros(n, width), 0, merge)
    valid = Valid(extra.ids)
    block = FeatureBlock(valid.of(x), valid.of(extra.ids), tuple(valid.of(t) for t in given[2:]))
    found = x.new_zeros(len(block), width)
    add(block, found)
    return found


def _add_sums(
    rows: FeatureBlock,
    columns: FeatureBlock,
    scale: Tensor,
    plan: SumPlan,
    losses: Losses,
    states: tuple[State, State | None],
    mb: float,
) -> None:
    """Add a block's sums to the rows' state and to the columns' (in place)."""
    ab, ba = losses
    of_rows, of_columns = states
    assert ab is not None
    for i, j, row, column, logits in positive_tiles(rows, columns, scale, None, mb, Scratch(rows.x)):
        _raise_best(logits, row, column, of_rows.best[:, i], None if of_columns is None else of_columns.best[:, j])
        tile = Tile(logits, scale, _side(rows.part(i), plan, *plan.row_values), _side(columns.part(j), plan))
        of_rows.add(i, ab.sums(tile))
        if ba is not None and of_columns is not None:
            of_columns.add(j, ba.sums(tile.flipped()))


def _raise_best(logits: Tensor, row: Tensor, column: Tensor, of_row: Tensor, of_column: Tensor | None) -> None:
    """Take a tile's largest logits of positives and negatives into [2, h] and [2, w]; the logits stay as they were."""
    at_positive = logits[row, column]
    logits[row, column] = -float("inf")
    for best, dim, index in ((of_row, 1, row), (of_column, 0, column)):
        if best is not None:
            best[0].scatter_reduce_(0, index, at_positive, "amax")
            torch.maximum(best[1], logits.amax(dim), out=best[1])
    logits[row, column] = at_positive


def _add_gradients(
    rows: FeatureBlock,
    columns: FeatureBlock,
    scale: Tensor,
    plan: SumPlan,
    losses: Losses,
    grads: tuple[Tensor, Tensor],
    mb: float,
) -> Tensor:
    """Add a block's gradients of the features (in place), [R, D] and [n, D]; returns that of the scale [1].

    The last of ``terms`` of a block is what is known of each row, if it has a loss.
    """
    grad_scale = torch.zeros_like(scale)
    for i, j, logits in tiles(rows, columns, scale, None, mb, Scratch(rows.x)):
        R, C = rows.part(i), columns.part(j)
        leaf, s = logits.detach().requires_grad_(), scale.detach().requires_grad_()
        at: list[tuple[Tensor, Tensor]] = []
        with torch.enable_grad():
            tile = Tile(leaf, s, _side(R, plan, *plan.row_values), _side(C, plan), backward=True)
            for row_loss, own, known in ((losses[0], tile, R), (losses[1], None, C)):
                if row_loss is not None:
                    found = row_loss.sums(tile.flipped() if own is None else own)
                    at += _gradients_within(found, known.terms[-1])
        if at:
            outputs, upstream = zip(*at, strict=True)
            g, g_scale = torch.autograd.grad(outputs, (leaf, s), upstream, allow_unused=True)
            if g is not None:
                grad_scale += add_gradients(g, R.x, C.x, scale, grads[0][i], grads[1][j])
            if g_scale is not None:
                grad_scale += g_scale
    return grad_scale


def _gradients_within(found: Sequence[Any], known: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(tensor, gradient at it) of all sums of a tile, given what is known of its rows [h, 3K]."""
    upstream, total, shift = known.T.view(3, len(found), -1).unbind(0)
    out = []
    with torch.no_grad():
        for k, reduction in enumerate(found):
            if reduction is not None:
                out += gradient_at(reduction, upstream[k], total[k], shift[k])
    return [(x, g) for x, g in out if x is not None and x.requires_grad]


def _merge(data: Tensor, kinds: Sequence[Any]) -> Tensor:
    """From every rank's state of all columns [R, W·B] to this rank's columns' [R, B]."""
    if world_size() == 1:
        return data
    largest, before = maxima(kinds), data[maxima(kinds)]
    after = before.clone()
    dist.all_reduce(after, dist.ReduceOp.MAX)
    drop = dict(zip(largest, (before - after).exp_().masked_fill_(before.isneginf(), 0), strict=True))
    for row, maximum in scaled_rows(kinds):
        data[row] *= drop[maximum]
    data[largest] = 0
    dist.all_reduce(data)
    data[largest] = after
    return data.chunk(world_size(), 1)[dist.get_rank()]
