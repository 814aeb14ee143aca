"""One view on parameters that an engine may have cut into pieces.

A parameter's *local* tensor is what this rank holds: all of it (one process, DDP, ZeRO 0–2), its DTensor shard
(FSDP2), or its flat partition (ZeRO-3). Both directions are here, so that saves, moving averages and optimizer state
speak of whole tensors by name and know no engine.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def local(p: Tensor) -> Tensor:
    """The part of a parameter or buffer that this rank holds (shares memory with it)."""
    data = p.detach()
    if isinstance(data, DTensor):
        return data.to_local()
    partition: Tensor | None = getattr(p, "ds_tensor", None)
    return data if partition is None else partition.data


def full(p: Tensor, part: Tensor) -> Tensor:
    """The whole tensor of which ``part`` is this rank's piece, cut like ``p``. All ranks must call it alike."""
    data = p.detach()
    if isinstance(data, DTensor):
        whole = DTensor.from_local(
            part, data.device_mesh, data.placements, run_check=False, shape=data.shape, stride=data.stride()
        )
        return whole.full_tensor()
    if getattr(p, "ds_tensor", None) is None:
        return part
    return gather_partitions(p, part)


def gather_partitions(p: Any, part: Tensor) -> Tensor:
    """ZeRO-3: the whole of ``p``-shaped state from every rank's flat ``part`` (the last ones are padded)."""
    mine = part.detach().flatten().to(p.device)
    out = mine.new_empty(dist.get_world_size() * mine.numel())
    dist.all_gather_into_tensor(out, mine)
    return out[: p.ds_numel].view(p.ds_shape)


def shard(p: Tensor, whole: Tensor) -> Tensor:
    """This rank's piece of ``whole``, cut like ``p``."""
    data = p.detach()
    if isinstance(data, DTensor):
        moved = whole.to(device=data.device, dtype=data.dtype)
        return distribute_tensor(moved, data.device_mesh, data.placements, src_data_rank=None).to_local()
    partition: Tensor | None = getattr(p, "ds_tensor", None)
    if partition is None:
        return whole
    size, start = partition.numel(), dist.get_rank() * partition.numel()
    flat = whole.flatten()[start : start + size]
    return torch.cat([flat, flat.new_zeros(size - len(flat))])


def shape(p: Tensor) -> torch.Size:
    """The whole tensor's shape."""
    return torch.Size(getattr(p, "ds_shape", p.shape))
