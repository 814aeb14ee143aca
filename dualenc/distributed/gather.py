"""All-gather of features with the correct gradient.

Each rank's loss is a function of every rank's features. With L = mean over ranks of L_r, the gradient at a rank's
features is the sum over ranks of what each L_r sends back: the backward is a reduce-scatter with SUM. Engines average
parameter gradients over ranks, so nothing else is scaled, for any world size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dualenc.distributed.world import world_size
from dualenc.errors import DualencError


def gather(x: Tensor) -> Tensor:
    """Concatenate ``x [B, …]`` of all ranks in rank order → ``[W·B, …]``; the gradient sums over ranks.

    Every rank must call it, and run the backward of it, in the same order.

    Raises:
        DualencError: if the ranks' shapes differ (gloo would abort the process, NCCL hang).
    """
    if world_size() == 1:
        return x
    check_equal_shapes(x)
    out: Tensor = _AllGather.apply(x)
    return out


def total(x: Tensor) -> Tensor:
    """Sum ``x`` of one shape over all ranks; its gradient is summed over ranks too, as :func:`gather`'s is.

    So a function of sums over the global batch (a covariance, say) that every rank evaluates alike has the gradient of
    one process: the same as ``gather(x[None]).sum(0)`` without W copies of it.
    """
    if world_size() == 1:
        return x
    check_equal_shapes(x)
    out: Tensor = _AllSum.apply(x)
    return out


def gather_ids(ids: Tensor) -> Tensor:
    """Concatenate integer ``ids [B]`` of all ranks → ``[W·B]``, without gradient."""
    return ids if world_size() == 1 else all_gather(ids)


_equal: set[tuple[int, ...]] = set()
"""Shapes that all ranks had together once, with the number of ranks in front."""


def check_equal_shapes(x: Tensor) -> None:
    """Raise on all ranks alike if ``x`` has another shape on some rank.

    Ranks compare each shape once: batches have one size on all ranks, so a new shape is new on all of them, and a step
    on known shapes communicates nothing and waits for nothing.
    """
    known = (world_size(), *x.shape)
    if world_size() == 1 or known in _equal:
        return
    mine = torch.tensor(x.shape, dtype=torch.int64, device=x.device)
    shapes = all_gather(mine).view(-1, x.ndim).tolist()
    if any(s != shapes[0] for s in shapes):
        listed = ", ".join(f"rank {r}: {s}" for r, s in enumerate(shapes))
        raise DualencError(
            f"Features must have the same shape on all ranks, got {listed}; give every rank the same batch size"
        )
    _equal.add(known)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return all_gather(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return reduce_scatter_sum(grad)


class _AllSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return all_sum(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return all_sum(grad)


def all_sum(x: Tensor) -> Tensor:
    """Sum ``x`` over ranks, without gradient."""
    out = x.detach().clone(memory_format=torch.contiguous_format)
    if world_size() > 1:
        dist.all_reduce(out)
    return out


def all_gather(x: Tensor) -> Tensor:
    """Concatenate ``x [B, …]`` of all ranks → ``[W·B, …]``, without gradient and without a check of the shapes.

    If a gather of ``x`` is under way (:func:`hand_over`), this waits for it and sends nothing.
    """
    if (started := _under_way.pop(id(x), None)) is not None:
        return started.begun.wait()
    return begin_all_gather(x, wait=True).out


@dataclass(slots=True)
class Begun:
    """An all-gather that is under way.

    Attributes:
        sent: what this rank sends; nobody may free or change it before the end.
        out: [W·B, …], to be read after :meth:`wait`.
    """

    sent: Tensor
    out: Tensor
    work: dist.Work | None

    def wait(self) -> Tensor:
        """``out`` when it is there. On CUDA the stream waits and the host does not."""
        if self.work is not None:
            self.work.wait()
            self.work = None
        return self.out


def begin_all_gather(x: Tensor, wait: bool = False) -> Begun:
    """Start :func:`all_gather` and return while it runs; with ``wait``, when it is done.

    Collectives of one group run in the order in which they were begun, so every rank must begin them in the same order.
    """
    sent = x.detach().contiguous()
    out = sent.new_empty((world_size() * sent.shape[0], *sent.shape[1:]))
    return Begun(sent, out, dist.all_gather_into_tensor(out, sent, async_op=not wait))


@dataclass(slots=True)
class _Promised:
    x: Tensor  # held, so that no other tensor has its id
    begun: Begun


_under_way: dict[int, _Promised] = {}
"""Gathers that were begun before anyone asked for them, by the id of the tensor that will be asked for."""


def hand_over(begun: Begun, x: Tensor) -> None:
    """Let the next gather of ``x``, this very tensor, have what ``begun`` brings; it was begun with the same values."""
    _under_way[id(x)] = _Promised(x, begun)


def withdraw(x: Tensor) -> bool:
    """Forget what was handed over for ``x``; whether nobody had asked for it."""
    return _under_way.pop(id(x), None) is not None


def reduce_scatter_sum(x: Tensor) -> Tensor:
    """Sum ``x [W·B, …]`` over ranks and keep this rank's ``[B, …]``."""
    out = x.new_empty((x.shape[0] // world_size(), *x.shape[1:]))
    dist.reduce_scatter_tensor(out, x.contiguous(), op=dist.ReduceOp.SUM)
    return out
