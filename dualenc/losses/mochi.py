"""Hard negatives mixed from the hardest of the batch (MoCHi, arXiv 2010.01028).

For the row q = a_i let n_1, n_2 … be its N_h hardest negatives among the columns of all ranks. Two kinds of mixtures,

    h = norm(u n_j + (1 − u) n_k),   u ~ U(0, 1)       ``between`` of them
    h = norm(v q + (1 − v) n_j),     v ~ U(0, ½)       ``towards`` the row

are added to the denominator of InfoNCE as s · q·sg(h); no gradient reaches them or their sources. Pairs with the row's
own id are never mixed in, so a repeated caption does not become a negative. A mixture of two negatives is made unit
length again and can be closer to q than either.

MoCHi contrasts two views of one modality. Across modalities the two sides lie apart, above all while towers are
untrained, and a mixture with the row lies between them, closer to the row than any column, its positive included. Such
mixtures fill the denominator and follow the row as it moves, and columns are pulled to their rows but hardly pushed
from others: random towers collapse to a point, and trained ones get worse. So ``towards`` is 0 by default. From random
weights add the others after a warm-up, as the paper does: ``checkpoint.init_from``, or
``loss: [info_nce, {name: mochi, warmup_samples: …}]``.

Random numbers follow from the row's pair id and the ids of the whole batch, so they are the same on any number of ranks
and after a resume.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from dualenc.distributed.gather import gather_ids
from dualenc.losses.blockwise.row_loss import INF, LogSumExp, Reduction, RowLoss, Side, Sum, Tile
from dualenc.losses.contrast import ContrastConfig, Contrastive, RowInputs
from dualenc.losses.hardest import hardest, uniform
from dualenc.losses.loss import losses


@dataclass(frozen=True, slots=True)
class WithMixtures(RowLoss):
    """InfoNCE with further negatives of each row alone: ``own`` [B, S] logits of this rank's rows, −inf: none; ``ids``
    [B] their pair ids."""

    own: Tensor
    ids: Tensor

    kinds = (LogSumExp, Sum, Sum)

    def sums(self, tile: Tile) -> Sequence[Reduction | None]:
        """See the base class."""
        return [
            LogSumExp(tile.logits),
            Sum(torch.where(tile.positive, tile.logits, 0.0)),
            None if tile.backward else Sum(tile.positive.to(tile.logits.dtype)),
        ]

    def loss(self, sums: Sequence[Tensor], rows: Side, scale: Tensor) -> Tensor:
        """See the base class."""
        own = self.own if len(self.own) == len(sums[0]) else self.own[self.ids >= 0]  # tiles leave absent rows out
        return torch.logsumexp(torch.cat([sums[0][:, None], own], 1), 1) - sums[1] / sums[2]


def mixtures(
    rows: Tensor,
    row_ids: Tensor,
    columns: Tensor,
    column_ids: Tensor,
    salt: Tensor,
    sizes: tuple[int, int, int],
    strip_mb: float = 8.0,
) -> Tensor:
    """Cosines [n, between + towards] of rows with their mixtures; −inf where a row has too few negatives.

    Holds the N_h hardest negatives of each row, [n, N_h, D].

    Args:
        rows: [n, D]; row_ids: [n]; columns: [N, D]; column_ids: [N].
        salt: a scalar int64, another one for every step and direction.
        sizes: N_h, ``between``, ``towards``; strip_mb: MiB of cosines held in the search.
    """
    hard, between, towards = sizes
    cosines, number = hardest(rows.detach(), row_ids, columns, column_ids, hard, strip_mb)
    with torch.no_grad():
        there = ~cosines.isneginf()
        near = columns[number].masked_fill(~there[:, :, None], 0.0)
        count = there.sum(1, keepdim=True)
        draw = uniform(row_ids, salt, 3 * between + 2 * towards).to(rows.dtype)
        u, first, second, v, source = torch.split(draw, [between, between, between, towards, towards], 1)
        first, second, source = ((x * count).long().clamp(max=near.shape[1] - 1) for x in (first, second, source))
        alike = torch.bmm(near, near.transpose(1, 2))
        pair = torch.gather(alike.flatten(1), 1, first * near.shape[1] + second)
        length = (u**2 + (1 - u) ** 2 + 2 * u * (1 - u) * pair).clamp(min=1e-12).sqrt()
        v = v / 2
        to_source = torch.gather(cosines.masked_fill(~there, 0.0), 1, source)
        length_towards = (v**2 + (1 - v) ** 2 + 2 * v * (1 - v) * to_source).clamp(min=1e-12).sqrt()
    # ⟨q, h⟩ from ⟨q, n⟩: the mixtures themselves are never made.
    to_near = torch.einsum("nd,nkd->nk", rows, near)
    itself = (rows * rows.detach()).sum(1, keepdim=True)
    mixed = (u * torch.gather(to_near, 1, first) + (1 - u) * torch.gather(to_near, 1, second)) / length
    pulled = (v * itself + (1 - v) * torch.gather(to_near, 1, source)) / length_towards
    return torch.cat([mixed, pulled], 1).masked_fill(count == 0, -INF)


@losses.register("mochi")
class MoCHi(Contrastive):
    """InfoNCE with further negatives mixed from each row's hardest ones.

    Formula: −z_ii + log(Σ_j exp(z_ij) + Σ_h exp(s·a_i·h)), h: mixtures of the hardest negatives, z = s·a_i·b_j
    Paper: MoCHi, arXiv 2010.01028
    Needs: nothing
    """

    class Config(ContrastConfig):
        """Settings."""

        hardest: Annotated[int, Field(ge=1)] = Field(32, description="N_h: negatives that are mixed, of each row")
        between: Annotated[int, Field(ge=0)] = Field(16, description="mixtures of two negatives, for each row")
        towards: Annotated[int, Field(ge=0)] = Field(
            0, description="mixtures of a negative with the row itself, for towers whose features share one region"
        )

    def directions(self, inputs: RowInputs) -> tuple[RowLoss, RowLoss]:
        """See the base class."""
        c, x = self.config, inputs
        all_ids, valid = gather_ids(x.ids), (x.ids >= 0)[:, None]
        out = []
        for k, (rows, others) in enumerate(((x.a, x.b), (x.b, x.a))):
            columns, sizes = gather_ids(others.detach()), (c.hardest, c.between, c.towards)
            rows = torch.where(valid, rows, 0.0)
            own = mixtures(rows, x.ids, columns, all_ids, all_ids.sum() + k, sizes, c.tile_mb or 8.0)
            out.append(WithMixtures(x.logit_scale * own, x.ids))
        return out[0], out[1]
