"""BarLIP: Barlow Twins (Zbontar et al. 2021, arXiv 2103.03230) between two towers, one of the additional losses of
Fini et al. 2023 (Improved baselines for vision-language pre-training, arXiv 2305.08675).

With p, q the projected rows of the two towers, each dimension standardised over the n valid rows of the global batch

    C = 1/n Σ_i p̂_i q̂_iᵀ,  L = scale · (Σ_k (1 − C_kk)² + λ Σ_{k ≠ l} C_kl²)

Mean, variance and C are sums over all ranks, so L is that of one process. A projector (linear, layer norm, GELU,
linear) is trained for each tower; the released one has batch norm, whose statistics would depend on the number of ranks
and on micro-batches. λ = 5e-3 and scale = 0.025 are the release's; its projector is 8,192 wide, here 1,024 by default.

Memory: [B, E] and [E, E]; no [N, N] matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from dualenc.config import Positive, Section
from dualenc.distributed.gather import gather_ids, total
from dualenc.losses.loss import Extras, Loss, LossOutput, losses


def cross_correlation(p: Tensor, q: Tensor, ids: Tensor, eps: float = 1e-5) -> Tensor:
    """C [E, E] of the projected rows p, q [B, E] over the valid rows of all ranks; the same on every rank."""
    valid = (ids >= 0)[:, None]
    n = (gather_ids(ids) >= 0).sum().clamp(min=1).to(p.dtype)
    p, q = torch.where(valid, p, 0.0), torch.where(valid, q, 0.0)
    # Centred before it is squared: the difference of two sums would lose what small variances are made of.
    mean = total(torch.cat([p.sum(0), q.sum(0)])) / n
    x, y = (torch.where(valid, z - m, 0.0) for z, m in zip((p, q), mean.chunk(2), strict=True))
    var = total(torch.cat([x.square().sum(0), y.square().sum(0)])) / n
    left, right = (var + eps).rsqrt().chunk(2)
    return left[:, None] * (total(x.T @ y) / n) * right[None]


def projector(dim: int, hidden: int, out: int) -> nn.Module:
    """Features [n, dim] → [n, out], without statistics of the batch."""
    return nn.Sequential(nn.Linear(dim, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, out))


@losses.register("barlip")
class BarLIP(Loss):
    """Redundancy reduction between the projected rows of two towers.

    Formula: scale · (Σ_k (1 − C_kk)² + λ Σ_{k≠l} C_kl²), C the correlation of the two towers over the batch
    Paper: Barlow Twins, arXiv 2103.03230; BarLIP in Fini et al. 2023, arXiv 2305.08675
    Needs: nothing; it trains a projector for each tower
    """

    takes_extras = True

    class Config(Section):
        """Settings."""

        redundancy: Annotated[float, Field(ge=0)] = Field(5e-3, description="λ, weight of the terms off the diagonal")
        scale: Annotated[float, Field(gt=0)] = Field(default=0.025, description="factor of the whole loss")
        project: Positive | None = Field(default=1024, description="width of the projection; null: the features")
        hidden: Positive = Field(default=1024, description="width inside the projector")

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def heads(self, dim: int, modalities: Sequence[str]) -> dict[str, Mapping[str, nn.Module]]:
        """A projector for each tower."""
        c = self.config
        return {"projected": {m: projector(dim, c.hidden, c.project) for m in modalities}} if c.project else {}

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
        p, q = (extras.a["projected"], extras.b["projected"]) if extras is not None and self.config.project else (a, b)
        c = cross_correlation(p, q, ids)
        off = c - torch.diag(c.diagonal())
        same, other = (1 - c.diagonal()).square().sum(), off.square().sum()
        value = self.config.scale * (same + self.config.redundancy * other)
        return LossOutput(value, {"correlation": c.diagonal().mean().detach()})
