"""Decoupled contrastive learning (DCL and DCLW, arXiv 2110.06848): the positives leave the denominator.

    ℓ_i = −w_i · mean_{j ∈ P(i)} z_ij + log Σ_{j ∉ P(i)} exp(z_ij),    z_ij = s · a_i·b_j

With one positive DCL_i = NCE_i + log(1 − p_ii), and its gradient at row i's logits is InfoNCE's / (1 − p_ii): it does
not fade once a pair is found, which helps where the batch is small. DCLW (``weighted``) has weights
w_i = 2 − n·softmax_i(a_i·b_i/σ) over the n rows of the global batch, without gradient; otherwise w_i = 1.

**A learned scale would never stop growing**: the derivative at s tends to −(a_i·b_i − max_j a_i·b_j), whatever s is. So
by default (``scale_by: nce``) the scale is moved by InfoNCE of the same similarities, and the features by DCL.
A row without any negative loses nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from dualenc.distributed.gather import gather_ids
from dualenc.losses.blockwise.row_loss import INF, Kind, LogSumExp, Reduction, RowLoss, Side, Sum, Tile
from dualenc.losses.contrast import ContrastConfig, Contrastive, RowInputs
from dualenc.losses.loss import losses
from dualenc.losses.targets import TileFunction

ScaleBy = Literal["nce", "loss", "nothing"]


@dataclass(frozen=True, slots=True)
class Decoupled(RowLoss):
    """The loss of the module for one direction.

    Attributes:
        scale_by: what moves the scale: InfoNCE, this loss itself, nothing.
        weight: the value of the slots that holds w_i; None: 1.
        log_weight: a function of a tile that is added to negatives' logits, as in ``meow``; None: nothing.
    """

    scale_by: ScaleBy = "nce"
    weight: str | None = None
    log_weight: TileFunction | None = None

    @property
    def kinds(self) -> Sequence[Kind]:
        """See the base class."""
        return [LogSumExp, Sum, Sum, *((LogSumExp, Sum) if self.scale_by == "nce" else ())]

    def sums(self, tile: Tile) -> Sequence[Reduction | None]:
        """See the base class."""
        z = tile.logits if self.scale_by == "loss" else tile.scale.detach() * tile.cosine
        negative = z if self.log_weight is None else z + self.log_weight(tile)
        positive = tile.positive
        out: list[Reduction | None] = [
            LogSumExp(negative.masked_fill(positive, -INF)),
            Sum(torch.where(positive, z, 0.0)),
            None if tile.backward else Sum(positive.to(z.dtype)),
        ]
        if self.scale_by == "nce":
            of_scale = tile.scale * tile.cosine.detach()
            out += [LogSumExp(of_scale), Sum(torch.where(positive, of_scale, 0.0))]
        return out

    def loss(self, sums: Sequence[Tensor], rows: Side, scale: Tensor) -> Tensor:
        """See the base class."""
        negatives, wanted, count = sums[:3]
        weight = 1.0 if self.weight is None else rows.values[self.weight]
        alone = negatives.isneginf()
        out = negatives.masked_fill(alone, 0.0) - (weight * wanted / count).masked_fill(alone, 0.0)
        if self.scale_by != "nce":
            return out
        nce = sums[3] - sums[4] / count
        return out + nce - nce.detach()


@losses.register("dcl")
class DCL(Contrastive):
    """InfoNCE without the positive in the denominator, for small batches.

    Formula: −w_i·s·a_i·b_i + log Σ_{j≠i} exp(s·a_i·b_j)
    Paper: DCL and DCLW, arXiv 2110.06848
    Needs: nothing; the scale is moved by InfoNCE unless scale_by says otherwise
    """

    class Config(ContrastConfig):
        """Settings."""

        weighted: bool = Field(False, description="DCLW: pairs that are far apart weigh more")
        sigma: Annotated[float, Field(gt=0)] = Field(0.5, description="of DCLW's weights")
        scale_by: ScaleBy = Field("nce", description="what moves a learned scale; loss: it grows without bound")

    def values(self, inputs: RowInputs) -> dict[str, Tensor]:
        """See the base class."""
        return {"weight": dclw_weights(inputs, self.config.sigma)} if self.config.weighted else {}

    def directions(self, inputs: RowInputs) -> tuple[RowLoss, RowLoss]:
        """See the base class."""
        row_loss = Decoupled(self.config.scale_by, "weight" if self.config.weighted else None)
        return row_loss, row_loss


def dclw_weights(inputs: RowInputs, sigma: float) -> Tensor:
    """w_i [B] = 2 − n·softmax_i(a_i·b_i/σ) over the valid rows of all ranks; their mean is 1."""
    with torch.no_grad():
        similarity = torch.where(inputs.ids >= 0, (inputs.a * inputs.b).sum(1) / sigma, -INF)
        everywhere = gather_ids(similarity)
        count = (~everywhere.isneginf()).sum()
        return 2 - count * (similarity - everywhere.logsumexp(0)).exp()
