"""The order of one source when a selection says which of its samples are seen, and how often.

**What a weight means.** Weights are held in units of 2^-24. A sample of weight w is seen floor(w) times in every epoch,
plus further copies whose expected number is exactly the rest, w − floor(w); so w is the expected number of copies per
epoch. With W the sum of all weights, the first e epochs together hold floor(e · W + phase) positions, where the phase
in [0, 1) comes from the seed: an epoch has floor(W) or ceil(W) positions, and where it begins is one multiplication.

**Which copies.** The rests of all samples, laid end to end in stored order, make a line of length F. An epoch with
M further copies cuts it into M equal parts and draws one point in each, from the counter (seed, source, epoch, part);
the sample under the point is seen once more. A sample with a rest may so be drawn by two neighbouring parts in one
epoch (three, if the parts are shorter than the rests), and neighbours in a shard tend not to be drawn together; any two
samples further apart are drawn independently of each other.

**The order.** As without a selection: the epoch permutes the shards, lays the copies drawn of each end to end, and
permutes runs of ``window`` copies in each lane. A selection of every sample at weight 1 changes nothing. Everything is
looked up by bisection in at most three arrays of one integer a selected sample, so any position is reached directly.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dualenc.data.order import Ints, SourceOrder, derive_key, hashed, permute
from dualenc.errors import DataError

ONE = 1 << 24
"""Units of a weight of 1."""
MAX_WEIGHT = 1e6
COPY = 1_000_003
"""What the c-th further copy of a sample adds c times to the number of its epoch, so that every copy of an epoch is
augmented differently; prime, so that copies also take turns among a few stored views."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """Rows of a selection, by shard and then by sample: ``shard``, ``sample`` (in its shard) and ``weight``, all [n];
    weights are positive, and no sample stands there twice. ``name`` is for messages."""

    name: str
    shard: Ints
    sample: Ints
    weight: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.shard)

    def told(self, total: int) -> str:
        """One line for people; ``total``: samples of the shards."""
        low, high, all_of = float(self.weight.min()), float(self.weight.max()), float(self.weight.sum())
        weights = f"weight {low:g}" if low == high else f"weights {low:.4g} to {high:.4g}"
        return f"selection {self.name}: {len(self):,} of {total:,} samples, {weights}, {all_of:,.1f} per epoch"


@dataclass(frozen=True, slots=True)
class _Epoch:
    """One epoch: ``order`` of the shards, where each ``ends`` on the line of copies, the ``copies`` of each shard, and
    the number of its ``first`` drawn point. All by shard, ``ends`` by place in the order."""

    order: Ints
    ends: Ints
    copies: Ints
    first: Ints
    drawn: int


class SelectedOrder(SourceOrder):
    """The order of a source's selected samples; the counterpart of ``SourceOrder``.

    Raises:
        DataError: no sample is selected, or the weights sum to less than 1.
    """

    def __init__(self, name: str, chosen: Chosen, seed: int, replace: bool, lanes: int, window: int) -> None:
        if not len(chosen):
            raise DataError(f"Source {name!r}: the selection {chosen.name} selects no sample of its shards.")
        self.shard_ids, counts = np.unique(chosen.shard, return_counts=True)
        sampling = "with_replacement" if replace else "without_replacement"
        super().__init__(name, counts.tolist(), seed, sampling, lanes, window)
        units = np.maximum(1, np.rint(chosen.weight * ONE)).astype(np.int64)
        self.length = int(units.sum())
        if self.length < ONE:
            raise DataError(
                f"Source {name!r}: the weights of the selection {chosen.name} sum to {self.length / ONE:.3g}; they "
                "must sum to at least 1, the samples of an epoch."
            )
        self.n = (self.length + ONE // 2) // ONE
        self.lanes = min(lanes, self.length // ONE)
        self.sample = chosen.sample
        self._row_end = np.cumsum(self.counts)
        whole, part = units // ONE, units % ONE
        self._whole_end = None if bool((whole == 1).all()) else np.cumsum(whole)
        self._part_end = np.cumsum(part) if part.any() else None
        ends = self._row_end - 1
        self._whole_of_shard = np.diff(self._whole_before(self._row_end), prepend=0)
        self._part_before = np.zeros(1, np.int64) if self._part_end is None else self._part_end[ends]
        self._whole = int(self._whole_of_shard.sum())
        self._phase = derive_key(self.key, 3) % ONE
        self._unit_end = np.cumsum(units) if replace else None
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._digest = hashlib.blake2b(chosen.sample.astype("<i8").tobytes() + units.astype("<i8").tobytes()).digest()
        self._digest += self.shard_ids.astype("<i8").tobytes()

    def fingerprint(self) -> bytes:
        """What the order depends on besides the plan's settings."""
        return super().fingerprint() + b"selected" + self._digest

    def in_shard(self, shard: int) -> Ints:
        """The selected samples of a shard."""
        i = int(np.searchsorted(self.shard_ids, shard))
        return self.sample[int(self._row_end[i] - self.counts[i]) : int(self._row_end[i])]

    def at(self, q: Ints) -> tuple[Ints, Ints, Ints]:
        """Shard, sample in shard, and epoch (plus COPY for each further copy) of the source's positions ``q``."""
        if self._unit_end is not None:
            uniform = (hashed(self.key, q) >> np.uint64(11)).astype(np.float64) * 2.0**-53
            point = np.minimum((uniform * self.length).astype(np.int64), self.length - 1)
            return *self._place_of(np.searchsorted(self._unit_end, point, side="right")), q
        shard, sample, passes = np.empty_like(q), np.empty_like(q), np.empty_like(q)
        for one in self._epochs_of(q):
            begin, end = self._start(one), self._start(one + 1)
            here = (q >= begin) & (q < end)
            line = self._place(one, q[here] - begin, end - begin)
            row, copy = self._row(self._epoch(one, end - begin), one, line)
            shard[here], sample[here] = self._place_of(row)
            passes[here] = one + COPY * copy
        return shard, sample, passes

    # --- epochs: Python integers, as the products exceed 2^63 -------------------------------------------------------

    def _start(self, one: int) -> int:
        """The first position of an epoch."""
        return (one * self.length + self._phase) // ONE

    def _epochs_of(self, q: Ints) -> list[int]:
        """The epochs that these positions are in."""
        if not len(q):
            return []
        first, last = (((int(x) + 1) * ONE - self._phase - 1) // self.length for x in (q.min(), q.max()))
        if last - first <= len(q):
            return list(range(first, last + 1))
        return sorted({((x + 1) * ONE - self._phase - 1) // self.length for x in q.tolist()})

    def _epoch(self, one: int, size: int) -> _Epoch:
        if one not in self._epochs:
            order = permute(derive_key(self.key, 2, one), len(self.counts), np.arange(len(self.counts)))
            drawn = size - self._whole
            before = self._points_before(one, drawn, self._part_before) if drawn else np.zeros_like(self.counts)
            further = np.diff(before, prepend=0)
            copies = self._whole_of_shard + further
            self._epochs[one] = _Epoch(order, np.cumsum(copies[order]), copies, before - further, drawn)
            while len(self._epochs) > 4:
                self._epochs.popitem(last=False)
        return self._epochs[one]

    # --- one copy -------------------------------------------------------------------------------------------------

    def _row(self, epoch: _Epoch, one: int, line: Ints) -> tuple[Ints, Ints]:
        """The selected row and the number of its copy at places of an epoch's line."""
        slot = np.searchsorted(epoch.ends, line, side="right")
        shard = epoch.order[slot]
        j = line - (epoch.ends[slot] - epoch.copies[shard])
        begin = np.cumsum(self._whole_of_shard) - self._whole_of_shard
        further = j >= self._whole_of_shard[shard]
        row, copy = np.empty_like(line), np.zeros_like(line)
        at = (begin[shard] + j)[~further]
        row[~further] = at if self._whole_end is None else np.searchsorted(self._whole_end, at, side="right")
        copy[~further] = at - self._whole_before(row[~further])
        if self._part_end is not None and further.any():
            k = (epoch.first[shard] + j - self._whole_of_shard[shard])[further]
            hit = np.searchsorted(self._part_end, self._point(one, epoch.drawn, k), side="right")
            row[further] = hit
            before = np.where(hit > 0, self._part_end[hit - 1], 0)
            whole = self._whole_before(hit + 1) - self._whole_before(hit)
            copy[further] = whole + k - self._part_of(epoch.drawn, before)
        return row, copy

    def _place_of(self, row: Ints) -> tuple[Ints, Ints]:
        return self.shard_ids[np.searchsorted(self._row_end, row, side="right")], self.sample[row]

    def _whole_before(self, row: Ints) -> Ints:
        """Whole copies of all rows before ``row``."""
        if self._whole_end is None:
            return row
        return np.where(row > 0, self._whole_end[row - 1], 0)

    # --- the line of rests: part k of M is [k F / M, (k + 1) F / M), rounded down ------------------------------------

    def _begin(self, drawn: int, k: Ints) -> Ints:
        """Where part k begins."""
        width, more = divmod(int(self._part_before[-1]), drawn)
        return k * width + k * more // drawn

    def _point(self, one: int, drawn: int, k: Ints) -> Ints:
        """The point drawn in part k."""
        begin = self._begin(drawn, k)
        width = (self._begin(drawn, k + 1) - begin).astype(np.uint64)
        return begin + (hashed(derive_key(self.key, 4, one), k) % width).astype(np.int64)

    def _part_of(self, drawn: int, x: Ints) -> Ints:
        """The part that a place of the line is in."""
        guess = (x.astype(np.float64) * (drawn / float(self._part_before[-1]))).astype(np.int64)
        k = np.clip(guess, 0, drawn - 1)
        k -= self._begin(drawn, k) > x
        k += (self._begin(drawn, k + 1) <= x) & (k < drawn - 1)
        return k

    def _points_before(self, one: int, drawn: int, x: Ints) -> Ints:
        """How many points of an epoch are before places of the line."""
        k = self._part_of(drawn, x)
        return k + (self._point(one, drawn, k) < x)
