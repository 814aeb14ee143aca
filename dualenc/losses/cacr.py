"""Contrastive attraction and contrastive repulsion (CACR, arXiv 2105.03746): far positives are pulled harder, near
negatives pushed harder.

With the cost c_ij = ‖a_i − b_j‖² = 2 − 2 a_i·b_j,

    CA_i = Σ_{j ∈ P(i)} π⁺_ij c_ij,     π⁺_i = softmax over the positives of  t⁺ c_ij
    CR_i = −Σ_{j ∉ P(i)} π⁻_ij c_ij,    π⁻_i = softmax over the negatives of −t⁻ c_ij
    ℓ_i  = CA_i + CR_i

``form: nce`` is the paper's large-scale form: ℓ_i = 2/s · Σ_{j ∈ P(i)} π⁺_ij · (−log softmax_j(s · a_i·b_j)), with π⁺
and the factor 2/s without gradient. **With one positive per row it is InfoNCE** (times 2/s), and π⁺ is 1 in both forms:
the weighted attraction needs items with several positives, such as captions or crops that share a pair id.
``distance`` uses no temperature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from dualenc.losses.blockwise.row_loss import INF, LogSumExp, Mean, Reduction, RowLoss, Side, Tile
from dualenc.losses.contrast import ContrastConfig, Contrastive, RowInputs
from dualenc.losses.loss import losses


@dataclass(frozen=True, slots=True)
class AttractRepel(RowLoss):
    """``form: distance`` for one direction. ``detach``: no gradient flows through π."""

    t_plus: float
    t_minus: float
    detach: bool = False

    kinds = (Mean, Mean)

    def sums(self, tile: Tile) -> Sequence[Reduction | None]:
        """See the base class."""
        cost = 2 - 2 * tile.cosine
        weighed = cost.detach() if self.detach else cost
        return [
            Mean(cost, (self.t_plus * weighed).masked_fill(~tile.positive, -INF)),
            Mean(cost, (-self.t_minus * weighed).masked_fill(tile.positive, -INF)),
        ]

    def loss(self, sums: Sequence[Tensor], rows: Side, scale: Tensor) -> Tensor:
        """See the base class."""
        return sums[0] - sums[1]


@dataclass(frozen=True, slots=True)
class AttractNCE(RowLoss):
    """``form: nce`` for one direction."""

    t_plus: float

    kinds = (LogSumExp, Mean)

    def sums(self, tile: Tile) -> Sequence[Reduction | None]:
        """See the base class."""
        cost = (2 - 2 * tile.cosine).detach()
        return [LogSumExp(tile.logits), Mean(tile.logits, (self.t_plus * cost).masked_fill(~tile.positive, -INF))]

    def loss(self, sums: Sequence[Tensor], rows: Side, scale: Tensor) -> Tensor:
        """See the base class."""
        return 2 / scale.detach() * (sums[0] - sums[1])


@losses.register("cacr")
class CACR(Contrastive):
    """Far positives are pulled harder and near negatives pushed harder; no temperature.

    Formula: Σ_P π⁺·c − Σ_N π⁻·c, c = ‖a_i − b_j‖², π⁺ = softmax_P(t⁺·c), π⁻ = softmax_N(−t⁻·c)
    Paper: CACR, arXiv 2105.03746
    Needs: nothing; several positives per pair id for π⁺ to act
    """

    class Config(ContrastConfig):
        """Settings."""

        form: Literal["distance", "nce"] = Field("distance", description="nce: InfoNCE with weighted positives")
        t_plus: Annotated[float, Field(ge=0)] = Field(1.0, description="t⁺")
        t_minus: Annotated[float, Field(ge=0)] = Field(2.0, description="t⁻; not used by form: nce")
        detach: bool = Field(False, description="no gradient through the weights; always so in form: nce")

    def directions(self, inputs: RowInputs) -> tuple[RowLoss, RowLoss]:
        """See the base class."""
        c = self.config
        row_loss: RowLoss = AttractNCE(c.t_plus) if c.form == "nce" else AttractRepel(c.t_plus, c.t_minus, c.detach)
        return row_loss, row_loss
