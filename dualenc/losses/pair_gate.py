"""A gate for each pair of modalities, after Hydra (Wu et al. 2024, Rethinking positive pairs, arXiv 2410.18200): what
two modalities share need not be what others share, so a pair is compared in a learned subspace of its own.

    L = L_inner( norm(m ⊙ a), norm(m ⊙ b) ),    m = sigmoid(g) ∈ (0, 1)^D, one g for each pair of modalities

Hydra gates pairs of *classes*; how it makes a gate of two classes could not be checked. A gate of equal numbers changes
nothing, so training starts at the loss inside. Memory: that of the loss inside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from dualenc.encoders.dual_encoder import EVERY
from dualenc.losses.loss import Extras, LossOutput, losses
from dualenc.losses.wrapper import Wrapper, WrapperConfig


class Gate(nn.Module):
    """Features [n, D] → features times a learned number in (0, 1) for each dimension."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.full((dim,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return x * self.logit.float().sigmoid()


@losses.register("pair_gate")
class PairGate(Wrapper):
    """A learned subspace for each pair of modalities.

    Formula: L(norm(m ⊙ a), norm(m ⊙ b)), m = sigmoid(g) for each pair, L another loss
    Paper: after Hydra, Wu et al. 2024, arXiv 2410.18200
    Needs: nothing; it stands around another loss and trains the gates
    """

    Config = WrapperConfig

    def heads(self, dim: int, modalities: Sequence[str]) -> dict[str, Mapping[str, nn.Module]]:
        """A gate for each two modalities, and the heads of the loss inside."""
        gates = {group_of(a, b): {EVERY: Gate(dim)} for a, b in combinations(modalities, 2)}
        return {**gates, **super().heads(dim, modalities)}

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
        group = group_of(*extras.pair)
        x, y = (normalize(side[group], dim=1) for side in (extras.a, extras.b))
        return self.inside(x, y, ids, logit_scale, logit_bias, extras)


def group_of(a: str, b: str) -> str:
    """The group of a pair's gate, in either order."""
    return "gate_" + "_".join(sorted((a, b)))
