"""Squared distance of a pair's features, without negatives: how LidarCLIP (arXiv 2212.06858) trains a LiDAR tower
against a frozen image tower.

    L = 1/n Σ_{i valid} ‖a_i − b_i‖² = 1/n Σ (2 − 2 a_i·b_i)

LidarCLIP takes the mean over the D components of embeddings as CLIP gives them; features here have length 1, so this is
D times that, on directions alone. One tower has to be locked: otherwise both collapse to a single point.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dualenc.config import Section
from dualenc.distributed.gather import check_equal_shapes, gather_ids
from dualenc.distributed.world import world_size
from dualenc.losses.loss import Loss, LossOutput, losses


def mse(a: Tensor, b: Tensor, ids: Tensor) -> LossOutput:
    """This rank's rows of the loss above.

    Args:
        a, b: [B, D] normalised features.
        ids: [B] pair ids, −1 for a slot that takes no part.

    Returns:
        value = Σ_{local valid i} ‖a_i − b_i‖² / (n / W) with n valid rows in the global batch; ``cosine``: the mean of
        a_i·b_i, likewise.
    """
    check_equal_shapes(a)
    all_ids = gather_ids(ids)
    share = (all_ids >= 0).sum().clamp(min=1).to(a.dtype) / world_size()
    x, y = (torch.where((ids >= 0)[:, None], side, 0.0) for side in (a, b))
    return LossOutput((x - y).square().sum() / share, {"cosine": (x * y).sum().detach() / share})


@losses.register("mse")
class MSE(Loss):
    """As a recipe's ``loss: {name: mse}``, with one tower locked. It has no parameters and uses no temperature.

    Formula: 1/n Σ_i ‖a_i − b_i‖²
    Paper: LidarCLIP, arXiv 2212.06858
    Needs: a locked tower: there are no negatives
    """

    def __init__(self, config: Section) -> None:
        super().__init__()

    def forward(
        self, a: Tensor, b: Tensor, ids: Tensor, logit_scale: Tensor, logit_bias: Tensor | None = None
    ) -> LossOutput:
        """See :func:`mse`."""
        return mse(a, b, ids)
