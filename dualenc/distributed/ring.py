"""A block that travels around the ranks, so that no rank ever holds what all ranks hold together.

Rank r starts with its own block and hands it to the next rank, W times; then every block has met every rank and is
home again, with what the ranks added to it. A rank holds its own block, the visiting one and the one that arrives,
whatever W is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

Visit = Callable[[Sequence[Tensor], Tensor], None]


def circulate(visit: Visit, fixed: Sequence[Tensor], found: Tensor) -> Tensor:
    """Pass every rank's block by every rank once, and return the results to its owner.

    Not differentiable: for use inside an autograd function, whose backward circulates the gradients as ``found``.
    Every rank must call it in the same order with the same shapes; the world has two ranks or more.

    Args:
        visit: called W times with the visiting block: ``visit(fixed, found)``; it changes ``found`` in place.
        fixed: tensors that are only read; they go on to the next rank while ``visit`` works.
        found: what ranks add to; it goes on after the visit.

    Returns:
        ``found`` after all visits, at home.
    """
    hops = dist.get_world_size()
    fixed = [x.contiguous() for x in fixed]
    for hop in range(hops):
        arriving = _pass_on(fixed) if hop < hops - 1 else None
        visit(fixed, found)
        (found,) = _pass_on([found])()
        if arriving:
            fixed = arriving()
    return found


def _pass_on(block: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
    """Start sending tensors to the next rank and receiving the previous rank's; the result waits and returns these.

    All ranks post the same list in the same order, which is how messages of one pair of ranks are matched.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    arrived = [torch.empty_like(x) for x in block]
    operations = []
    for out, into in zip(block, arrived, strict=True):
        operations.append(dist.P2POp(dist.isend, out, (rank + 1) % size))
        operations.append(dist.P2POp(dist.irecv, into, (rank - 1) % size))
    requests = dist.batch_isend_irecv(operations)

    def wait() -> list[Tensor]:
        for request in requests:
            request.wait()
        return arrived

    return wait
