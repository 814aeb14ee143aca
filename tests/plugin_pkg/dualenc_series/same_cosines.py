"""A distillation term: the student's cosines should be the teacher's, Σ_ij (a_i·b_j − t^a_i·t^b_j)² / n²."""

from __future__ import annotations

from dualenc.distill import PairInputs, Term, TermConfig, features_of
from dualenc.losses import LossOutput


class SameCosines(Term):
    """Squared differences of all cosines of the batch."""

    Config = TermConfig
    needs_features = True

    def __call__(self, x: PairInputs) -> LossOutput:
        rows, columns = x.ids >= 0, x.all_ids >= 0
        student = x.a[rows] @ x.columns.all_b[columns].T
        teacher = features_of(x.teacher.a)[rows] @ x.teacher.all_b[columns].T
        return LossOutput((student - teacher).square().sum() / x.share / x.count)
