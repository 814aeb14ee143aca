"""An exponential moving average of the weights whose memory is counted in samples."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dualenc.engine import shards
from dualenc.errors import CheckpointError


class EMA:
    """The average of a model's trainable weights; everything else (frozen weights, buffers) is copied.

    Build it after the engine: it keeps what this rank holds, so it costs one more copy of the rank's shard.

    Args:
        model: the engine's ``module``.
        half_life: in samples: weights from that long ago count half as much as today's.
    """

    def __init__(self, model: nn.Module, half_life: int) -> None:
        self.half_life = half_life
        self._model = model
        self._average = {name: shards.local(x).clone() for name, x in _tensors(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module, samples: int) -> None:
        """Move towards ``model``'s weights after a step on ``samples`` samples: decay = 2^(−samples / half_life)."""
        self._model = model
        decay = 0.5 ** (samples / self.half_life)
        for name, x in _tensors(model).items():
            now = shards.local(x)
            if x.requires_grad and now.is_floating_point():
                self._average[name].lerp_(now.to(self._average[name].device), 1 - decay)
            else:
                self._average[name].copy_(now)

    def state_dict(self) -> dict[str, Tensor]:
        """Whole averaged tensors by name, on the CPU. All ranks must call it: sharded weights are collected."""
        return {name: shards.full(x, self._average[name]).cpu().clone() for name, x in _tensors(self._model).items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Set the average from whole tensors.

        Raises:
            CheckpointError: if a tensor is missing.
        """
        for name, x in _tensors(self._model).items():
            if name not in state:
                raise CheckpointError(f"The saved moving average has no tensor {name}")
            self._average[name].copy_(shards.shard(x, state[name]))


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by their names in ``state_dict`` (without collecting shards)."""
    return dict(model.state_dict(keep_vars=True))
