"""Feature distillation: the student's features are pulled to the teacher's (CLIP-KD's FD, arXiv 2307.12732).

    mse      ℓ_i = ½ (‖P_a a_i − t^a_i‖² + ‖P_b b_i − t^b_i‖²)        (= 2 − 2·cosine: all vectors have length 1)
    cosine   ℓ_i = ½ ((1 − cos(P_a a_i, t^a_i)) + (1 − cos(P_b b_i, t^b_i)))

Both are sums over dimensions: the mean over dimensions that CLIP-KD takes (with weight 2000) is D_t times less.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from dualenc.distill.terms.term import HeadConfig, HeadTerm, PairInputs, features_of, terms
from dualenc.losses import LossOutput


@terms.register("feature")
class Feature(HeadTerm):
    """Features pulled to the teacher's (mse or cosine), through a projection where dimensions differ.

    ``{name: feature, distance: mse}``; with a projection to the teacher's dimension (training only).

    Formula: ½ (‖P a − t^a‖² + ‖P b − t^b‖²), or 1 − cosine
    Paper: CLIP-KD, arXiv 2307.12732
    Needs: a teacher with features
    """

    class Config(HeadConfig):
        """Settings."""

        distance: Literal["mse", "cosine"] = Field(
            default="mse", description="between the features of student and teacher"
        )

    config: Config

    def __call__(self, x: PairInputs) -> LossOutput:
        """See the module."""
        keep = x.ids >= 0
        total: Tensor = x.logit_scale.new_zeros(())
        for student, teacher in zip(x.projected(), (x.teacher.a, x.teacher.b), strict=True):
            s, t = student[keep], features_of(teacher)[keep]
            if self.config.distance == "mse":
                total = total + (s - t).square().sum() / 2
            else:
                total = total + (1 - (s * t).sum(1)).sum() / 2
        return LossOutput(total / x.share)
