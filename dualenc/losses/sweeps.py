"""The losses without the [B, N] matrix, over ranks: sweeps of this rank's rows over everybody's columns.

InfoNCE takes two sweeps: logsumexp of rows and columns in the forward, gradients in the backward. The sigmoid loss
takes one where the columns are gathered (value and gradient together, scaled in the backward), else two as well.

Columns come either gathered (N·D floats on every rank while a sweep lasts) or around the ring (never more than three
blocks of B·D); what ranks find out about a column, its running softmax and its gradient, goes back to its owner.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from dualenc.distributed.gather import all_gather, check_equal_shapes, reduce_scatter_sum
from dualenc.distributed.ring import Visit, circulate
from dualenc.distributed.world import world_size
from dualenc.losses.tiled import Block, Positives, Stats


@dataclass(frozen=True, slots=True)
class How:
    """How a loss is computed; no number depends on it.

    Attributes:
        tile_mb: MiB of logits that exist at one time.
        ring: columns around the ring, not gathered.
        blocks: the module with the block functions, ``tiled`` or ``triton_tiled``.
    """

    tile_mb: float
    ring: bool
    blocks: ModuleType


def sweep_info_nce(
    a: Tensor, b: Tensor, ids: Tensor, all_ids: Tensor, logit_scale: Tensor, label_smoothing: float, how: How
) -> tuple[Tensor, Tensor, Tensor]:
    """Σ over this rank's valid rows of ℓ_i(a→b) + ℓ_i(b→a), and the hits both ways.

    Args:
        a, b: [B, D]; ids: [B]; all_ids: [W·B], those of all ranks; logit_scale: [1].
    """
    check_equal_shapes(a)
    value, hits_ab, hits_ba = _InfoNCE.apply(a, b, ids, all_ids, logit_scale, label_smoothing, how)
    return value, hits_ab, hits_ba


def sweep_sigmoid(
    a: Tensor, b: Tensor, ids: Tensor, logit_scale: Tensor, logit_bias: Tensor | None, how: How
) -> tuple[Tensor, Tensor, Tensor]:
    """Σ −log σ(z·logit) over this rank's valid rows and all valid columns, and the hits both ways."""
    check_equal_shapes(a)
    bias = torch.zeros_like(logit_scale) if logit_bias is None else logit_bias
    value, hits_ab, hits_ba = _Sigmoid.apply(a, b, ids, logit_scale, bias, how)
    return value, hits_ab, hits_ba


def merge_stats(parts: list[Tensor]) -> list[Tensor]:
    """From every rank's statistics of all columns (the fields of ``Stats``, each [W·B]) to this rank's columns' [B]."""
    if world_size() == 1:
        return parts
    pos, neg, z, at_pos = parts
    before = torch.maximum(pos, neg)
    dist.all_reduce(pos, dist.ReduceOp.MAX)
    dist.all_reduce(neg, dist.ReduceOp.MAX)
    # −inf: this rank has no rows, or the column takes no part.
    z = torch.where(before.isneginf(), 0, z * (before - torch.maximum(pos, neg)).exp_())
    sums = torch.stack([z, at_pos])
    dist.all_reduce(sums)
    return [x.chunk(world_size())[dist.get_rank()] for x in (pos, neg, *sums)]


def merge_gradients(parts: list[Tensor]) -> list[Tensor]:
    """From every rank's gradients of all columns [W·B, D] to this rank's columns' [B, D]."""
    return parts if world_size() == 1 else [reduce_scatter_sum(x) for x in parts]


def _sweep(
    ring: bool,
    visit: Visit,
    fixed: list[Tensor],
    moving: list[Tensor],
    merge: Callable[[list[Tensor]], list[Tensor]],
) -> list[Tensor]:
    """``visit`` with all columns, in one piece or block by block; returns ``moving`` at home."""
    if world_size() > 1 and ring:
        return circulate(visit, fixed, moving)
    everybody = [x if world_size() == 1 else all_gather(x) for x in fixed]
    parts = [x.repeat(world_size(), *[1] * (x.ndim - 1)) for x in moving]
    visit(everybody, parts)
    return merge(parts)


class _Chosen:
    """The slots that take part; indexing copies nothing where all do."""

    def __init__(self, ids: Tensor) -> None:
        self.index = torch.nonzero(ids >= 0).flatten()
        self.all = len(self.index) == len(ids)

    def of(self, x: Tensor) -> Tensor:
        return x if self.all else x[self.index]

    def back(self, x: Tensor, part: Tensor) -> None:
        """Write ``part`` (from ``of(x)``, changed in place) into ``x``."""
        if not self.all:
            x[self.index] = part


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
        weight = (1 - label_smoothing) / Positives(all_ids).count(ids).clamp(min=1).to(a.dtype)
        smooth = label_smoothing / max(int((all_ids >= 0).sum()), 1)
        chosen = _Chosen(ids)
        rows = Block(chosen.of(a), chosen.of(ids))
        of_rows = Stats.empty(rows.x)

        def visit(fixed: list[Tensor], moving: list[Tensor]) -> None:
            here = _Chosen(fixed[1])
            columns = Block(*(here.of(x) for x in fixed))
            parts = [here.of(x) for x in moving]
            if len(rows) and len(columns):
                how.blocks.info_nce_stats(rows, columns, logit_scale, of_rows, Stats(*parts), how.tile_mb)
            for x, part in zip(moving, parts, strict=True):
                here.back(x, part)

        of_columns = Stats(*_sweep(how.ring, visit, [b, ids], Stats.empty(b).tensors(), merge_stats))
        lse_rows, lse_columns = of_rows.lse(), of_columns.lse()
        ctx.save_for_backward(a, b, ids, weight, logit_scale, lse_rows, lse_columns)
        ctx.smooth, ctx.how = smooth, how
        mine, of_mine, w = chosen.of(b), of_columns.of(chosen.index), chosen.of(weight)
        value = (lse_rows - w * of_rows.at_pos).sum() + (of_mine.lse() - w * of_mine.at_pos).sum()
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
        a, b, ids, weight, logit_scale, lse_rows, lse_columns = ctx.saved_tensors
        how: How = ctx.how
        chosen = _Chosen(ids)
        # Ranks that scale their losses differently: rank r's factor belongs to its rows and its columns.
        upstream = None if _equal_on_all_ranks(grad) else grad.expand(len(ids)).contiguous()
        rows = Block(chosen.of(a), chosen.of(ids), chosen.of(weight), lse_rows)
        if upstream is not None:
            rows.upstream = chosen.of(upstream)
        grad_rows, grad_scale = torch.zeros_like(rows.x), a.new_zeros(())

        def visit(fixed: list[Tensor], moving: list[Tensor]) -> None:
            here = _Chosen(fixed[1])
            columns = Block(*(here.of(x) for x in fixed))
            part = here.of(moving[0])
            if len(rows) and len(columns):
                grad_scale.add_(
                    how.blocks.info_nce_grad(rows, columns, logit_scale, ctx.smooth, grad_rows, part, how.tile_mb)
                )
            here.back(moving[0], part)

        fixed = [b, ids, weight, lse_columns] + ([] if upstream is None else [upstream])
        (grad_b,) = _sweep(how.ring, visit, fixed, [torch.zeros_like(b)], merge_gradients)
        factor = grad if upstream is None else torch.ones_like(grad)
        grad_a = _spread(grad_rows, chosen, a)
        return grad_a * factor, grad_b * factor, None, None, (grad_scale * factor).reshape_as(logit_scale), None, None


class _Sigmoid(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, ids: Tensor, logit_scale: Tensor, logit_bias: Tensor, how: How
    ) -> tuple[Tensor, Tensor, Tensor]:
        chosen = _Chosen(ids)
        rows = Block(chosen.of(a), chosen.of(ids))
        of_rows, total = Stats.empty(rows.x), a.new_zeros(())
        at_once = any(ctx.needs_input_grad) and (world_size() == 1 or not how.ring)
        grad_rows, grad_scalars, grad_columns = torch.zeros_like(rows.x), a.new_zeros(2), a.new_zeros(0)

        def visit(fixed: list[Tensor], moving: list[Tensor]) -> None:
            nonlocal grad_columns
            here = _Chosen(fixed[1])
            columns = Block(*(here.of(x) for x in fixed))
            parts = [here.of(x) for x in moving]
            grads = (grad_rows, torch.zeros_like(columns.x)) if at_once else None
            if len(rows) and len(columns):
                value, *scalars = how.blocks.sigmoid_block(
                    rows, columns, logit_scale, logit_bias, of_rows, Stats(*parts), grads, how.tile_mb
                )
                total.add_(value)
                grad_scalars.add_(torch.stack(scalars))
            for x, part in zip(moving, parts, strict=True):
                here.back(x, part)
            if grads:
                grad_columns = _spread(grads[1], here, fixed[0])

        of_columns = Stats(*_sweep(how.ring, visit, [b, ids], Stats.empty(b).tensors(), merge_stats))
        ctx.how, ctx.at_once = how, at_once
        if at_once:
            ctx.save_for_backward(_spread(grad_rows, chosen, a), grad_columns, grad_scalars, logit_scale, logit_bias)
        else:
            ctx.save_for_backward(a, b, ids, logit_scale, logit_bias)
        hits = of_rows.hits(), of_columns.of(chosen.index).hits()
        ctx.mark_non_differentiable(*hits)
        return total, *hits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if ctx.at_once:
            grad_a, grad_columns, scalars, logit_scale, logit_bias = ctx.saved_tensors
            grad_a = grad_a * grad
            (grad_b,) = merge_gradients([grad_columns * grad])
        else:
            a, b, ids, logit_scale, logit_bias = ctx.saved_tensors
            grad_a, grad_b, scalars = _sigmoid_gradients(a, b, ids, logit_scale, logit_bias, grad, ctx.how)
        to_scale, to_bias = scalars * grad
        return grad_a, grad_b, None, to_scale.reshape_as(logit_scale), to_bias.reshape_as(logit_bias), None


def _sigmoid_gradients(
    a: Tensor, b: Tensor, ids: Tensor, logit_scale: Tensor, logit_bias: Tensor, grad: Tensor, how: How
) -> tuple[Tensor, Tensor, Tensor]:
    """The second sweep around the ring: gradients of a and b [B, D], and of scale and bias [2] for upstream 1."""
    chosen = _Chosen(ids)
    rows = Block(chosen.of(a), chosen.of(ids))
    grad_rows, scalars = torch.zeros_like(rows.x), a.new_zeros(2)

    def visit(fixed: list[Tensor], moving: list[Tensor]) -> None:
        here = _Chosen(fixed[1])
        columns = Block(*(here.of(x) for x in fixed))
        if len(rows) and len(columns):
            part = torch.zeros_like(columns.x)
            _, *found = how.blocks.sigmoid_block(
                rows, columns, logit_scale, logit_bias, None, None, (grad_rows, part), how.tile_mb
            )
            scalars.add_(torch.stack(found))
            moving[0].index_add_(0, here.index, part * grad)

    (grad_b,) = _sweep(how.ring, visit, [b, ids], [torch.zeros_like(b)], merge_gradients)
    return _spread(grad_rows, chosen, a) * grad, grad_b, scalars


def _spread(part: Tensor, chosen: _Chosen, like: Tensor) -> Tensor:
    """``part`` at the chosen slots of zeros shaped ``like``."""
    return part if chosen.all else torch.zeros_like(like).index_copy_(0, chosen.index, part)


def _equal_on_all_ranks(x: Tensor) -> bool:
    """Whether the scalar is the same everywhere (NaN on all counts as the same)."""
    if world_size() == 1:
        return True
    every = all_gather(x.reshape(1))
    return bool(((every == every[0]) | (every.isnan() & every[0].isnan())).all())
