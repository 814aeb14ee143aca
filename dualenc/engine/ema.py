"""Averages of the weights: exponential, with a half-life in samples; or Gaussian over the length of the run."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dualenc.checkpoint.ranges import Piece, Stored
from dualenc.engine import held as shards


class Average:
    """The average of a model's trainable weights; everything else (frozen weights, buffers) is copied.

    Build it after the engine: it keeps what this rank holds, so it costs one more copy of the rank's shard.

    Args:
        model: the engine's ``module``.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._average = {name: shards.local(x).clone() for name, x in _tensors(model).items()}

    def update(self, model: nn.Module, samples: int, skipped: Tensor | None = None) -> None:
        """Add ``model``'s weights after a step on ``samples`` samples.

        ``skipped`` (a scalar bool tensor): the step changed nothing. It is not read by the host.
        """
        raise NotImplementedError

    @torch.no_grad()
    def _move(self, model: nn.Module, share: float, skipped: Tensor | None = None) -> None:
        """average ← average + share · (weights − average); unchanged where ``skipped``. Buffers and frozen weights are
        copied."""
        self._model = model
        averages, weights = [], []
        for name, x in _tensors(model).items():
            average, now = self._average[name], shards.local(x)
            if x.requires_grad and now.is_floating_point():
                averages.append(average)
                weights.append(now.to(average.device))
            else:
                now = now.to(average.device)
                average.copy_(now if skipped is None else torch.where(skipped.to(average.device), average, now))
        if averages:
            blend(averages, weights, share, skipped)

    def state_dict(self) -> dict[str, Tensor]:
        """Whole averaged tensors by name, on the CPU. All ranks must call it: sharded weights are collected."""
        return {name: shards.full(x, self._average[name]).cpu().clone() for name, x in _tensors(self._model).items()}

    def pieces(self, rank: int, world_size: int) -> list[Piece]:
        """The part of the average that this rank writes; nothing is collected."""
        parts = {name: (x, self._average[name]) for name, x in _tensors(self._model).items()}
        return shards.own(parts, rank, world_size)

    def load_state_dict(self, saved: Stored) -> None:
        """Set the average; every rank reads its own part only.

        Raises:
            CheckpointError: if its tensors are not the model's.
        """
        for name, _, part in shards.read_all(_tensors(self._model), saved):
            self._average[name].copy_(part)


class EMA(Average):
    """Exponential moving average.

    Args:
        half_life: in samples: weights from that long ago count half as much as today's.
    """

    def __init__(self, model: nn.Module, half_life: int) -> None:
        super().__init__(model)
        self.half_life = half_life

    def update(self, model: nn.Module, samples: int, skipped: Tensor | None = None) -> None:
        """Move towards ``model``'s weights: decay = 2^(−samples / half_life)."""
        self._move(model, 1 - 0.5 ** (samples / self.half_life), skipped)


class Trajectory(Average):
    """Σ_e w_e θ_e with w_e ∝ exp(−(e − mean)² / 2 std²), Σ w = 1, e the share of the run that is done.

    PromptSRC's Gaussian prompt aggregation (Khattak et al., arXiv 2307.06948), over steps instead of epochs. What the
    weights so far add up to depends on the step alone (a skipped step counts with unchanged weights), so a resumed run
    needs the average and nothing else.

    Args:
        mean, std: as shares of the run.
        total: samples of the whole run.
        seen, step: samples seen already, and in a step: a resumed run's.
    """

    def __init__(self, model: nn.Module, mean: float, std: float, total: int, seen: int = 0, step: int = 1) -> None:
        super().__init__(model)
        self.mean, self.std, self.total, self.seen = mean, std, total, seen
        # In logarithms: far from the mean the weights themselves are too small for a float.
        self._log_sum = _log_sum([self._log(k) for k in range(step, seen + 1, step)])

    def update(self, model: nn.Module, samples: int, skipped: Tensor | None = None) -> None:
        """Add ``model``'s weights with this step's weight."""
        self.seen += samples
        now = self._log(self.seen)
        self._log_sum = _log_sum([self._log_sum, now])
        self._move(model, math.exp(now - self._log_sum))

    def _log(self, seen: int) -> float:
        return -((seen / self.total - self.mean) ** 2) / (2 * self.std**2)


@torch.no_grad()
def blend(averages: list[Tensor], weights: list[Tensor], share: float, skipped: Tensor | None = None) -> None:
    """averages ← averages + share · (weights − averages), in place; unchanged where ``skipped``, which is not read.

    On the CPU one pass for each tensor; elsewhere three kernels for all tensors together.
    """
    factor = torch.full((), share, device=averages[0].device)
    if skipped is not None:
        factor = factor.masked_fill(skipped.to(factor.device), 0.0)
    if factor.device.type == "cpu":
        for average, now in zip(averages, weights, strict=True):
            average.lerp_(now, factor.to(average.dtype))
        return
    torch._foreach_add_(averages, torch._foreach_mul(torch._foreach_sub(weights, averages), factor))


def _log_sum(logs: list[float]) -> float:
    top = max(logs, default=-math.inf)
    return top if top == -math.inf else top + math.log(sum(math.exp(x - top) for x in logs))


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by their names in ``state_dict`` (without collecting shards)."""
    return dict(model.state_dict(keep_vars=True))
