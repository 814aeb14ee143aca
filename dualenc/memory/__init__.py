"""What outlives a step: queues of keys, numbers for each sample, slow copies of towers, networks that make views,
tensors that all ranks share.

A loss names what it remembers (``Loss.memory``, ``Loss.slow``, ``Loss.views``); training builds it, commits it after
every optimizer step, and saves it with every checkpoint (``dualenc.train.memory``).
"""

from dualenc.memory.class_matrix import ClassMatrix
from dualenc.memory.slow import SlowModel, SlowTowers
from dualenc.memory.state import KeyQueue, LossState, Replicated, RunShape, SampleBuffer
from dualenc.memory.views import LearnedView, ViewMaker

__all__ = [
    "ClassMatrix",
    "KeyQueue",
    "LearnedView",
    "LossState",
    "Replicated",
    "RunShape",
    "SampleBuffer",
    "SlowModel",
    "SlowTowers",
    "ViewMaker",
]
