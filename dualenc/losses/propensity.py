"""Negatives weighed by the inverse of how likely looks alone would pick them (after DebCSE, arXiv 2309.07396).

    ℓ_i = −mean_{j ∈ P(i)} z_ij + log( Σ_{j ∈ P(i)} exp(z_ij) + Σ_{j ∉ P(i)} w_ij exp(z_ij) ),    z_ij = s · a_i·b_j
    w_ij ∝ 1/p_ij with mean 1 over row i's negatives,
    p_ij = floor + (1 − floor) · ((1 − μ)·surface_ij + μ·meaning_ij)

surface is how alike two items are in a superficial way: exp(−|x_i − x_j| / width) for a number x such as a caption's
length. meaning is (cosine in a locked tower + 1)/2, where one is locked and μ > 0. So negatives of a row's own length,
which a similarity biased by length would favour, count less. DebCSE samples by 1/p; its p could not be checked, so this
form is the project's own. A constant p is InfoNCE.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from dualenc.data.batch import present
from dualenc.errors import ConfigError
from dualenc.losses.blockwise.row_loss import RowLoss, Tile
from dualenc.losses.contrast import ContrastConfig, Contrastive, RowInputs, frozen_features, label
from dualenc.losses.hcl import Reweighted
from dualenc.losses.loss import losses
from dualenc.losses.relational import frozen_cosine


@losses.register("propensity")
class Propensity(Contrastive):
    """Negatives weigh less the more they resemble the row on the surface alone, as in length.

    Formula: −z_ii + log(exp(z_ii) + Σ_{j≠i} w_ij·exp(z_ij)), w_ij ∝ 1/p_ij with mean 1, z = s·a_i·b_j
    Paper: after DebCSE, arXiv 2309.07396
    Needs: a label that is a number; a locked tower if semantic > 0
    """

    class Config(ContrastConfig):
        """Settings."""

        label: str = Field("length", description="the superficial number, in data.sources.N.values")
        width: Annotated[float, Field(gt=0)] = Field(5.0, description="difference at which surface is 1/e")
        semantic: Annotated[float, Field(ge=0, le=1)] = Field(0.0, description="μ: share of meaning in p")
        floor: Annotated[float, Field(gt=0, le=1)] = Field(0.1, description="least p: no weight is above 1/floor")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.needs = [config.label]

    def values(self, inputs: RowInputs) -> dict[str, Tensor]:
        """See the base class.

        Raises:
            ConfigError: the label is a list, or ``semantic`` is set and no tower is locked.
        """
        number = label(inputs.extras, self.config.label)
        if number.ndim != 1:
            raise ConfigError(
                f"loss.label: propensity needs one number per sample, and {self.config.label!r} is a list"
            )
        frozen = frozen_features(inputs.extras, "propensity with semantic") if self.config.semantic else {}
        return {self.config.label: number, **frozen}

    def directions(self, inputs: RowInputs) -> tuple[RowLoss, RowLoss]:
        """See the base class."""
        c = self.config
        frozen = [name for name in self.values(inputs) if name != c.label]

        @torch.no_grad()
        def log_weight(tile: Tile) -> Tensor:
            rows, columns = (x.values[c.label] for x in (tile.rows, tile.columns))
            known = present(rows)[:, None] & present(columns)
            apart = (rows[:, None] - columns).abs().to(tile.logits.dtype)
            p = torch.where(known, (-apart / c.width).exp(), 0.5)
            if frozen:
                p = (1 - c.semantic) * p + c.semantic * (frozen_cosine(tile, frozen) / 2 + 0.5).clamp(min=0)
            return torch.log(c.floor + (1 - c.floor) * p).neg()

        row_loss = Reweighted(log_weight)
        return row_loss, row_loss
