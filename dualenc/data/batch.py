"""What travels from the loader to the towers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

ABSENT = -1
"""Pair id of a slot without a usable sample: it takes part in no loss. Also a whole-number value that a slot lacks."""
WHOLE = "*"
"""Key in ``Batch.extras`` of what belongs to the sample as a whole, whatever its modalities."""


def present(values: Tensor) -> Tensor:
    """Where a label has a value: bool of the same shape. ``ABSENT`` (whole numbers) and NaN (floats) are none."""
    return ~values.isnan() if values.is_floating_point() else values != ABSENT


@dataclass(frozen=True, slots=True)
class BadSample:
    """One sample that could not be used, as the quarantine file lists it."""

    source: str
    shard: str
    key: str
    member: str
    reason: str


@dataclass(frozen=True, slots=True)
class TeacherRows:
    """One teacher's outputs for a batch, by slot, without gradient.

    Attributes:
        has: modality → bool [B]: the slots whose item it has.
        features: modality → [B, D_t] L2-normalised fp32, zero where it has none; empty for a teacher that has only
            scores.
        scores: (first, second) modality → [B, N] logits of this rank's items of the first against the second's items of
            the global batch; pairs it did not score are −inf. Empty for a teacher with features.
    """

    has: dict[str, Tensor]
    features: dict[str, Tensor] = field(default_factory=dict)
    scores: dict[tuple[str, str], Tensor] = field(default_factory=dict)


@dataclass(slots=True)
class Batch:
    """One rank's share of a global batch of N = W · B slots.

    Attributes:
        size: B, the number of local slots; the same on all ranks by construction.
        inputs: modality → collated tensors (a tensor or a dict of tensors) of the n_m rows that have it. If no row
            has it: one dummy row, so that every rank runs every tower (ZeRO-3 and FSDP2 need that).
        rows: modality → LongTensor [n_m]: the slots that the rows of ``inputs`` belong to; empty for a dummy.
        ids: LongTensor [B], the pair id. Equal ids are positives of each other, across ranks too;
            ``ABSENT`` marks a slot whose sample was lost.
        keys: the B sample ids ("source/shard/key") for reports, tests and NaN post-mortems.
        bad: samples lost while making this batch.
        step: the global step this batch belongs to.
        seen: samples that the run has seen before this step; None where nobody counted: steps of one size.
        load_s: seconds the worker spent on it.
        passes: LongTensor [B]: the epoch of its source that each slot's sample is from; augmentation depends on it.
        numbers: LongTensor [B]: the number of each slot's sample among all samples of the sources, from 0, the same in
            every epoch and on any number of ranks; None where nobody counted.
        views: name → collated rows of one modality as another model takes them (a teacher's image size or tokenizer):
            the same rows and slots as ``inputs`` of that modality.
        extras: name → modality (or pair, or ``WHOLE``) → [B, …] by slot, without gradient: further inputs of a loss.
            The loader makes them from the ``labels`` in a modality's rows and from the sources' ``values``.
        teachers: name → a teacher's outputs for these samples; distillation adds them on the device.
    """

    size: int
    inputs: dict[str, Any]
    rows: dict[str, Tensor]
    ids: Tensor
    keys: list[str]
    step: int = 0
    bad: list[BadSample] = field(default_factory=list)
    load_s: float = 0.0
    passes: Tensor | None = None
    numbers: Tensor | None = None
    views: dict[str, Any] = field(default_factory=dict)
    extras: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    teachers: dict[str, TeacherRows] = field(default_factory=dict)
    seen: int | None = None

    def to(self, device: torch.device | str) -> Batch:
        """Move every tensor to ``device`` (non-blocking where the memory is pinned)."""
        return self._moved(lambda t: t.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Called by torch's DataLoader when ``pin_memory`` is on."""
        return self._moved(lambda t: t.pin_memory())

    def _moved(self, move: Callable[[Tensor], Tensor]) -> Batch:
        return replace(
            self,
            inputs=map_tensors(self.inputs, move),
            rows=map_tensors(self.rows, move),
            ids=move(self.ids),
            numbers=None if self.numbers is None else move(self.numbers),
            views=map_tensors(self.views, move),
            extras=map_tensors(self.extras, move),
            teachers={
                name: TeacherRows(*(map_tensors(x, move) for x in (t.has, t.features, t.scores)))
                for name, t in self.teachers.items()
            },
        )

    def chunks(self, size: int) -> list[Batch]:
        """Split into micro-batches of ``size`` slots; a chunk that lacks a modality borrows row 0 as its dummy."""
        out = []
        for start in range(0, self.size, size):
            stop = min(start + size, self.size)
            inputs: dict[str, Any] = {}
            rows: dict[str, Tensor] = {}
            for m, r in self.rows.items():
                pick: slice | Tensor = slice(start, stop)
                if (
                    len(r) == self.size
                ):  # every slot, in order: nothing to look up on the device, which would be waited for
                    rows[m] = r[pick] - start
                else:
                    take = torch.nonzero((r >= start) & (r < stop)).flatten()
                    rows[m] = r[take] - start
                    pick = take if len(take) else torch.zeros(1, dtype=torch.long, device=r.device)
                inputs[m] = map_tensors(self.inputs[m], lambda t, pick=pick: t[pick])  # type: ignore[misc]
            out.append(Batch(stop - start, inputs, rows, self.ids[start:stop], self.keys[start:stop], self.step))
        return out


def map_tensors(x: Any, fn: Any) -> Any:
    """Apply ``fn`` to a tensor or to every tensor of a (nested) mapping; every tensor's first axis is the row."""
    if isinstance(x, Tensor):
        return fn(x)
    if isinstance(x, Mapping):
        return {k: map_tensors(v, fn) for k, v in x.items()}
    return x
