"""Blocks that travel around the ranks, so that no rank ever holds what all ranks hold together.

Rank r starts with its own block and hands it to the next rank, W times; then every block has met every rank and is
home again. What ranks add to a block on its way (running sums, gradients) comes home with it. A rank holds its own
block, the visiting one and the one that arrives: three of B rows, whatever W is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

Visit = Callable[[list[Tensor], list[Tensor]], None]


def circulate(visit: Visit, fixed: Sequence[Tensor], moving: Sequence[Tensor], both_ways: bool = True) -> list[Tensor]:
    """Let every rank's block meet every rank once, and bring it home.

    Not differentiable: for use inside an autograd function, whose backward circulates the gradients as ``moving``.
    Every rank must call it in the same order with the same shapes.

    Args:
        visit: called W times a lane with the visiting block: ``visit(fixed, moving)``; it changes ``moving`` in place.
        fixed: tensors [B, …] that only are read. They go on to the next rank while ``visit`` works.
        moving: tensors [B, …] that collect what ranks add. They go on after the visit.
        both_ways: the first half of the rows goes up the ranks, the second half down, so that a link that can send
            and receive at a time is used in both directions; ``visit`` then meets 2 W half blocks.

    Returns:
        ``moving`` after all visits, at home.
    """
    W = dist.get_world_size()
    rows = len((*fixed, *moving)[0])
    cuts = [(0, rows // 2), (rows // 2, rows)] if both_ways and rows > 1 else [(0, rows)]
    lanes = [([x[i:j].contiguous() for x in fixed], [x[i:j].clone() for x in moving]) for i, j in cuts]
    for hop in range(W):
        arriving = _send([lane[0] for lane in lanes]) if hop < W - 1 else None
        for lane in lanes:
            visit(*lane)
        fixed_now = arriving() if arriving else [lane[0] for lane in lanes]
        lanes = list(zip(fixed_now, _send([lane[1] for lane in lanes])(), strict=True))
    return [torch.cat(parts) for parts in zip(*(lane[1] for lane in lanes), strict=True)]


def _send(lanes: list[list[Tensor]]) -> Callable[[], list[list[Tensor]]]:
    """Start to pass each lane's tensors on, lane 0 up and lane 1 down; the result waits and gives what arrived.

    All ranks post the same list, so messages match by their order, on two ranks too, where up and down are one peer.
    """
    rank, W = dist.get_rank(), dist.get_world_size()
    arrived = [[torch.empty_like(x) for x in lane] for lane in lanes]
    operations = []
    for k, (out, into) in enumerate(zip(lanes, arrived, strict=True)):
        up, down = (rank + 1) % W, (rank - 1) % W
        to, source = (up, down) if k == 0 else (down, up)
        for x, y in zip(out, into, strict=True):
            operations += [dist.P2POp(dist.isend, x, to), dist.P2POp(dist.irecv, y, source)]
    requests = dist.batch_isend_irecv(operations) if operations else []

    def wait() -> list[list[Tensor]]:
        for request in requests:
            request.wait()
        return arrived

    return wait
