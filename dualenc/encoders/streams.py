"""Streams: a second view's own projector, and the dropout and drop path that only it has in the tower it shares."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dualenc.config.stream import Stream
from dualenc.encoders.tower import Tower
from dualenc.errors import ConfigError


def build_projector(stream: Stream, width: int, embed_dim: int) -> nn.Module | None:
    """From pooled features [n, width] to [n, embed_dim]; None: the tower's own head.

    The release of Fini et al. has batch norms between the layers, whose statistics would depend on ranks; here layer
    norms.
    """
    if stream.projector == "shared":
        return None
    widths = [width, *[stream.hidden] * (stream.layers - 1)] if stream.projector == "mlp" else [width]
    parts: list[nn.Module] = []
    for one, two in itertools.pairwise(widths):
        parts += [nn.Linear(one, two), nn.LayerNorm(two), nn.GELU()]
    last = nn.Linear(widths[-1], embed_dim, bias=False)
    nn.init.normal_(last.weight, std=1 / math.sqrt(widths[-1]))
    return nn.Sequential(*parts, last) if parts else last


class BlockNoise:
    """Dropout and drop path on what each block of a tower adds to its input; nothing unless :meth:`active`.

    A block that gives y for x gives x + dropped(y − x): dropout of single entries, then of whole rows, each divided by
    the share that is kept. Rows skip block l of L with the rate ``drop_path`` · l / L (Huang et al. 2016, stochastic
    depth). Blocks whose output has another shape than their input, such as a stride, are left as they are.

    Raises:
        ConfigError: the tower has no repeated blocks.
    """

    def __init__(self, tower: Tower, where: str) -> None:
        blocks = tower.blocks()
        if not blocks:
            raise ConfigError(
                f"{where}: the tower {tower.component.name} has no repeated blocks; leave dropout and drop_path out"
            )
        self.dropout = self.drop_path = 0.0
        for k, block in enumerate(blocks, 1):
            block.register_forward_hook(self._hook(k / len(blocks)))

    @contextmanager
    def active(self, stream: Stream) -> Iterator[None]:
        """Inside, the tower's forward has the noise of ``stream``."""
        self.dropout, self.drop_path = stream.dropout, stream.drop_path
        try:
            yield
        finally:
            self.dropout = self.drop_path = 0.0

    def _hook(self, depth: float) -> Any:
        def add(block: nn.Module, given: tuple[Any, ...], out: Any) -> Any:
            if not block.training or not (self.dropout or self.drop_path):
                return None
            y, x = out[0] if isinstance(out, tuple) else out, given[0] if given else None
            if not isinstance(x, Tensor) or not isinstance(y, Tensor) or x.shape != y.shape:
                return None
            y = x + dropped(y - x, self.dropout, depth * self.drop_path)
            return (y, *out[1:]) if isinstance(out, tuple) else y

        return add


def dropped(branch: Tensor, dropout: float, drop_path: float) -> Tensor:
    """``branch`` [n, …] with entries and whole rows set to 0, the others divided by the share that is kept."""
    if dropout:
        branch = nn.functional.dropout(branch, dropout)
    if drop_path:
        keep = torch.rand(len(branch), device=branch.device) >= drop_path
        branch = branch * (keep.to(branch.dtype) / (1 - drop_path)).view(-1, *[1] * (branch.ndim - 1))
    return branch
