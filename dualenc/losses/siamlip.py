"""SiamLIP: SimSiam (Chen and He 2021, arXiv 2011.10566) between two towers, one of the additional losses of Fini et al.
2023 (Improved baselines for vision-language pre-training, arXiv 2305.08675).

With z the projected rows of a tower, h its predictor and sg the stop-gradient

    L = −1/n Σ_i ½ ( cos(h(z^a_i), sg z^b_i) + cos(h(z^b_i), sg z^a_i) )

There are no negatives; without predictor or stop-gradient the towers would collapse. Projector and predictor have layer
norms where SimSiam has batch norms, whose statistics would depend on the number of ranks and on micro-batches.

Memory: [B, E]; no columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from pydantic import Field
from torch import Tensor, nn

from dualenc.config import Positive, Section
from dualenc.losses.barlip import projector
from dualenc.losses.loss import Extras, Loss, LossOutput, losses
from dualenc.losses.rowwise import shared_out


class ProjectedPredicted(nn.Module):
    """Features [n, D] → [n, 2E]: the projection z, then the prediction h(z)."""

    def __init__(self, dim: int, hidden: int, out: int) -> None:
        super().__init__()
        self.projector, self.predictor = projector(dim, hidden, out), projector(out, max(out // 4, 1), out)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        z = self.projector(x)
        return torch.cat([z, self.predictor(z)], 1)


@losses.register("siamlip")
class SiamLIP(Loss):
    """Each tower predicts the other, without negatives.

    Formula: −½ (cos(h(z_a), sg z_b) + cos(h(z_b), sg z_a))
    Paper: SimSiam, arXiv 2011.10566; SiamLIP in Fini et al. 2023, arXiv 2305.08675
    Needs: nothing; it trains a projector and a predictor for each tower
    """

    takes_extras = True

    class Config(Section):
        """Settings."""

        project: Positive = Field(default=512, description="width of the projection")
        hidden: Positive = Field(default=1024, description="width inside projector and predictor")

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def heads(self, dim: int, modalities: Sequence[str]) -> dict[str, Mapping[str, nn.Module]]:
        """Projector and predictor of each tower."""
        c = self.config
        return {"predicted": {m: ProjectedPredicted(dim, c.hidden, c.project) for m in modalities}}

    def forward(
        self,
        a: Tensor,
        b: Tensor,
        ids: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        extras: Extras | None = None,
    ) -> LossOutput:
        """See the module; scale and bias are not used."""
        assert extras is not None
        _, share = shared_out(ids, a.dtype)
        (za, ha), (zb, hb) = (x["predicted"].chunk(2, 1) for x in (extras.a, extras.b))
        cos = nn.functional.cosine_similarity
        both = [torch.where(ids >= 0, cos(h, z.detach(), dim=1), 0.0).sum() for h, z in ((ha, zb), (hb, za))]
        found = 0.5 * (both[0] + both[1]) / share
        return LossOutput(-found, {"prediction": found.detach()})
