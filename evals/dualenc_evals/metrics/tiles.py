"""Counting in a block of scores: the part of exact ranks that a matmul does not do."""

from __future__ import annotations

import torch
from torch import Tensor

BYTES = 8
"""Bools in one int64."""
WORDS = 255
"""int64 words added up before a byte of the sum could overflow."""


def count_below(scores: Tensor, limits: Tensor) -> Tensor:
    """How many of each row's scores lie below its limit; a NaN is not below.

    A plain ``(scores < limits).sum(1)`` widens every bool to an int64 and takes as long as the matmul that made the
    scores. Here eight bools are added at once as the bytes of an int64, in tiles that stay in the cache.

    Args:
        scores: [n, M] fp32.
        limits: [n].

    Returns:
        [n] int64.
    """
    n, columns = scores.shape
    out = torch.zeros(n, dtype=torch.int64)
    width = WORDS * BYTES
    whole = columns - columns % BYTES
    mask = torch.empty(n, width, dtype=torch.bool)
    for start in range(0, whole, width):
        stop = min(start + width, whole)
        tile = mask[:, : stop - start]
        torch.lt(scores[:, start:stop], limits[:, None], out=tile)
        words = tile.view(torch.int64).sum(1)
        out += words[:, None].view(torch.uint8).sum(1)
    return out + (scores[:, whole:] < limits[:, None]).sum(1)
