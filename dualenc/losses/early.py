"""Gathers that begin as soon as a tower is done, so that they run while the next tower computes.

A loss asks for the features of all ranks after the last tower. Those of the first could have travelled by then: the
model tells when a tower is done (``DualEncoder.watcher``), and the gather that the loss asks for later takes what was
begun. The numbers are the same bit for bit, and so are the collectives; only their order changes, alike on all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from dualenc.data.batch import Batch
from dualenc.distributed.gather import Begun, begin_all_gather, check_equal_shapes, hand_over, withdraw
from dualenc.distributed.world import world_size
from dualenc.encoders.dual_encoder import DualEncoder
from dualenc.losses.loss import Loss


class EarlyGathers:
    """The gathers of one step. With one rank, or a loss that gathers nothing as it is given, there are none.

    Args:
        model: a :class:`DualEncoder`; others are not watched.
        batch: this rank's slots, whole.
        pairs: those that are contrasted.
        loss: says which sides it gathers.
    """

    def __init__(self, model: nn.Module, batch: Batch, pairs: Sequence[tuple[str, str]], loss: Loss) -> None:
        self._model, self._batch = model, batch
        self._begun: dict[str, Begun] = {}
        self.wasted: list[str] = []
        """Modalities whose features were gathered and that nobody asked for."""
        self.wanted: set[str] = set()
        if world_size() > 1 and isinstance(model, DualEncoder):
            device = batch.ids.device
            sides = loss.gathers(batch.size * world_size(), device)
            named = {m for pair in pairs for side, m in zip("ab", pair, strict=True) if side in sides}
            self.wanted = named & set(list(batch.inputs)[:-1])  # nothing runs after the last tower

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around the model's forward."""
        if not self.wanted or not isinstance(self._model, DualEncoder):
            yield
            return
        self._model.watcher = self._tower_is_done
        try:
            yield
        finally:
            self._model.watcher = None

    def _tower_is_done(self, m: str, features: Tensor) -> None:
        if m in self.wanted:
            slots = to_slots(features.detach(), self._batch.rows[m], self._batch.size)
            check_equal_shapes(slots)
            self._begun[m] = begin_all_gather(slots)

    @contextmanager
    def given_to(self, slots: Mapping[str, Tensor]) -> Iterator[None]:
        """Around the loss: the features by slot that it is given."""
        for m, begun in self._begun.items():
            hand_over(begun, slots[m])
        try:
            yield
        finally:
            for m, begun in self._begun.items():
                if withdraw(slots[m]):
                    begun.wait()
                    self.wasted.append(m)
            self._begun = {}


def to_slots(x: Tensor, rows: Tensor, size: int) -> Tensor:
    """Put ``x[k]`` (of ``[n, …]``) into slot ``rows[k]`` of ``[size, …]``; other slots are zero, extra rows unused."""
    return x.new_zeros(size, *x.shape[1:]).index_copy(0, rows, x[: len(rows)])
