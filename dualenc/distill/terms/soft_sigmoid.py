"""Soft labels for sigmoid models (SigLIP, arXiv 2303.15343): every pair is a yes or no, with the teacher's probability.

    ℓ_i = Σ_j KL( Bernoulli(σ(l^T_ij)) ‖ Bernoulli(σ(l_ij)) ),    l = scale · cosine + bias

over all valid columns. One direction suffices: the matrix is the same. A softmax teacher's logits have no zero point;
give it ``teacher_bias``, or the labels are about ½ everywhere.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from dualenc.distill.terms.term import PairInputs, Term, TermConfig, terms
from dualenc.losses import LossOutput
from dualenc.losses.blockwise.strips import strip_sum


@terms.register("soft_sigmoid")
class SoftSigmoid(Term):
    """Soft yes/no labels for sigmoid models, every pair by itself.

    ``{name: soft_sigmoid, teacher_bias: null}``.

    Formula: Σ_j KL(Bernoulli(σ(l^T_ij)) ‖ Bernoulli(σ(l_ij)))
    Paper: SigLIP, arXiv 2303.15343
    Needs: a teacher, with features or scores
    """

    class Config(TermConfig):
        """Settings."""

        teacher_bias: float | None = Field(
            default=None, description="added to the teacher's logits; null: its own bias"
        )

    needs_features = True  # a fusion teacher scores only a few of the pairs

    config: Config

    def __call__(self, x: PairInputs) -> LossOutput:
        """See the module."""
        bias = torch.zeros_like(x.logit_scale) if x.logit_bias is None else x.logit_bias
        (d, *_) = tuple(x.directions())
        teacher_bias = d.teacher_bias if self.config.teacher_bias is None else self.config.teacher_bias

        def rows_sum(rows: Tensor, t_rows: Tensor, columns: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
            teacher = d.teacher_logits(t_rows) + teacher_bias
            q = teacher.sigmoid()
            entropy = binary_cross_entropy_with_logits(teacher, q, reduction="sum")
            return binary_cross_entropy_with_logits(scale * (rows @ columns.T) + bias, q, reduction="sum") - entropy

        total = strip_sum(
            rows_sum,
            (d.rows, d.teacher_rows),
            (d.columns, x.logit_scale, bias),
            len(d.columns),
            self.config.strip_mb,
        )
        return LossOutput(total / x.share)
