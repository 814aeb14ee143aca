"""What each engine holds on a rank besides activations, in bytes, as its code allocates it.

All weights are fp32, also under bf16 (autocast over fp32 weights, see dualenc/engine), so no engine keeps a second,
wider copy but DeepSpeed, whose ZeRO 1–3 clone this rank's part of the weights whatever their dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dualenc.config import EngineConfig, Optim
from dualenc.engine.optim import moments
from dualenc.plan.weights import Leaf, Weights

F64 = npt.NDArray[np.float64]
FP32 = 4

REDUCE_BUCKET = 500_000_000
"""Elements of the buffer that ZeRO 1–3 copy gradients into before they are reduced: DeepSpeed's default."""
LIVE = 1_000_000_000
"""Elements that ZeRO 3 keeps gathered between forward and backward (stage3_max_live_parameters, …_reuse_distance)."""
PREFETCH = 50_000_000
"""Elements that ZeRO 3 gathers ahead."""


@dataclass(frozen=True, slots=True)
class EngineKind:
    """One way to run the step.

    Attributes:
        name: as tables call it.
        keys: what a recipe says for it.
        sharded: whether it is only of use on several ranks.
    """

    name: str
    keys: tuple[str, ...]
    sharded: bool = True

    def fits(self, config: EngineConfig) -> bool:
        """Whether a recipe already asks for it."""
        said = dict(k.removeprefix("engine.").split("=") for k in self.keys)
        return all(str(getattr(config, key)) == value for key, value in said.items())


ONE = EngineKind("one process", ("engine.kind=accelerate", "engine.parallel=auto"), sharded=False)
DDP = EngineKind("DDP", ("engine.kind=accelerate", "engine.parallel=ddp"))
FSDP2 = EngineKind("FSDP2", ("engine.kind=accelerate", "engine.parallel=fsdp2"))
ZERO = tuple(
    EngineKind(f"ZeRO {s}", ("engine.kind=deepspeed", "engine.parallel=auto", f"engine.zero_stage={s}"))
    for s in range(4)
)
KINDS = (ONE, DDP, FSDP2, *ZERO)


@dataclass(frozen=True, slots=True)
class Holding:
    """Bytes on one rank.

    Attributes:
        parameters: weights and buffers, as they are kept between steps.
        optimizer: moments, and copies of the weights that the optimizer works on.
        average: of the weights, if the recipe keeps one.
        working: buffers and gathered weights while the model runs.
        gradients: elements whose gradient is complete → bytes held for them.
        stepping: gradients and scratch memory while the optimizer steps.
    """

    parameters: float
    optimizer: float
    average: float
    working: float
    gradients: Callable[[F64], F64]
    stepping: float

    @property
    def kept(self) -> float:
        """What is always there."""
        return self.parameters + self.optimizer + self.average


def holding(
    kind: EngineKind, weights: Weights, optim: Optim, ranks: int, chunked: bool, cuda: bool, shard: int | None = None
) -> Holding:
    """What a rank holds under an engine.

    Args:
        shard: ranks that share a copy of the state under FSDP2 (HSDP); None: all.
        chunked: the step works through micro-batches, so gradients of all but the last are added up unreduced.
        cuda: the optimizer is fused and needs no scratch memory.
    """
    if kind is FSDP2:
        return _fsdp2(weights, optim, shard or ranks, chunked, cuda)
    if kind in ZERO[1:]:
        return _zero(ZERO.index(kind), weights, optim, ranks, chunked, cuda)
    T, P = FP32 * weights.trained, FP32 * weights.total + weights.buffers
    scratch = 0 if cuda else 2 * FP32 * weights.largest
    average = P if _averages(optim) else 0
    kept = FP32 * moments(optim, weights.trained, weights.matrices)
    if kind is DDP:  # gradients are views of the buckets, once they are reduced
        own = T if chunked else 0
        return Holding(P, kept, average, T, lambda done: np.full_like(done, own), T + own + scratch)
    flat = min(T, FP32 * REDUCE_BUCKET) if kind is ZERO[0] else 0  # one bucket, flattened to be reduced
    ever = (lambda done: np.full_like(done, T)) if chunked else (lambda done: FP32 * done)
    return Holding(P, kept, average, 0, ever, T + max(scratch, flat))


def _averages(optim: Optim) -> bool:
    return optim.ema_samples is not None or optim.trajectory is not None


def _sum(leaves: list[Leaf], ranks: int = 1) -> float:
    return FP32 * sum(leaf.shard(ranks) for leaf in leaves)


def _fsdp2(weights: Weights, optim: Optim, ranks: int, chunked: bool, cuda: bool) -> Holding:
    *blocks, rest = weights.units
    trained = [leaf for leaf in weights.leaves if leaf.trained]
    part, P = _sum(trained, ranks), _sum(weights.leaves, ranks)
    everything = FP32 * weights.trained
    share = part / max(everything, 1)
    block, root = max((_sum(b) for b in blocks), default=0.0), _sum(rest)
    # What is in no block is gathered from the start of the forward to the end of the backward. Of the blocks one is
    # gathered, the next is on its way, and its parts are copied out of the flat buffer that they come in.
    working = root + 3 * block
    if not cuda:  # gloo gathers from copies, and keeps the last one
        working += root + 2 * block
    scratch = 0 if cuda else 2 * FP32 * max((leaf.shard(ranks) for leaf in trained), default=0)

    def gradients(done: F64) -> F64:
        if chunked:  # without reduction they stay whole
            return np.full_like(done, everything)
        # Those of a block are copied into the buffer that is reduced; those outside of blocks wait for the end.
        return FP32 * done * share + root * done / max(weights.trained, 1) + 2 * block

    kept = FP32 * moments(optim, weights.trained, weights.matrices) * share
    average = P if _averages(optim) else 0
    return Holding(P + weights.buffers, kept, average, working, gradients, part + scratch)


def _zero(stage: int, weights: Weights, optim: Optim, ranks: int, chunked: bool, cuda: bool) -> Holding:
    T, frozen = FP32 * weights.trained, FP32 * (weights.total - weights.trained)
    part, bucket = T / ranks, FP32 * REDUCE_BUCKET
    # With this rank's copy of the weights.
    optimizer = FP32 * moments(optim, weights.trained, weights.matrices) / ranks + part
    scratch = 0 if cuda else 2 * part  # the optimizer sees one flat parameter
    once = min(T, bucket)  # gradients that are reduced together
    if stage == 3:
        P = (T + frozen) / ranks + weights.buffers
        gathered = min(T + frozen, FP32 * LIVE) + min(T + frozen, FP32 * PREFETCH)
        stepping = bucket + part + max(once + part, scratch)
        average = P if _averages(optim) else 0
        return Holding(P, optimizer, average, bucket + gathered, lambda done: np.full_like(done, part), stepping)
    P = T + frozen + weights.buffers

    def gradients(done: F64) -> F64:  # they are moved into the bucket; this rank's part is kept when it is reduced
        if chunked:
            return np.full_like(done, T if stage == 1 else part)
        return np.where(FP32 * done > bucket, part, 0.0)

    average = P if _averages(optim) else 0
    return Holding(P, optimizer, average, bucket, gradients, max(bucket + part, 2 * part + scratch))
