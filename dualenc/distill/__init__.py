"""Learning from teachers: online or cached features, and the terms that compare them with the student's.

To add a term: write ``distill/yours.py`` with a class registered in ``base.terms``, import it here, and write its test.
A term sees a :class:`~dualenc.distill.terms.term.PairInputs` and returns a :class:`dualenc.losses.LossOutput`.
"""

from dualenc.distill.objective import Distillation
from dualenc.distill.setup import Distiller
from dualenc.distill.terms import affinity, anchor, dcd, feature, gradient, interactive, soft_labels, soft_sigmoid  # noqa: F401
from dualenc.distill.terms.term import PairInputs, Term, TermConfig, features_of, terms

__all__ = ["Distillation", "Distiller", "PairInputs", "Term", "TermConfig", "features_of", "terms"]
