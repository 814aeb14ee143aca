"""Relational distillation as a loss: a row of similarities follows a frozen model's row (DCD's flat control, arXiv
2207.01426; MobileCLIP, arXiv 2311.17049).

    ℓ_i = −Σ_j T̄_ij log softmax_j(s · a_i·b_j),    T̄_i = softmax_j(f_i·f_j / τ)

f are unit embeddings by the locked tower of one side (both sides' cosines are averaged where both are locked). With a
dual encoder as the teacher use ``distill: soft_labels``, which compares its two modalities. Watch ``excess``, ℓ minus
the entropy of T̄: it is the KL divergence and has its minimum at 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from dualenc.losses.blockwise.row_loss import RowLoss, Tile
from dualenc.losses.contrast import ContrastConfig, Contrastive, RowInputs, frozen_features
from dualenc.losses.loss import losses
from dualenc.losses.targets import SoftTarget, Targets


def frozen_cosine(tile: Tile, names: Sequence[str]) -> Tensor:
    """The mean over ``names`` of the cosines of slots in a frozen encoder, [h, w]."""
    total = [tile.products(tile.rows.values[n], tile.columns.values[n]) for n in names]
    return torch.stack(total).mean(0).to(tile.logits.dtype) if len(total) > 1 else total[0].to(tile.logits.dtype)


class FrozenSoftmax(Targets):
    """log T of the module, up to a constant of the row."""

    log = True

    def __init__(self, names: Sequence[str], temperature: float) -> None:
        self.names, self.temperature = list(names), temperature

    def __call__(self, tile: Tile) -> Tensor:
        """See the class."""
        return frozen_cosine(tile, self.names) / self.temperature


@losses.register("relational")
class Relational(Contrastive):
    """Rows of similarities follow those of items in a locked tower.

    Formula: −Σ_j T̄_ij log softmax_j(s·a_i·b_j), T̄_i = softmax_j(f_i·f_j/τ)
    Paper: DCD, arXiv 2207.01426; MobileCLIP, arXiv 2311.17049
    Needs: a locked tower
    """

    class Config(ContrastConfig):
        """Settings."""

        temperature: Annotated[float, Field(gt=0)] = Field(0.07, description="τ of the targets")

    def values(self, inputs: RowInputs) -> dict[str, Tensor]:
        """See the base class."""
        return frozen_features(inputs.extras, "relational")

    def directions(self, inputs: RowInputs) -> tuple[RowLoss, RowLoss]:
        """See the base class."""
        names = list(self.values(inputs))
        row_loss = SoftTarget(FrozenSoftmax(names, self.config.temperature), excess=True)
        return row_loss, row_loss
