"""Affinity mimicking (TinyCLIP, arXiv 2309.12314): which samples are near each other, as the teacher sees it.

Across modalities it is the soft-label term with the models' own scales, image → text and text → image. ``within`` adds
the affinities inside each modality, a row's own column left out:

    ℓ_i = KL( softmax_{j≠i}(α_T t_i·t_j) ‖ softmax_{j≠i}(α a_i·a_j) )
"""

from __future__ import annotations

import torch
from pydantic import Field, model_validator
from torch import Tensor

from dualenc.distill.terms.soft_labels import TeacherSoftmax, soft_labels
from dualenc.distill.terms.term import PairInputs, Term, TermConfig, features_of, how_of, terms
from dualenc.losses import LossOutput
from dualenc.losses.blockwise.row_loss import INF, Tile
from dualenc.losses.contrast import contrast
from dualenc.losses.targets import SoftTarget


def itself(tile: Tile) -> Tensor:
    """Bool [h, w]: the column is the row."""
    rows, columns = tile.pair("slot")
    return rows == columns


def neighbours(tile: Tile) -> Tensor:
    """The logits of the other columns."""
    return tile.logits.masked_fill(itself(tile), -INF)


class TeacherNeighbours(TeacherSoftmax):
    """The teacher's softmax over the other columns."""

    def __call__(self, tile: Tile) -> Tensor:
        """See the class."""
        return super().__call__(tile).masked_fill(itself(tile), -INF)


@terms.register("affinity")
class Affinity(Term):
    """Affinity mimicking: the teacher's similarities across modalities, and within each if asked for.

    ``{name: affinity, across: true, within: false}``: the mean of the parts that are asked for.

    Formula: KL(softmax(α_T t_i·t_j) ‖ softmax(α a_i·a_j)), across modalities and within each
    Paper: TinyCLIP, arXiv 2309.12314
    Needs: a teacher with features
    """

    class Config(TermConfig):
        """Settings."""

        across: bool = Field(default=True, description="compare the similarities between the modalities")
        within: bool = Field(default=False, description="compare the similarities inside each modality")

        @model_validator(mode="after")
        def _some(self) -> Affinity.Config:
            if not (self.across or self.within):
                raise ValueError("across and within are both false; set at least one of them to true")
            return self

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.needs_features = config.within

    def __call__(self, x: PairInputs) -> LossOutput:
        """See the module."""
        parts = []
        if self.config.across:
            parts.append(soft_labels(x, x.logit_scale, 1.0, 1.0, self.config.strip_mb))
        if self.config.within:
            parts.append(self._within(x))
        return LossOutput(torch.stack(parts).mean())

    def _within(self, x: PairInputs) -> Tensor:
        if int(x.count) < 2:  # a single row has no neighbours
            return x.a[:0].sum() + x.b[:0].sum() + x.logit_scale[:0].sum()
        how, total = how_of(x, self.config.strip_mb), x.logit_scale.new_zeros(())
        row_loss = SoftTarget(
            TeacherNeighbours("teacher", "teacher", x.teacher.logit_scale), neighbours, divergence=True
        )
        for rows, teacher in ((x.a, x.teacher.a), (x.b, x.teacher.b)):
            values = {"teacher": features_of(teacher), "slot": x.slots}
            total = total + contrast(rows, rows, x.ids, x.logit_scale, row_loss, None, values=values, how=how).value / 2
        return total
