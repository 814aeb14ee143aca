"""The hardest negatives of rows among the columns of all ranks, a strip of rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor

INF = float("inf")


@torch.no_grad()
def hardest(
    rows: Tensor, row_ids: Tensor, columns: Tensor, column_ids: Tensor, k: int, strip_mb: float = 8.0
) -> tuple[Tensor, Tensor]:
    """The ``k`` negatives of each row with the largest cosine, from the largest down.

    Args:
        rows: [n, D]; row_ids: [n]; columns: [N, D]; column_ids: [N], −1 for one that is not there.
        strip_mb: MiB of cosines held at once.

    Returns:
        cosines [n, k] and column numbers [n, k], where k is at most N; a cosine is −inf where a row has fewer.
    """
    k = min(k, len(columns))
    height = max(int(strip_mb * 2**20 / columns.element_size() / max(len(columns), 1)), 16)
    # What stands in a column that is not there must not count, were it NaN.
    columns = torch.where(column_ids[:, None] >= 0, columns, 0.0)
    cosines, numbers = rows.new_empty(len(rows), k), row_ids.new_empty(len(rows), k)
    for start in range(0, len(rows), height):
        i = slice(start, start + height)
        apart = (row_ids[i, None] != column_ids) & (column_ids >= 0)
        torch.topk((rows[i] @ columns.T).masked_fill_(~apart, -INF), k, out=(cosines[i], numbers[i]))
    return cosines, numbers


def uniform(ids: Tensor, salt: Tensor, count: int) -> Tensor:
    """Numbers in [0, 1), fp64 [n, count]: of each id and the salt alone, so alike on any number of ranks.

    Args:
        ids: [n] int64; salt: a scalar int64.
    """
    x = (ids[:, None] + salt) * -7046029254386353131 + torch.arange(count, device=ids.device) * 6364136223846793005
    for multiplier in (-4658895280553007687, -7723592293110705685):  # the mixing of splitmix64
        x = (x ^ (x >> 30 & (1 << 34) - 1)) * multiplier
    return (x ^ (x >> 31 & (1 << 33) - 1)).bitwise_and((1 << 53) - 1).double() / (1 << 53)
