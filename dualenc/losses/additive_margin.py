"""InfoNCE in which a pair must win by a margin (additive margin softmax; dual encoders: Yang et al., arXiv 1902.08564).

    ℓ_i = −mean_{j ∈ P(i)} log softmax_j(s · (a_i·b_j − m [j ∈ P(i)]))

P(i) are the columns with row i's pair id. m is in units of the cosine; 0 is InfoNCE. The loss falls as long as a pair's
cosine is not m above those of the other columns, so features of a small batch are pushed further apart. LaBSE
(arXiv 2007.01852) uses m = 0.3.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from dualenc.losses.blockwise.row_loss import RowLoss, Tile
from dualenc.losses.contrast import ContrastConfig, Contrastive, RowInputs
from dualenc.losses.loss import losses
from dualenc.losses.targets import SamePair, SoftTarget


@losses.register("additive_margin")
class AdditiveMargin(Contrastive):
    """InfoNCE in which the cosine of a pair is lowered by a margin.

    Formula: −(log softmax_j(s·(a_i·b_j − m·[j = i])))_i
    Paper: Yang et al., arXiv 1902.08564; LaBSE, arXiv 2007.01852
    Needs: nothing
    """

    class Config(ContrastConfig):
        """Settings."""

        margin: Annotated[float, Field(ge=0, lt=2)] = Field(0.3, description="m, a difference of cosines")

    def directions(self, inputs: RowInputs) -> tuple[RowLoss, RowLoss]:
        """See the base class."""
        margin: float = self.config.margin

        def lowered(tile: Tile) -> Tensor:
            return tile.logits - margin * tile.scale * tile.positive.to(tile.logits.dtype)

        row_loss = SoftTarget(SamePair(), push=lowered, pull=lowered)
        return row_loss, row_loss
