"""The state of a loss: what is proposed while the loss is computed becomes the state only if the step is taken.

Three kinds, all of them the same numbers on any number of ranks, because they follow the order of the global batch
(slot j is row j // W of rank j % W) and not the order of ranks:

    Replicated    small tensors; every rank has all of them
    KeyQueue      the newest K keys, or K for each lane (a domain, a language); every rank has all of them
    SampleBuffer  numbers for every sample of the data; rank r of W holds those of a range of samples

A forward *proposes*; :meth:`LossState.commit` makes it so once the step is known to be finite. A second forward before
that (a look-ahead teacher's virtual step) replaces what was proposed. Nothing here waits for the device.

In a checkpoint every tensor is whole under one name, in flat ranges that the ranks share out, so any world size and any
engine reads it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dualenc.checkpoint.ranges import Piece, Stored, deal
from dualenc.data.batch import ABSENT
from dualenc.distributed.gather import all_gather, gather_ids, reduce_scatter_sum
from dualenc.distributed.world import world_size
from dualenc.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class RunShape:
    """What the size of a loss's state depends on.

    Attributes:
        dim: D of the features.
        pairs: the pairs that the loss is for.
        samples: in all sources together.
        rank, world_size: of this process; a :class:`SampleBuffer` is cut by them.
        device: where state is kept; ``meta`` gives sizes and takes no memory.
        dtype: of keys and of numbers for samples.
    """

    dim: int
    pairs: Sequence[tuple[str, str]]
    samples: int
    rank: int = 0
    world_size: int = 1
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32


class LossState(ABC):
    """Tensors that a loss reads in a step and changes after it; see the module."""

    @abstractmethod
    def commit(self, skipped: Tensor) -> None:
        """Take over what was last proposed, if anything was; where ``skipped`` (a scalar bool on the device), change
        nothing. All ranks call it alike."""

    @abstractmethod
    def held(self) -> Mapping[str, tuple[tuple[int, ...], int, Tensor]]:
        """Name → (whole shape, where this rank's part starts in the flattened whole, the part itself)."""

    @property
    def cut(self) -> bool:
        """Whether each rank holds a part of its own; otherwise all hold everything."""
        return False

    def pieces(self, name: str, rank: int, ranks: int) -> list[Piece]:
        """What this rank writes of it; ``name`` comes before the names of its tensors."""
        mine = [Piece(f"{name}/{k}", shape, at, x.reshape(-1)) for k, (shape, at, x) in self.held().items()]
        return [p for p in mine if p.data.numel() or rank == 0] if self.cut else deal(mine, rank, ranks)

    def load(self, name: str, saved: Stored) -> None:
        """Set what :meth:`pieces` of all ranks wrote; this rank reads its own part.

        Raises:
            CheckpointError: a tensor is missing or has another shape.
        """
        for k, (shape, at, x) in self.held().items():
            full = f"{name}/{k}"
            if full not in saved.shapes:
                raise CheckpointError(f"The checkpoint has no {full}, which the loss remembers")
            if saved.shapes[full] != shape:
                raise CheckpointError(
                    f"{full} has shape {list(saved.shapes[full])} in the checkpoint, but the loss needs {list(shape)}"
                )
            x.copy_(saved.read(full, at, at + x.numel()).view(x.shape))

    def bytes(self) -> int:
        """On this rank."""
        return sum(x.numel() * x.element_size() for _, _, x in self.held().values())


class Replicated(LossState):
    """Tensors of which every rank has the same copy.

    Attributes:
        now: name → the tensor as of the last step.
    """

    def __init__(self, start: Mapping[str, Tensor]) -> None:
        self.now = dict(start)
        self._next: Mapping[str, Tensor] | None = None

    def propose(self, values: Mapping[str, Tensor]) -> None:
        """New values, equal on all ranks; names that are left out stay as they are."""
        self._next = {k: x.detach() for k, x in values.items()}

    def commit(self, skipped: Tensor) -> None:
        """See :class:`LossState`."""
        for k, x in (self._next or {}).items():
            self.now[k].copy_(torch.where(skipped, self.now[k], x))
        self._next = None

    def held(self) -> dict[str, tuple[tuple[int, ...], int, Tensor]]:
        """See :class:`LossState`."""
        return {k: (tuple(x.shape), 0, x) for k, x in self.now.items()}


class KeyQueue(LossState):
    """The newest ``capacity`` keys of each lane, whatever the number of ranks: a ring in the order of global slots.

    A step appends the keys of its slots that are there (id not −1) in slot order; of more than fit the newest stay.

    Attributes:
        keys: [lanes · capacity, D]; ids: their pair ids, −1 where nothing is yet; lane: which lane each place is of.
    """

    def __init__(self, capacity: int, run: RunShape, lanes: int = 1, dim: int | None = None) -> None:
        places, on = lanes * capacity, run.device
        self.capacity, self.lanes = capacity, lanes
        # One more place at the end takes what is not kept, so that no size depends on values.
        self._keys = torch.zeros(places + 1, dim or run.dim, dtype=run.dtype, device=on)
        self._ids = torch.full((places + 1,), ABSENT, device=on)
        self._next = torch.zeros(lanes, dtype=torch.long, device=on)
        self.lane = torch.arange(places, device=on) // capacity
        self._proposed: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def keys(self) -> Tensor:
        """See the class."""
        return self._keys[:-1]

    @property
    def ids(self) -> Tensor:
        """See the class."""
        return self._ids[:-1]

    def propose(self, keys: Tensor, ids: Tensor, lane: Tensor | None = None) -> None:
        """This rank's keys [B, D] with their pair ids [B] and lanes [B]; −1 in either: it is not appended."""
        lane = torch.zeros_like(ids) if lane is None else lane
        self._proposed = (keys.detach(), ids, lane)

    def commit(self, skipped: Tensor) -> None:
        """See :class:`LossState`."""
        if self._proposed is None:
            return
        keys, ids, lane = (in_slot_order(x) for x in self._proposed)
        self._proposed = None
        there = (ids >= 0) & (lane >= 0) & ~skipped
        own = (lane[:, None] == torch.arange(self.lanes, device=lane.device)) & there[:, None]
        lane = lane.clamp(min=0)
        number = torch.gather(own.cumsum(0) - 1, 1, lane[:, None]).squeeze(1)
        count = own.sum(0)
        kept = there & (number >= count[lane] - self.capacity)
        at = lane * self.capacity + (self._next[lane] + number) % self.capacity
        at = torch.where(kept, at, self.lanes * self.capacity)
        self._keys.index_copy_(0, at, keys.to(self._keys.dtype))
        self._ids.index_copy_(0, at, ids)
        self._next.copy_((self._next + count) % self.capacity)

    def held(self) -> dict[str, tuple[tuple[int, ...], int, Tensor]]:
        """See :class:`LossState`."""
        parts = {"keys": self.keys, "ids": self.ids, "next": self._next}
        return {k: (tuple(x.shape), 0, x) for k, x in parts.items()}


class SampleBuffer(LossState):
    """Numbers for every sample of the data, by its number among all samples (``Batch.numbers``).

    Rank r of W holds samples r·⌈M/W⌉ … of M. Reading asks every owner for the rows of the global batch, and writing
    tells it: O(N) numbers are sent for a global batch of N, whatever M is. Of slots with the same sample the last one's
    values stay.
    """

    def __init__(self, fields: Mapping[str, float], run: RunShape) -> None:
        self.fields, self.samples = list(fields), run.samples
        each = -(-run.samples // run.world_size)
        self.start = min(run.rank * each, run.samples)
        self.size = min(self.start + each, run.samples) - self.start
        start = torch.tensor(list(fields.values()), dtype=run.dtype, device=run.device)
        self._data = start[:, None].repeat(1, self.size + 1)  # the last place takes what others own
        self._proposed: tuple[Tensor, Tensor] | None = None

    @property
    def cut(self) -> bool:
        """See :class:`LossState`."""
        return True

    def read(self, numbers: Tensor, there: Tensor) -> dict[str, Tensor]:
        """Field → [B] of this rank's slots; 0 where not ``there``. All ranks call it alike.

        Args:
            numbers: [B] int64; there: [B] bool.
        """
        wanted = gather_ids(torch.where(there, numbers, ABSENT))
        at = self._places(wanted)
        found = torch.where((at < self.size)[:, None], self._data[:, at].T, 0.0)
        mine = reduce_scatter_sum(found) if world_size() > 1 else found
        return dict(zip(self.fields, mine.unbind(1), strict=True))

    def propose(self, numbers: Tensor, there: Tensor, values: Mapping[str, Tensor]) -> None:
        """New values [B] of every field for this rank's slots, those that are ``there``."""
        new = torch.stack([values[k].detach().to(self._data.dtype) for k in self.fields], 1)
        self._proposed = (torch.where(there, numbers, ABSENT), new)

    def commit(self, skipped: Tensor) -> None:
        """See :class:`LossState`."""
        if self._proposed is None:
            return
        numbers, values = (in_slot_order(x) for x in self._proposed)
        self._proposed = None
        numbers, order = torch.sort(numbers, stable=True)
        last = torch.ones_like(numbers, dtype=torch.bool)
        last[:-1] = numbers[1:] != numbers[:-1]
        at = torch.where(last & ~skipped, self._places(numbers), self.size)
        self._data.index_copy_(1, at, values[order].T.contiguous())

    def _places(self, numbers: Tensor) -> Tensor:
        """Where this rank holds samples; ``size`` for those that it does not."""
        at = numbers - self.start
        return torch.where((at >= 0) & (at < self.size), at, self.size)

    def held(self) -> dict[str, tuple[tuple[int, ...], int, Tensor]]:
        """See :class:`LossState`."""
        return {k: ((self.samples,), self.start, self._data[i, :-1]) for i, k in enumerate(self.fields)}


def in_slot_order(x: Tensor) -> Tensor:
    """``x [B, …]`` of all ranks → [W·B, …] in the order of the global batch's slots, without gradient."""
    ranks = world_size()
    if ranks == 1:
        return x
    return all_gather(x).view(ranks, *x.shape).transpose(0, 1).reshape(-1, *x.shape[1:])
