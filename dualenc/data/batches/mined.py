"""Batches of look-alikes, from the neighbours that ``dualenc mine neighbors`` finds in stored features.

An epoch is arranged greedily: samples are visited in a seeded order; one that is still free opens a bag, which takes
its nearest free neighbours, then theirs, until it is full. So every sample has one place, and later epochs meet other
neighbours. This is one pass over the samples (about 2 µs each for every neighbour that is looked at) in each process
that reads, when it first needs the epoch: at the start, after a resume, and once an epoch. Two epochs are kept: 16
bytes a sample, and 4 · K for the neighbours.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Annotated, Any

import numpy as np
from pydantic import Field, field_validator

from dualenc.config import Positive, Section
from dualenc.data.batches.arranged import Arranged, batch_plans
from dualenc.data.batches.facts import Facts
from dualenc.data.batches.mined_files import digest_of_array, read_neighbors
from dualenc.data.order import Ints, SourceOrder, derive_key, permute
from dualenc.errors import ConfigError

Epoch = Annotated[int, Field(ge=0)]


class Mined(Arranged):
    """An epoch of bags of neighbours, full ones first, in a seeded order."""

    def __init__(self, config: Any, order: SourceOrder, size: int, facts: Facts, which: int) -> None:
        super().__init__(config, order, size, facts, which)
        files = config.files if isinstance(config.files, dict) else {order.name: config.files}
        if order.name not in files:
            raise ConfigError(
                f"data.batches.files: source {order.name!r} has no file of neighbours; "
                f"write files: {{{order.name}: FILE}}"
            )
        self.neighbors = read_neighbors(files[order.name], facts.ids(which), order.name)
        self._epochs: OrderedDict[int, tuple[Ints, int]] = OrderedDict()

    def bag(self, epoch: int) -> int:
        """Samples of a bag in an epoch."""
        raise NotImplementedError

    def line(self, epoch: int, at: Ints) -> Ints:
        return self._arranged(epoch)[0][at]

    def whole_in(self, epoch: int) -> int:
        return self._arranged(epoch)[1] // self.size

    def token(self) -> str:
        return digest_of_array(self.neighbors)

    def _arranged(self, epoch: int) -> tuple[Ints, int]:
        """The epoch's line, and how many of its samples are in full bags."""
        if epoch not in self._epochs:
            key = derive_key(self.order.key, 7, epoch)
            self._epochs[epoch] = bags_in_order(self.neighbors, self.bag(epoch), key)
            while len(self._epochs) > 2:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]

    def describe(self) -> str:
        bag, n = self.bag(0), self.order.n
        full = self._arranged(0)[1]
        alone = int((self.neighbors < 0).all(1).sum())
        none = f"; {alone:,} samples have no neighbour" if alone else ""
        return (
            f"{n:,} samples of {self.neighbors.shape[1]} neighbours each, bags of {bag:,} in batches of {self.size:,}; "
            f"in epoch 0 {100 * full / n:.1f} % of the samples are in full bags{none}; "
            f"{(4 * self.neighbors.shape[1] + 16) * n:,} bytes a process"
        )


def bags_in_order(neighbors: Any, bag: int, key: int) -> tuple[Ints, int]:
    """Samples in bags of neighbours: int64 [n], and how many of the first of them are in full bags.

    Args:
        neighbors: int32 [n, K], nearest first, −1 for none.
        bag: samples of a bag.
        key: of the order in which samples open bags and in which bags follow each other.
    """
    n = len(neighbors)
    free = bytearray(b"\1" * n)
    full: list[list[int]] = []
    short: list[int] = []
    for seed in permute(key, n, np.arange(n)).tolist():
        if not free[seed]:
            continue
        free[seed] = 0
        members = [seed]
        for one in members:  # grows while it is read: neighbours first, then theirs
            for other in neighbors[one].tolist():
                if len(members) == bag:
                    break
                if other >= 0 and free[other]:
                    free[other] = 0
                    members.append(other)
            if len(members) == bag:
                break
        if len(members) == bag:
            full.append(members)
        else:
            short += members
    bags = np.array(full, np.int64).reshape(-1, bag)
    shuffled = permute(derive_key(key, 1), len(bags), np.arange(len(bags)))
    return np.concatenate([bags[shuffled].reshape(-1), np.array(short, np.int64)]), bags.size


@batch_plans.register("hard_negatives")
class HardNegatives(Mined):
    """Every batch is neighbours, and neighbours of these: the global hard negatives of a feature store.

    Keeps: every sample once an epoch; one order on any number of ranks
    Paper: none; what sentence-transformers and GritLM mine for each query, for batches
    Needs: a file of neighbours, dualenc mine neighbors
    """

    class Config(Section):
        """Settings of hard_negatives."""

        files: str | dict[str, str] = Field(
            description="the file that dualenc mine neighbors writes; {SOURCE: FILE} for several sources"
        )

    def bag(self, epoch: int) -> int:
        return self.size


@batch_plans.register("bags")
class GrowingBags(Mined):
    """Batches of hard bags whose size grows with the epochs: BagCurri (S05).

    Keeps: every sample once an epoch; one order on any number of ranks
    Paper: No Detail Left Behind (S05)
    Needs: a file of neighbours, dualenc mine neighbors
    """

    class Config(Section):
        """Settings of bags."""

        files: str | dict[str, str] = Field(
            description="the file that dualenc mine neighbors writes; {SOURCE: FILE} for several sources"
        )
        sizes: dict[Epoch, Positive] = Field(
            default={0: 2, 1: 4, 2: 8},
            description="epoch → size of the bags from that epoch on, a divisor of batch.size; 1: a random order",
        )

        @field_validator("sizes")
        @classmethod
        def _from_zero(cls, sizes: dict[int, int]) -> dict[int, int]:
            if 0 not in sizes:
                raise ValueError("the first size must be that of epoch 0, for example {0: 2, 2: 4}")
            return dict(sorted(sizes.items()))

    def __init__(self, config: Any, order: SourceOrder, size: int, facts: Facts, which: int) -> None:
        for epoch, bag in config.sizes.items():
            if size % bag:
                raise ConfigError(
                    f"data.batches.sizes: {bag} (from epoch {epoch}) does not divide batch.size ({size}); use a divisor"
                )
        super().__init__(config, order, size, facts, which)

    def bag(self, epoch: int) -> int:
        return int([b for e, b in self.config.sizes.items() if e <= epoch][-1])

    def describe(self) -> str:
        later = [f"{b:,} from epoch {e}" for e, b in self.config.sizes.items() if e]
        return super().describe() + (f"; bags of {', '.join(later)}" if later else "")
