"""Uniformity on the sphere (Wang and Isola 2020, arXiv 2005.10242, eq. 2).

    L = log mean_{i, j: id_i ≠ id_j} exp(−t ‖x_i − x_j‖²)

over the valid rows of one tower in the global batch; rows of one id, repeats or positives, do not repel each other. The
sums over ranks are taken before the logarithm, so the value is that of one process.

Memory: strips of [n, N], recomputed in the backward.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from dualenc.distributed.gather import gather, gather_ids, total
from dualenc.losses.blockwise.strips import strip_sum
from dualenc.losses.loss import Loss, LossOutput, losses
from dualenc.losses.rowwise import StripConfig


def uniformity(x: Tensor, ids: Tensor, t: float = 2.0, strip_mb: float = 64.0) -> Tensor:
    """The loss above for one tower: x [B, D], ids [B] → scalar, the same on all ranks."""
    all_x, all_ids = gather(x), gather_ids(ids)
    valid, present = ids >= 0, all_ids >= 0

    def kernel_sum(rows: Tensor, row_ids: Tensor, columns: Tensor, column_ids: Tensor) -> Tensor:
        squared = (2 - 2 * rows @ columns.T).clamp(min=0)
        other = (row_ids[:, None] != column_ids[None]) & (row_ids >= 0)[:, None] & (column_ids >= 0)
        return torch.stack([(torch.exp(-t * squared) * other).sum(), other.sum().to(rows.dtype)])

    rows, columns = torch.where(valid[:, None], x, 0.0), torch.where(present[:, None], all_x, 0.0)
    kernel, count = total(strip_sum(kernel_sum, (rows, ids), (columns, all_ids), len(all_x), strip_mb))
    return torch.where(count > 0, (kernel / count.clamp(min=1)).clamp(min=torch.finfo(x.dtype).tiny), 1.0).log()


@losses.register("uniformity")
class Uniformity(Loss):
    """Rows spread evenly over the sphere, for each tower.

    Formula: log mean_{i≠j} exp(−t ‖x_i − x_j‖²)
    Paper: Wang and Isola 2020, arXiv 2005.10242
    Needs: nothing
    """

    class Config(StripConfig):
        """Settings."""

        t: Annotated[float, Field(gt=0)] = Field(default=2.0, description="t of the Gaussian kernel")

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def forward(
        self, a: Tensor, b: Tensor, ids: Tensor, logit_scale: Tensor, logit_bias: Tensor | None = None
    ) -> LossOutput:
        """See the module; scale and bias are not used."""
        c = self.config
        values = {f"uniformity_of_{n}": uniformity(x, ids, c.t, c.strip_mb) for n, x in c.of(a, b)}
        return LossOutput(torch.stack(list(values.values())).mean(), {n: v.detach() for n, v in values.items()})
