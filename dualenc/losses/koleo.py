"""KoLeo: the Kozachenko–Leonenko estimate of entropy as a regulariser (Sablayrolles et al. 2019, arXiv 1806.03198), as
used for wearable biosignals (Abbaspourazad et al. 2024, arXiv 2312.05409) and DINOv2.

    L = −1/n Σ_i log min_{j: id_j ≠ id_i} ‖x_i − x_j‖

over the valid rows of one tower in the *global* batch (DINOv2 looks within a GPU, so its value depends on their
number). Rows with the id of row i, which are its repeats or positives, are no neighbours of it.

Memory: strips of [n, N] cosines without gradient, then [n, D].
"""

from __future__ import annotations

import torch
from torch import Tensor

from dualenc.distributed.gather import gather
from dualenc.losses.hardest import hardest
from dualenc.losses.loss import Loss, LossOutput, losses
from dualenc.losses.rowwise import StripConfig, shared_out

_CLOSEST = 1e-8
"""Distance below which two rows count as this far apart: the logarithm stays finite, its gradient zero."""


def koleo(x: Tensor, ids: Tensor, strip_mb: float = 64.0) -> Tensor:
    """This rank's rows of the loss above for one tower: x [B, D], ids [B] → scalar."""
    all_ids, share = shared_out(ids, x.dtype)
    valid, all_x = ids >= 0, torch.where((all_ids >= 0)[:, None], gather(x), 0.0)
    rows = torch.where(valid[:, None], x, 0.0)
    cosine, nearest = hardest(rows.detach(), ids, all_x.detach(), all_ids, 1, strip_mb)
    found = ~cosine[:, 0].isneginf() & valid
    # Squares of a difference of two equal rows have no gradient; a norm's would be 0/0.
    squared = (rows - all_x[nearest[:, 0]]).square().sum(1)
    return -0.5 * torch.where(found, squared.clamp(min=_CLOSEST**2).log(), 0.0).sum() / share


@losses.register("koleo")
class KoLeo(Loss):
    """Each row away from its nearest neighbour in the batch, for each tower.

    Formula: −mean_i log min_{j≠i} ‖x_i − x_j‖
    Paper: Sablayrolles et al. 2019, arXiv 1806.03198; wearable biosignals, arXiv 2312.05409
    Needs: nothing
    """

    Config = StripConfig

    def __init__(self, config: StripConfig) -> None:
        super().__init__()
        self.config = config

    def forward(
        self, a: Tensor, b: Tensor, ids: Tensor, logit_scale: Tensor, logit_bias: Tensor | None = None
    ) -> LossOutput:
        """See the module; scale and bias are not used."""
        values = {f"koleo_of_{n}": koleo(x, ids, self.config.strip_mb) for n, x in self.config.of(a, b)}
        return LossOutput(torch.stack(list(values.values())).mean(), {n: v.detach() for n, v in values.items()})
