"""Batch plans: which samples meet in a batch (``data.batches``); see :mod:`dualenc.data.batches.composed`."""

from dualenc.data.batches import by_source as by_source
from dualenc.data.batches import grouped as grouped
from dualenc.data.batches import mined as mined
from dualenc.data.batches.arranged import Arranged, BatchPlan, batch_plans, chosen_batches
from dualenc.data.batches.composed import Composed, compose, prepare
from dualenc.data.batches.facts import Facts, ReadFacts

__all__ = [
    "Arranged",
    "BatchPlan",
    "Composed",
    "Facts",
    "ReadFacts",
    "batch_plans",
    "chosen_batches",
    "compose",
    "prepare",
]
