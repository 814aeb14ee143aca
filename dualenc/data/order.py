"""Which sample is at which position of the global stream: a pure function of (counts, seed, recipe).

Nothing here depends on ranks, workers or files, and nothing is replayed: the sample at a position is computed from its
number, so resuming means starting at another number. All randomness is 64-bit integer arithmetic written out below
(SplitMix64 and a Feistel network over it), not a library's generator: the order is the same on every machine and for
every version of numpy and Python.

**One source, without replacement.** In a source of n samples, position q is place ``p = q % n`` of epoch ``q // n``.
The epoch permutes the shards, lays their samples end to end, and cuts that line into ``lanes`` parts that differ by at
most one sample; place p belongs to lane ``p % lanes``. Inside a lane, runs of ``window`` samples are permuted. All
three maps are bijections, so an epoch holds every sample exactly once whatever the shards' sizes are.

**With replacement.** Position q draws one of the n samples from the counter (seed, source, q).

**Mixtures.** The stream is cut into blocks; a block holds each source's share of positions (rounded so that errors
never accumulate) in a seeded order. A source's own order does not depend on the other sources.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dualenc.errors import ConfigError, DataError

Ints = NDArray[np.int64]
Words = NDArray[np.uint64]
Counts = Sequence[int] | Ints
"""Samples of each shard; a million of them are better an array."""

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_ROUNDS = 8
_BLOCK = 1024
_BLOCK_MAX = 1 << 20


# --- fixed arithmetic --------------------------------------------------------------------------------------------


def mix64(x: Words) -> Words:
    """SplitMix64's finalizer (Steele et al., 2014), element by element, modulo 2^64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def derive_key(*parts: int) -> int:
    """Fold integers into one 64-bit key; order matters."""
    key = 0
    for part in parts:
        key = (key * _GOLDEN + part + _GOLDEN) & _MASK
        key = int(mix64(np.array([key], np.uint64))[0])
    return key


def name_key(name: str) -> int:
    """A 64-bit number for a name, the same in every process (Python's ``hash`` is not)."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def hashed(key: int, counters: Ints) -> Words:
    """Independent 64-bit words for the counters of one key."""
    return mix64(mix64(counters.astype(np.uint64) * np.uint64(_GOLDEN) + np.uint64(key)) ^ np.uint64(key))


def permute(key: int, size: int, index: Ints) -> Ints:
    """Apply the key's pseudo-random permutation of ``range(size)`` to every index, without storing it.

    A Feistel network on the next power of two; values that fall outside the range are mapped again ("cycle walking",
    Black and Rogaway 2002), which keeps it a bijection of the range. Costs O(len(index)).
    """
    if size <= 1:
        return np.zeros_like(index)
    bits = (size - 1).bit_length()
    low = np.uint64(bits // 2)
    high_mask, low_mask = np.uint64((1 << (bits - bits // 2)) - 1), np.uint64((1 << (bits // 2)) - 1)
    keys = hashed(key, np.arange(2 * _ROUNDS))
    out = index.astype(np.uint64)
    todo = np.arange(len(out))
    while len(todo):
        x = out[todo]
        left, right = x >> low, x & low_mask
        for i in range(_ROUNDS):
            left = left ^ (mix64(right + keys[2 * i]) & high_mask)
            right = right ^ (mix64(left + keys[2 * i + 1]) & low_mask)
        x = (left << low) | right
        out[todo] = x
        todo = todo[x >= size]
    return out.astype(np.int64)


# --- one source --------------------------------------------------------------------------------------------------


class SourceOrder:
    """The order of one source's samples. ``counts[i]`` is the number of samples in shard i."""

    def __init__(self, name: str, counts: Counts, seed: int, sampling: str, lanes: int, window: int) -> None:
        self.name = name
        self.counts = np.asarray(counts, np.int64)
        self.n = int(self.counts.sum())
        if self.n == 0 or bool((self.counts <= 0).any()):
            raise DataError(f"Source {name!r} has a shard without samples: rebuild its index or leave the shard out.")
        self.key = derive_key(seed, name_key(name))
        self.replace = sampling == "with_replacement"
        self.lanes = min(lanes, self.n)
        self.window = window
        self.starts: Ints = np.concatenate([[0], np.cumsum(self.counts)[:-1]])
        self._shards: OrderedDict[int, tuple[Ints, Ints]] = OrderedDict()

    def at(self, q: Ints) -> tuple[Ints, Ints, Ints]:
        """Shard, sample in shard, and epoch of the source's positions ``q``.

        With replacement the epoch is the position itself, so that a sample drawn twice is augmented differently.
        """
        if self.replace:
            uniform = (hashed(self.key, q) >> np.uint64(11)).astype(np.float64) * 2.0**-53
            line = np.minimum((uniform * self.n).astype(np.int64), self.n - 1)
            ends = np.cumsum(self.counts)
            shard = np.searchsorted(ends, line, side="right")
            return shard, line - (ends[shard] - self.counts[shard]), q
        passes = q // self.n
        shard, sample = np.empty_like(q), np.empty_like(q)
        for one in np.unique(passes):
            here = passes == one
            line = self._place(int(one), q[here] - one * self.n, self.n)
            order, ends = self._shard_order(int(one))
            slot = np.searchsorted(ends, line, side="right")
            shard[here] = order[slot]
            sample[here] = line - (ends[slot] - self.counts[order[slot]])
        return shard, sample, passes

    def fingerprint(self) -> bytes:
        """What the order depends on besides the plan's settings."""
        return self.name.encode() + b"\0" + self.counts.astype("<i8").tobytes()

    def _place(self, one: int, p: Ints, n: int) -> Ints:
        """Where place ``p`` of an epoch of ``n`` samples is on the epoch's line of samples."""
        lane, i = p % self.lanes, p // self.lanes
        small, more = divmod(n, self.lanes)
        start = lane * small + np.minimum(lane, more)
        length = small + (lane < more)
        window = i // self.window
        out = np.empty_like(p)
        group = lane * (n // self.window + 2) + window
        for g in np.unique(group):
            here = group == g
            first = int(window[here][0]) * self.window
            size = min(self.window, int(length[here][0]) - first)
            key = derive_key(self.key, 1, one, int(lane[here][0]), int(window[here][0]))
            out[here] = start[here] + first + permute(key, size, i[here] - first)
        return out

    def _shard_order(self, one: int) -> tuple[Ints, Ints]:
        """The epoch's permutation of shards and where each ends on the line."""
        if one not in self._shards:
            index = np.arange(len(self.counts))
            order = permute(derive_key(self.key, 2, one), len(self.counts), index)
            self._shards[one] = (order, np.cumsum(self.counts[order]))
            while len(self._shards) > 4:
                self._shards.popitem(last=False)
        return self._shards[one]


# --- all sources -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Refs:
    """Samples by number, as arrays of equal length: ``source``, ``shard``, ``sample`` (in its shard), ``passes``."""

    source: Ints
    shard: Ints
    sample: Ints
    passes: Ints

    def __len__(self) -> int:
        return len(self.source)


class Plan:
    """The whole order. Built from shard counts only (``dualenc.data.shards.index.build_plan`` reads them from indexes).

    Args:
        names: the sources' names; a source's order depends on its name and the seed, not on its place in the list.
        counts: for each source, the samples of each shard, in the order of its shard list.
        seed: any integer.
        weights: relative shares of samples among the sources; default: equal.
        sampling, lanes, window: as in the recipe's ``data`` section.

    Raises:
        ConfigError: if a source's share is less than one sample per block.
        DataError: if a source or a shard has no samples.
    """

    def __init__(
        self,
        names: Sequence[str],
        counts: Sequence[Counts],
        seed: int,
        weights: Sequence[float] | None = None,
        sampling: Literal["without_replacement", "with_replacement"] = "without_replacement",
        lanes: int = 1,
        window: int = 1_000_000,
    ) -> None:
        self.names = list(names)
        self.sources = [
            SourceOrder(n, c, seed, sampling, lanes, window) for n, c in zip(self.names, counts, strict=True)
        ]
        shares = np.asarray(weights if weights is not None else [1.0] * len(self.names), np.float64)
        self.shares = shares / shares.sum()
        self.key = derive_key(seed, name_key("mixture"))
        self._settings = (seed, sampling, lanes, window, [float(s).hex() for s in self.shares])
        self._beside: list[str] = []
        smallest = int(np.argmin(self.shares))
        self.block = _BLOCK
        while self.block * self.shares[smallest] < 1:
            self.block *= 2
            if self.block > _BLOCK_MAX:
                raise ConfigError(
                    f"data.sources: the weight of {self.names[smallest]!r} is less than one sample in {_BLOCK_MAX:,}; "
                    "raise it or leave the source out."
                )
        # Shares as 32-bit fractions whose last bound is exactly one: apportionment is then integer arithmetic.
        self._bounds = [round(b * 2**32) for b in np.cumsum(self.shares)[:-1]] + [2**32]
        self._blocks: OrderedDict[int, tuple[Ints, Ints]] = OrderedDict()

    def _take_over(self, other: Plan) -> None:
        """Become the order that ``other`` is: for plans that are built on another one."""
        self.names, self.sources, self.shares, self.key = other.names, other.sources, other.shares, other.key
        self._settings, self.block, self._bounds = other._settings, other.block, other._bounds
        self._beside = list(other._beside)
        self._blocks = OrderedDict()

    def depend_on(self, what: str) -> None:
        """Let the digest depend on something else that samples are made of, such as values beside the shards."""
        self._beside.append(what)

    def reorder(self, source: int, order: SourceOrder) -> None:
        """Take the source's samples in another order: that of a selection."""
        self.sources[source] = order

    @property
    def total(self) -> int:
        """Samples in all sources together; of a source with a selection, those of an epoch."""
        return sum(s.n for s in self.sources)

    @property
    def samples_per_pass(self) -> int:
        """Positions of one epoch: the samples of all sources. (In a mixture, each source has epochs of its own.)"""
        return self.total

    @property
    def sizes(self) -> dict[str, int]:
        """Source name → samples in one epoch of it."""
        return {s.name: s.n for s in self.sources}

    def digest(self) -> str:
        """A fingerprint of everything the order depends on; two plans with the same digest give the same stream."""
        h = hashlib.blake2b(repr(self._settings).encode(), digest_size=16)
        for s in self.sources:
            h.update(s.fingerprint())
        for what in self._beside:
            h.update(b"\0" + what.encode())
        return h.hexdigest()

    def at(self, positions: Sequence[int] | Ints) -> Refs:
        """The samples at global positions (``step · N + slot``, non-negative), in the order of ``positions``."""
        P = np.asarray(positions, np.int64)
        if len(P) and int(P.min()) < 0:
            raise ValueError(f"positions start at 0, got {int(P.min())}")
        source, q = (np.zeros_like(P), P) if len(self.sources) == 1 else self._apportion(P)
        shard, sample, passes = np.empty_like(P), np.empty_like(P), np.empty_like(P)
        for i in np.unique(source):
            here = source == i
            shard[here], sample[here], passes[here] = self.sources[i].at(q[here])
        return Refs(source, shard, sample, passes)

    def local(self, step: int, rank: int, world: int, batch_size: int, offset: int = 0) -> Refs:
        """The samples of one rank: the slots j of step ``step`` with ``j % world == rank``; batch_size is global.

        Args:
            offset: positions before step 0, read in batches of another size.
        """
        if batch_size % world:
            raise ConfigError(f"batch.size ({batch_size}) must be a multiple of the {world} ranks.")
        return self.at(offset + step * batch_size + np.arange(rank, batch_size, world, dtype=np.int64))

    def _apportion(self, P: Ints) -> tuple[Ints, Ints]:
        """Source and position within the source of every global position."""
        source, q = np.empty_like(P), np.empty_like(P)
        blocks = P // self.block
        for b in np.unique(blocks):
            here = blocks == b
            of, at = self._block(int(b))
            j = P[here] - b * self.block
            source[here], q[here] = of[j], at[j]
        return source, q

    def _block(self, b: int) -> tuple[Ints, Ints]:
        if b not in self._blocks:
            before, after = self._given(b * self.block), self._given((b + 1) * self.block)
            ends = np.cumsum(after - before)
            place = permute(derive_key(self.key, b), self.block, np.arange(self.block))
            of = np.searchsorted(ends, place, side="right")
            at = np.empty_like(of)
            for i in range(len(self.sources)):
                mine = of == i
                at[mine] = before[i] + np.arange(int(mine.sum()))
            self._blocks[b] = (of, at)
            while len(self._blocks) > 8:
                self._blocks.popitem(last=False)
        return self._blocks[b]

    def _given(self, position: int) -> Ints:
        """How many of the first ``position`` places each source has; Python integers, as the product exceeds 2^63."""
        ends = [(position * b) >> 32 for b in self._bounds]
        return np.array([b - a for a, b in zip([0, *ends], ends, strict=False)], np.int64)
