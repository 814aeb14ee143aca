"""An exponential moving average of the weights whose memory is counted in samples."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dualenc.distributed.pieces import Piece, Stored
from dualenc.engine import shards


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


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by their names in ``state_dict`` (without collecting shards)."""
    return dict(model.state_dict(keep_vars=True))
