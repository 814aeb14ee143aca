"""Contrast at several depths (HCMCL of HiCMAE, Sun et al. 2024, arXiv 2401.05698): pooled hidden states of both towers'
blocks, mapped to one space, are contrasted as features are.

    L = Σ_{l ∈ depths} L_inner( norm(P^a_l h^a_l), norm(P^b_l h^b_l); 1/τ )

h_l is the mean over places of the output of the block at a share l of a tower's depth (padding left out), P_l a linear
map of each tower that is trained along and then dropped; HiCMAE, whose towers are of one width, has none. It takes 3, 6
and 9 of 10 layers, τ = 0.07 fixed, and a weight of 0.0025 in its sum; it contrasts within a GPU, here over the global
batch.

Memory: that of the loss inside, once for each depth, and [B, D] a depth.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from dualenc.encoders.dual_encoder import hidden_group
from dualenc.losses.loss import Extras, LossOutput, losses
from dualenc.losses.wrapper import Wrapper, WrapperConfig


@losses.register("layers")
class Layers(Wrapper):
    """A loss on the pooled hidden states of both towers at several depths.

    Formula: Σ_l L(norm(P_l h^a_l), norm(P_l h^b_l); 1/τ), h_l the mean over places after a block, L another loss
    Paper: HiCMAE, Sun et al. 2024, arXiv 2401.05698
    Needs: towers of repeated blocks; it trains a linear map for each depth and tower
    """

    class Config(WrapperConfig):
        """Settings."""

        depths: list[Annotated[float, Field(gt=0, le=1)]] = Field(
            default=[0.3, 0.6, 0.9], min_length=1, description="shares of a tower's depth; 1: its last block"
        )
        tau: Annotated[float, Field(gt=0)] = Field(0.07, description="temperature at every depth; it is not trained")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.tau = config.tau
        self.hidden = tuple(dict.fromkeys(config.depths))

    def forward(
        self,
        a: Tensor,
        b: Tensor,
        ids: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        extras: Extras | None = None,
    ) -> LossOutput:
        """See the module; a and b, the features themselves, are not used."""
        assert extras is not None
        value, metrics = a.new_zeros(()), dict[str, Tensor]()
        scale = logit_scale.new_full((1,), 1 / self.tau)
        for depth in self.hidden:
            x, y = (normalize(side[hidden_group(depth)], dim=1) for side in (extras.a, extras.b))
            out = self.inside(x, y, ids, scale, None, extras)
            value = value + out.value
            metrics[f"depth_{round(100 * depth)}"] = out.value.detach()
        return LossOutput(value, metrics)
