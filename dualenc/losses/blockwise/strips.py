"""Sums over [n, N] logits, one strip of rows at a time: the whole matrix never exists."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def strip_size(columns: int, strip_mb: float | None) -> int:
    """How many rows make a strip of at most ``strip_mb`` MiB of fp32 logits (at least 16, at most 1024)."""
    return 1024 if strip_mb is None else int(min(max(strip_mb * 2**18 / max(columns, 1), 16), 1024))


def strip_sum(
    fn: Callable[..., Tensor], rows: Sequence[Tensor], shared: Sequence[Tensor], columns: int, strip_mb: float | None
) -> Tensor:
    """Σ over strips of ``fn(*strip of rows, *shared)``, with the memory of one strip, forward and backward.

    A strip's intermediate values are discarded and recomputed in the backward (torch.utils.checkpoint), so a
    [B, N] matrix never exists whole and the gradient is the same.

    Args:
        fn: (row strips …, shared …) → a tensor of sums over the strip's rows; the same shape for any strip.
        rows: tensors with the same first axis, which is split.
        shared: tensors passed whole to every strip.
        columns: N, for the size of a strip.
        strip_mb: MiB of an [n, N] matrix; None: one strip.
    """
    n = len(rows[0])
    if n == 0:  # a zero that still runs the gathers' backward with the other ranks
        zero: Tensor = torch.stack([x[:0].sum() for x in (*rows, *shared) if x.is_floating_point()]).sum()
        return zero
    if strip_mb is None:
        return fn(*rows, *shared)
    size = strip_size(columns, strip_mb)
    if size >= n:
        return fn(*rows, *shared)
    parts = [
        checkpoint(fn, *(x[k : k + size] for x in rows), *shared, use_reentrant=False, preserve_rng_state=False)
        for k in range(0, n, size)
    ]
    total: Tensor = torch.stack(parts).sum(0)
    return total


def nce_rows(logits: Tensor, positive: Tensor) -> Tensor:
    """−Σ_{j positive} log softmax(logits)_j / (number of positives) of each row, [n, C] → [n]."""
    weight = positive.to(logits.dtype) / positive.sum(1, keepdim=True)
    return torch.logsumexp(logits, 1) - torch.where(positive, weight * logits, 0.0).sum(1)
