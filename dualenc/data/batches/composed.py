"""The order with a batch plan: the stream of *batches* is a mixture of the sources, and each composes its own.

Batch t of the run is the k-th of one source: sources take whole batches in blocks, as samples do without a plan, so
their shares are kept with errors that never accumulate. The source's plan says which samples its k-th batch holds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from dualenc.config import Data
from dualenc.data.batches.arranged import BatchPlan, chosen_batches
from dualenc.data.batches.facts import Facts, ReadFacts
from dualenc.data.order import Ints, Plan, Refs
from dualenc.data.shards.index import build_plan, open_sources
from dualenc.data.shards.remote import Bounds, ShardCache, is_local
from dualenc.errors import ConfigError


class Composed(Plan):
    """A :class:`~dualenc.data.order.Plan` whose batches are composed.

    Args:
        base: the sources' orders, shares and seed; it is not changed.
        parts: a batch plan for each source.
        size: samples of a global batch; positions are ``step · size + slot``.
        settings: of the plan, for the digest.
    """

    def __init__(self, base: Plan, parts: Sequence[BatchPlan], size: int, settings: str) -> None:
        self._take_over(base)
        self.parts, self.size = list(parts), size
        self._settings_of_batches = settings

    @property
    def samples_per_pass(self) -> int:
        """Positions of one epoch; fewer than the samples if the plan leaves some out."""
        return sum(p.per_epoch for p in self.parts)

    @property
    def sizes(self) -> dict[str, int]:
        """Source name → samples in one epoch of it."""
        return {s.name: p.per_epoch for s, p in zip(self.sources, self.parts, strict=True)}

    @property
    def scattered(self) -> bool:
        """Whether a batch takes samples from anywhere in a source, whatever the shards they are in."""
        return any(p.scattered for p in self.parts)

    def digest(self) -> str:
        """As :meth:`Plan.digest`; also of the batch plan, what it read, and the batch size."""
        h = hashlib.blake2b(f"{super().digest()}\0{self.size}\0{self._settings_of_batches}".encode(), digest_size=16)
        for part in self.parts:
            h.update(f"\0{part.token()}".encode())
        return h.hexdigest()

    def at(self, positions: Sequence[int] | Ints) -> Refs:
        """The samples at global positions (``step · size + slot``, non-negative), in the order of ``positions``."""
        P = np.asarray(positions, np.int64)
        if len(P) and int(P.min()) < 0:
            raise ValueError(f"positions start at 0, got {int(P.min())}")
        batches, slots = P // self.size, P % self.size
        source, shard, sample, passes = (np.empty_like(P) for _ in range(4))
        for t in np.unique(batches):
            here = batches == t
            one = np.array([t], np.int64)
            of, k = (np.zeros_like(one), one) if len(self.sources) == 1 else self._apportion(one)
            i = int(of[0])
            line, passes[here] = self.parts[i].batch(int(k[0]), slots[here])
            starts = self.sources[i].starts
            source[here], shard[here] = i, np.searchsorted(starts, line, side="right") - 1
            sample[here] = line - starts[shard[here]]
        return Refs(source, shard, sample, passes)

    def local(self, step: int, rank: int, world: int, batch_size: int, offset: int = 0) -> Refs:
        """As :meth:`Plan.local`; the batch has the size the plan was made for, and nothing was read in others."""
        if batch_size != self.size or offset:
            raise ValueError(f"the batches were composed of {self.size} samples, not {batch_size} after {offset}")
        return super().local(step, rank, world, batch_size)

    def describe(self) -> list[str]:
        """A line for each source: the plan and its counts."""
        shares = [f"{100 * s:.3g} % of the batches" for s in self.shares.tolist()]
        return [
            f"data.batches: source {s.name!r}{'' if len(self.sources) == 1 else f' ({share})'}: {p.describe()}"
            for s, p, share in zip(self.sources, self.parts, shares, strict=True)
        ]


def compose(base: Plan, data: Data, size: int, facts: Facts) -> Plan:
    """``base``, or its batches as ``data.batches`` composes them.

    Raises:
        ConfigError: a plan or setting that does not exist, a batch it cannot make, ``data.sampling`` of another kind,
            or a source with a selection.
        DataError: samples lack what the plan asks for.
    """
    if data.batches is None:
        return base
    factory, config = chosen_batches(data.batches)
    check_sampling(data)
    chosen = [i for i, s in enumerate(data.sources) if s.selection is not None]
    if chosen:
        raise ConfigError(
            f"data.sources.{chosen[0]}.selection: a batch plan ({data.batches.name}) arranges all samples of a source; "
            "leave out data.batches or the selection, or pack the selected samples into shards of their own"
        )
    parts = [factory(config, order, size, facts, i) for i, order in enumerate(base.sources)]
    return Composed(base, parts, size, f"{data.batches.name}\0{config.model_dump_json()}")


def check_sampling(data: Data) -> None:
    """Refuse a batch plan together with a sampling that draws with replacement or is a plan of its own.

    Raises:
        ConfigError: naming both.
    """
    name = data.sampling if isinstance(data.sampling, str) else data.sampling.name
    if data.batches is not None and name != "without_replacement":
        raise ConfigError(
            f"data.batches: {data.batches.name} composes epochs in which every sample has its place, so it cannot be "
            f"used with data.sampling: {name}; use without_replacement"
        )


def prepare(data: Data, size: int, seed: int) -> Composed:
    """Compose the batches of a recipe outside a loader: to describe them, and so that the files they are read from are
    written once, before the ranks look for them.

    Raises:
        ConfigError, DataError: as :func:`compose`.
    """
    assert data.batches is not None
    sets = open_sources(data)
    cache = None
    if not all(is_local(u) for s in sets for u in s.urls):
        cache = ShardCache.temporary(data.cache_gb, data.retries, Bounds.of(data))
    try:
        plan = compose(build_plan(data, sets, seed), data, size, ReadFacts(data, sets, cache))
    finally:
        if cache is not None:
            cache.remove()
    assert isinstance(plan, Composed)
    return plan
