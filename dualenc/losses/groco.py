"""Learning by sorting (GroCo, arXiv 2301.02009): positives go above the hardest negatives, differentiably.

The cosines of a row's K hardest negatives and of its P positives, each ascending, go through an odd-even sorting
network whose comparators exchange two neighbours x, y softly: they stay with probability 1/2 + atan(β (y − x)) / π. The
product of the layers says with which probability a score ends at a rank, and

    ℓ_i = cross-entropy of "the score at rank r is a positive's" with "r is one of the P highest", mean over r

For K = P = 1 it is −log(1/2 + atan(β (s⁺ − s⁻)) / π). There is no temperature; at β = 1 separated pairs keep a loss of
0.288. Negatives are of the other modality, as positives are: the two ranges of cosines differ.
"""

from __future__ import annotations

from math import pi
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from dualenc.config import Section
from dualenc.distributed.gather import check_equal_shapes, gather, gather_ids
from dualenc.distributed.world import world_size
from dualenc.losses.blockwise.tiled import PositiveColumns
from dualenc.losses.hardest import hardest
from dualenc.losses.loss import Loss, LossOutput, losses


def order_loss(negatives: Tensor, positives: Tensor, beta: float) -> Tensor:
    """ℓ [n] of the module from cosines of negatives [n, K] and of positives [n, P], in any order."""
    scores = torch.cat([negatives.sort(1).values, positives.sort(1).values], 1)
    n, size, first = *scores.shape, negatives.shape[1]
    # Row r of ``of``: how likely the score at place r is each of the scores we began with.
    of = torch.eye(size, dtype=scores.dtype, device=scores.device).expand(n, size, size)
    for layer in range(size):
        low = torch.arange(layer % 2, size - 1, 2, device=scores.device)
        if not len(low):
            continue
        x, y = scores[:, low], scores[:, low + 1]
        stay = 0.5 + torch.atan(beta * (y - x)) / pi
        scores = scores.index_copy(1, low, stay * x + (1 - stay) * y)
        scores = scores.index_copy(1, low + 1, (1 - stay) * x + stay * y)
        x, y, stay = of[:, low], of[:, low + 1], stay[:, :, None]
        of = of.index_copy(1, low, stay * x + (1 - stay) * y).index_copy(1, low + 1, (1 - stay) * x + stay * y)
    is_positive = of[:, :, first:].sum(2)
    right = torch.cat([1 - is_positive[:, :first], is_positive[:, first:]], 1)
    return -right.clamp(min=torch.finfo(right.dtype).tiny).log().mean(1)


def groco_rows(
    rows: Tensor, row_ids: Tensor, columns: Tensor, column_ids: Tensor, k: int, beta: float, strip_mb: float = 8.0
) -> tuple[Tensor, Tensor]:
    """Σ ℓ_i over valid rows, and the number of rows with a positive above every negative.

    Args:
        rows: [B, D]; row_ids: [B]; columns: [N, D]; column_ids: [N]; k: K; strip_mb: MiB of cosines held at once.
    """
    total, found = rows[:0].sum() + columns[:0].sum(), rows.new_zeros(())
    valid = torch.nonzero(row_ids >= 0).flatten()
    place = PositiveColumns(column_ids)
    counts, there = place.count(row_ids[valid]), int((column_ids >= 0).sum())
    for p in sorted(set(counts.tolist())):  # rows with equally many positives at a time
        if p == there:  # without any negative there is nothing to sort
            continue
        mine = valid[counts == p]
        row, column = place.of(row_ids[mine])
        assert (row.view(-1, p) == torch.arange(len(mine), device=row.device)[:, None]).all()
        q = rows[mine]
        _, number = hardest(q.detach(), row_ids[mine], columns.detach(), column_ids, min(k, there - p), strip_mb)
        negatives, positives = (torch.einsum("nd,nkd->nk", q, columns[at]) for at in (number, column.view(-1, p)))
        total = total + order_loss(negatives, positives, beta).sum()
        found = found + (positives.detach().amax(1) > negatives.detach().amax(1)).sum()
    return total, found


@losses.register("groco")
class GroCo(Loss):
    """Positives are sorted above the hardest negatives by a differentiable sorting network; no temperature.

    Formula: mean_r BCE(rank r is a positive's), K negatives and P positives through an odd-even network
    Paper: GroCo, arXiv 2301.02009
    Needs: nothing
    """

    class Config(Section):
        """Settings."""

        negatives: Annotated[int, Field(ge=1, le=64)] = Field(10, description="K: the hardest negatives of a row")
        beta: Annotated[float, Field(gt=0)] = Field(1.0, description="β: steepness of a comparator")
        stop_gradient: bool = Field(True, description="columns get no gradient, as published")
        tile_mb: Annotated[float, Field(gt=0)] = Field(8.0, description="MiB of cosines held in the search for them")

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def forward(
        self, a: Tensor, b: Tensor, ids: Tensor, logit_scale: Tensor, logit_bias: Tensor | None = None
    ) -> LossOutput:
        """As every loss; columns [N, D] of both sides are gathered, and K of them are held for each row."""
        c = self.config
        check_equal_shapes(a)
        all_ids = gather_ids(ids)
        share = (all_ids >= 0).sum().clamp(min=1) / world_size()
        total, metrics = a.new_zeros(()), {}
        for x, y, name in ((a, b, "ab"), (b, a, "ba")):
            columns = gather_ids(y.detach()) if c.stop_gradient else gather(y)
            of_rows, hits = groco_rows(x, ids, columns, all_ids, c.negatives, c.beta, c.tile_mb)
            total = total + of_rows / (2 * share)
            metrics[f"top1_{name}"] = hits / share
        return LossOutput(total + logit_scale[:0].sum(), metrics)
