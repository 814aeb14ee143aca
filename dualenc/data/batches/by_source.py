"""Homogeneous batches of sources: the shares of a mixture are kept by whole batches."""

from __future__ import annotations

from dualenc.data.batches.arranged import BatchPlan, batch_plans
from dualenc.data.order import Ints


@batch_plans.register("by_source")
class BySource(BatchPlan):
    """Every batch is of one source, whose own order it follows; no array is kept.

    Keeps: every sample once an epoch; one order on any number of ranks
    Paper: none
    Needs: nothing
    """

    scattered = False

    def batch(self, k: int, slots: Ints) -> tuple[Ints, Ints]:
        shard, sample, passes = self.order.at(k * self.size + slots)
        return self.order.starts[shard] + sample, passes

    def describe(self) -> str:
        return f"{self.order.n:,} samples in batches of {self.size:,} of this source alone"
