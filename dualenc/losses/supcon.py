"""Supervised contrast across a pair: every item with the same label is a positive (SupCon, arXiv 2004.11362, eq. 2;
UniCL, arXiv 2204.03610, across two modalities).

    ℓ_i = −1/|P_i| Σ_{j ∈ P_i} log softmax_j(s · a_i·b_j),    P_i = {j: label_j = label_i or id_j = id_i}

The label is any value of the samples: a class, an entity (MOFI, arXiv 2306.07952), a participant (arXiv 2312.05409), a
speaker, a caption that occurs more than once. Of lists, items that share an entry are positives. A slot without a label
has its own pair only.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from dualenc.data.batch import present
from dualenc.losses.blockwise.row_loss import RowLoss, Tile
from dualenc.losses.contrast import ContrastConfig, Contrastive, RowInputs
from dualenc.losses.loss import losses
from dualenc.losses.targets import SoftTarget, Targets


def same_value(tile: Tile, name: str) -> Tensor:
    """Bool [h, w]: where row and column have the same value, or lists with an entry in common."""
    rows, columns = tile.rows.values[name], tile.columns.values[name]
    if rows.ndim == 1:
        return (rows[:, None] == columns) & present(rows)[:, None]
    out = torch.zeros(len(rows), len(columns), dtype=torch.bool, device=rows.device)
    for x in rows.unbind(1):
        for y in columns.unbind(1):
            out |= (x[:, None] == y) & present(x)[:, None]
    return out


class EqualValues(Targets):
    """T = 1 where the value ``name`` is the same, and for the pair itself."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, tile: Tile) -> Tensor:
        """See the class."""
        return (same_value(tile, self.name) | tile.positive).to(tile.logits.dtype)


@losses.register("supcon")
class SupCon(Contrastive):
    """Items with the same label (class, entity, speaker, repeated caption) are positives of each other.

    Formula: −1/|P_i| Σ_{j∈P_i} log softmax_j(s·a_i·b_j), P_i: same label
    Paper: SupCon, arXiv 2004.11362; UniCL, arXiv 2204.03610
    Needs: a label
    """

    class Config(ContrastConfig):
        """Settings."""

        label: str = Field("label", description="name in data.sources.N.values")
        label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
            default=0.0, description="ε: target spread over all columns"
        )

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.needs = [config.label]

    def directions(self, inputs: RowInputs) -> tuple[RowLoss, RowLoss]:
        """See the base class."""
        row_loss = SoftTarget(EqualValues(self.config.label), smoothing=self.config.label_smoothing)
        return row_loss, row_loss
