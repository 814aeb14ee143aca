"""A margin loss over all negatives (Kiros et al. 2014, arXiv 1411.2539).

L = 1/2n Σ_i Σ_{j: id_j ≠ id_i} [m − a_i·b_i + a_i·b_j]₊ + [m − a_i·b_i + b_i·a_j]₊
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from dualenc.config import Section
from dualenc.distributed.gather import gather, gather_ids
from dualenc.distributed.world import world_size
from dualenc.losses import Loss, LossOutput


class Hinge(Loss):
    """Every wrong pair should be ``margin`` further apart than the right one."""

    class Config(Section):
        margin: Annotated[float, Field(gt=0)] = 0.2

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.margin = config.margin

    def forward(
        self, a: Tensor, b: Tensor, ids: Tensor, logit_scale: Tensor, logit_bias: Tensor | None = None
    ) -> LossOutput:
        all_ids, all_a, all_b = gather_ids(ids), gather(a), gather(b)
        share = (all_ids >= 0).sum().clamp(min=1) / world_size()
        mine = ids >= 0
        wrong = (all_ids[None] >= 0) & (all_ids[None] != ids[mine][:, None])
        right = (a[mine] * b[mine]).sum(1, keepdim=True)
        total = a.new_zeros(())
        for rows, columns in ((a[mine], all_b), (b[mine], all_a)):
            total = total + ((self.margin - right + rows @ columns.T).clamp(min=0) * wrong).sum()
        return LossOutput(total / share / 2, {"cosine": right.sum().detach() / share})
