"""Symmetric InfoNCE (the softmax loss of CLIP, arXiv 2103.00020), with several positives by pair id.

For a valid row i with positives P(i) = {j : id_j = id_i} among the valid columns V of the global batch

    ℓ_i = −Σ_j t_ij log softmax_j(s · a_i·b_j),    t_ij = (1 − ε)·[j ∈ P(i)]/|P(i)| + ε/|V|

and the loss is ½ (mean_i ℓ_i(a→b) + mean_i ℓ_i(b→a)). Uniform targets over positives: SupCon's L_out
(arXiv 2004.11362, eq. 2) with the anchor's own pair among its positives.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from dualenc.distributed.gather import check_equal_shapes, gather, gather_ids
from dualenc.distributed.world import world_size
from dualenc.losses.blockwise.sweeps import How, sweep_info_nce
from dualenc.losses.contrast import contrast, hard_negatives
from dualenc.losses.loss import Extras, Loss, LossOutput, SideName, TiledConfig, losses
from dualenc.losses.targets import SamePair, SoftTarget


def info_nce(
    a: Tensor, b: Tensor, ids: Tensor, logit_scale: Tensor, label_smoothing: float = 0.0, how: How | None = None
) -> LossOutput:
    """This rank's rows of the loss above, in both directions.

    Args:
        a, b: [B, D] normalised features; the columns are those of all ranks.
        ids: [B] pair ids, −1 for a slot that takes no part.
        logit_scale: [1].
        label_smoothing: ε in [0, 1).
        how: tiled, without the [B, N] matrices (see ``losses.sweeps``), or None for the plain matrices.

    Returns:
        value = Σ_{local valid i} ½ (ℓ_i(a→b) + ℓ_i(b→a)) / (n / W) with n valid rows in the global batch, and the
        share of rows with a positive above every negative (``top1_ab``, ``top1_ba``), likewise.
    """
    check_equal_shapes(a)
    all_ids = gather_ids(ids)
    share = (all_ids >= 0).sum().clamp(min=1).to(a.dtype) / world_size()
    if how is None:
        all_a, all_b = gather(a), gather(b)
        sum_ab, hits_ab = info_nce_rows(a, all_b, ids, all_ids, logit_scale, label_smoothing)
        sum_ba, hits_ba = info_nce_rows(b, all_a, ids, all_ids, logit_scale, label_smoothing)
        total = sum_ab + sum_ba
    else:
        total, hits_ab, hits_ba = sweep_info_nce(a, b, ids, all_ids, logit_scale, label_smoothing, how)
    return LossOutput(total / (2 * share), {"top1_ab": hits_ab / share, "top1_ba": hits_ba / share})


def info_nce_rows(
    rows: Tensor, columns: Tensor, row_ids: Tensor, column_ids: Tensor, logit_scale: Tensor, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """Σ ℓ_i over valid rows, and the number of rows with a positive above every negative.

    Args:
        rows: [B, D]; columns: [N, D]; row_ids: [B]; column_ids: [N]. Every valid row's id occurs among the columns.
    """
    valid, present = row_ids >= 0, column_ids >= 0
    # Masks and no selection, whose size the host would have to wait for; on a complete batch they change no bit.
    rows, columns = torch.where(valid[:, None], rows, 0.0), torch.where(present[:, None], columns, 0.0)
    logits = logit_scale * (rows @ columns.T)
    logits = logits.masked_fill_(~present, torch.finfo(logits.dtype).min)  # not −inf: a row may have no column at all
    positive = (row_ids[:, None] == column_ids) & valid[:, None]
    target = positive.to(logits.dtype) / positive.sum(1, keepdim=True).clamp(min=1)
    if label_smoothing:
        share = (label_smoothing / present.sum().clamp(min=1).double()).to(target.dtype)
        target = (1 - label_smoothing) * target + share * present
    per_row = torch.logsumexp(logits, dim=1) - (target * logits).sum(1)
    return torch.where(valid, per_row, 0.0).sum(), hits(logits, positive)


def hits(logits: Tensor, positive: Tensor) -> Tensor:
    """How many rows of [B, N] have a positive above every negative. A tie, as of collapsed features, is a miss."""
    logits = logits.detach()
    return (logits.amax(1) > logits.masked_fill(positive, -float("inf")).amax(1)).sum().to(logits.dtype)


@losses.register("info_nce")
class InfoNCE(Loss):
    """InfoNCE, CLIP's loss, both directions; with label smoothing, and hard negatives where samples bring them.

    Formula: −(log softmax_j(s·a_i·b_j))_i, targets (1−ε)·own pair + ε/N
    Paper: CLIP, arXiv 2103.00020
    Needs: nothing
    """

    takes_extras = True

    class Config(TiledConfig):
        """Settings."""

        label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
            default=0.0, description="ε: share of the target spread over all columns"
        )

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def gathers(self, global_batch: int, device: torch.device) -> Collection[SideName]:
        """As ``impl`` and ``columns`` say."""
        return self.config.gathers(global_batch, device)

    def forward(
        self,
        a: Tensor,
        b: Tensor,
        ids: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        extras: Extras | None = None,
    ) -> LossOutput:
        """See :func:`info_nce`; ``logit_bias`` adds the same to all logits of a row and is ignored.

        Hard negatives (``contrast.hard_negatives``) are further columns.
        """
        how = self.config.choose(len(a) * world_size(), a.device)
        if columns := hard_negatives(extras, ids):
            row_loss = SoftTarget(SamePair(), smoothing=self.config.label_smoothing)
            return contrast(a, b, ids, logit_scale, row_loss, row_loss, columns=columns, how=how)
        return info_nce(a, b, ids, logit_scale, self.config.label_smoothing, how)
