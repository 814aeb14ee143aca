"""Hard negatives weigh more: HCL (arXiv 2010.04592) and HN-NCE (DiHT, arXiv 2301.02280, eq. 4).

With z_ij = s · a_i·b_j, m_i negatives, and weights w_ij = exp(β z_ij) / mean_{k ∉ P(i)} exp(β z_ik), whose mean is 1,

    R_i = mean_{j ∉ P(i)} w_ij exp(z_ij)
    ℓ_i = −mean_{j ∈ P(i)} z_ij + log( α Σ_{j ∈ P(i)} exp(z_ij) + m_i · G_i )
    G_i = max( (R_i − τ⁺ mean_{j ∈ P(i)} exp(z_ij)) / (1 − τ⁺), exp(−s) )    with τ⁺ > 0, else R_i

β = 0, α = 1, τ⁺ = 0 is InfoNCE. HN-NCE has τ⁺ = 0 and β, α as settings; HCL has α = 1 and τ⁺ the probability that a
negative is a false one. The gradient flows through the weights, as in HCL's code. A row without any negative has only
its positives. With α < 1 a learned scale has no minimum of its own (see ``dcl``): bound it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from dualenc.losses.blockwise.row_loss import INF, Kind, LogSumExp, Reduction, RowLoss, Side, Sum, Tile
from dualenc.losses.contrast import ContrastConfig, Contrastive, RowInputs
from dualenc.losses.loss import losses
from dualenc.losses.targets import TileFunction


@dataclass(frozen=True, slots=True)
class Reweighted(RowLoss):
    """The loss of the module for one direction, with any weights of the negatives.

    Attributes:
        log_weight: a function of a tile: log w_ij up to a constant of the row; the mean of w over a row's negatives is
            made 1.
        alpha, tau_plus: α and τ⁺.
    """

    log_weight: TileFunction
    alpha: float = 1.0
    tau_plus: float = 0.0

    @property
    def kinds(self) -> Sequence[Kind]:
        """See the base class."""
        return [LogSumExp, LogSumExp, LogSumExp, Sum, Sum, Sum]

    def sums(self, tile: Tile) -> Sequence[Reduction | None]:
        """See the base class."""
        z, positive = tile.logits, tile.positive
        log_weight = self.log_weight(tile).masked_fill(positive, -INF)
        counts: list[Reduction | None] = [None, None]
        if not tile.backward:
            ones = positive.to(z.dtype)
            counts = [Sum(ones), Sum(1 - ones)]
        return [
            LogSumExp(z.masked_fill(~positive, -INF)),
            LogSumExp(z + log_weight),
            LogSumExp(log_weight),
            Sum(torch.where(positive, z, 0.0)),
            *counts,
        ]

    def loss(self, sums: Sequence[Tensor], rows: Side, scale: Tensor) -> Tensor:
        """See the base class."""
        positives, weighted, weights, wanted, n_positive, n_negative = sums
        alone = n_negative == 0
        mean = weighted.masked_fill(alone, 0.0) - weights.masked_fill(alone, 0.0)
        if self.tau_plus:
            false = positives - n_positive.log()
            top = torch.maximum(mean, false).detach()
            left = (mean - top).exp() - self.tau_plus * (false - top).exp()
            tiny = torch.finfo(left.dtype).tiny
            estimate = top + left.clamp(min=tiny).log() - math.log1p(-self.tau_plus)
            mean = torch.maximum(estimate, -scale)
        negatives = (mean + n_negative.clamp(min=1).log()).masked_fill(alone, -INF)
        return torch.logaddexp(positives + math.log(self.alpha), negatives) - wanted / n_positive


@losses.register("hcl")
class HCL(Contrastive):
    """InfoNCE in which hard negatives weigh more (HCL, HN-NCE), and which may allow for false ones.

    Formula: −z_ii + log(α·exp(z_ii) + Σ_{j≠i} w_ij·exp(z_ij)), w_ij ∝ exp(β·z_ij) with mean 1, z = s·a_i·b_j
    Paper: HCL, arXiv 2010.04592; HN-NCE (DiHT), arXiv 2301.02280
    Needs: nothing
    """

    class Config(ContrastConfig):
        """Settings."""

        beta: Annotated[float, Field(ge=0)] = Field(0.25, description="hardness; 0: all negatives weigh the same")
        alpha: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="weight of the positive below the fraction")
        tau_plus: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="share of false negatives (HCL)")

    def directions(self, inputs: RowInputs) -> tuple[RowLoss, RowLoss]:
        """See the base class."""
        c = self.config
        row_loss = Reweighted(lambda tile: c.beta * tile.logits, c.alpha, c.tau_plus)
        return row_loss, row_loss
