"""One view of parameters, whether or not an engine has sharded them.

A parameter's *local* tensor is what this rank holds: all of it (one process, DDP, ZeRO 0–2), its DTensor shard
(FSDP2), or its flat partition (ZeRO-3). Both directions are here, so that saves, moving averages and optimizer state
speak of whole tensors, or of flat ranges of them, by name and know no engine.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dualenc.checkpoint.ranges import Piece, Stored, deal
from dualenc.errors import CheckpointError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def _dtensor(data: Tensor) -> DTensor | None:
    """``data`` if it is a DTensor. Their module takes a second to import: where nobody has, there are none."""
    module = sys.modules.get("torch.distributed.tensor")
    return data if module is not None and isinstance(data, module.DTensor) else None


def _partition(p: Tensor) -> Tensor | None:
    """ZeRO-3's flat part of a parameter; DeepSpeed sets it on the parameter, whose class does not declare it."""
    return getattr(p, "ds_tensor", None)


def local(p: Tensor) -> Tensor:
    """The part of a parameter or buffer that this rank holds (shares memory with it)."""
    data = p.detach()
    if (shards := _dtensor(data)) is not None:
        return shards.to_local()
    partition = _partition(p)
    return data if partition is None else partition.data


def full(p: Tensor, part: Tensor) -> Tensor:
    """The whole tensor of which ``part`` is this rank's piece, cut like ``p``. All ranks must call it alike."""
    if (data := _dtensor(p.detach())) is not None:
        whole = type(data).from_local(
            part, data.device_mesh, data.placements, run_check=False, shape=data.shape, stride=data.stride()
        )
        return whole.full_tensor()
    if _partition(p) is None:
        return part
    return gather_partitions(p, part)


def gather_partitions(p: Any, part: Tensor) -> Tensor:
    """ZeRO-3: the whole of ``p``-shaped state from every rank's flat ``part`` (the last ones are padded)."""
    mine = part.detach().flatten().to(p.device)
    out = mine.new_empty(dist.get_world_size() * mine.numel())
    dist.all_gather_into_tensor(out, mine)
    return out[: p.ds_numel].view(p.ds_shape)


@torch.no_grad()
def all_finite(model: nn.Module) -> bool:
    """Whether every trained parameter is finite, as far as this rank holds it."""
    found = [torch.isfinite(local(p)).all() for p in model.parameters() if p.requires_grad]
    return not found or bool(torch.stack(found).all())


def is_cut(p: Tensor) -> bool:
    """Whether ranks hold different parts of it."""
    return _dtensor(p.detach()) is not None or _partition(p) is not None


def extent(p: Tensor) -> tuple[int, int]:
    """[start, end) of this rank's local part in the flattened whole tensor; ZeRO-3's padding is left out."""
    if (data := _dtensor(p.detach())) is not None:
        from torch.distributed.tensor import Replicate, Shard

        mesh = data.device_mesh
        if data.placements != (*[Replicate()] * (mesh.ndim - 1), Shard(0)):
            raise RuntimeError(f"shards are cut along the first dimension, got {data.placements}")
        rows, row = data.shape[0], data.shape[1:].numel()
        each = -(-rows // mesh.size(mesh.ndim - 1))  # as torch.chunk
        start = min(mesh.get_local_rank(mesh.ndim - 1) * each, rows)
        end = min(start + each, rows)
        if (end - start) * row != data.to_local().numel():
            raise RuntimeError(f"expected rows {start} to {end} of {rows} here, got {data.to_local().shape}")
        return start * row, end * row
    partition = _partition(p)
    if partition is None:
        return 0, p.numel()
    whole, each = int(p.ds_numel), partition.numel()  # type: ignore[attr-defined]
    start = min(dist.get_rank() * each, whole)
    return start, min(start + each, whole)


def _writes(p: Tensor) -> bool:
    """Whether this rank writes its part of ``p``: of the ranks that hold the same shard (HSDP), the first does."""
    data = _dtensor(p.detach())
    if data is None or data.device_mesh.ndim == 1:
        return True
    return data.device_mesh.get_local_rank(0) == 0


def piece(name: str, p: Tensor, part: Tensor) -> Piece:
    """``part``, cut like ``p``, as a flat range of the whole."""
    (start, end), flat = extent(p), part.detach().flatten()
    if len(flat) != local(p).numel():
        raise RuntimeError(f"{name}: {len(flat)} elements, but this rank holds {local(p).numel()} of the parameter")
    return Piece(name, tuple(shape(p)), start, flat[: end - start if _writes(p) else 0])


def own(parts: Mapping[str, tuple[Tensor, Tensor]], rank: int, world_size: int) -> list[Piece]:
    """What this rank writes of tensors given as (parameter or buffer, local part): together, every element once.

    Parts that only this rank holds, an equal share of the parameters that all ranks hold, and rank 0 the buffers
    (running statistics may differ between ranks; an unsharded checkpoint keeps those of rank 0, too).
    """
    mine, everywhere = [], []
    for name, (p, part) in parts.items():
        if is_cut(p) or (rank == 0 and not isinstance(p, nn.Parameter)):
            mine.append(piece(name, p, part))
        elif isinstance(p, nn.Parameter):
            everywhere.append(piece(name, p, part))
    return [x for x in mine if x.data.numel() or rank == 0] + deal(everywhere, rank, world_size)


def read_all(tensors: Mapping[str, Tensor], saved: Stored) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, parameter or buffer, its saved local part) of a whole model, one after another.

    Raises:
        CheckpointError: the checkpoint has an extra tensor, lacks one, or one has another shape.
    """
    for name in saved.shapes:
        if name not in tensors:
            raise CheckpointError(f"The checkpoint has a tensor {name}, which the model does not have")
    for name, x in tensors.items():
        yield name, x, read(x, saved, name)


def read(p: Tensor, saved: Stored, name: str) -> Tensor:
    """This rank's part of a saved tensor, in the shape of :func:`local` (on the CPU); only this part is read.

    Raises:
        CheckpointError: the saved tensor is missing or has another shape.
    """
    if name not in saved.shapes:
        raise CheckpointError(f"The checkpoint has no tensor {name}, which the model needs")
    if saved.shapes[name] != tuple(shape(p)):
        raise CheckpointError(
            f"{name} has shape {list(saved.shapes[name])} in the checkpoint, but the model needs {list(shape(p))}"
        )
    start, end = extent(p)
    flat, mine = saved.read(name, start, end), local(p)
    if mine.numel() > len(flat):  # ZeRO-3's last partitions are padded
        flat = torch.cat([flat, flat.new_zeros(mine.numel() - len(flat))])
    return flat.view(mine.shape)


def shape(p: Tensor) -> torch.Size:
    """The whole tensor's shape."""
    # ZeRO 3 hangs the whole shape on a parameter that it has emptied
    return torch.Size(getattr(p, "ds_shape", p.shape))
