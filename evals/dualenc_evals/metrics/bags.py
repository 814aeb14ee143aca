"""Hard-bag retrieval: R@1 inside small bags of look-alikes (TrueMatch, No Detail Left Behind, seed S05).

Recall over a whole gallery is mostly won by telling unlike things apart; inside a bag only the details count. A right
answer must score strictly higher than every other one: with identical features no answer is right.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dualenc_evals.metrics.scores import BLOCK_ELEMENTS, Floats, Ints, block_starts

NEAREST = 64
"""Neighbours remembered per item when bags are made; an item whose neighbours are all taken makes no bag."""


def bag_values(x: Tensor, y: Tensor, bags: Ints, elements: int = BLOCK_ELEMENTS) -> tuple[Floats, Floats, Floats]:
    """Whether each member of each bag finds its partner.

    Args:
        x: [N, D] one side; y: [N, D] its partners, row by row.
        bags: [K, b] rows that are compared with each other.

    Returns:
        (x → y [K, b], y → x [K, b], all of the bag right both ways [K]) as 0 and 1.
    """
    K, b = bags.shape
    eye = torch.eye(b, dtype=torch.bool)
    there, back = np.zeros((K, b)), np.zeros((K, b))
    for start, stop in block_starts(K, b * b * x.shape[1], elements):
        rows = torch.from_numpy(bags[start:stop])
        # Sums of products in fp64, one pair at a time: equal rows get equal scores at any position.
        scores = (x[rows].double()[:, :, None] * y[rows].double()[:, None]).sum(-1)
        own = torch.diagonal(scores, dim1=1, dim2=2)
        others = scores.masked_fill(eye, -torch.inf)
        there[start:stop] = (others < own[:, :, None]).logical_or(eye).all(2).numpy()
        back[start:stop] = (others < own[:, None, :]).logical_or(eye).all(1).numpy()
    return there, back, np.asarray((there * back).all(1), dtype=np.float64)


def make_bags(
    x: Tensor, y: Tensor, labels: Sequence[str | None] | None, size: int, seed: int, owners: Sequence[int] | None = None
) -> Ints:
    """Disjoint bags of ``size`` look-alikes, [K, size] rows; leftover rows are in no bag.

    Args:
        x, y: [N, D] both sides, row by row.
        labels: [N] equal values look alike, and are shuffled by seed; None: nearest neighbours of x + y.
        owners: [N] which partner each row has; two rows with one partner never share a bag, nothing could tell them
            apart.
    """
    partner = np.arange(len(x)) if owners is None else np.asarray(owners)
    _, once = np.unique(partner, return_index=True)
    rows = np.sort(once)
    order = np.random.default_rng(seed).permutation(len(rows))
    if labels is not None:
        by: dict[str | None, list[int]] = {}
        for i in rows[order].tolist():
            by.setdefault(labels[i], []).append(i)
        cut = [own[s : s + size] for own in by.values() for s in range(0, len(own) - size + 1, size)]
        return np.array(cut, dtype=np.int64).reshape(-1, size)
    z = torch.nn.functional.normalize(x[torch.from_numpy(rows)] + y[torch.from_numpy(rows)], dim=1)
    return rows[_greedy(z, order, size)]


def _greedy(z: Tensor, order: npt.NDArray[np.int64], size: int) -> Ints:
    """In the given order, each row that is still free takes its nearest free rows."""
    near = min(len(z), max(NEAREST, 4 * size))
    nearest = torch.cat([(z[s:e] @ z.T).topk(near, dim=1).indices for s, e in block_starts(len(z), len(z))]).numpy()
    free = np.ones(len(z), dtype=bool)
    bags = []
    for i in order:
        if not free[i]:
            continue
        mine = [j for j in nearest[i] if free[j] and j != i][: size - 1]
        if len(mine) == size - 1:
            bags.append([i, *mine])
            free[[i, *mine]] = False
    return np.array(bags, dtype=np.int64).reshape(-1, size)
