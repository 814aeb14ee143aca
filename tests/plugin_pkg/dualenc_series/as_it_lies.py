"""A plan: samples in the order in which they lie in their shards, pass after pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dualenc.config import Section
from dualenc.data.order import Plan, Refs


class AsItLies(Plan):
    """For one source; ``start``: the sample it begins with."""

    class Config(Section):
        start: int = 0

    def __init__(
        self,
        names: Sequence[str],
        counts: Sequence[Sequence[int]],
        seed: int,
        weights: Sequence[float],
        lanes: int,
        window: int,
        config: Config,
    ) -> None:
        super().__init__(names, counts, seed, weights)
        self._start, self._ends = config.start, np.cumsum(counts[0])

    def at(self, positions: Any) -> Refs:
        p = np.asarray(positions, np.int64) + self._start
        place = p % self.total
        shard = np.searchsorted(self._ends, place, side="right")
        before = np.concatenate([[0], self._ends])[shard]
        return Refs(np.zeros_like(p), shard, place - before, p // self.total)
