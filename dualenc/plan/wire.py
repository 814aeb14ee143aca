"""Bytes that a rank sends in a step, with ring collectives: N bytes gathered or scattered cost (W − 1)/W · N."""

from __future__ import annotations

from dataclasses import dataclass

from dualenc.config import Recipe
from dualenc.plan.engine_memory import DDP, FP32, FSDP2, LIVE, ONE, ZERO, EngineKind
from dualenc.plan.weights import Weights


@dataclass(frozen=True, slots=True)
class Wire:
    """Bytes sent by a rank in a step.

    Attributes:
        gradients: all-reduce, or reduce-scatter where the engine shards them.
        parameters: all-gathers of weights.
        features: all-gather of features and reduce-scatter of their gradients.
    """

    gradients: float
    parameters: float
    features: float

    @property
    def total(self) -> float:
        """Their sum."""
        return self.gradients + self.parameters + self.features


def wire(kind: EngineKind, weights: Weights, recipe: Recipe, ranks: int, chunks: int) -> Wire:
    """What a rank sends.

    Args:
        chunks: micro-batches of a step; more than one are encoded twice (GradCache).
    """
    if kind is ONE or ranks == 1:
        return Wire(0, 0, 0)
    part = (ranks - 1) / ranks
    T, everything = FP32 * weights.trained, FP32 * weights.total
    sides = len({m for pair in recipe.pairs for m in pair})
    features = 2 * part * FP32 * recipe.batch.size * recipe.embed_dim * sides
    passes = 1 if chunks == 1 else 2 * chunks
    if kind in (DDP, ZERO[0]):
        return Wire(2 * part * T, 0, features)
    if kind is FSDP2:
        # Each pass gathers everything; the backward gathers the blocks again, the rest is still there.
        blocks = FP32 * sum(leaf.elements for unit in weights.units[:-1] for leaf in unit)
        backward = 1 if chunks == 1 else chunks
        shard = recipe.engine.shard_size or ranks
        within, copies = (shard - 1) / shard, ranks // shard
        # HSDP: reduced within a group, and each part of the sum among the groups; weights come from the group alone.
        reduced = within * T + 2 * (copies - 1) / copies * T / shard
        return Wire(reduced, within * (passes * everything + backward * blocks), features)
    stage = ZERO.index(kind)
    reduced = chunks if stage > 1 else 1  # ZeRO 2 and 3 reduce every micro-batch
    if stage < 3:
        return Wire(part * T * reduced, part * T, features)
    backward = chunks if weights.total > LIVE else 0  # a smaller model stays gathered until its backward
    return Wire(part * T * reduced, part * everything * (passes + backward), features)
