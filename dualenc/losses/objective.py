"""From the model's outputs to one number: which slots take part in which pair, and the mean over pairs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from dualenc.config import pair_name
from dualenc.data.batch import ABSENT, WHOLE, Batch
from dualenc.losses.early import EarlyGathers
from dualenc.losses.early import to_slots as to_slots
from dualenc.losses.loss import Extras, Loss, LossOutput


def objective(
    outputs: Mapping[str, Mapping[str, Tensor]],
    batch: Batch,
    pairs: Sequence[tuple[str, str]],
    loss: Loss,
    early: EarlyGathers | None = None,
) -> LossOutput:
    """Apply ``loss`` to every pair of modalities and average the pairs, each with the same weight.

    A slot takes part in a pair if it has both modalities and a pair id. Features that are in no pair (dummy rows,
    a modality without one) and unused scales keep a path with gradient zero, so that on every rank every parameter
    gets a gradient: engines that reduce parameter by parameter would wait for it.

    Args:
        outputs: what the model's forward returns: ``features`` {m: [n_m, D]}, ``logit_scale`` and ``logit_bias``
            {pair: [1]}. Every other group is rows by modality like ``features``, for losses that take extras.
        batch: gives ``rows`` {m: [n_m]} (empty for a dummy row), ``ids`` [B], ``size`` B, and ``extras`` and
            ``teachers`` for losses that take them.
        pairs: (modality, modality).
        early: gathers of these features that were begun in the forward.

    Returns:
        value and metrics as in :class:`LossOutput`; metrics are named ``loss/PAIR``, ``top1/A-to-B`` …,
        ``logit_scale/PAIR`` and, where there is one, ``logit_bias/PAIR``.
    """
    slots = {m: to_slots(x, batch.rows[m], batch.size) for m, x in outputs["features"].items()}
    with early.given_to(slots) if early is not None else nullcontext():
        return _of_pairs(outputs, slots, batch, pairs, loss)


def _of_pairs(
    outputs: Mapping[str, Mapping[str, Tensor]],
    slots: Mapping[str, Tensor],
    batch: Batch,
    pairs: Sequence[tuple[str, str]],
    loss: Loss,
) -> LossOutput:
    scales, biases = outputs["logit_scale"], outputs["logit_bias"]
    has = {m: mark(batch.rows[m], batch.size) for m in slots}
    value = zero_path(x for group in outputs.values() for x in group.values())
    metrics: dict[str, Tensor] = {}
    for a, b in pairs:
        key = pair_name((a, b))
        ids = torch.where(has[a] & has[b], batch.ids, ABSENT)
        more = {"extras": extras_of(outputs, batch, (a, b), pairs)} if loss.takes_extras else {}
        out = loss(slots[a], slots[b], ids, scales[key], biases.get(key), **more)
        value = value + out.value / len(pairs)
        metrics[f"loss/{key}"] = out.value.detach()
        metrics |= {_metric_name(name, a, b): x for name, x in out.metrics.items()}
        metrics[f"logit_scale/{key}"] = scales[key].detach().squeeze()
        if key in biases:
            metrics[f"logit_bias/{key}"] = biases[key].detach().squeeze()
    return LossOutput(value, metrics)


SHARED = ("features", "logit_scale", "logit_bias")
"""Groups of a model's outputs that every loss is given; the others are extras."""


def extras_of(
    outputs: Mapping[str, Mapping[str, Tensor]],
    batch: Batch,
    pair: tuple[str, str],
    pairs: Sequence[tuple[str, str]] = (),
) -> Extras:
    """What the batch and the model's further outputs hold for a pair, one of ``pairs``."""
    out = Extras(pair, {}, {}, teachers=batch.teachers, pairs=pairs, step=batch.step, numbers=batch.numbers)
    out.seen = batch.seen
    for group, rows in outputs.items():
        for side, m in zip((out.a, out.b), pair, strict=True):
            if group not in SHARED and m in rows:
                side[group] = to_slots(rows[m], batch.rows[m], batch.size)
    for name, values in batch.extras.items():
        for side, key in ((out.a, pair[0]), (out.b, pair[1]), (out.both, pair_name(pair)), (out.both, WHOLE)):
            if key in values:
                side[name] = values[key]
    return out


def mark(rows: Tensor, size: int) -> Tensor:
    """Bool [size]: which slots are in ``rows``."""
    return torch.zeros(size, dtype=torch.bool, device=rows.device).index_fill(0, rows, True)


def zero_path(tensors: Iterable[Any]) -> Tensor:
    """A zero that depends on every tensor: its gradient there is 0 even where the tensor holds a NaN."""
    total: Tensor = torch.stack([x[:0].sum(dtype=torch.float32) for x in tensors]).sum()
    return total


def _metric_name(name: str, a: str, b: str) -> str:
    base, _, direction = name.rpartition("_")
    ends = {"ab": f"{a}-to-{b}", "ba": f"{b}-to-{a}"}
    return f"{base}/{ends[direction]}" if direction in ends else f"{name}/{pair_name((a, b))}"
