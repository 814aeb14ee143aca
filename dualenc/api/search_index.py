"""Features of many items, to be searched with a feature of another modality."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dualenc.errors import ConfigError

_BLOCK = 1 << 26
"""Scores that exist at one time."""


@dataclass(frozen=True, slots=True)
class Hit:
    """One item that a search found.

    Attributes:
        item: the item's path or text; its position where it has neither.
        score: the cosine of item and query.
        position: its row in the index.
    """

    item: str | int
    score: float
    position: int


@dataclass(frozen=True, slots=True)
class FoundInIndex:
    """What :meth:`dualenc.Model.search_index` found: the hits, of how many items, of which modality."""

    hits: list[Hit]
    total: int
    modality: str


@dataclass(frozen=True)
class SearchIndex:
    """Items that can be searched: what :meth:`dualenc.Model.index` makes.

    Attributes:
        modality: of the items.
        items: how each is called, row by row.
        features: [n, D], L2-normalised.
        skipped: item → reason of those that could not be read.
    """

    modality: str
    items: Sequence[str | int]
    features: Tensor
    skipped: dict[str | int, str]

    def __post_init__(self) -> None:
        if len(self.items) != len(self.features):
            raise ConfigError(
                f"a search index needs one feature per item, got {len(self.features)} features for {len(self)} items"
            )

    def __len__(self) -> int:
        return len(self.items)

    def nearest(self, queries: Tensor, k: int = 5) -> list[list[Hit]]:
        """The ``k`` nearest items of each query, best first; all of them where there are fewer.

        Args:
            queries: [q, D], L2-normalised.

        Raises:
            ConfigError: ``k`` below 1, or features of another width.
        """
        if k < 1:
            raise ConfigError(f"k: {k} must be at least 1")
        if queries.ndim != 2 or queries.shape[1] != self.features.shape[1]:
            raise ConfigError(f"queries must be [q, {self.features.shape[1]}], got {list(queries.shape)}")
        hits: list[list[Hit]] = []
        for some in torch.split(queries.to(self.features), max(1, _BLOCK // max(len(self), 1))):
            scores, rows = torch.topk(some @ self.features.T, min(k, len(self)), dim=1)
            for score, row in zip(scores.tolist(), rows.tolist(), strict=True):
                hits.append([Hit(self.items[r], s, r) for s, r in zip(score, row, strict=True)])
        return hits
