"""Positives made in feature space (Hallucinator, Wu et al. 2023, arXiv 2307.12168): a harder positive pair without
encoding anything again.

    q̂ = norm(q + λ (q − sg k)),    L = L_inner(a, b) + w · ½ ( L_inner(â, b) + L_inner(a, b̂) )

q̂ extrapolates a row away from its positive k, so that the pair shares less. The paper's generator ends with a small
learned map whose form could not be checked; here it is the identity. λ = 0 gives (1 + w) · L_inner.

Memory: that of the loss inside, three times.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from dualenc.losses.loss import Extras, LossOutput, losses
from dualenc.losses.wrapper import Wrapper, WrapperConfig


def beyond(x: Tensor, y: Tensor, step: float) -> Tensor:
    """norm(x + step (x − sg y)), [B, D] each."""
    return normalize(x + step * (x - y.detach()), dim=1)


@losses.register("hallucinator")
class Hallucinator(Wrapper):
    """Positives made in feature space, beyond each row as seen from its pair.

    Formula: L(a, b) + w ½ (L(â, b) + L(a, b̂)), q̂ = norm(q + λ (q − sg k)), L another loss
    Paper: Hallucinator, Wu et al. 2023, arXiv 2307.12168
    Needs: nothing; it stands around another loss
    """

    class Config(WrapperConfig):
        """Settings."""

        step: Annotated[float, Field(ge=0)] = Field(0.3, description="λ, how far beyond the row")
        share: Annotated[float, Field(gt=0)] = Field(0.5, description="w, weight of the made pairs")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.step, self.share = config.step, config.share

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
        given = (ids, logit_scale, logit_bias, extras)
        plain = self.inside(a, b, *given)
        one = self.inside(beyond(a, b, self.step), b, *given).value
        two = self.inside(a, beyond(b, a, self.step), *given).value
        made = (one + two) / 2
        metrics = {**plain.metrics, "plain": plain.value.detach(), "made": made.detach()}
        return LossOutput(plain.value + self.share * made, metrics)
