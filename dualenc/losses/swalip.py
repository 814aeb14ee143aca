"""SwALIP: swapped assignments (SwAV, Caron et al. 2020, arXiv 2006.09882) between two towers, one of the additional
losses of Fini et al. 2023 (Improved baselines for vision-language pre-training, arXiv 2305.08675).

With K unit prototypes c_k that both towers share, s^a_i = (x^a_i · c_k)_k, and Q^a = Sinkhorn(s^a / ε) over the valid
rows of the global batch (rows sum to 1, columns to n/K; without gradient)

    L = 1/n Σ_i ½ ( −Σ_k Q^b_ik log softmax_k(s^a_i / τ) − Σ_k Q^a_ik log softmax_k(s^b_i / τ) )

ε = 0.05 and 3 iterations are the release's; τ = 0.1 and learned prototypes are SwAV's (how the release makes its
assignments could not be checked).

Memory: [B, K]; the assignments need K column sums over ranks an iteration, no [N, N] matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import log_softmax, normalize

from dualenc.config import Positive, Section
from dualenc.distributed.gather import all_sum, gather_ids
from dualenc.encoders.dual_encoder import EVERY
from dualenc.losses.loss import Extras, Loss, LossOutput, losses
from dualenc.losses.rowwise import shared_out


class Prototypes(nn.Module):
    """Features [n, D] → cosines with K directions [n, K]."""

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(normalize(torch.randn(count, dim), dim=1))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return normalize(x.float(), dim=1) @ normalize(self.weight.float(), dim=1).T


@torch.no_grad()
def assignments(scores: Tensor, ids: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Q [B, K] of the cosines [B, K]: rows of 1 (0 where a slot takes no part), columns alike over all ranks."""
    valid = (ids >= 0)[:, None]
    n = (gather_ids(ids) >= 0).sum().clamp(min=1).to(scores.dtype)
    q = torch.where(valid, ((scores.detach() - 1) / epsilon).exp(), 0.0)
    tiny = torch.finfo(q.dtype).tiny
    for _ in range(iterations):
        q = q / all_sum(q.sum(0)).clamp(min=tiny) * (n / q.shape[1])
        q = q / q.sum(1, keepdim=True).clamp(min=tiny)
    return q


@losses.register("swalip")
class SwALIP(Loss):
    """Each tower predicts to which prototypes the other is assigned.

    Formula: ½ (CE(Q_b, softmax(s_a/τ)) + CE(Q_a, softmax(s_b/τ))), Q = Sinkhorn(s/ε), s cosines with prototypes
    Paper: SwAV, arXiv 2006.09882; SwALIP in Fini et al. 2023, arXiv 2305.08675
    Needs: nothing; it trains prototypes
    """

    takes_extras = True

    class Config(Section):
        """Settings."""

        prototypes: Positive = Field(default=512, description="K, unit vectors that both towers share")
        tau: Annotated[float, Field(gt=0)] = Field(default=0.1, description="τ of the softmax over prototypes")
        epsilon: Annotated[float, Field(ge=0.02)] = Field(default=0.05, description="ε of the Sinkhorn assignments")
        iterations: Positive = Field(default=3, description="Sinkhorn iterations")

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def heads(self, dim: int, modalities: Sequence[str]) -> dict[str, Mapping[str, nn.Module]]:
        """The prototypes, which all towers share."""
        return {"prototypes": {EVERY: Prototypes(dim, self.config.prototypes)}}

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
        c = self.config
        _, share = shared_out(ids, a.dtype)
        sa, sb = extras.a["prototypes"], extras.b["prototypes"]
        qa, qb = (assignments(s, ids, c.epsilon, c.iterations) for s in (sa, sb))
        valid = (ids >= 0)[:, None]
        swapped = torch.where(valid, qb * log_softmax(sa / c.tau, 1) + qa * log_softmax(sb / c.tau, 1), 0.0)
        agreed = (qa.argmax(1) == qb.argmax(1)) & valid[:, 0]
        return LossOutput(-0.5 * swapped.sum() / share, {"same_prototype": agreed.sum().to(a.dtype) / share})
