"""Hard positives and hard negatives along the gradient (the idea of CLAPS, arXiv 2012.07280, on features).

With u_j the direction on the sphere in which the InfoNCE of the batch rises fastest at b_j, without gradient,

    b̂_j = norm(b_j + ε σ_b u_j),    σ_b² = mean ‖b_j − mean b‖²,    and â likewise,
    L = (1 − λ) NCE(a, b) + λ/2 (NCE(a, b̂) + NCE(â, b))

b̂_j is further from its own row than b_j, a hard positive, and closer to others, a hard negative for them. CLAPS
perturbs a decoder's hidden states by the gradient of a likelihood; here the step is taken where both towers meet.
ε = 0 or λ = 0 is InfoNCE. It costs three more InfoNCEs and no further forward of a tower.

The step is measured in units of σ, the spread of the batch's features (1 when their mean is 0). Every step has the same
length whatever the gradient, so in units of the sphere it would be longer than the distances between items while
untrained towers put all of them in a narrow cone; the loss of the moved features then pulls each item to the mean of
the batch harder than InfoNCE pulls it to its pair, and the towers collapse. CLAPS starts from a trained model.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from dualenc.distributed.gather import all_sum
from dualenc.distributed.world import world_size
from dualenc.losses.blockwise.sweeps import How
from dualenc.losses.info_nce import info_nce
from dualenc.losses.loss import Loss, LossOutput, TiledConfig, losses


def spread(x: Tensor, ids: Tensor) -> Tensor:
    """σ of the module, of rows [B, D] of length 1 on all ranks, zero where the id is −1; without gradient."""
    count = all_sum((ids >= 0).sum()).clamp(min=1)
    return (1 - (all_sum(x.double().sum(0)) / count).square().sum()).clamp(min=0).sqrt().to(x.dtype)


def rising(a: Tensor, b: Tensor, ids: Tensor, logit_scale: Tensor, how: How | None) -> tuple[Tensor, Tensor]:
    """Unit directions [B, D] at ``a`` and at ``b``, tangent to the sphere, in which the batch's InfoNCE rises fastest.

    Zero where the gradient is. They are the same on any number of ranks: a factor does not change a direction.
    """
    with torch.enable_grad():
        x, y = a.detach().requires_grad_(), b.detach().requires_grad_()
        grads = torch.autograd.grad(info_nce(x, y, ids, logit_scale.detach(), how=how).value, (x, y))
    out = [
        normalize(g - (g * z.detach()).sum(1, keepdim=True) * z.detach(), dim=1)
        for g, z in zip(grads, (x, y), strict=True)
    ]
    return out[0], out[1]


@losses.register("adversarial")
class Adversarial(Loss):
    """InfoNCE also of features moved a step against it: hard positives and negatives at once.

    Formula: (1−λ)·NCE(a, b) + λ/2·(NCE(a, b̂) + NCE(â, b)), b̂ = norm(b + ε·spread·rising direction)
    Paper: the idea of CLAPS, arXiv 2012.07280
    Needs: nothing
    """

    class Config(TiledConfig):
        """Settings."""

        epsilon: Annotated[float, Field(ge=0)] = Field(
            0.1, description="ε: length of the step, in units of the spread of the batch's features"
        )
        share: Annotated[float, Field(ge=0, le=1)] = Field(0.5, description="λ: share of the moved features' losses")

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def forward(
        self, a: Tensor, b: Tensor, ids: Tensor, logit_scale: Tensor, logit_bias: Tensor | None = None
    ) -> LossOutput:
        """See the module."""
        c, how = self.config, self.config.choose(len(a) * world_size(), a.device)
        a, b = (torch.where(ids[:, None] >= 0, x, 0.0) for x in (a, b))
        out = info_nce(a, b, ids, logit_scale, how=how)
        to_a, to_b = rising(a, b, ids, logit_scale, how)
        step_a, step_b = (c.epsilon * spread(x, ids) for x in (a, b))
        moved_a, moved_b = normalize(a + step_a * to_a, dim=1), normalize(b + step_b * to_b, dim=1)
        hard = info_nce(a, moved_b, ids, logit_scale, how=how).value
        hard = (hard + info_nce(moved_a, b, ids, logit_scale, how=how).value) / 2
        metrics = out.metrics | {"moved": hard.detach()}
        return LossOutput((1 - c.share) * out.value + c.share * hard, metrics)
