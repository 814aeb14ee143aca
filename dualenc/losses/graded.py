"""Graded positives from a tree (SPACE-2, arXiv 2209.06638): the more of their annotation two items share, the more of
the target they get.

    ℓ_i = −Σ_j T̄_ij log softmax_j(s · a_i·b_j),    T_ij = (Σ_{l: paths agree down to l} w_l / Σ_{l ≤ depth} w_l)^power

with depth the longer of the two paths, w_l = 1 by default, and T̄ with rows normalised to 1. An item's own pair has
T = 1; an item without an annotation has only that. Paths that agree or differ at the root alone give SupCon.
SPACE-2 takes one head for each level; here one head sees the sum, with a weight for each level.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from dualenc.data.batch import present
from dualenc.errors import ConfigError
from dualenc.losses.blockwise.row_loss import RowLoss, Tile
from dualenc.losses.contrast import ContrastConfig, Contrastive, RowInputs, label
from dualenc.losses.loss import losses
from dualenc.losses.targets import SoftTarget, Targets


class SharedPath(Targets):
    """T of the module, of a value [n, width] whose level l is a number of the path down to l."""

    def __init__(self, name: str, weights: Sequence[float], power: float) -> None:
        self.name, self.weights, self.power = name, weights, power

    def __call__(self, tile: Tile) -> Tensor:
        """See the class."""
        rows, columns = tile.rows.values[self.name], tile.columns.values[self.name]
        shared = tile.logits.new_zeros(len(rows), len(columns))
        weights = torch.tensor(self.weights, dtype=shared.dtype, device=shared.device)
        for w, x, y in zip(self.weights, rows.unbind(1), columns.unbind(1), strict=True):
            shared.add_((x[:, None] == y) & present(x)[:, None], alpha=w)
        depth_of_rows, depth_of_columns = (present(v).to(shared.dtype) @ weights for v in (rows, columns))
        deepest = torch.maximum(depth_of_rows[:, None], depth_of_columns).clamp(min=torch.finfo(shared.dtype).tiny)
        return (shared / deepest).pow_(self.power).masked_fill_(tile.positive, 1.0)


@losses.register("graded")
class Graded(Contrastive):
    """Targets graded by how far two items agree in a tree of annotations.

    Formula: −Σ_j T̄_ij log softmax_j(s·a_i·b_j), T_ij: shared part of the two paths
    Paper: SPACE-2, arXiv 2209.06638
    Needs: a label of type tree
    """

    class Config(ContrastConfig):
        """Settings."""

        label: str = Field("tree", description="name in data.sources.N.values, of type tree")
        level_weights: list[Annotated[float, Field(ge=0)]] | None = Field(
            None, description="of the tree's levels from the root on; default 1 each"
        )
        power: Annotated[float, Field(gt=0)] = Field(1.0, description="of the score; above 1 favours close relatives")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.needs = [config.label]

    def directions(self, inputs: RowInputs) -> tuple[RowLoss, RowLoss]:
        """See the base class.

        Raises:
            ConfigError: the label is not a path, or the number of weights is not that of its levels.
        """
        c, tree = self.config, label(inputs.extras, self.config.label)
        if tree.ndim != 2:
            raise ConfigError(f"loss: graded needs a tree, and {c.label!r} is one value per sample; give it type: tree")
        weights = c.level_weights or [1.0] * tree.shape[1]
        if len(weights) != tree.shape[1]:
            raise ConfigError(
                f"loss.level_weights has {len(weights)} numbers for a tree of {tree.shape[1]} levels; give one each"
            )
        row_loss = SoftTarget(SharedPath(c.label, weights, c.power))
        return row_loss, row_loss
