"""Affinity mimicking (TinyCLIP, arXiv 2309.12314): which samples are near each other, as the teacher sees it.

Across modalities it is the soft-label term with the models' own scales, image → text and text → image. ``within`` adds
the affinities inside each modality, a row's own column left out:

    ℓ_i = KL( softmax_{j≠i}(α_T t_i·t_j) ‖ softmax_{j≠i}(α a_i·a_j) )
"""

from __future__ import annotations

import torch
from pydantic import Field, model_validator
from torch import Tensor

from dualenc.distill.terms.term import PairInputs, Term, TermConfig, features_of, kl_rows, soft_label_sum, terms
from dualenc.distributed.world import rank
from dualenc.losses import LossOutput
from dualenc.losses.blockwise.strips import strip_sum


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
            parts.append(self._across(x))
        if self.config.within:
            parts.append(self._within(x))
        return LossOutput(torch.stack(parts).mean() / (2 * x.share))

    def _across(self, x: PairInputs) -> Tensor:
        total = x.logit_scale.new_zeros(())
        for d in x.directions():
            total = total + soft_label_sum(d, x.logit_scale, 1.0, 1.0, self.config.strip_mb)
        return total

    def _within(self, x: PairInputs) -> Tensor:
        keep, present = torch.nonzero(x.ids >= 0).flatten(), torch.nonzero(x.all_ids >= 0).flatten()
        own = keep + rank() * len(x.ids)  # the column that is the row itself
        total = x.logit_scale.new_zeros(())
        t = x.teacher
        for rows, columns, t_rows, t_columns in (
            (x.a, x.columns.all_a, features_of(t.a), t.all_a),
            (x.b, x.columns.all_b, features_of(t.b), t.all_b),
        ):

            def rows_sum(
                r: Tensor, tr: Tensor, at: Tensor, c: Tensor, tc: Tensor, places: Tensor, scale: Tensor
            ) -> Tensor:
                itself = at[:, None] == places[None]
                student = (scale * (r @ c.T)).masked_fill(itself, float("-inf"))
                teacher = (t.logit_scale * (tr @ tc.T)).masked_fill(itself, float("-inf"))
                return kl_rows(student, teacher).sum()

            if int(x.count) < 2:  # a single row has no neighbours
                total = total + rows[:0].sum() + columns[:0].sum()
                continue
            total = total + strip_sum(
                rows_sum,
                (rows[keep], t_rows[keep], own),
                (columns[present], t_columns[present], present, x.logit_scale),
                len(present),
                self.config.strip_mb,
            )
        return total
