"""The losses without the [B, N] matrix, over ranks: sweeps of this rank's rows over all ranks' columns.

InfoNCE takes two: the logsumexp of rows and columns in the forward, then gradients in the backward. Each computes a
tile of logits once, for both directions, where the plain loss computes one matrix per direction. The sigmoid loss takes
one, value and gradients together, since no term waits for a sum; around the ring two as well, as the gradients that
travel back with the blocks need the upstream gradient.

Columns come either gathered (N·D floats on every rank while a sweep lasts) or around the ring (a few blocks of B·D,
whatever the number of ranks). What ranks find out about a column, its running softmax and its gradient, goes back to
its owner.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from dualenc.distributed.gather import all_gather, reduce_scatter_sum
from dualenc.distributed.ring import circulate
from dualenc.distributed.world import world_size
from dualenc.losses.blockwise.tiled import FeatureBlock, PositiveColumns, Stats


@dataclass(frozen=True, slots=True)
class How:
    """How a loss is computed; the numbers do not depend on it.

    Attributes:
        tile_mb: MiB of a tile of logits.
        ring: columns travel around the ring instead of being gathered.
        blocks: the module with the block functions, ``tiled`` or ``triton_kernels``.
    """

    tile_mb: float
    ring: bool
    blocks: ModuleType


def sweep_info_nce(
    a: Tensor, b: Tensor, ids: Tensor, all_ids: Tensor, logit_scale: Tensor, label_smoothing: float, how: How
) -> tuple[Tensor, Tensor, Tensor]:
    """Σ over this rank's valid rows of ℓ_i(a→b) + ℓ_i(b→a), and the hits both ways.

    Args:
        a, b: [B, D], of one shape on all ranks; ids: [B]; all_ids: [W·B], those of all ranks; logit_scale: [1].
    """
    value, hits_ab, hits_ba = _InfoNCE.apply(a, b, ids, all_ids, logit_scale, label_smoothing, how)
    return value, hits_ab, hits_ba


def sweep_sigmoid(
    a: Tensor, b: Tensor, ids: Tensor, all_ids: Tensor, logit_scale: Tensor, logit_bias: Tensor | None, how: How
) -> tuple[Tensor, Tensor, Tensor]:
    """Σ −log σ(z·logit) over this rank's valid rows and all valid columns, and the hits both ways.

    Args:
        a, b: [B, D], of one shape on all ranks; ids: [B]; all_ids: [W·B], those of all ranks; logit_scale: [1];
            logit_bias: [1] or None.
    """
    bias = torch.zeros_like(logit_scale) if logit_bias is None else logit_bias
    value, hits_ab, hits_ba = _Sigmoid.apply(a, b, ids, all_ids, logit_scale, bias, how)
    return value, hits_ab, hits_ba


def merge_stats(found: Tensor) -> Tensor:
    """From every rank's statistics of all columns, ``Stats.data`` [4, W·B], to this rank's columns' [4, B]."""
    if world_size() == 1:
        return found
    largest, sums = found[:2], found[2:]
    before = largest.amax(0)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    # −inf: this rank has no rows, or the column takes no part.
    sums[0] = torch.where(before.isneginf(), 0, sums[0] * (before - largest.amax(0)).exp_())
    dist.all_reduce(sums)
    return found.chunk(world_size(), 1)[dist.get_rank()]


def merge_gradients(found: Tensor) -> Tensor:
    """From every rank's gradients of all columns [W·B, D] to this rank's columns' [B, D]."""
    return found if world_size() == 1 else reduce_scatter_sum(found)


class Valid:
    """The slots that take part; selecting them copies nothing if all do."""

    def __init__(self, ids: Tensor) -> None:
        self.index = torch.nonzero(ids >= 0).flatten()
        self.all = len(self.index) == len(ids)

    def of(self, x: Tensor, dim: int = 0) -> Tensor:
        return x if self.all else x.index_select(dim, self.index)

    def put(self, part: Tensor, x: Tensor, dim: int) -> None:
        """Write ``part``, which is ``of(x)`` changed in place, back into ``x``."""
        if not self.all:
            x.index_copy_(dim, self.index, part)

    def spread(self, part: Tensor, n: int) -> Tensor:
        """``part`` at these of n rows, zeros elsewhere."""
        return part if self.all else part.new_zeros(n, *part.shape[1:]).index_copy_(0, self.index, part)


def sweep(
    ring: bool,
    add: Callable[[FeatureBlock, Tensor], None],
    columns: Sequence[Tensor],
    empty: Callable[[int], Tensor],
    dim: int,
    merge: Callable[[Tensor], Tensor],
) -> Tensor:
    """Call ``add(columns, found)`` for the valid columns of all ranks, at once or rank by rank.

    Args:
        columns: of this rank, [B, …]: features, ids, and terms.
        empty: n → ``found`` before anything is added, for n columns along dimension ``dim``.
        merge: sums ``found`` for all columns over ranks, if they come at once.

    Returns:
        what all ranks found about this rank's columns.
    """

    def visit(fixed: Sequence[Tensor], found: Tensor) -> None:
        valid = Valid(fixed[1])
        part = valid.of(found, dim)
        x, ids, *terms = (valid.of(t) for t in fixed)
        add(FeatureBlock(x, ids, tuple(terms)), part)
        valid.put(part, found, dim)

    n, ranks = len(columns[0]), world_size()
    if ranks > 1 and ring:
        return circulate(visit, columns, empty(n))
    found = empty(n * ranks)
    visit(columns if ranks == 1 else [all_gather(x) for x in columns], found)
    return merge(found)


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        b: Tensor,
        ids: Tensor,
        all_ids: Tensor,
        logit_scale: Tensor,
        label_smoothing: float,
        how: How,
    ) -> tuple[Tensor, Tensor, Tensor]:
        target = (1 - label_smoothing) / PositiveColumns(all_ids).count(ids).clamp(min=1).to(a.dtype)
        smooth = label_smoothing and label_smoothing / max(int((all_ids >= 0).sum()), 1)  # asked only if it is needed
        valid = Valid(ids)
        rows, mine = FeatureBlock(valid.of(a), valid.of(ids)), valid.of(b)
        of_rows = Stats.empty(len(rows), a)

        def add(columns: FeatureBlock, found: Tensor) -> None:
            how.blocks.info_nce_stats(rows, columns, logit_scale, of_rows, Stats(found), how.tile_mb)

        found = sweep(how.ring, add, [b, ids], lambda n: Stats.empty(n, b).data, 1, merge_stats)
        of_columns, of_mine = Stats(found), Stats(valid.of(found, 1))
        ctx.save_for_backward(a, b, ids, target, logit_scale, of_rows.lse(), of_columns.lse())
        ctx.smooth, ctx.how = smooth, how
        t = valid.of(target)
        value = (of_rows.lse() - t * of_rows.at_pos).sum() + (of_mine.lse() - t * of_mine.at_pos).sum()
        if smooth:
            sums = torch.stack([rows.x.sum(0), mine.sum(0)])
            everywhere = sums.clone()
            if world_size() > 1:
                dist.all_reduce(everywhere)
            value -= smooth * logit_scale.squeeze() * (sums * everywhere.flip(0)).sum()
        hits = of_rows.hits(), of_mine.hits()
        ctx.mark_non_differentiable(*hits)
        return value, *hits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        a, b, ids, target, logit_scale, lse_rows, lse_columns = ctx.saved_tensors
        how: How = ctx.how
        # A vector and not a factor at the end: a column's part belongs to its owner's value, and its rank may scale
        # the loss differently.
        upstream, target = grad.expand(len(ids)).contiguous(), target * grad
        valid = Valid(ids)
        rows = FeatureBlock(valid.of(a), valid.of(ids), (valid.of(target), lse_rows, valid.of(upstream)))
        grad_rows, grad_scale = torch.zeros_like(rows.x), torch.zeros_like(logit_scale)

        def add(columns: FeatureBlock, found: Tensor) -> None:
            grad_scale.add_(
                how.blocks.info_nce_grad(rows, columns, logit_scale, ctx.smooth, grad_rows, found, how.tile_mb)
            )

        columns = [b, ids, target, lse_columns, upstream]
        grad_b = sweep(how.ring, add, columns, lambda n: b.new_zeros(n, b.shape[1]), 0, merge_gradients)
        return valid.spread(grad_rows, len(a)), grad_b, None, None, grad_scale, None, None


class _Sigmoid(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        b: Tensor,
        ids: Tensor,
        all_ids: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor,
        how: How,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.how, ctx.at_once = how, any(ctx.needs_input_grad) and not (how.ring and world_size() > 1)
        valid = Valid(ids)
        rows = FeatureBlock(valid.of(a), valid.of(ids))
        of_rows, sums = Stats.empty(len(rows), a), a.new_zeros(3)
        grads = None
        if ctx.at_once:
            grads = torch.zeros_like(rows.x), a.new_zeros(len(Valid(all_ids).index), a.shape[1])

        def add(columns: FeatureBlock, found: Tensor) -> None:
            sums.add_(
                how.blocks.sigmoid_block(
                    rows, columns, logit_scale, logit_bias, (of_rows, Stats(found)), grads, how.tile_mb
                )
            )

        found = sweep(how.ring, add, [b, ids], lambda n: Stats.empty(n, b).data, 1, merge_stats)
        ctx.save_for_backward(a, b, ids, all_ids, logit_scale, logit_bias, sums, *(grads or ()))
        hits = of_rows.hits(), Stats(found).hits()
        ctx.mark_non_differentiable(*hits)
        return sums[0].clone(), *hits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        a, b, ids, all_ids, logit_scale, logit_bias, sums, *grads = ctx.saved_tensors
        how: How = ctx.how
        valid = Valid(ids)
        if ctx.at_once:
            grad_rows, grad_columns = grads
            grad_b = merge_gradients(Valid(all_ids).spread(grad_columns * grad, len(all_ids)))
        else:
            rows = FeatureBlock(valid.of(a), valid.of(ids))
            grad_rows, sums = torch.zeros_like(rows.x), torch.zeros_like(sums)

            def add(columns: FeatureBlock, found: Tensor) -> None:
                part = torch.zeros_like(columns.x)
                sums.add_(
                    how.blocks.sigmoid_block(
                        rows, columns, logit_scale, logit_bias, None, (grad_rows, part), how.tile_mb
                    )
                )
                found.addcmul_(part, grad)

            grad_b = sweep(how.ring, add, [b, ids], lambda n: b.new_zeros(n, b.shape[1]), 0, merge_gradients)
        grad_a = valid.spread(grad_rows * grad, len(a))
        _, to_scale, to_bias = sums * grad
        return grad_a, grad_b, None, None, to_scale.reshape_as(logit_scale), to_bias.reshape_as(logit_bias), None
