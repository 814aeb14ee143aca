"""The step: encode → objective → backward → engine.step → metrics. Nothing here waits for the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dualenc.data.batch import Batch
from dualenc.distributed.world import World, all_reduce_sum
from dualenc.encoders.dual_encoder import telling_rows
from dualenc.engine import Engine
from dualenc.engine.protocol import Outputs
from dualenc.losses import Loss, LossOutput, objective
from dualenc.losses.early import EarlyGathers
from dualenc.losses.grad_cache import cached_backward

Pairs = Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class StepResult:
    """A step of the global batch, the same on all ranks: loss and metrics are of the whole batch.

    All are scalar tensors on the device; reading one waits for the step. ``skipped`` (bool): the loss or the gradient
    was not finite, so no weight changed on any rank.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    grad_norm: Tensor
    skipped: Tensor


def train_step(engine: Engine, batch: Batch, pairs: Pairs, loss: Loss, micro: int | None = None) -> StepResult:
    """Train on one batch.

    Args:
        engine: owns the model and its optimizer.
        batch: this rank's slots, on the engine's device.
        pairs: the pairs of modalities to contrast.
        loss: from ``build_loss``.
        micro: how many slots are encoded at a time; None for all at once. It changes memory and time, no number.
    """

    early = None

    def value(outputs: Outputs, of: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        out = objective(outputs, of, pairs, loss, early)
        numbers = mean_over_ranks(out, engine.world)
        return spoiled_if_not_finite(out.value, numbers["loss"]), numbers

    if micro is None or micro >= batch.size:
        early = EarlyGathers(engine.module, batch, pairs, loss)
        with early.watching(), telling_rows(engine.module, batch.rows):
            outputs = engine.forward(batch.inputs)
        total, numbers = value(outputs, batch)
        engine.backward(total)
    else:
        numbers = cached_backward(engine, batch.chunks(micro), batch, value)
    done = engine.step()
    return StepResult(numbers.pop("loss"), numbers, done.grad_norm, done.skipped)


def mean_over_ranks(out: LossOutput, world: World) -> dict[str, Tensor]:
    """Loss and metrics of the global batch: one reduction of a small tensor."""
    values = torch.stack([out.value.detach().float(), *(x.detach().float() for x in out.metrics.values())])
    mean = all_reduce_sum(values, world) / world.world_size
    return dict(zip(["loss", *out.metrics], mean.unbind(), strict=True))


def spoiled_if_not_finite(value: Tensor, global_loss: Tensor) -> Tensor:
    """``value``; its gradient becomes NaN on all ranks if the global loss is not finite, so that all skip the step.

    This needs no waiting for the device: 0 · loss + 1 is 1 or NaN.
    """
    return value * (global_loss.detach() * 0 + 1)
