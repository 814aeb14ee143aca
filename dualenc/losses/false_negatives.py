"""Negatives that are too similar to the row's own item are left out, as they may be unlabelled positives (the in-batch
filter of MultiCSR, arXiv 2310.10962).

    ℓ_i = −mean_{j ∈ P(i)} z_ij + log Σ_{j ∈ P(i) or sim_ij ≤ t} exp(z_ij),    z_ij = s · a_i·b_j

sim is the cosine of the two items in a locked tower (the mean, where both are), or, with ``label``, the overlap of two
lists such as the words of captions: |shared| / |either|. Columns that are left out get no gradient from that row.
t = 1 is InfoNCE.
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
from dualenc.losses.loss import losses
from dualenc.losses.relational import frozen_cosine
from dualenc.losses.targets import SamePair, SoftTarget, without


def overlap(tile: Tile, name: str) -> Tensor:
    """[h, w]: how many entries of a list two slots share, of those that either has (Jaccard); 0 where one is empty.

    Entries of a list are taken to be different from each other.
    """
    rows, columns = tile.rows.values[name], tile.columns.values[name]
    shared = tile.logits.new_zeros(len(rows), len(columns))
    for x in rows.unbind(1):
        mine = present(x)[:, None]
        for y in columns.unbind(1):
            shared += (x[:, None] == y) & mine
    size = present(rows).sum(1)[:, None] + present(columns).sum(1)
    return shared / (size - shared).clamp(min=1)


@losses.register("false_negatives")
class FalseNegatives(Contrastive):
    """InfoNCE without the negatives that look like the row's own item to a locked tower, or share its words.

    Formula: −z_ii + log Σ_{j=i or sim_ij≤t} exp(z_ij), z = s·a_i·b_j
    Paper: MultiCSR, arXiv 2310.10962
    Needs: a locked tower, or a label that is a list
    """

    class Config(ContrastConfig):
        """Settings."""

        threshold: Annotated[float, Field(ge=-1, le=1)] = Field(
            0.9, description="t: similarity above which it is left out"
        )
        label: str | None = Field(None, description="compare these lists (data.sources.N.values), not a locked tower")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.needs = [config.label] if config.label else []

    def values(self, inputs: RowInputs) -> dict[str, Tensor]:
        """See the base class.

        Raises:
            ConfigError: no tower is locked and no label named, or the label is not a list.
        """
        name = self.config.label
        if name is None:
            return frozen_features(inputs.extras, "false_negatives (without label:)")
        words = label(inputs.extras, name)
        if words.ndim != 2:
            raise ConfigError(f"loss.label: {name!r} is one value per sample, not a list; use supcon for equal values")
        return {name: words}

    def directions(self, inputs: RowInputs) -> tuple[RowLoss, RowLoss]:
        """See the base class."""
        c, names = self.config, list(self.values(inputs))

        @torch.no_grad()
        def similar(tile: Tile) -> Tensor:
            alike: Tensor = frozen_cosine(tile, names) if c.label is None else overlap(tile, c.label)
            return alike.gt(c.threshold)

        row_loss = SoftTarget(SamePair(), push=without(similar))
        return row_loss, row_loss
