"""The block functions of ``tiled`` for CUDA: matrix products by cuBLAS, all else on a tile in two Triton kernels.

A tile of logits is read twice for the statistics (its rows', its columns') and once for the gradient, which replaces
it. Every sum is owned by one program, so there are no atomics and numbers do not change from run to run. Products are
as exact as torch's: fp32 unless TF32 was allowed.

Import it only where Triton is installed. Tested against ``tiled`` with Triton's interpreter on the CPU
(TRITON_INTERPRET=1 before the import); compiled, but not run, for compute capability 8.0 and 9.0. Not yet run on a GPU:
its GPU test is skipped without one, and block sizes are not tuned.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dualenc.losses.blockwise.tiled import FeatureBlock, Scratch, Stats, add_gradients, tiles

ALONG_ROW, ALONG_COLUMN, GRADIENT = (4, 512), (64, 32), (8, 256)
"""What a program reads at a time, (rows or columns it owns, entries of each): neighbours in memory are columns."""


def info_nce_stats(
    rows: FeatureBlock, columns: FeatureBlock, scale: Tensor, of_rows: Stats, of_columns: Stats, mb: float
) -> None:
    """As ``tiled.info_nce_stats``."""
    for i, j, logits in tiles(rows, columns, scale, None, mb, Scratch(rows.x)):
        _both_stats(logits, rows.ids[i], columns.ids[j], of_rows.of(i), of_columns.of(j), None)


def info_nce_grad(
    rows: FeatureBlock,
    columns: FeatureBlock,
    scale: Tensor,
    smooth: float,
    grad_rows: Tensor,
    grad_columns: Tensor,
    mb: float,
) -> Tensor:
    """As ``tiled.info_nce_grad``."""
    grad_scale = rows.x.new_zeros(())
    for i, j, logits in tiles(rows, columns, scale, None, mb, Scratch(rows.x)):
        R, C = rows.part(i), columns.part(j)
        _to_gradient(logits, R.ids, C.ids, (*R.terms, *C.terms), smooth)
        grad_scale += add_gradients(logits, R.x, C.x, scale, grad_rows[i], grad_columns[j])
    return grad_scale


def sigmoid_block(
    rows: FeatureBlock,
    columns: FeatureBlock,
    scale: Tensor,
    bias: Tensor,
    stats: tuple[Stats, Stats] | None,
    grads: tuple[Tensor, Tensor] | None,
    mb: float,
) -> Tensor:
    """As ``tiled.sigmoid_block``."""
    sums, terms = rows.x.new_zeros(3), rows.x.new_zeros(len(rows))
    for i, j, logits in tiles(rows, columns, scale, bias, mb, Scratch(rows.x)):
        if stats is not None:
            _both_stats(logits, rows.ids[i], columns.ids[j], stats[0].of(i), stats[1].of(j), terms[i])
        if grads is not None:
            _to_gradient(logits, rows.ids[i], columns.ids[j], (), None)
            sums[1] += add_gradients(logits, rows.x[i], columns.x[j], scale, grads[0][i], grads[1][j])
            sums[2] += logits.sum()
    sums[0] = terms.sum()
    return sums


def _both_stats(
    logits: Tensor, row_ids: Tensor, column_ids: Tensor, of_row: Stats, of_column: Stats, terms: Tensor | None
) -> None:
    """Add a tile to the statistics (views) and, for the sigmoid loss, Σ softplus(−z·logit) to ``terms`` [h]."""
    h, w = logits.shape
    sigmoid = terms is not None
    to_row = [*of_row.data, torch.zeros_like(of_row.z) if terms is None else terms]
    to_column = [*of_column.data, torch.zeros_like(of_column.z)]
    own, other = ALONG_ROW
    _stats_kernel[(triton.cdiv(h, own),)](logits, row_ids, column_ids, *to_row, h, w, w, 1, sigmoid, own, other)
    other, own = ALONG_COLUMN
    _stats_kernel[(triton.cdiv(w, own),)](logits, column_ids, row_ids, *to_column, w, h, 1, w, sigmoid, own, other)


def _to_gradient(
    logits: Tensor, row_ids: Tensor, column_ids: Tensor, terms: tuple[Tensor, ...], smooth: float | None
) -> None:
    """Replace the logits [h, w] by the gradient at them.

    Args:
        terms: InfoNCE: the rows' three, then the columns'; sigmoid loss: none.
        smooth: InfoNCE: ε / |V|; None for the sigmoid loss.
    """
    h, w = logits.shape
    height, width = GRADIENT
    grid = (triton.cdiv(h, height), triton.cdiv(w, width))
    six = terms or (logits,) * 6  # never read
    _gradient_kernel[grid](logits, row_ids, column_ids, *six, h, w, smooth or 0.0, smooth is None, height, width)


# Kernels have no type annotations: Triton reads them as code.


@triton.jit  # type: ignore
def _stats_kernel(  # type: ignore
    LOGITS, OWN_IDS, OTHER_IDS, POS, NEG, Z, AT_POS, TERMS, n_own, n_other, own_stride, other_stride,
    SIGMOID: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """One program: OWN rows (or columns) against all others, OTHER at a time; it alone writes their statistics."""
    i = tl.program_id(0) * OWN + tl.arange(0, OWN)
    mine = i < n_own
    own_ids = tl.load(OWN_IDS + i, mask=mine, other=-1)
    pos = tl.load(POS + i, mask=mine, other=-float("inf"))
    neg = tl.load(NEG + i, mask=mine, other=-float("inf"))
    z = tl.load(Z + i, mask=mine, other=0.0)
    at_pos = tl.load(AT_POS + i, mask=mine, other=0.0)
    terms = tl.load(TERMS + i, mask=mine, other=0.0)
    for start in range(0, n_other, OTHER):
        j = start + tl.arange(0, OTHER)
        there = mine[:, None] & (j < n_other)[None, :]
        other_ids = tl.load(OTHER_IDS + j, mask=j < n_other, other=-2)
        at = LOGITS + i.to(tl.int64)[:, None] * own_stride + j.to(tl.int64)[None, :] * other_stride
        logits = tl.load(at, mask=there, other=-float("inf"))
        positive = own_ids[:, None] == other_ids[None, :]
        before = tl.maximum(pos, neg)
        pos = tl.maximum(pos, tl.max(tl.where(positive, logits, -float("inf")), 1))
        neg = tl.maximum(neg, tl.max(tl.where(positive, -float("inf"), logits), 1))
        if SIGMOID:
            signed = tl.where(positive, -logits, logits)
            softplus = tl.maximum(signed, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(signed)))
            terms += tl.sum(tl.where(there, softplus, 0.0), 1)
        else:
            m = tl.maximum(pos, neg)
            z = z * tl.exp(before - m) + tl.sum(tl.where(there, tl.exp(logits - m[:, None]), 0.0), 1)
            at_pos += tl.sum(tl.where(positive & there, logits, 0.0), 1)
    tl.store(POS + i, pos, mask=mine)
    tl.store(NEG + i, neg, mask=mine)
    tl.store(Z + i, z, mask=mine)
    tl.store(AT_POS + i, at_pos, mask=mine)
    tl.store(TERMS + i, terms, mask=mine)


@triton.jit  # type: ignore
def _gradient_kernel(  # type: ignore
    LOGITS, ROW_IDS, COLUMN_IDS, ROW_TARGET, ROW_LSE, ROW_UP, COLUMN_TARGET, COLUMN_LSE, COLUMN_UP, h, w, smooth,
    SIGMOID: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One program: HEIGHT × WIDTH entries of the tile, changed from logits to gradients."""
    i = tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)
    j = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    in_h, in_w = i < h, j < w
    there = in_h[:, None] & in_w[None, :]
    at = LOGITS + i.to(tl.int64)[:, None] * w + j[None, :]
    logits = tl.load(at, mask=there, other=0.0)
    row_ids, column_ids = tl.load(ROW_IDS + i, mask=in_h, other=-1), tl.load(COLUMN_IDS + j, mask=in_w, other=-2)
    positive = row_ids[:, None] == column_ids[None, :]
    if SIGMOID:
        signed = tl.where(positive, -logits, logits)
        e = tl.exp(-tl.abs(signed))
        g = tl.where(signed >= 0, 1.0, e) / (1.0 + e)
        g = tl.where(positive, -g, g)
    else:
        row_target, column_target = tl.load(ROW_TARGET + i, mask=in_h), tl.load(COLUMN_TARGET + j, mask=in_w)
        row_lse, column_lse = tl.load(ROW_LSE + i, mask=in_h), tl.load(COLUMN_LSE + j, mask=in_w)
        row_up, column_up = tl.load(ROW_UP + i, mask=in_h), tl.load(COLUMN_UP + j, mask=in_w)
        to_row = row_up[:, None] * (tl.exp(logits - row_lse[:, None]) - smooth)
        to_column = column_up[None, :] * (tl.exp(logits - column_lse[None, :]) - smooth)
        g = to_row + to_column - tl.where(positive, row_target[:, None] + column_target[None, :], 0.0)
    tl.store(at, g, mask=there)
