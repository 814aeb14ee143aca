"""Contrast of places *within* a sample, for maps of two views or two sensors: the local loss of Chaitanya et al. 2020
(Contrastive learning of global and local features for medical image segmentation, arXiv 2006.10511).

Both modalities of a sample say what is at the same K places (``local`` [B, K, D], as for the losses on regions). Place
k of one map has place k of the other as its positive; negatives are the other places of the sample in *both* maps:

    ℓ_ik = −log e^{α p_k·q_k} / ( Σ_l e^{α p_k·q_l} + Σ_{l ≠ k} e^{α p_k·p_l} ),    L = 1/n Σ_i mean_k ½ (ℓ^a + ℓ^b)

with n samples that have a place in both maps. No sample sees another, so there are no columns and no collectives but
the count of rows. Losses on regions (``prc``, ``point_contrast``) compare places of all samples.

Memory: [K, 2K] logits for each local sample.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dualenc.config import Section
from dualenc.data.batch import ABSENT
from dualenc.distributed.gather import gather_ids
from dualenc.distributed.world import world_size
from dualenc.errors import ConfigError
from dualenc.losses.loss import Extras, Loss, LossOutput, losses


def local_rows(p: Tensor, q: Tensor, there: Tensor, scale: Tensor) -> Tensor:
    """ℓ [n, K] of the places of p against q and p, [n, K, D] each; 0 where ``there`` [n, K] is false."""
    across, within = scale * (p @ q.mT), scale * (p @ p.mT)
    no = ~there[:, None, :]
    own = torch.eye(p.shape[1], dtype=torch.bool, device=p.device)
    logits = torch.cat([across.masked_fill(no, -1e4), within.masked_fill(no | own, -1e4)], 2)
    rows = logits.logsumexp(2) - across.diagonal(dim1=1, dim2=2)
    return torch.where(there, rows, 0.0)


@losses.register("local_contrast")
class LocalContrast(Loss):
    """Places of a map against the other places of their own sample.

    Formula: −mean_k log( e^{α p_k·q_k} / (Σ_l e^{α p_k·q_l} + Σ_{l≠k} e^{α p_k·p_l}) ), both directions
    Paper: Chaitanya et al. 2020, arXiv 2006.10511
    Needs: towers that say what is at places (local_dim and input.places)
    """

    takes_extras = True

    def __init__(self, config: Section) -> None:
        super().__init__()

    def forward(
        self,
        a: Tensor,
        b: Tensor,
        ids: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        extras: Extras | None = None,
    ) -> LossOutput:
        """See the module; a and b, the features of whole samples, are not used."""
        for side, m in zip((extras.a, extras.b) if extras else (), extras.pair if extras else (), strict=True):
            if "local" not in side or "region" not in side:
                raise ConfigError(
                    f"loss: local_contrast compares places of bird's-eye-view maps; {m!r} has none: set "
                    f"modalities.{m}.input.places and modalities.{m}.encoder.local_dim"
                )
        assert extras is not None
        there = (ids >= 0)[:, None] & (extras.a["region"] != ABSENT) & (extras.b["region"] != ABSENT)
        used = there.any(1)
        share = gather_ids(used.long()).sum().clamp(min=1).to(a.dtype) / world_size()
        exact = torch.promote_types(extras.a["local"].dtype, torch.float32)
        p, q = (torch.where(used[:, None, None], x["local"].to(exact), 0.0) for x in (extras.a, extras.b))
        each = local_rows(p, q, there, logit_scale) + local_rows(q, p, there, logit_scale)
        each = each.sum(1) / (2 * there.sum(1)).clamp(min=1)
        return LossOutput(each.sum() / share)
