"""Continuously weighted contrastive loss (CWCL, Srinivasa et al., NeurIPS 2023) for a tower matched to a locked one.

With f_i the unit embedding of row i by the *frozen encoder itself* (before any learned projection), for the direction
whose anchors x are the locked modality's features and whose columns y are the other's

    w_ij = ⟨f_i, f_j⟩/2 + 1/2,    w̄_ij = w_ij / Σ_k w_ik,    ℓ_i = −Σ_j w̄_ij log softmax_j(s · x_i·y_j)

over the valid columns of the global batch. The other direction, y → x, is plain InfoNCE (several positives by pair
id). The paper adds the two directions; here they are averaged, so that the value and the learning rate compare with
InfoNCE's.

The target is nearly uniform: unrelated rows have w ≈ ½, so a row's own pair carries about 2/N of the mass, and ℓ is
near log N whatever the model does. Watch ``excess``, ℓ minus the entropy of w̄ (a KL divergence, 0 at best).
``sharpen`` (w to that power; not in the paper) is 1 by default.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from dualenc.distributed.world import world_size
from dualenc.errors import ConfigError
from dualenc.losses.blockwise.row_loss import Tile
from dualenc.losses.blockwise.sweeps import How
from dualenc.losses.contrast import ContrastConfig, hard_negatives
from dualenc.losses.loss import Extras, Loss, LossOutput, losses
from dualenc.losses.soft_target import soft_target_nce
from dualenc.losses.targets import SamePair, Targets


class FrozenSimilarity(Targets):
    """T = (⟨f_i, f_j⟩/2 + ½)^sharpen of frozen unit embeddings f, the value ``name`` of the slots."""

    def __init__(self, name: str, sharpen: float = 1.0) -> None:
        self.name, self.sharpen = name, sharpen

    def __call__(self, tile: Tile) -> Tensor:
        """See the class."""
        rows, columns = tile.rows.values[self.name], tile.columns.values[self.name]
        # A cosine a rounding error below −1 would give a negative weight.
        weight = tile.products(rows, columns).mul_(0.5).add_(0.5).clamp_(min=0)
        return (weight if self.sharpen == 1 else weight.pow_(self.sharpen)).to(tile.logits.dtype)


def cwcl(
    a: Tensor,
    b: Tensor,
    ids: Tensor,
    logit_scale: Tensor,
    frozen: tuple[Tensor | None, Tensor | None],
    sharpen: float = 1.0,
    how: How | None = None,
) -> LossOutput:
    """This rank's rows of the loss above.

    Args:
        a, b: [B, D] normalised features; the columns are those of all ranks.
        ids: [B] pair ids, −1 for a slot that takes no part.
        logit_scale: [1].
        frozen: for ``a`` and for ``b`` the frozen encoder's normalised embeddings [B, W], or None where that side is
            trained. With both, both directions are weighted.
        sharpen: exponent of w; 1 is the paper's.
        how: tiled, or None for the whole matrices.

    Returns:
        value = Σ_{local valid i} ½ (ℓ_i(a→b) + ℓ_i(b→a)) / (n / W) with n valid rows in the global batch; the share of
        rows with a positive above every negative (``top1_ab``, ``top1_ba``), and for a weighted direction ``excess_ab``
        or ``excess_ba``, likewise.

    Raises:
        ConfigError: neither side is frozen.
    """
    if frozen[0] is None and frozen[1] is None:
        raise ConfigError(
            "loss: cwcl takes its targets from a locked tower, and neither tower of this pair is locked: "
            "set modalities.NAME.lock: true for one of them, or write loss: {name: info_nce}"
        )
    values = {name: f for name, f in zip("ab", frozen, strict=True) if f is not None}
    ab, ba = (FrozenSimilarity(side, sharpen) if side in values else SamePair() for side in "ab")
    return soft_target_nce(a, b, ids, logit_scale, (ab, ba), excess=True, values=values, how=how)


@losses.register("cwcl")
class CWCL(Loss):
    """Targets from the similarity of items in a locked tower, for the direction whose rows it encodes.

    Formula: −Σ_j w̄_ij log softmax_j(s·x_i·y_j), w = f_i·f_j/2 + 1/2; the other direction is InfoNCE
    Paper: CWCL, Srinivasa et al., NeurIPS 2023
    Needs: a locked tower (modalities.NAME.lock: true or trunk)
    """

    takes_extras = True

    class Config(ContrastConfig):
        """Settings."""

        sharpen: Annotated[float, Field(gt=0)] = Field(1.0, description="power of the weights; 1 as published")
        strip_mb: Annotated[float, Field(gt=0)] | None = Field(None, description="the older name of tile_mb")

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config.model_copy(update={"tile_mb": config.tile_mb or config.strip_mb})

    def forward(
        self,
        a: Tensor,
        b: Tensor,
        ids: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        extras: Extras | None = None,
    ) -> LossOutput:
        """See :func:`cwcl`; ``logit_bias`` adds the same to all logits of a row and is ignored."""
        frozen = (extras.a.get("frozen"), extras.b.get("frozen")) if extras is not None else (None, None)
        if hard_negatives(extras, ids):
            raise ConfigError("loss: cwcl has no targets for hard negatives; leave out input.negatives")
        how = self.config.choose(len(a) * world_size(), a.device)
        return cwcl(a, b, ids, logit_scale, frozen, self.config.sharpen, how)
