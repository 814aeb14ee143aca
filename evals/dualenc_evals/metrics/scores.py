"""The numbers, as pure functions on features, ranks and labels: no files, no models, no processes.

Conventions everywhere: features are L2-normalised fp32, similarity is their dot product, a rank is 1-based, and a
tie counts AGAINST the model: a wrong candidate that scores as high as the right one ranks before it. So a model
whose features are all equal gets the last rank, not the first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

BLOCK_ELEMENTS = 2**24
"""Scores held at once (64 MiB of fp32): peak memory grows with the gallery, never with queries × gallery."""
_BYTES = 8
"""Bools in one int64."""
_WORDS = 255
"""int64 words added up before a byte of the sum could overflow."""


class Positives:
    """Which gallery rows are right for each query, as flat arrays (CSR).

    Attributes:
        offsets: [N + 1]; query i owns ``rows[offsets[i]:offsets[i+1]]``.
        rows: gallery row numbers.
    """

    def __init__(self, lists: Sequence[Sequence[int]], gallery_size: int) -> None:
        """Raises ValueError for a query without a right answer or a row outside the gallery."""
        counts = np.array([len(p) for p in lists], dtype=np.int64)
        if len(counts) and counts.min() == 0:
            raise ValueError(f"query {int(counts.argmin())} has no right answer in the gallery")
        self.offsets: Ints = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self.rows: Ints = np.array([j for p in lists for j in p], dtype=np.int64)
        if len(self.rows) and (self.rows.min() < 0 or self.rows.max() >= gallery_size):
            raise ValueError(f"a right answer points outside the gallery of {gallery_size}")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def counts(self) -> Ints:
        """[N]: how many right answers each query has."""
        return np.diff(self.offsets)

    def block(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """(query row within the block, gallery row) of every right answer of queries ``start:stop``."""
        lo, hi = self.offsets[start], self.offsets[stop]
        owner = np.repeat(np.arange(stop - start), self.counts[start:stop])
        return torch.from_numpy(owner), torch.from_numpy(self.rows[lo:hi].copy())


def block_starts(queries: int, gallery: int, elements: int = BLOCK_ELEMENTS) -> list[tuple[int, int]]:
    """Cut ``queries`` into blocks whose scores fit ``elements``; the cut never depends on the number of ranks."""
    size = max(1, min(queries, elements // max(gallery, 1)))
    return [(s, min(s + size, queries)) for s in range(0, queries, size)]


def distinct_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct rows of ``x [M, D]`` and the index [M] into them; ``x`` itself when no two rows are equal.

    Equal rows must get equal scores, and one matmul may round two equal columns differently (its edge columns take
    another kernel), so they share a column.
    """
    raw = np.ascontiguousarray(x.numpy()).view(np.dtype((np.void, x.shape[1] * x.element_size()))).reshape(-1)
    _, first, inverse = np.unique(raw, return_index=True, return_inverse=True)
    if len(first) == len(x):
        return x, torch.arange(len(x))
    return x[torch.from_numpy(first)], torch.from_numpy(inverse.reshape(-1).astype(np.int64))


def best_ranks(
    queries: Tensor,
    gallery: Tensor,
    positives: Positives,
    *,
    elements: int = BLOCK_ELEMENTS,
    shard: tuple[int, int] = (0, 1),
) -> Ints:
    """Rank of each query's best right answer among the wrong candidates; ties count against the model.

    rank_i = 1 + #{j wrong for i : s_ij ≥ max over right j' of s_ij'}. Several right answers (captions) do not push
    each other down, as in the COCO protocol.

    Args:
        queries: [N, D]; gallery: [M, D]; both fp32 on the CPU.
        positives: right gallery rows of each query.
        elements: scores held at once.
        shard: (rank, world_size): this rank does every world_size-th block; the other queries' ranks stay 0, so the
            sum over ranks is the answer, bit for bit that of one process.

    Returns:
        [N] int64.
    """
    columns, inverse = distinct_rows(gallery)
    out = np.zeros(len(queries), dtype=np.int64)
    for n, (start, stop) in enumerate(block_starts(len(queries), len(gallery), elements)):
        if n % shard[1] != shard[0]:
            continue
        scores = queries[start:stop] @ columns.T
        if len(columns) < len(gallery):
            scores = scores[:, inverse]
        owner, right = positives.block(start, stop)
        own = scores[owner, right]
        best = torch.full((stop - start,), -torch.inf).scatter_reduce_(0, owner, own, "amax")
        # "Not below" instead of "at least": a NaN score then ranks before the right answer, never behind it.
        ahead = len(gallery) - count_below(scores, best)
        ahead -= torch.zeros_like(ahead).index_add_(0, owner, (~(own < best[owner])).long())
        out[start:stop] = (ahead + 1).numpy()
    return out


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
    width = _WORDS * _BYTES
    whole = columns - columns % _BYTES
    mask = torch.empty(n, width, dtype=torch.bool)
    for start in range(0, whole, width):
        stop = min(start + width, whole)
        tile = mask[:, : stop - start]
        torch.lt(scores[:, start:stop], limits[:, None], out=tile)
        words = tile.view(torch.int64).sum(1)
        out += words[:, None].view(torch.uint8).sum(1)
    return out + (scores[:, whole:] < limits[:, None]).sum(1)


def top_k(queries: Tensor, gallery: Tensor, k: int) -> tuple[Ints, Floats]:
    """The k best gallery rows of a few queries: (rows [n, k], scores [n, k]), best first, then by row."""
    scores = (queries @ gallery.T).numpy().astype(np.float64)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return order.astype(np.int64), np.take_along_axis(scores, order, 1)


# --- from ranks ---------------------------------------------------------------------------------------------------


def recall_at_k(ranks: Ints, k: int) -> float:
    """Share of queries with a right answer among the first k."""
    return float(np.mean(ranks <= k))


def median_rank(ranks: Ints) -> float:
    """The median; of an even number, the mean of the two in the middle."""
    return float(np.median(ranks))


def mean_reciprocal_rank(ranks: Ints) -> float:
    """Mean of 1 / rank."""
    return float(np.mean(1.0 / ranks))


def retrieval_values(ranks: Ints, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """R@k, MRR, median and mean rank of one direction."""
    values = {f"R@{k}": recall_at_k(ranks, k) for k in ks}
    mean = float(np.mean(ranks))
    return values | {"MRR": mean_reciprocal_rank(ranks), "median_rank": median_rank(ranks), "mean_rank": mean}


def chance_retrieval(counts: Ints, gallery_size: int, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """What random order would give, exactly: ``counts [N]`` right answers of each query among ``gallery_size``.

    The best of m right answers among M ranks beyond k with probability C(M-m, k) / C(M, k).
    """
    M = gallery_size
    kinds, share = np.unique(counts, return_counts=True)
    weights = share / share.sum()
    beyond = np.zeros(M + 1)  # beyond[k]: no right answer among the first k, averaged over queries
    for m, w in zip(kinds, weights, strict=True):
        k = np.arange(M)
        steps = np.maximum(M - m - k, 0) / (M - k)
        beyond += w * np.concatenate([[1.0], np.cumprod(steps)])
    at = -np.diff(beyond)  # at[k-1]: the best right answer has rank k
    values = {f"R@{k}": float(1.0 - beyond[min(k, M)]) for k in ks}
    # No right answer comes before the best one, so its position is its rank.
    values["MRR"] = float(np.sum(at / np.arange(1, M + 1)))
    values["median_rank"] = float(np.argmax(1.0 - beyond >= 0.5 - 1e-12))
    values["mean_rank"] = float(np.sum(at * np.arange(1, M + 1)))
    return values


# --- classification -----------------------------------------------------------------------------------------------


def class_ranks(scores: Tensor, labels: Ints, twins_after: Ints | None = None) -> tuple[Ints, Ints]:
    """(rank of the true class [N], predicted class [N]) from ``scores [N, C]``; a tie goes to the wrong class.

    ``twins_after [C]``: how many later classes have the very same prompts as each class. No model can tell those
    apart (ImageNet has two "missile" and two "sunglasses"), so among them the first wins, as in published numbers.
    """
    index = torch.from_numpy(labels)
    true = scores.gather(1, index[:, None])
    others = scores.scatter(1, index[:, None], -torch.inf)
    ranks = ((~(others < true)).sum(1) + 1).clamp_max(scores.shape[1])
    if twins_after is not None:
        ranks -= torch.from_numpy(twins_after)[index]
    best_other = torch.nan_to_num(others, nan=-torch.inf).argmax(1)
    predicted = torch.where(ranks == 1, index, best_other)
    return ranks.numpy(), predicted.numpy()


def confusion_matrix(labels: Ints, predicted: Ints, classes: int) -> Ints:
    """[C, C] counts: row = true class, column = predicted class."""
    return np.bincount(labels * classes + predicted, minlength=classes * classes).reshape(classes, classes)


def mean_per_class_recall(labels: Ints, predicted: Ints) -> float:
    """Recall of each class that has items, averaged: every class weighs the same."""
    n = int(max(labels.max(), predicted.max())) + 1
    total = np.bincount(labels, minlength=n)
    right = np.bincount(labels[labels == predicted], minlength=n)
    there = total > 0
    return float(np.mean(right[there] / total[there]))


def classification_values(ranks: Ints, labels: Ints, predicted: Ints) -> dict[str, float]:
    """top-1, top-5 and mean per-class recall."""
    return {
        "top1": recall_at_k(ranks, 1),
        "top5": recall_at_k(ranks, 5),
        "mean_per_class_recall": mean_per_class_recall(labels, predicted),
    }


def calibration_error(confidence: Floats, right: npt.NDArray[np.bool_], bins: int = 15) -> float:
    """Expected calibration error: mean gap between confidence and accuracy over equal bins (Guo et al. 2017, eq. 3).

    ``confidence [N]``: probability of the best class, in (0, 1]; a value on an edge belongs to the bin below it.
    ``right [N]``: whether the true class won (a tie lost).
    """
    place = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    gaps = np.bincount(place, right.astype(np.float64) - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence))


def selective_risks(confidence: Floats, right: npt.NDArray[np.bool_]) -> Floats:
    """[N]: share of wrong answers among the k most confident, k = 1 … N: the risk-coverage curve (Geifman and El-Yaniv
    2017, arXiv 1705.08500), whose mean is AURC. Equally confident answers come in any order, so the expected share is
    taken.

    ``confidence [N]``, ``right [N]`` as in :func:`calibration_error`.
    """
    _, group, counts = np.unique(-confidence, return_inverse=True, return_counts=True)
    wrong = np.bincount(group, ~right, minlength=len(counts)) / counts  # of each level of confidence
    return np.cumsum(np.repeat(wrong, counts)) / np.arange(1, len(confidence) + 1)


def risk_curve(risks: Floats, wrong: int, points: int = 100) -> dict[str, list[float]]:
    """:func:`selective_risks` ``risks [N]`` of which ``wrong`` answers are wrong, for a plot.

    Returns:
        ``coverage``, ``risk`` and ``best``, the risk with every wrong answer after all right ones, at up to ``points``
        coverages, evenly spaced, the last of which is 1.
    """
    n = len(risks)
    k = np.unique(np.ceil(np.linspace(1 / points, 1, points) * n - 1e-9).astype(np.int64))
    columns = {"coverage": k / n, "risk": risks[k - 1], "best": np.maximum(k - (n - wrong), 0) / k}
    return {name: np.round(v, 6).tolist() for name, v in columns.items()}


def confidences(scores: Tensor, scale: float) -> Floats:
    """[N] probability of the best class: softmax of ``scale`` × ``scores [N, C]``."""
    z = scale * scores.double()
    return torch.exp(z.amax(1) - z.logsumexp(1)).numpy()


def chance_classification(classes: int) -> dict[str, float]:
    """What guessing classes at random gives."""
    return {"top1": 1 / classes, "top5": min(5, classes) / classes, "mean_per_class_recall": 1 / classes}


# --- intervals ----------------------------------------------------------------------------------------------------


def bootstrap_weights(groups: Ints, *, seed: int = 0, resamples: int = 1000) -> Iterator[Floats]:
    """How often each group was drawn, ``resamples`` times: ``groups [N]`` number 0 … G-1, weights [G].

    One resample at a time, each step a vector operation: a [resamples, N] table would not fit beside the features.
    """
    n = int(groups.max()) + 1
    rng = np.random.default_rng(seed)
    for _ in range(resamples):
        yield np.bincount(rng.integers(0, n, n), minlength=n).astype(np.float64)


def bootstrap_ci(
    values: Mapping[str, Floats | Ints],
    groups: Ints | None = None,
    *,
    seed: int = 0,
    resamples: int = 1000,
    level: float = 0.95,
) -> dict[str, list[float]]:
    """Percentile bootstrap intervals of means (Efron & Tibshirani 1993, chapter 13).

    Args:
        values: name → [N] numbers whose mean is the metric.
        groups: [N] group of each value: the captions of one image are drawn together, since they are not
            independent; default: each value is its own group.

    Returns:
        name → [low, high].
    """
    names = list(values)
    table = np.stack([np.asarray(values[n], dtype=np.float64) for n in names], axis=1)
    index = _groups(len(table), groups)
    n = int(index.max()) + 1
    sums = np.zeros((n, len(names)))
    np.add.at(sums, index, table)
    sizes = np.bincount(index, minlength=n).astype(np.float64)
    draws = bootstrap_weights(index, seed=seed, resamples=resamples)
    means = np.stack([w @ sums / (w @ sizes) for w in draws])
    return dict(zip(names, _percentiles(means, level), strict=True))


def bootstrap_of(
    statistic: Callable[[Floats], float],
    n: int,
    groups: Ints | None = None,
    *,
    seed: int = 0,
    resamples: int = 1000,
    level: float = 0.95,
) -> list[float]:
    """Percentile bootstrap interval of any ``statistic``, a function of the items' weights [N]."""
    index = _groups(n, groups)
    draws = bootstrap_weights(index, seed=seed, resamples=resamples)
    got = np.array([[statistic(w[index])] for w in draws])
    return _percentiles(got[np.isfinite(got[:, 0])], level)[0]


def _groups(n: int, groups: Ints | None) -> Ints:
    return np.arange(n) if groups is None else np.unique(groups, return_inverse=True)[1].reshape(-1)


def _percentiles(table: Floats, level: float) -> list[list[float]]:
    tail = 100 * (1 - level) / 2
    low, high = np.percentile(table, [tail, 100 - tail], axis=0)
    return [[float(a), float(b)] for a, b in zip(low, high, strict=True)]


def weighted_class_recall(labels: Ints, predicted: Ints) -> Callable[[Floats], float]:
    """:func:`mean_per_class_recall` as a function of the items' weights."""
    right = labels == predicted

    def statistic(weights: Floats) -> float:
        total = np.bincount(labels, weights)
        found = np.bincount(labels[right], weights[right], minlength=len(total))
        there = total > 0
        return float(np.mean(found[there] / total[there]))

    return statistic


def weighted_median(values: Ints) -> Callable[[Floats], float]:
    """The median of ``values [N]``, each taken as often as its whole-number weight says."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]

    def statistic(weights: Floats) -> float:
        upto = np.cumsum(weights[order])
        half = upto[-1] / 2
        low, high = np.searchsorted(upto, half - 0.25), np.searchsorted(upto, half + 0.25)
        return float(ordered[low] + ordered[high]) / 2

    return statistic


def item_values(ranks: Ints, ks: Sequence[int]) -> dict[str, Floats]:
    """The per-query numbers whose means are R@k and MRR: what :func:`bootstrap_ci` resamples."""
    return {f"R@{k}": (ranks <= k).astype(np.float64) for k in ks} | {"MRR": 1.0 / ranks}


# --- geometry of the two clouds -----------------------------------------------------------------------------------


def modality_gap(a: Tensor, b: Tensor) -> float:
    """Distance between the two modalities' mean features, ‖mean(a) − mean(b)‖ (Liang et al. 2022, arXiv 2203.02053)."""
    return float((a.double().mean(0) - b.double().mean(0)).norm())


def mean_offdiagonal_cosine(x: Tensor) -> float:
    """Mean cosine of two different rows of ``x [N, D]``: near 1 means collapse. O(N): (‖Σx‖² − Σ‖x‖²) / (N(N−1))."""
    n = len(x)
    if n < 2:
        return math.nan
    d = x.double()
    return float((d.sum(0).square().sum() - d.square().sum()) / (n * (n - 1)))


def alignment(a: Tensor, b: Tensor) -> float:
    """Mean squared distance of positives ``a [P, D]``, ``b [P, D]`` (Wang & Isola 2020, arXiv 2005.10242, α = 2)."""
    return float((a.double() - b.double()).square().sum(1).mean())


def uniformity(x: Tensor, t: float = 2.0, elements: int = BLOCK_ELEMENTS) -> float:
    """log mean exp(−t‖x_i − x_j‖²) over i ≠ j, in tiles (Wang & Isola 2020). 0 is collapse; lower is better."""
    n = len(x)
    if n < 2:
        return math.nan
    d = x.double()
    total = sum(
        float(torch.exp(-t * (2 - 2 * (d[s:e] @ d.T)).clamp_min(0)).sum()) for s, e in block_starts(n, n, elements)
    )
    return math.log((total - n) / (n * (n - 1)))


UNIFORMITY_ROWS = 2048
"""Uniformity looks at all pairs of rows; of larger sets, at those of this many rows, evenly spaced."""


def _some(x: Tensor) -> Tensor:
    step = len(x) / UNIFORMITY_ROWS
    return x if step <= 1 else x[(torch.arange(UNIFORMITY_ROWS) * step).long()]


def geometry(a: Tensor, b: Tensor, pairs: tuple[Tensor, Tensor], names: tuple[str, str]) -> dict[str, float]:
    """Modality gap, alignment of the pairs, mean off-diagonal cosine and uniformity of each modality."""
    return {
        "modality_gap": modality_gap(a, b),
        "alignment": alignment(a[pairs[0]], b[pairs[1]]),
        f"mean_offdiagonal_cosine_{names[0]}": mean_offdiagonal_cosine(a),
        f"mean_offdiagonal_cosine_{names[1]}": mean_offdiagonal_cosine(b),
        f"uniformity_{names[0]}": uniformity(_some(a)),
        f"uniformity_{names[1]}": uniformity(_some(b)),
    }


def rounded(values: Mapping[str, Any], digits: int = 6) -> dict[str, Any]:
    """Numbers as written to a file: rounded, NaN as None (JSON has no NaN)."""
    show: Callable[[Any], Any] = lambda v: (
        [show(x) for x in v] if isinstance(v, list) else None if not math.isfinite(v) else round(float(v), digits)
    )
    return {k: show(v) for k, v in values.items()}
