"""Soft labels: the student's row of similarities is pulled to the teacher's (Hinton et al., arXiv 1503.02531).

    ℓ_i = T² · KL( softmax_j(l^T_ij / T_t) ‖ softmax_j(l_ij / T_s) ),    T² = T_t · T_s

over all valid columns, in both directions, each with weight ½. l are logits: scale · cosine. With T = 1 this is the KL
that MobileCLIP (arXiv 2311.17049) and CLIP-KD's contrastive relational distillation (arXiv 2307.12732) use.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from dualenc.distill.terms.term import PairInputs, Term, TermConfig, soft_label_sum, terms
from dualenc.losses import LossOutput


@terms.register("soft_labels")
class SoftLabels(Term):
    """Rows of similarities pulled to the teacher's: KL of softmaxes with a temperature for each.

    ``{name: soft_labels, teacher_temperature: 1, student_temperature: 1}``: the temperatures divide the logits.

    Formula: T² KL(softmax(l^T / T_t) ‖ softmax(l / T_s)), both directions
    Paper: Hinton et al., arXiv 1503.02531; MobileCLIP, arXiv 2311.17049
    Needs: a teacher, with features or scores
    """

    class Config(TermConfig):
        """Settings."""

        teacher_temperature: Annotated[float, Field(gt=0)] = Field(
            default=1.0, description="the teacher's logits are divided by this"
        )
        student_temperature: Annotated[float, Field(gt=0)] = Field(
            default=1.0, description="the student's logits are divided by this"
        )
        learn_scale: bool = Field(default=True, description="false: this term does not move the student's logit scale")

    config: Config

    def __call__(self, x: PairInputs) -> LossOutput:
        """See the module."""
        c = self.config
        scale = x.logit_scale if c.learn_scale else x.logit_scale.detach()
        total: Tensor = x.logit_scale.new_zeros(())
        for d in x.directions():
            total = total + soft_label_sum(d, scale, c.student_temperature, c.teacher_temperature, c.strip_mb)
        return LossOutput(c.teacher_temperature * c.student_temperature * total / (2 * x.share))
