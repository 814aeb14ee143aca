"""Sigmoid loss (SigLIP, arXiv 2303.15343, eq. 1 and algorithm 1), with several positives by pair id.

    L = −1/n Σ_{i valid} Σ_{j valid} log σ(z_ij (s · a_i·b_j + bias)),    z_ij = +1 if id_i = id_j, else −1

over the global batch of n valid rows.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from dualenc.distributed.gather import check_equal_shapes, gather, gather_ids
from dualenc.distributed.world import world_size
from dualenc.losses.blockwise.sweeps import How, merge_stats, sweep_sigmoid
from dualenc.losses.blockwise.tiled import Stats
from dualenc.losses.info_nce import hits
from dualenc.losses.loss import Loss, LossOutput, SideName, TiledConfig, losses


def sigmoid_loss(
    a: Tensor,
    b: Tensor,
    ids: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None = None,
    how: How | None = None,
) -> LossOutput:
    """This rank's rows of the loss above.

    Args:
        a, b: [B, D] normalised features; the columns are ``b`` of all ranks.
        ids: [B] pair ids, −1 for a slot that takes no part.
        logit_scale: [1]; logit_bias: [1], or None for no bias.
        how: tiled, without the [B, N] matrix (see ``losses.sweeps``), or None for the plain matrix.

    Returns:
        value = the sum over local rows / (n / W), and ``top1_ab`` and ``top1_ba``, the share of rows with a positive
        above every negative.
    """
    check_equal_shapes(a)
    all_ids = gather_ids(ids)
    share = (all_ids >= 0).sum().clamp(min=1).to(a.dtype) / world_size()
    if how is None:
        total, hits_ab, hits_ba = plain_sigmoid(a, gather(b), ids, all_ids, logit_scale, logit_bias)
    else:
        total, hits_ab, hits_ba = sweep_sigmoid(a, b, ids, all_ids, logit_scale, logit_bias, how)
    return LossOutput(total / share, {"top1_ab": hits_ab / share, "top1_ba": hits_ba / share})


def plain_sigmoid(
    rows: Tensor,
    columns: Tensor,
    row_ids: Tensor,
    column_ids: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Σ over valid rows and columns of −log σ(z·logit), and the hits of this rank's rows a→b and b→a.

    Args:
        rows: [B, D]; columns: [W·B, D], those of all ranks; row_ids: [B]; column_ids: [W·B].
    """
    valid, present = row_ids >= 0, column_ids >= 0
    # Masks and no selection, whose size the host would have to wait for; on a complete batch they change no bit.
    rows, columns = torch.where(valid[:, None], rows, 0.0), torch.where(present[:, None], columns, 0.0)
    logits = logit_scale * (rows @ columns.T)
    if logit_bias is not None:
        logits = logits + logit_bias
    there = valid[:, None] & present
    positive = (row_ids[:, None] == column_ids) & there
    terms = nn.functional.logsigmoid((2 * positive.to(logits.dtype) - 1) * logits)
    of_columns = Stats.empty(len(columns), columns.detach())
    seen = logits.detach().masked_fill(~there, -float("inf"))
    of_columns.pos.copy_(seen.amax(0))  # of all: above every negative only if it is a positive's
    of_columns.neg.copy_(seen.masked_fill(positive, -float("inf")).amax(0))
    return -torch.where(there, terms, 0.0).sum(), hits(seen, positive), Stats(merge_stats(of_columns.data)).hits()


@losses.register("sigmoid")
class Sigmoid(Loss):
    """SigLIP's loss: every pair of the batch is classified by itself.

    Give ``logit_scale: {init: 10, bias: -10}`` with it.

    Formula: −1/n Σ_ij log σ(z_ij·(s·a_i·b_j + bias)), z = 1 for a pair, else −1
    Paper: SigLIP, arXiv 2303.15343
    Needs: a logit bias
    """

    Config = TiledConfig

    def __init__(self, config: TiledConfig) -> None:
        super().__init__()
        self.config = config

    def gathers(self, global_batch: int, device: torch.device) -> Collection[SideName]:
        """Rows are those of ``a``."""
        return [side for side in self.config.gathers(global_batch, device) if side == "b"]

    def forward(
        self, a: Tensor, b: Tensor, ids: Tensor, logit_scale: Tensor, logit_bias: Tensor | None = None
    ) -> LossOutput:
        """See :func:`sigmoid_loss`."""
        return sigmoid_loss(a, b, ids, logit_scale, logit_bias, self.config.choose(len(a) * world_size(), a.device))
