"""The rank of every right answer, not only of the best: mAP@k and nDCG@k for queries with several right answers.

A right answer's rank is 1 + the wrong candidates that score at least as high (ties count against the model) + the
right ones before it. Memory grows with the gallery and the number of right answers, never with queries × gallery.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dualenc_evals.metrics.scores import BLOCK_ELEMENTS, Floats, Ints, Positives, block_starts, distinct_rows

MANY = 32
"""With at least so many right answers of a query, its scores are sorted once instead of compared for each of them."""


def wrong_ahead(
    queries: Tensor,
    gallery: Tensor,
    positives: Positives,
    *,
    elements: int = BLOCK_ELEMENTS,
    shard: tuple[int, int] = (0, 1),
) -> Ints:
    """[P]: for every right answer (in ``positives.rows``' order), the wrong candidates that score at least as high.

    Arguments as in :func:`dualenc_evals.metrics.scores.best_ranks`; the sum over ranks is the
    answer. Costs one pass over the scores for each right answer that a query has; of more than :data:`MANY`, it sorts.
    """
    columns, inverse = distinct_rows(gallery)
    out = np.zeros(len(positives.rows), dtype=np.int64)
    for n, (start, stop) in enumerate(block_starts(len(queries), len(gallery), elements)):
        if n % shard[1] != shard[0]:
            continue
        scores = queries[start:stop] @ columns.T
        scores = scores[:, inverse] if len(columns) < len(gallery) else scores
        owner, right = positives.block(start, stop)
        own = scores[owner, right]
        scores[owner, right] = -torch.inf  # right answers never count as ahead of one another
        lo = int(positives.offsets[start])
        place = torch.arange(len(owner)) - (torch.from_numpy(positives.offsets[start:stop]) - lo)[owner]
        ahead = torch.zeros(len(owner), dtype=torch.long)
        if int(place.max()) < MANY:
            for t in range(int(place.max()) + 1):
                mine = place == t
                ahead[mine] = (~(scores[owner[mine]] < own[mine, None])).sum(1)
        else:
            for q in range(stop - start):
                own_q = slice(int(positives.offsets[start + q]) - lo, int(positives.offsets[start + q + 1]) - lo)
                ordered = scores[q].nan_to_num(torch.inf, torch.inf, -torch.inf).sort().values
                ahead[own_q] = len(gallery) - torch.searchsorted(ordered, own[own_q])
            ahead[own.isnan()] = len(gallery)
        wrong = len(gallery) - torch.from_numpy(positives.counts[start:stop])[owner]
        out[lo : lo + len(owner)] = torch.minimum(ahead, wrong).numpy()
    return out


def places(ahead: Ints, positives: Positives) -> tuple[Ints, Ints, Ints]:
    """(query, number of the right answer from the best on: 1, 2, …, its rank), each [P], by query."""
    owner = np.repeat(np.arange(len(positives)), positives.counts)
    order = np.lexsort((ahead, owner))
    number = np.arange(len(ahead)) - positives.offsets[:-1][owner] + 1
    return owner, number, ahead[order] + number


def average_precision(ahead: Ints, positives: Positives, k: int) -> Floats:
    """[N] AP@k = 1/min(m, k) · Σ precision at each right answer among the first k; m right answers of the query.

    With one right answer it is 1/rank, or 0 beyond k; the audio retrieval literature's mAP@10 is its mean.
    """
    owner, number, place = places(ahead, positives)
    gains = np.where(place <= k, number / place, 0.0)
    return np.bincount(owner, gains, minlength=len(positives)) / np.minimum(positives.counts, k)


def ndcg(ahead: Ints, positives: Positives, k: int) -> Floats:
    """[N] nDCG@k with gains 0 and 1 and discount 1/log2(1 + place) (Järvelin & Kekäläinen 2002)."""
    owner, _, place = places(ahead, positives)
    gains = np.where(place <= k, 1 / np.log2(1.0 + place), 0.0)
    return np.bincount(owner, gains, minlength=len(positives)) / _ideal(positives.counts, k)


def _ideal(counts: Ints, k: int) -> Floats:
    steps = np.cumsum(1 / np.log2(np.arange(2, k + 2)))
    return np.asarray(steps[np.minimum(counts, k) - 1])


def chance_average_precision(counts: Ints, gallery_size: int, k: int) -> float:
    """Mean AP@k of random orders, exactly: ``counts [N]`` right answers of each query among ``gallery_size``.

    Rank i is right with probability m/M, and then (m-1)/(M-1) of the i-1 ranks before it are.
    """
    M = gallery_size
    i = np.arange(1, min(k, M) + 1)
    kinds, share = np.unique(counts, return_counts=True)
    rest = (kinds - 1) / max(M - 1, 1)
    each = [m / M * np.sum((1 + (i - 1) * r) / i) / min(m, k) for m, r in zip(kinds, rest, strict=True)]
    return float(np.average(each, weights=share))


def chance_ndcg(counts: Ints, gallery_size: int, k: int) -> float:
    """Mean nDCG@k of random orders, exactly."""
    i = np.arange(1, min(k, gallery_size) + 1)
    return float(np.mean(counts / gallery_size * np.sum(1 / np.log2(1 + i)) / _ideal(counts, k)))
