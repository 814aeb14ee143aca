"""Soft labels: the student's row of similarities is pulled to the teacher's (Hinton et al., arXiv 1503.02531).

    ℓ_i = T² · KL( softmax_j(l^T_ij / T_t) ‖ softmax_j(l_ij / T_s) ),    T² = T_t · T_s

over all valid columns, in both directions, each with weight ½. l are logits: scale · cosine. With T = 1 this is the KL
that MobileCLIP (arXiv 2311.17049) and CLIP-KD's contrastive relational distillation (arXiv 2307.12732) use. It is the
soft-target contrast of :mod:`dualenc.losses.targets` with the teacher's softmax as targets.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from dualenc.distill.terms.term import PairInputs, Term, TermConfig, features_of, how_of, terms
from dualenc.losses import LossOutput
from dualenc.losses.blockwise.row_loss import INF, Tile
from dualenc.losses.contrast import contrast
from dualenc.losses.targets import SoftTarget, Targets


class TeacherSoftmax(Targets):
    """log T = scale · t_i·t_j, up to a constant of the row; ``rows`` and ``columns`` name the features t of either."""

    log = True

    def __init__(self, rows: str, columns: str, scale: float) -> None:
        self.rows, self.columns, self.scale = rows, columns, scale

    def __call__(self, tile: Tile) -> Tensor:
        """See the class."""
        products = tile.products(tile.rows.values[self.rows], tile.columns.values[self.columns])
        return (self.scale * products).to(tile.logits.dtype)


class TeacherScores(Targets):
    """log T = a row's ``scores`` [n, N] of the columns at their ``slot``, / temperature; −inf: not scored."""

    log = True

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature

    def __call__(self, tile: Tile) -> Tensor:
        """See the class."""
        scores = tile.rows.values["scores"][:, tile.columns.values["slot"]]
        return (scores / self.temperature).to(tile.logits.dtype)

    def scored(self, tile: Tile) -> Tensor:
        """The student's logits, without the columns that the teacher did not score."""
        return tile.logits.masked_fill(self(tile).isneginf(), -INF)


def soft_labels(
    x: PairInputs, logit_scale: Tensor, student_t: float, teacher_t: float, strip_mb: float | None
) -> Tensor:
    """This rank's share of ½ Σ_directions KL(softmax(l^T / teacher_t) ‖ softmax(l / student_t)), the mean over rows."""
    t, how = x.teacher, how_of(x, strip_mb)
    if t.scores_ab is not None and t.scores_ba is not None:
        targets = TeacherScores(teacher_t)
        row_loss = SoftTarget(targets, push=targets.scored, divergence=True)
        total = x.logit_scale.new_zeros(())
        for rows, columns, scores in ((x.a, x.b, t.scores_ab), (x.b, x.a, t.scores_ba)):
            total = (
                total
                + contrast(
                    rows,
                    columns,
                    x.ids,
                    logit_scale / student_t,
                    row_loss,
                    None,
                    values={"slot": x.slots},
                    row_values={"scores": scores},
                    how=how,
                ).value
            )
        return total / 2
    values = {"teacher_a": features_of(t.a), "teacher_b": features_of(t.b)}
    scale = t.logit_scale / teacher_t
    ab = SoftTarget(TeacherSoftmax("teacher_a", "teacher_b", scale), divergence=True)
    ba = SoftTarget(TeacherSoftmax("teacher_b", "teacher_a", scale), divergence=True)
    return contrast(x.a, x.b, x.ids, logit_scale / student_t, ab, ba, values=values, how=how).value


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
        value = soft_labels(x, scale, c.student_temperature, c.teacher_temperature, c.strip_mb)
        return LossOutput(c.teacher_temperature * c.student_temperature * value)
