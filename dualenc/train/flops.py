"""Floating-point operations of a step, and the share of the device's peak that they reach (MFU).

The towers run once on meta tensors of the shapes of the first batch, and torch counts the multiplications and additions
of its matrix products, convolutions and attentions. A tower that is trained counts three times, as its backward takes
twice its forward; a locked one once. So does a caption head, which is trained. The rest of the loss, recomputation and
micro-batches, which encode twice, are not counted.
"""

from __future__ import annotations

import copy
import logging
import resource
import sys
from typing import Any

import torch
from torch import nn

from dualenc.data.batch import Batch, map_tensors
from dualenc.encoders import DualEncoder
from dualenc.encoders.caption_head import CaptionHead
from dualenc.encoders.context_head import ContextHead
from dualenc.encoders.dual_encoder import telling_rows
from dualenc.flop_counter import counting

logger = logging.getLogger(__name__)

PEAKS = {
    "B200": 2250.0,
    "GH200": 989.4,
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.5,
    "H100": 989.4,
    "MI300X": 1307.4,
    "A100": 312.0,
    "A30": 165.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
    "V100": 125.0,
    "T4": 65.0,
}
"""Dense bf16 peak of a device in 10^12 operations a second, from the vendors' data sheets (V100 and T4, which have no
bf16: fp16). A device is found by the first of these names in its own."""


def peak_of(name: str) -> float | None:
    """Operations a second of a device by the name that torch gives it; None for one that is not listed."""
    words = name.replace("-", " ")
    found = [peak for key, peak in PEAKS.items() if all(w in words.split() for w in key.split())]
    return found[0] * 1e12 if found else None


class FlopCount:
    """Counts the operations of a model's step once, on its first batch.

    Build it before the engine cuts the model: shapes are taken now, on the meta device, and no weight is copied.
    """

    def __init__(self, model: DualEncoder) -> None:
        tensors = [*model.parameters(), *model.buffers()]
        meta: dict[int, Any] = {id(x): x.detach().to("meta").requires_grad_(x.requires_grad) for x in tensors}
        for x in model.parameters():
            meta[id(x)] = nn.Parameter(meta[id(x)], requires_grad=x.requires_grad)
        self._model: DualEncoder | None = None
        try:
            self._model = copy.deepcopy(model, meta)
        except (RuntimeError, TypeError) as e:  # a tower that holds what cannot be copied
            logger.info("operations are not counted: %s", str(e).splitlines()[:1])
        self.per_sample: float | None = None
        """Operations of a training step for each slot of the batch; None: not counted yet, or not countable."""

    def note(self, batch: Batch) -> None:
        """Count on this batch, if it is the first."""
        model, self._model = self._model, None
        if model is not None:
            self.per_sample = _count(model.eval(), batch)


def _count(model: DualEncoder, batch: Batch) -> float | None:
    total = forward = 0.0
    inputs = map_tensors(batch.inputs, lambda x: x.to("meta"))
    try:
        for m, rows in inputs.items():
            tower = model.tower(m)
            once = _operations(tower, rows)
            trained = any(p.requires_grad for p in tower.parameters())
            forward, total = forward + once, total + once * (3 if trained else 1)
        if any(isinstance(head, CaptionHead | ContextHead) for head in model.heads.values()):
            with telling_rows(model, map_tensors(batch.rows, lambda x: x.to("meta"))):
                total += 3 * (_operations(model, inputs) - forward)
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as e:
        logger.info("operations are not counted: %s cannot run on meta tensors (%s)", m, str(e).splitlines()[:1])
        return None
    return total / batch.size


def _operations(module: nn.Module, rows: Any) -> float:
    """Of one forward."""
    with torch.no_grad(), counting() as counted:
        module(rows)
    return float(counted.get_total_flops())


def speed(per_sample: float | None, samples_per_s: float, world_size: int, device: torch.device) -> dict[str, float]:
    """``tflops_per_s`` of all ranks and, on a device that is listed, ``mfu``, the share of its bf16 peak."""
    if per_sample is None:
        return {}
    rate = per_sample * samples_per_s
    out = {"tflops_per_s": rate / 1e12}
    peak = peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return out if peak is None else out | {"mfu": rate / (peak * world_size)}


def peak_memory(device: torch.device) -> float:
    """The most bytes this rank had so far: of the device as torch allocated them, on a CPU of main memory."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1.0 if sys.platform == "darwin" else 1024.0)
