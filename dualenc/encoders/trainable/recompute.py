"""Selective activation checkpointing: only every N-th block recomputes its activations in the backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dualenc.encoders.tower import Tower


def recompute_every(tower: Tower, n: int) -> int:
    """Let every ``n``-th of the tower's repeated blocks recompute; returns how many do, 0 where it has no blocks.

    Chen et al., arXiv 1604.06174. The gradient is the same, dropout included. Names in the state dict stay.
    """
    chosen = tower.blocks()[n - 1 :: n]
    for block in chosen:
        block.forward = _Recomputed(block)
    return len(chosen)


class _Recomputed:
    """A block's forward, recomputed in the backward. It belongs to its block: a copy of that has a copy of this."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        block = self.block
        forward: Any = type(block).forward
        if not (block.training and torch.is_grad_enabled()):
            return forward(block, *args, **kwargs)
        return checkpoint(forward, block, *args, use_reentrant=False, **kwargs)
