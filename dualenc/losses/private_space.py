"""A private space beside the shared one, kept independent of it (the k-JEM of SepCLR, Louiset et al. 2024, arXiv
2402.11928).

Features c are what the pair shares; a linear map of each tower gives what is private, s. With Gaussian kernels k of
width τ (k(u, v) = exp(−‖u − v‖² / 2τ)) over the valid rows of the global batch, rows of another id

    JEM  = 1/n Σ_i log mean_j k(c_i, c_j) k(s_i, s_j)        least where the joint entropy of (c, s) is greatest
    unif = 1/n Σ_i log mean_j k(s_i, s_j)
    L    = weight_joint · JEM + weight_private · unif

A great joint entropy at given marginals means little mutual information: the private space is pushed to hold what the
shared one does not. For each tower by itself; c gets the gradient too unless ``detach_shared``. JEM(c, s) is the
entropy term of the concatenation [c; s].

Memory: strips of two [n, N] kernels, recomputed in the backward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import normalize

from dualenc.config import Positive
from dualenc.distributed.gather import gather
from dualenc.losses.blockwise.strips import strip_sum
from dualenc.losses.loss import Extras, Loss, LossOutput, losses
from dualenc.losses.rowwise import StripConfig, shared_out


def joint_entropies(c: Tensor, s: Tensor, ids: Tensor, tau: float, strip_mb: float) -> Tensor:
    """This rank's share of (JEM, unif), [2], for c [B, D] and s [B, E] of length 1."""
    all_ids, share = shared_out(ids, c.dtype)
    valid, there = ids >= 0, all_ids >= 0
    c_rows, s_rows = (torch.where(valid[:, None], x, 0.0) for x in (c, s))
    columns = (*(torch.where(there[:, None], gather(x), 0.0) for x in (c, s)), all_ids)

    def rows_sum(ci: Tensor, si: Tensor, i: Tensor, cj: Tensor, sj: Tensor, j: Tensor) -> Tensor:
        other = (i[:, None] != j[None]) & (i >= 0)[:, None] & (j >= 0)
        count, some = other.sum(1).clamp(min=1).to(ci.dtype).log(), other.any(1)
        # −‖u − v‖² / 2τ = (u·v − 1) / τ of unit vectors.
        private = (si @ sj.T - 1) / tau
        joint = private + (ci @ cj.T - 1) / tau
        means = [x.masked_fill(~other, -1e4).logsumexp(1) - count for x in (joint, private)]
        return torch.stack([torch.where(some, x, 0.0).sum() for x in means])

    return strip_sum(rows_sum, (c_rows, s_rows, ids), columns, 2 * len(all_ids), strip_mb) / share


@losses.register("private_space")
class PrivateSpace(Loss):
    """A private space of each tower, independent of what the pair shares.

    Formula: mean_i log mean_j k(c_i, c_j) k(s_i, s_j) + mean_i log mean_j k(s_i, s_j), s a linear map of c
    Paper: SepCLR (k-JEM), Louiset et al. 2024, arXiv 2402.11928
    Needs: nothing; it trains a linear map for each tower
    """

    takes_extras = True

    class Config(StripConfig):
        """Settings."""

        width: Positive = Field(64, description="dimensions of the private space")
        tau: Annotated[float, Field(gt=0)] = Field(default=0.5, description="τ, width of the Gaussian kernels")
        weight_joint: Annotated[float, Field(ge=0)] = Field(default=1.0, description="weight of JEM")
        weight_private: Annotated[float, Field(ge=0)] = Field(default=1.0, description="weight of unif")
        detach_shared: bool = Field(default=False, description="only the private space is moved")

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def heads(self, dim: int, modalities: Sequence[str]) -> dict[str, Mapping[str, nn.Module]]:
        """A linear map for each tower."""
        return {"private": {m: nn.Linear(dim, self.config.width) for m in modalities}}

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
        config, private = self.config, {"a": extras.a["private"], "b": extras.b["private"]}
        values = []
        metrics: dict[str, Tensor] = {}
        for name, x in config.of(a, b):
            c = x.detach() if config.detach_shared else x
            joint, alone = joint_entropies(c, normalize(private[name], dim=1), ids, config.tau, config.strip_mb)
            values.append(config.weight_joint * joint + config.weight_private * alone)
            metrics |= {f"joint_entropy_of_{name}": joint.detach(), f"private_spread_of_{name}": alone.detach()}
        return LossOutput(torch.stack(values).mean(), metrics)
