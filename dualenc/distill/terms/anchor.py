"""Anchoring to the model a run started from, PromptSRC's regularisers for any tower (Khattak et al., arXiv 2307.06948).

    ℓ_i = Σ_m λ_m · mean_d |f_id − f⁰_id|  +  λ_p · ½ Σ_directions KL( softmax_j(l⁰_ij) ‖ softmax_j(l_ij) )

f are L2-normalised features, l logits over all valid columns. The released code divides the KL by the number of logits,
rows times columns; here it is the mean over rows, so its λ_p is the number of columns times the one here.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from dualenc.distill.terms.soft_labels import soft_labels
from dualenc.distill.terms.term import PairInputs, Term, TermConfig, features_of, terms
from dualenc.losses import LossOutput


@terms.register("anchor")
class AnchorTerm(Term):
    """Keeps features (L1) and rows of similarities (KL) near those of the model the run started from.

    ``{name: anchor, feature: {image: 10, text: 25}, logits: 1}``; a recipe's ``anchor:`` section writes it.

    Formula: Σ_m λ_m mean |f − f⁰| + λ_p KL(softmax(l⁰) ‖ softmax(l))
    Paper: PromptSRC, arXiv 2307.06948
    Needs: the model the run started from as teacher
    """

    class Config(TermConfig):
        """Settings; a modality that is not named is not anchored."""

        feature: dict[str, Annotated[float, Field(ge=0)]] = Field(
            default_factory=dict, description="modality → weight of mean |f − f0|"
        )
        logits: Annotated[float, Field(ge=0)] = Field(default=1.0, description="weight of KL(p0 ‖ p)")

    needs_features = True
    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.names_modalities = {"feature": list(config.feature)}

    def __call__(self, x: PairInputs) -> LossOutput:
        """See the module."""
        keep = x.ids >= 0
        total: Tensor = x.logit_scale.new_zeros(())
        for m, student, teacher in zip(x.pair, (x.a, x.b), (x.teacher.a, x.teacher.b), strict=True):
            weight = self.config.feature.get(m, 0.0)
            if weight:
                distance = (student[keep] - features_of(teacher)[keep]).abs().mean(1)
                total = total + weight * distance.sum() / x.share
        if self.config.logits:
            total = total + self.config.logits * soft_labels(x, x.logit_scale, 1.0, 1.0, self.config.strip_mb)
        return LossOutput(total)
