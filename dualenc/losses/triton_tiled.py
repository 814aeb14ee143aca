"""The block functions of ``tiled`` for CUDA: matrix products by cuBLAS, all else on a tile in two Triton kernels.

A tile of logits is read twice for the statistics (its rows', its columns') and once for the gradient, which replaces
it. Every sum is owned by one program, so there are no atomics and numbers do not change from run to run; nothing waits
for the device. Products are as exact as torch's: fp32 unless TF32 was allowed.

Import it only where Triton is installed. With TRITON_INTERPRET=1 in the environment before the import, Triton runs the
kernels on the CPU; the tests use that where there is no GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dualenc.losses.tiled import Block, Scratch, Stats, add_gradients, tiles

ALONG_ROW, ALONG_COLUMN, GRADIENT = (4, 512), (64, 32), (8, 256)
"""What a program reads at a time, (rows or columns it owns, entries of each): neighbours in memory are columns."""


def info_nce_stats(rows: Block, columns: Block, scale: Tensor, of_rows: Stats, of_columns: Stats, mb: float) -> None:
    """As ``tiled.info_nce_stats``."""
    for i, j, logits in tiles(rows, columns, scale, None, mb, Scratch(rows.x)):
        _both_stats(logits, rows.ids[i], columns.ids[j], of_rows.of(i), of_columns.of(j), None)


def info_nce_grad(
    rows: Block, columns: Block, scale: Tensor, smooth: float, grad_rows: Tensor, grad_columns: Tensor, mb: float
) -> Tensor:
    """As ``tiled.info_nce_grad``."""
    grad_scale = rows.x.new_zeros(())
    for i, j, logits in tiles(rows, columns, scale, None, mb, Scratch(rows.x)):
        _to_gradient(logits, rows.part(i), columns.part(j), smooth, sigmoid=False)
        grad_scale += add_gradients(logits, rows.x[i], columns.x[j], scale, grad_rows[i], grad_columns[j])
    return grad_scale


def sigmoid_block(
    rows: Block,
    columns: Block,
    scale: Tensor,
    bias: Tensor,
    of_rows: Stats | None,
    of_columns: Stats | None,
    grads: tuple[Tensor, Tensor] | None,
    mb: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``tiled.sigmoid_block``."""
    terms, (grad_scale, grad_bias) = rows.x.new_zeros(len(rows)), rows.x.new_zeros(2)
    for i, j, logits in tiles(rows, columns, scale, bias, mb, Scratch(rows.x)):
        if of_rows is not None and of_columns is not None:
            _both_stats(logits, rows.ids[i], columns.ids[j], of_rows.of(i), of_columns.of(j), terms[i])
        if grads is not None:
            _to_gradient(logits, rows.part(i), columns.part(j), 0.0, sigmoid=True)
            grad_bias += logits.sum()
            grad_scale += add_gradients(logits, rows.x[i], columns.x[j], scale, grads[0][i], grads[1][j])
    return terms.sum(), grad_scale, grad_bias


def _both_stats(
    logits: Tensor, row_ids: Tensor, column_ids: Tensor, of_row: Stats, of_column: Stats, terms: Tensor | None
) -> None:
    """Add a tile to the statistics (views) and, for the sigmoid loss, Σ softplus(−z·logit) to ``terms`` [h]."""
    h, w = logits.shape
    sigmoid = terms is not None
    to_row = [*of_row.tensors(), torch.zeros_like(of_row.z) if terms is None else terms]
    to_column = [*of_column.tensors(), torch.zeros_like(of_column.z)]
    own, other = ALONG_ROW
    _stats_kernel[(triton.cdiv(h, own),)](logits, row_ids, column_ids, *to_row, h, w, w, 1, sigmoid, own, other)
    other, own = ALONG_COLUMN
    _stats_kernel[(triton.cdiv(w, own),)](logits, column_ids, row_ids, *to_column, w, h, 1, w, sigmoid, own, other)


def _to_gradient(logits: Tensor, rows: Block, columns: Block, smooth: float, sigmoid: bool) -> None:
    """Replace the logits [h, w] by the gradient at them."""
    h, w = logits.shape
    vectors = [x.new_ones(len(x)) if v is None else v for x, v in _vectors(rows) + _vectors(columns)]
    height, width = GRADIENT
    grid = (triton.cdiv(h, height), triton.cdiv(w, width))
    _gradient_kernel[grid](logits, rows.ids, columns.ids, *vectors, h, w, smooth, sigmoid, height, width)


def _vectors(block: Block) -> list[tuple[Tensor, Tensor | None]]:
    return [(block.x[:, 0], v) for v in (block.weight, block.lse, block.upstream)]


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
    LOGITS, ROW_IDS, COLUMN_IDS, ROW_WEIGHT, ROW_LSE, ROW_UP, COLUMN_WEIGHT, COLUMN_LSE, COLUMN_UP, h, w, smooth,
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
        row_weight, column_weight = tl.load(ROW_WEIGHT + i, mask=in_h), tl.load(COLUMN_WEIGHT + j, mask=in_w)
        row_lse, column_lse = tl.load(ROW_LSE + i, mask=in_h), tl.load(COLUMN_LSE + j, mask=in_w)
        row_up, column_up = tl.load(ROW_UP + i, mask=in_h), tl.load(COLUMN_UP + j, mask=in_w)
        to_row = tl.exp(logits - row_lse[:, None]) - smooth - tl.where(positive, row_weight[:, None], 0.0)
        to_column = tl.exp(logits - column_lse[None, :]) - smooth - tl.where(positive, column_weight[None, :], 0.0)
        g = row_up[:, None] * to_row + column_up[None, :] * to_column
    tl.store(at, g, mask=there)
