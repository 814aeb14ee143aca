"""The row sums of InfoNCE and the sigmoid loss without the [B, N] matrix.

A strip of rows meets all columns; its loss and its gradient are taken at once, while the strip's logits are there, so
nothing of size B·N is kept and no product is computed twice. Memory is O((B + N)·D + strip). The gradient is scaled
by the upstream gradient in the backward.

With e_ij = exp(l_ij − m_i) and Z_i = Σ_j e_ij the softmax never exists: (e/Z) C = (e C)/Z and (e/Z)ᵀ R = eᵀ (R/Z).
Targets are sparse (each row has few positives), so they are added by index.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def tiled_info_nce(
    rows: Tensor,
    columns: Tensor,
    row_ids: Tensor,
    column_ids: Tensor,
    logit_scale: Tensor,
    label_smoothing: float = 0.0,
    strip_mb: float = 64.0,
) -> tuple[Tensor, Tensor]:
    """As ``info_nce_rows``: Σ ℓ_i over valid rows, and the number of rows whose best column is a positive.

    Args:
        rows: [B, D]; columns: [N, D]; row_ids: [B]; column_ids: [N]; −1 takes no part.
        logit_scale: [1].
        label_smoothing: ε of the targets.
        strip_mb: memory for the logits that exist at one time, in MiB.
    """
    total, hits = _InfoNCERows.apply(rows, columns, row_ids, column_ids, logit_scale, label_smoothing, strip_mb)
    return total, hits


def tiled_sigmoid(
    rows: Tensor,
    columns: Tensor,
    row_ids: Tensor,
    column_ids: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None = None,
    strip_mb: float = 64.0,
) -> tuple[Tensor, Tensor]:
    """As ``sigmoid_rows``: Σ −log σ(z·logit) over valid rows and columns, and the top-1 hits.

    Arguments as in :func:`tiled_info_nce`; ``logit_bias`` is [1] or None.
    """
    bias = torch.zeros_like(logit_scale) if logit_bias is None else logit_bias
    total, hits = _SigmoidRows.apply(rows, columns, row_ids, column_ids, logit_scale, bias, strip_mb)
    return total, hits


class Positives:
    """Column positions of each row's positives, found by sorting the column ids once."""

    def __init__(self, column_ids: Tensor) -> None:
        self.sorted, self.order = torch.sort(column_ids)

    def of(self, row_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Every (row, column) with equal ids, as two index tensors [P], and the count per row [B]."""
        first = torch.searchsorted(self.sorted, row_ids)
        count = torch.searchsorted(self.sorted, row_ids, right=True) - first
        row = torch.repeat_interleave(torch.arange(len(row_ids), device=row_ids.device), count)
        start_of_row = torch.cumsum(count, 0) - count
        within = torch.arange(len(row), device=row.device) - start_of_row[row]
        return row, self.order[first[row] + within], count


def strip_rows(columns: int, element_size: int, strip_mb: float) -> int:
    """How many rows make a strip of at most ``strip_mb`` MiB of logits (at least 16, at most 1024)."""
    return int(min(max(strip_mb * 2**20 / element_size / max(columns, 1), 16), 1024))


def _strips(valid: Tensor, columns: Tensor, strip_mb: float) -> tuple[Tensor, ...]:
    """The valid rows' positions, a strip at a time; none where there is none."""
    return torch.split(valid, strip_rows(len(columns), columns.element_size(), strip_mb)) if len(valid) else ()


class _InfoNCERows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        columns: Tensor,
        row_ids: Tensor,
        column_ids: Tensor,
        logit_scale: Tensor,
        label_smoothing: float,
        strip_mb: float,
    ) -> tuple[Tensor, Tensor]:
        valid, present = torch.nonzero(row_ids >= 0).flatten(), torch.nonzero(column_ids >= 0).flatten()
        C, ids = columns[present], column_ids[present]
        positives, column_sum = Positives(ids), C.sum(0)
        grad_rows, grad_columns = torch.zeros_like(rows), torch.zeros_like(C)
        total, hits, grad_scale = rows.new_zeros(()), rows.new_zeros(()), rows.new_zeros(())
        smooth = label_smoothing / max(len(C), 1)
        for strip in _strips(valid, C, strip_mb):
            R = rows[strip] * logit_scale
            logits = R @ C.T
            row, column, count = positives.of(row_ids[strip])
            weight = ((1 - label_smoothing) / count.to(rows.dtype))[row]
            best, where = logits.max(1, keepdim=True)
            hits += (ids[where.flatten()] == row_ids[strip]).sum()
            total -= (weight * logits[row, column]).sum() + smooth * (R @ column_sum).sum()
            e = logits.sub_(best).exp_()
            Z = e.sum(1, keepdim=True)
            total += (best + Z.log()).sum()
            # d total / d logits = e/Z − target; times the columns, and its transpose times the scaled rows.
            g = torch.mm(e, C).div_(Z)
            g.index_add_(0, row, C[column] * -weight[:, None])
            if smooth:
                g -= smooth * column_sum
                grad_columns -= smooth * R.sum(0)
            grad_columns.addmm_(e.T, R / Z)
            grad_columns.index_add_(0, column, R[row] * -weight[:, None])
            grad_scale += (g * rows[strip]).sum()
            grad_rows[strip] = g * logit_scale
        return _save(ctx, total, hits, grad_rows, grad_columns, grad_scale.reshape_as(logit_scale), columns, present)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        grad_rows, grad_columns, grad_scale = (g * grad for g in ctx.saved_tensors)
        return grad_rows, grad_columns, None, None, grad_scale, None, None


class _SigmoidRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        columns: Tensor,
        row_ids: Tensor,
        column_ids: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor,
        strip_mb: float,
    ) -> tuple[Tensor, Tensor]:
        valid, present = torch.nonzero(row_ids >= 0).flatten(), torch.nonzero(column_ids >= 0).flatten()
        C, ids = columns[present], column_ids[present]
        positives = Positives(ids)
        grad_rows, grad_columns = torch.zeros_like(rows), torch.zeros_like(C)
        total, hits, grad_scale, grad_bias = (rows.new_zeros(()) for _ in range(4))
        for strip in _strips(valid, C, strip_mb):
            R = rows[strip] * logit_scale
            logits = torch.addmm(logit_bias, R, C.T)
            row, column, _ = positives.of(row_ids[strip])
            hits += (ids[logits.argmax(1)] == row_ids[strip]).sum()
            logits[row, column] *= -1  # now −z·logit: every term is softplus of it
            total += nn.functional.softplus(logits).sum()
            g = logits.sigmoid_()
            g[row, column] *= -1
            grad_bias += g.sum()
            by_row = g @ C
            grad_columns.addmm_(g.T, R)
            grad_scale += (by_row * rows[strip]).sum()
            grad_rows[strip] = by_row * logit_scale
        out = _save(ctx, total, hits, grad_rows, grad_columns, grad_scale.reshape_as(logit_scale), columns, present)
        ctx.grad_bias = grad_bias.reshape_as(logit_bias)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        grad_rows, grad_columns, grad_scale = (g * grad for g in ctx.saved_tensors)
        return grad_rows, grad_columns, None, None, grad_scale, ctx.grad_bias * grad, None


def _save(
    ctx: Any,
    total: Tensor,
    hits: Tensor,
    grad_rows: Tensor,
    grad_present: Tensor,
    grad_scale: Tensor,
    columns: Tensor,
    present: Tensor,
) -> tuple[Tensor, Tensor]:
    if len(present) == len(columns):
        grad_columns = grad_present
    else:
        grad_columns = torch.zeros_like(columns)
        grad_columns[present] = grad_present
    ctx.save_for_backward(grad_rows, grad_columns, grad_scale)
    ctx.mark_non_differentiable(hits)
    return total, hits
