"""One unit vector for each of many classes, cut over ranks by ranges of classes (partial-FC, An et al. 2021, arXiv
2010.05222)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dualenc.memory.state import LossState, RunShape
from dualenc.seeds import derive_seed

_BLOCK = 4096
"""Classes whose first vectors are drawn together, so that they do not depend on the number of ranks."""


class ClassMatrix(LossState):
    """Class vectors [E, D]; rank r of W holds classes r·⌈E/W⌉ ….

    After a step every vector moves against its gradient and back onto the sphere: v ← (v − lr · g) / ‖v − lr · g‖.

    Attributes:
        count: E. start: the first class of this rank. size: how many it holds.
        rows: [size + 1, D]; the last row takes what other ranks hold.
    """

    def __init__(self, count: int, lr: float, name: str, run: RunShape) -> None:
        each = -(-count // run.world_size)
        self.count, self.lr = count, lr
        self.start = min(run.rank * each, count)
        self.size = min(self.start + each, count) - self.start
        self.rows = torch.zeros(self.size + 1, run.dim, device=run.device)
        if self.rows.device.type != "meta":
            self._begin(name)
        self._gradient: Tensor | None = None

    def _begin(self, name: str) -> None:
        for block in range(self.start // _BLOCK, -(-(self.start + self.size) // _BLOCK)):
            g = torch.Generator().manual_seed(derive_seed("classes", name, block))
            drawn = normalize(torch.randn(_BLOCK, self.rows.shape[1], generator=g), dim=1)
            first, last = max(block * _BLOCK, self.start), min((block + 1) * _BLOCK, self.start + self.size)
            kept = drawn[first - block * _BLOCK : last - block * _BLOCK]
            self.rows[first - self.start : last - self.start] = kept.to(self.rows.device)

    @property
    def cut(self) -> bool:
        """See :class:`LossState`."""
        return True

    def places(self, classes: Tensor) -> Tensor:
        """Where this rank holds classes; ``size`` for those that it does not, and for −1."""
        at = classes - self.start
        return torch.where((at >= 0) & (at < self.size) & (classes >= 0), at, self.size)

    def propose(self, gradient: Tensor) -> None:
        """The gradient [size + 1, D] at this rank's rows; the last row is ignored."""
        self._gradient = gradient.detach()

    def commit(self, skipped: Tensor) -> None:
        """See :class:`LossState`."""
        if self._gradient is None:
            return
        now = self.rows[:-1]
        now.copy_(torch.where(skipped, now, normalize(now - self.lr * self._gradient[:-1], dim=1)))
        self._gradient = None

    def held(self) -> dict[str, tuple[tuple[int, ...], int, Tensor]]:
        """See :class:`LossState`."""
        width = self.rows.shape[1]
        return {"vectors": ((self.count, width), self.start * width, self.rows[:-1])}
