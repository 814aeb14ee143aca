"""Byte-pair merging of long words in n log n: the textbook loop takes minutes for 64,000 letters without a space."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence


def merged(symbols: Sequence[str], ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """Join neighbours, the pair of lowest rank first and of equal ones the leftmost, until no pair has a rank.

    The same pieces as merging every occurrence of the lowest pair in turn (Sennrich et al. 2016): a pair that a merge
    makes contains it, so its rank is higher, and equal pairs are joined from left to right in both.

    Args:
        symbols: of one word, the last with its end-of-word mark.
    """
    parts: list[str | None] = list(symbols)
    after = [*range(1, len(parts)), -1]
    before = list(range(-1, len(parts) - 1))
    heap: list[tuple[int, int, str, str]] = []

    def offer(left: int, right: int) -> None:
        a, b = parts[left], parts[right]
        assert a is not None
        assert b is not None
        rank = ranks.get((a, b))
        if rank is not None:
            heapq.heappush(heap, (rank, left, a, b))

    for i in range(len(parts) - 1):
        offer(i, i + 1)
    while heap:
        _, left, a, b = heapq.heappop(heap)
        right = after[left]
        if parts[left] != a or right < 0 or parts[right] != b:
            continue  # one of the two has been merged with another symbol since
        parts[left], parts[right] = a + b, None
        after[left] = after[right]
        if after[left] >= 0:
            before[after[left]] = left
            offer(left, after[left])
        if before[left] >= 0:
            offer(before[left], left)
    return [p for p in parts if p is not None]
