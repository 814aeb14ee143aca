"""Pairs among many items: those with the same number, and those whose features are close."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from dualenc.data.order import Ints

BLOCK = 4096


def runs(numbers: Ints, most: int) -> Iterator[tuple[Ints, Ints]]:
    """Pairs of places of ``numbers`` [n] with the same number: each with the next ``most`` that have it."""
    order = np.argsort(numbers, kind="stable")
    ranked = numbers[order]
    here = np.arange(len(ranked))
    for ahead in range(1, most + 1):
        here = here[here + ahead < len(ranked)]
        here = here[ranked[here] == ranked[here + ahead]]
        if not len(here):
            return
        yield order[here], order[here + ahead]


def close_features(x: Tensor, cosine: float, others: Tensor | None = None) -> Iterator[tuple[Ints, Ints]]:
    """Pairs (i of ``x`` [n, D], j) of normalised features with at least this cosine, exactly, block by block: j of
    ``others`` [m, D], or without these a later row of ``x``. A block of 4,096 rows is in memory at once."""
    y = x if others is None else others
    for i in range(0, len(x), BLOCK):
        rows = x[i : i + BLOCK].float()
        for j in range(i if others is None else 0, len(y), BLOCK):
            close = rows @ y[j : j + BLOCK].float().T >= cosine
            if others is None and j == i:
                close = torch.triu(close, 1)
            a, b = torch.nonzero(close, as_tuple=True)
            if len(a):
                yield a.numpy() + i, b.numpy() + j
