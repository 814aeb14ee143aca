"""A second view of each feature through an information bottleneck: after the twin network of CVIB (Chang et al. 2023,
arXiv 2303.02846), whose pruned copy is contrasted with the original.

A gate of each tower has a mean μ_d and a variance σ_d² for each dimension (Dai et al. 2018, arXiv 1802.10399), both
trained; ε is standard normal.

    ã = norm(a ⊙ (μ + σ ⊙ ε))
    L = L_inner(a, b) + w ½ ( L_inner(ã, b) + L_inner(a, b̃) ) + β · mean_d ½ log(1 + μ_d²/σ_d²)

The last term is what a dimension lets through, in nats: dimensions that the contrast does not need are closed. CVIB
prunes the layers of a sentiment classifier; here the features of the two towers are gated, and all is trained as one.
ε is a hash of id, dimension, seed and step, so it is the same on any number of ranks. β = 0, μ = 1 and σ → 0 give
(1 + w) L_inner.

Memory: that of the loss inside, three times, and [B, 3 D].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import normalize, softplus

from dualenc.losses.hardest import uniform
from dualenc.losses.loss import Extras, LossOutput, losses
from dualenc.losses.rowwise import shared_out
from dualenc.losses.wrapper import Wrapper, WrapperConfig


class BottleneckGate(nn.Module):
    """Features [n, D] → [n, 2 D], the same for each row: means, then logarithms of the variances."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.ones(dim))
        self.log_variance = nn.Parameter(torch.full((dim,), -4.0))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        both = torch.cat([self.mean, self.log_variance]).float()
        return both.expand(len(x), -1) + 0 * x[:, :1].float()  # a row of its own for each row


def standard_normal(ids: Tensor, salt: Tensor, count: int) -> Tensor:
    """[n] ids and a salt → [n, count] numbers of a standard normal distribution, the same for the same id and salt."""
    u = uniform(ids, salt, 2 * count)
    radius = (-2 * (1 - u[:, :count]).clamp(min=1e-7).log()).sqrt()
    return radius * (2 * math.pi * u[:, count:]).cos()


@losses.register("vib_gate")
class VIBGate(Wrapper):
    """A noisy, gated second view of each feature, which lets through as little as the contrast allows.

    Formula: L(a, b) + w ½ (L(ã, b) + L(a, b̃)) + β·mean ½ log(1 + μ²/σ²), ã = norm(a ⊙ (μ + σε)), L another loss
    Paper: after CVIB, Chang et al. 2023, arXiv 2303.02846
    Needs: nothing; it stands around another loss and trains the gates
    """

    class Config(WrapperConfig):
        """Settings."""

        share: Annotated[float, Field(gt=0)] = Field(0.5, description="w, weight of the gated views")
        beta: Annotated[float, Field(ge=0)] = Field(0.01, description="β, what a nat a dimension costs")
        seed: int = Field(default=0, description="of the noise")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.share, self.beta, self.seed = config.share, config.beta, config.seed

    def heads(self, dim: int, modalities: Sequence[str]) -> dict[str, Mapping[str, nn.Module]]:
        """A gate for each tower, and the heads of the loss inside."""
        return {"bottleneck": {m: BottleneckGate(dim) for m in modalities}, **super().heads(dim, modalities)}

    def forward(
        self,
        a: Tensor,
        b: Tensor,
        ids: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        extras: Extras | None = None,
    ) -> LossOutput:
        """See the module."""
        assert extras is not None
        given = (ids, logit_scale, logit_bias, extras)
        plain = self.inside(a, b, *given)
        _, share = shared_out(ids, a.dtype)
        views, cost = [], a.new_zeros(())
        for k, (x, side) in enumerate(((a, extras.a), (b, extras.b))):
            mean, log_variance = side["bottleneck"].chunk(2, 1)
            salt = torch.tensor(2 * (extras.step + (self.seed << 32)) + k, device=ids.device)
            noise = standard_normal(ids, salt, x.shape[1]).to(x.dtype)
            views.append(normalize(x * (mean + (log_variance / 2).exp() * noise), dim=1))
            # ½ log(1 + μ²/σ²), where σ² may be tiny
            nats = 0.5 * softplus(mean.square().clamp(min=1e-12).log() - log_variance).mean(1)
            cost = cost + torch.where(ids >= 0, nats, 0.0).sum() / share / 2
        one, two = self.inside(views[0], b, *given).value, self.inside(a, views[1], *given).value
        gated = (one + two) / 2
        metrics = {**plain.metrics, "plain": plain.value.detach(), "gated": gated.detach(), "nats": cost.detach()}
        return LossOutput(plain.value + self.share * gated + self.beta * cost, metrics)
