"""Sigmoid loss (SigLIP, arXiv 2303.15343, eq. 1 and algorithm 1), with several positives by pair id.

    L = −1/n Σ_{i valid} Σ_{j valid} log σ(z_ij (s · a_i·b_j + bias)),    z_ij = +1 if id_i = id_j, else −1

over the global batch of n valid rows.
"""

from __future__ import annotations

from torch import Tensor, nn

from dualenc.distributed.gather import gather, gather_ids
from dualenc.distributed.world import world_size
from dualenc.losses.base import LossOutput, TiledConfig, losses
from dualenc.losses.tiled import tiled_sigmoid


def sigmoid_loss(
    a: Tensor,
    b: Tensor,
    ids: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None = None,
    strip_mb: float | None = None,
) -> LossOutput:
    """This rank's rows of the loss above.

    Args:
        a, b: [B, D] normalised features; the columns are ``b`` of all ranks.
        ids: [B] pair ids, −1 for a slot that takes no part.
        logit_scale: [1]; logit_bias: [1], or None for no bias.
        strip_mb: compute in strips of this many MiB of logits, or None for the plain [B, N] matrix.

    Returns:
        value = the sum over local rows / (n / W), and ``top1_ab``, the share of rows whose best column is a positive.
    """
    all_b, all_ids = gather(b), gather_ids(ids)
    share = (all_ids >= 0).sum().clamp(min=1) / world_size()
    if strip_mb is None:
        total, hits = sigmoid_rows(a, all_b, ids, all_ids, logit_scale, logit_bias)
    else:
        total, hits = tiled_sigmoid(a, all_b, ids, all_ids, logit_scale, logit_bias, strip_mb)
    return LossOutput(total / share, {"top1_ab": hits / share})


def sigmoid_rows(
    rows: Tensor,
    columns: Tensor,
    row_ids: Tensor,
    column_ids: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Σ over valid rows and columns of −log σ(z·logit), and the number of rows whose best column is a positive."""
    valid, present = row_ids >= 0, column_ids >= 0
    logits = logit_scale * (rows[valid] @ columns[present].T)
    if logit_bias is not None:
        logits = logits + logit_bias
    positive = row_ids[valid, None] == column_ids[None, present]
    total = -nn.functional.logsigmoid((2 * positive.to(logits.dtype) - 1) * logits).sum()
    if not len(logits):
        return total, logits.new_zeros(())
    best = logits.detach().argmax(1, keepdim=True)
    return total, positive.gather(1, best).sum().to(logits.dtype)


@losses.register("sigmoid")
class Sigmoid(nn.Module):
    """The sigmoid loss as a recipe's ``loss: {name: sigmoid}``. Give ``logit_scale: {init: 10, bias: -10}`` with it.

    It has no parameters: scale and bias are the model's.
    """

    Config = TiledConfig

    def __init__(self, config: TiledConfig) -> None:
        super().__init__()
        self.config = config

    def forward(
        self, a: Tensor, b: Tensor, ids: Tensor, logit_scale: Tensor, logit_bias: Tensor | None = None
    ) -> LossOutput:
        """See :func:`sigmoid_loss`."""
        return sigmoid_loss(a, b, ids, logit_scale, logit_bias, self.config.choose(len(a) * world_size()))
