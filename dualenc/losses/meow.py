"""Negatives weighed by how often they fall into another cluster (MEOW, arXiv 2212.13847).

Over k clusterings of the items, w_ij = k − #{clusterings in which i and j are together}, so

    ℓ_i = −mean_{j ∈ P(i)} z_ij + log Σ_{j ∉ P(i)} w_ij exp(z_ij),    z_ij = s · a_i·b_j

A pair's own weight is 0, as in ``dcl``: with all items in clusters of their own it is DCL + log k. So the scale is
moved by InfoNCE unless ``scale_by`` says otherwise. A row whose negatives are all in its own clusters loses nothing.
The label holds one cluster or a list, one for each clustering; an item without one is in no cluster.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from dualenc.data.batch import present
from dualenc.losses.blockwise.row_loss import RowLoss, Tile
from dualenc.losses.contrast import ContrastConfig, Contrastive, RowInputs
from dualenc.losses.dcl import Decoupled, ScaleBy
from dualenc.losses.loss import losses


@torch.no_grad()
def log_apart(tile: Tile, name: str) -> Tensor:
    """log of in how many clusterings row and column are apart; −inf where in none."""
    rows, columns = tile.rows.values[name], tile.columns.values[name]
    if rows.ndim == 1:
        rows, columns = rows[:, None], columns[:, None]
    apart = tile.logits.new_full((len(rows), len(columns)), float(rows.shape[1]))
    for x, y in zip(rows.unbind(1), columns.unbind(1), strict=True):
        apart -= ((x[:, None] == y) & present(x)[:, None]).to(apart.dtype)
    return apart.log()


@losses.register("meow")
class MEOW(Contrastive):
    """Negatives of other clusters weigh more, those of the row's own cluster nothing.

    Formula: −z_ii + log Σ_{j≠i} w_ij·exp(z_ij), w_ij: clusterings that part i and j, z = s·a_i·b_j
    Paper: MEOW, arXiv 2212.13847
    Needs: a label, one cluster or a list of them; the scale is moved by InfoNCE unless scale_by says otherwise
    """

    class Config(ContrastConfig):
        """Settings."""

        label: str = Field("clusters", description="name in data.sources.N.values")
        scale_by: ScaleBy = Field("nce", description="what moves a learned scale; loss: it grows without bound")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.needs = [config.label]

    def directions(self, inputs: RowInputs) -> tuple[RowLoss, RowLoss]:
        """See the base class."""
        name = self.config.label
        row_loss = Decoupled(self.config.scale_by, log_weight=lambda tile: log_apart(tile, name))
        return row_loss, row_loss
