"""Batches by a label of each sample: of one label, of one cluster, or of several samples from each of some groups.

What is kept: the samples sorted by label (8 bytes each) and where every label starts. An epoch permutes within each
label by arithmetic, so reaching any batch costs the batch and, once an epoch, a pass over the labels.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import Any

import numpy as np
from pydantic import Field

from dualenc.config import Positive, Section
from dualenc.data.batch import ABSENT
from dualenc.data.batches.arranged import (
    Arranged,
    Remainder,
    batch_plans,
    check_enough,
    group_starts,
    quantiles,
    remainder_field,
    within,
)
from dualenc.data.batches.facts import Facts
from dualenc.data.batches.mined_files import read_labels
from dualenc.data.order import Ints, SourceOrder, derive_key, permute
from dualenc.errors import ConfigError


class Grouped(Arranged):
    """Whole batches of one label; what is left of each label makes mixed batches, or waits.

    The epoch's line: the whole batches of label after label, then the remainders, label after label in a seeded order.
    """

    def __init__(self, config: Any, order: SourceOrder, size: int, facts: Facts, which: int, unit: int = 0) -> None:
        super().__init__(config, order, size, facts, which)
        labels = self.labels(facts)
        self._digest = hashlib.blake2b(np.ascontiguousarray(labels).tobytes(), digest_size=8).hexdigest()
        self.unit = unit or size
        self.members, self.names, self.starts = group_starts(labels)
        self.sizes = np.diff(self.starts)
        self.units = self.sizes // self.unit  # of each label: batches, or tuples
        self.left = self.sizes - self.units * self.unit
        self.unit_ends = np.cumsum(self.units)
        self.whole = int(self.unit_ends[-1]) * self.unit // size
        self.left_out = 0
        if config.remainder == "leave_out":
            check_enough(self.whole, f"{self.unit:,} samples of one {self.what()}", order, size)
            self.per_epoch = self.whole * size
            self.left_out = order.n - self.per_epoch
        self._left_orders: OrderedDict[int, tuple[Ints, Ints]] = OrderedDict()

    def labels(self, facts: Facts) -> Ints:
        """int64 [n]: the label of every sample."""
        raise NotImplementedError

    def what(self) -> str:
        """What the label is, in one word."""
        raise NotImplementedError

    def line(self, epoch: int, at: Ints) -> Ints:
        first = self.whole * self.size
        out = np.empty_like(at)
        main = at < first
        out[main] = self._whole(epoch, at[main])
        out[~main] = self._left(epoch, at[~main] - first)
        return out

    def _whole(self, epoch: int, at: Ints) -> Ints:
        unit, i = at // self.unit, at % self.unit
        group = np.searchsorted(self.unit_ends, unit, side="right")
        i = (unit - (self.unit_ends[group] - self.units[group])) * self.unit + i
        found: Ints = self.members[self.starts[group] + within(self.order.key, epoch, group, i, self.sizes)]
        return found

    def _left(self, epoch: int, at: Ints) -> Ints:
        """Samples of the line after the whole batches."""
        order, ends = self._left_order(epoch)
        slot = np.searchsorted(ends, at, side="right")
        group = order[slot]
        i = self.sizes[group] - (ends[slot] - at)
        found: Ints = self.members[self.starts[group] + within(self.order.key, epoch, group, i, self.sizes)]
        return found

    def _left_order(self, epoch: int) -> tuple[Ints, Ints]:
        if epoch not in self._left_orders:
            order = permute(derive_key(self.order.key, 5, epoch), len(self.left), np.arange(len(self.left)))
            self._left_orders[epoch] = (order, np.cumsum(self.left[order]))
            while len(self._left_orders) > 2:
                self._left_orders.popitem(last=False)
        return self._left_orders[epoch]

    def token(self) -> str:
        return self._digest

    def describe(self) -> str:
        mixed = -(-(self.per_epoch - self.whole * self.size) // self.size)
        out = f", {self.left_out:,} samples left out of each epoch, others each time" if self.left_out else ""
        none = int(self.sizes[self.names == ABSENT].sum())
        absent = f"; {none:,} samples have no {self.what()} and count as one" if none else ""
        return (
            f"{self.order.n:,} samples, {len(self.names):,} {self.what()}s of {quantiles(self.sizes)} samples "
            f"(smallest / median / largest); an epoch has {self.whole:,} batches of one {self.what()} and {mixed:,} "
            f"mixed ones{out}{absent}; {16 * len(self.sizes) + 8 * self.order.n:,} bytes a process"
        )


@batch_plans.register("by_value")
class ByValue(Grouped):
    """Every batch holds samples of one value: a domain, a language, a class (S14, S17).

    Keeps: every sample once an epoch, in mixed batches what is left of each value; one order on any number of ranks
    Paper: S14, Contrastive learning and mixture of experts; S17, CCP
    Needs: the values of samples, data.sources.N.values
    """

    class Config(Section):
        """Settings of by_value."""

        value: str = Field(description="name of a value in data.sources.N.values")
        remainder: Remainder = remainder_field()

    def labels(self, facts: Facts) -> Ints:
        return facts.values(self.which, self.config.value)

    def what(self) -> str:
        return str(self.config.value)


@batch_plans.register("clusters")
class Clusters(Grouped):
    """Every batch holds samples of one cluster: negatives are alike (MCL, S27).

    With several files, those of earlier stages first, the samples of a batch agree in all of them.

    Keeps: every sample once an epoch, in mixed batches what is left of each cluster; one order on any number of ranks
    Paper: MCL, Learning the Unlearned (S27)
    Needs: a file of clusters, dualenc mine clusters
    """

    class Config(Section):
        """Settings of clusters."""

        files: str | list[str] = Field(
            description="what dualenc mine clusters writes; several files: one for each stage"
        )
        remainder: Remainder = remainder_field()

    def labels(self, facts: Facts) -> Ints:
        files = [self.config.files] if isinstance(self.config.files, str) else self.config.files
        ids = facts.ids(self.which)
        stages = np.stack([read_labels(f, ids, self.order.name) for f in files])
        _, joint = np.unique(stages, axis=1, return_inverse=True)
        joint = joint.reshape(-1).astype(np.int64)
        joint[(stages == ABSENT).any(0)] = ABSENT
        return joint

    def what(self) -> str:
        return "cluster"


@batch_plans.register("groups")
class Groups(Grouped):
    """Every batch holds per_group samples of each of its groups, whose samples are positives of each other (S04).

    Groups are participants, speakers or drives; a batch has size / ``per_group`` of them. Each is cut into tuples of
    ``per_group``; a batch takes tuples that are far apart in the line of groups, so two of one group meet in a batch
    only if a group has more tuples than there are batches. Samples that fill no tuple make batches of their own, in
    which a group has what is left of it.

    Keeps: every sample once an epoch, what fills no tuple in batches of its own; one order on any number of ranks
    Paper: Large-scale training of foundation models for wearable biosignals (S04)
    Needs: the values of samples, data.sources.N.values
    """

    class Config(Section):
        """Settings of groups."""

        value: str = Field(description="name of a value in data.sources.N.values: participant, speaker, drive …")
        per_group: Positive = Field(default=2, description="samples of each group in a batch; divides batch.size")
        remainder: Remainder = remainder_field()

    def __init__(self, config: Any, order: SourceOrder, size: int, facts: Facts, which: int) -> None:
        if size % config.per_group:
            raise ConfigError(
                f"data.batches.per_group: {config.per_group} does not divide batch.size ({size}); use a divisor of it"
            )
        super().__init__(config, order, size, facts, which, unit=config.per_group)
        self._tuple_orders: OrderedDict[int, tuple[Ints, Ints]] = OrderedDict()

    def labels(self, facts: Facts) -> Ints:
        return facts.values(self.which, self.config.value)

    def what(self) -> str:
        return str(self.config.value)

    def _whole(self, epoch: int, at: Ints) -> Ints:
        each, batches = self.size // self.unit, self.whole
        batch, j = at // self.size, at % self.size
        return self._tuples(epoch, (j // self.unit) * batches + batch, j % self.unit, each * batches)

    def _tuples(self, epoch: int, number: Ints, i: Ints, used: int) -> Ints:
        """Sample ``i`` of tuple ``number`` on the epoch's line of tuples, of which the first ``used`` are dealt."""
        order, ends = self._tuple_order(epoch)
        slot = np.searchsorted(ends, number, side="right")
        group = order[slot]
        within_group = (number - (ends[slot] - self.units[group])) * self.unit + i
        found: Ints = self.members[self.starts[group] + within(self.order.key, epoch, group, within_group, self.sizes)]
        return found

    def _left(self, epoch: int, at: Ints) -> Ints:
        """After the tuples that were dealt: tuples too few for a batch, then what is left of each group."""
        dealt = self.whole * self.size // self.unit
        spare = (int(self.unit_ends[-1]) - dealt) * self.unit
        out = np.empty_like(at)
        first = at < spare
        out[first] = self._tuples(epoch, dealt + at[first] // self.unit, at[first] % self.unit, dealt)
        out[~first] = super()._left(epoch, at[~first] - spare)
        return out

    def _tuple_order(self, epoch: int) -> tuple[Ints, Ints]:
        if epoch not in self._tuple_orders:
            order = permute(derive_key(self.order.key, 6, epoch), len(self.units), np.arange(len(self.units)))
            self._tuple_orders[epoch] = (order, np.cumsum(self.units[order]))
            while len(self._tuple_orders) > 2:
                self._tuple_orders.popitem(last=False)
        return self._tuple_orders[epoch]

    def describe(self) -> str:
        each = self.size // self.unit
        out = f", {self.left_out:,} samples left out of each epoch, others each time" if self.left_out else ""
        mixed = -(-(self.per_epoch - self.whole * self.size) // self.size)
        many = int((self.units > max(self.whole, 1)).sum())
        twice = f"; {many:,} groups are so large that a batch holds them more than once" if many else ""
        return (
            f"{self.order.n:,} samples, {len(self.names):,} groups ({self.what()}) of {quantiles(self.sizes)} samples "
            f"(smallest / median / largest); an epoch has {self.whole:,} batches of {each:,} groups × {self.unit} and "
            f"{mixed:,} of what is left{out}{twice}; {16 * len(self.sizes) + 8 * self.order.n:,} bytes a process"
        )
