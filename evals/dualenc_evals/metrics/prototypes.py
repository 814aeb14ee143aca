"""Classes by prototypes instead of prompts: means of the features of labelled items (OVDiff, Karazija et al. 2024, seed
S43, which takes its items from a generator of images; any labelled items will do).

A class may have several prototypes, the nearest of which counts. The background is one more class with prototypes of
its own, which may win. Prompts may decide beforehand which classes are in question at all.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dualenc.features.mining import k_means
from dualenc.model.zero_shot import classifier
from dualenc_evals.metrics.scores import Ints, distinct_rows

BELOW = -2.0
"""Score of a class that cannot win: below every cosine."""


def make_prototypes(x: Tensor, labels: Ints, each: Sequence[int]) -> tuple[Tensor, Ints]:
    """(unit prototypes [P, D], the class of each [P]).

    Args:
        x: [N, D] unit rows; labels: [N] class numbers.
        each: [C] prototypes of a class. One is the mean of its rows, several are the means of k-means clusters; a class
            has no more prototypes than rows.
    """
    number = np.zeros(len(x), dtype=np.int64)
    owners: list[int] = []
    for c, k in enumerate(each):
        rows = np.flatnonzero(labels == c)
        if not len(rows):
            continue
        cluster = k_means(x[torch.from_numpy(rows)], min(k, len(rows))) if k > 1 else np.zeros(len(rows), np.int64)
        used, place = np.unique(cluster, return_inverse=True)
        number[rows] = len(owners) + place.reshape(-1)
        owners += [c] * len(used)
    return classifier(x, torch.from_numpy(number), len(owners)), np.array(owners, dtype=np.int64)


class ByPrompts:
    """Scores of items for classes with one weight each."""

    def __init__(self, weights: Tensor) -> None:
        """``weights [C, D]``: unit rows."""
        self.weights, self.width = weights, len(weights)
        self._columns, self._inverse = distinct_rows(weights)

    def scores(self, x: Tensor) -> Tensor:
        """[n, C] cosines of the rows ``x [n, D]`` with the classes; equal classes score exactly the same."""
        return (x @ self._columns.T)[:, self._inverse]


class ByPrototypes:
    """The same for classes with any number of prototypes: the cosine with a class's nearest one.

    Args:
        table: [P, D] unit prototypes; owners: [P] their classes, below ``classes``.
        keep: how many classes may win, those that ``prompts`` score best; classes that tie with the last of them stay.
        prompts: scores of the first K ≤ ``classes`` classes; a class beyond them, the background, may always win.
    """

    def __init__(
        self, table: Tensor, owners: Ints, classes: int, keep: int | None = None, prompts: ByPrompts | None = None
    ) -> None:
        self.table, self.owners, self.classes, self.width = table, owners, classes, max(len(table), classes)
        self._nearest = ByPrompts(table)
        self._keep, self._prompts = keep, prompts

    def scores(self, x: Tensor) -> Tensor:
        """[n, C]; :data:`BELOW` for classes without prototypes and those that may not win."""
        out = torch.full((len(x), self.classes), BELOW)
        index = torch.from_numpy(self.owners).expand(len(x), -1)
        out = out.scatter_reduce(1, index, self._nearest.scores(x), "amax")
        if self._prompts is not None and self._keep is not None and self._keep < self._prompts.width:
            first = self._prompts.scores(x)
            weak = first < first.topk(self._keep, dim=1).values[:, -1:]
            out[:, : self._prompts.width].masked_fill_(weak, BELOW)
        return out


class Lazily:
    """Rows of scores [N, C] that are computed when they are asked for."""

    def __init__(self, x: Tensor, classes: ByPrompts | ByPrototypes) -> None:
        self._x, self._classes = x, classes

    def __getitem__(self, rows: Tensor) -> Tensor:
        return self._classes.scores(self._x[rows])
