"""BYOLIP: BYOL (Grill et al. 2020, arXiv 2006.07733) between two towers, one of the additional losses of Fini et al.
2023 (Improved baselines for vision-language pre-training, arXiv 2305.08675).

As SiamLIP (:mod:`dualenc.losses.siamlip`), but the target z̃ is the projection by slow copies of tower and projector:

    L = −1/n Σ_i ½ ( cos(h(z^a_i), z̃^b_i) + cos(h(z^b_i), z̃^a_i) )

There are no negatives. The momentum of 0.99 is the release's. Memory: [B, E]; no columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cosine_similarity as cos

from dualenc.errors import ConfigError
from dualenc.losses.loss import Extras, LossOutput, losses
from dualenc.losses.rowwise import shared_out
from dualenc.losses.siamlip import SiamLIP
from dualenc.memory import SlowTowers

PREDICTED, TARGET = "predicted", "slow_predicted"


@losses.register("byolip")
class BYOLIP(SiamLIP):
    """Each tower predicts the slow copy of the other, without negatives.

    Formula: −½ (cos(h(z_a), z̃_b) + cos(h(z_b), z̃_a)), z̃ by slow copies
    Paper: BYOL, arXiv 2006.07733; BYOLIP in Fini et al. 2023, arXiv 2305.08675
    Needs: nothing; it trains a projector and a predictor for each tower
    """

    class Config(SiamLIP.Config):
        """Settings."""

        decay: Annotated[float, Field(ge=0, lt=1)] = Field(0.99, description="decay of the slow towers per step")

    config: Config

    def slow(self, pairs: Sequence[tuple[str, str]]) -> Mapping[str, SlowTowers]:
        """One slow copy of the pairs' towers and projectors."""
        modalities = tuple(dict.fromkeys(m for pair in pairs for m in pair))
        return {TARGET: SlowTowers(self.config.decay, {TARGET: PREDICTED}, modalities)}

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
        if extras is None or TARGET not in extras.a:
            raise ConfigError("loss: byolip needs slow towers and projectors, which dualenc train keeps")
        _, share = shared_out(ids, a.dtype)
        there = ids >= 0
        ha, hb = (_or_one(x[PREDICTED].chunk(2, 1)[1], there) for x in (extras.a, extras.b))
        za, zb = (_or_one(x[TARGET].chunk(2, 1)[0].detach(), there) for x in (extras.a, extras.b))
        pulled_a, pulled_b = (torch.where(there, cos(h, z, dim=1), 0.0).sum() for h, z in ((ha, zb), (hb, za)))
        found = 0.5 * (pulled_a + pulled_b) / share
        return LossOutput(-found, {"prediction": found.detach()})


def _or_one(x: Tensor, there: Tensor) -> Tensor:
    """x [n, E], with ones in rows that are not ``there``: what stands in them may be no vector to take a cosine of."""
    return torch.where(there[:, None], x, 1.0)
