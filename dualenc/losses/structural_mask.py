"""Negatives of the same group are left out (arXiv 2006.10511): two slices at one depth, two frames of one place, two
clips of one recording look alike, and pushing them apart teaches nothing.

    ℓ_i = −mean_{j ∈ P(i)} z_ij + log Σ_{j ∈ P(i) or group_j ≠ group_i} exp(z_ij),    z_ij = s · a_i·b_j

That is the paper's G^D− (its G^D, where they are positives, is ``supcon``). An item without a group keeps all its
negatives. With every item in a group of its own it is InfoNCE.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from dualenc.losses.blockwise.row_loss import RowLoss
from dualenc.losses.contrast import ContrastConfig, Contrastive, RowInputs
from dualenc.losses.loss import losses
from dualenc.losses.supcon import same_value
from dualenc.losses.targets import SamePair, SoftTarget, without


@losses.register("structural_mask")
class StructuralMask(Contrastive):
    """InfoNCE whose negatives are not of the row's own group (place, clip, partition).

    Formula: −z_ii + log Σ_{j=i or group_j≠group_i} exp(z_ij), z = s·a_i·b_j
    Paper: Chaitanya et al. 2020, arXiv 2006.10511
    Needs: a label
    """

    class Config(ContrastConfig):
        """Settings."""

        label: str = Field("group", description="name in data.sources.N.values")
        label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
            default=0.0, description="ε: target spread over all columns"
        )

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.needs = [config.label]

    def directions(self, inputs: RowInputs) -> tuple[RowLoss, RowLoss]:
        """See the base class."""
        c = self.config
        row_loss = SoftTarget(
            SamePair(), push=without(lambda tile: same_value(tile, c.label)), smoothing=c.label_smoothing
        )
        return row_loss, row_loss
