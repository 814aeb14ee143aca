"""Learning from teachers: online or cached features, and the terms that compare them with the student's.

To add a term: write ``distill/terms/yours.py`` with a registered subclass of :class:`Term` (which lists what a term may
need of a run), import it here, and write its test. A term sees a :class:`~dualenc.distill.terms.term.PairInputs` and
returns a :class:`dualenc.losses.LossOutput`.
"""

from dualenc.distill.objective import Distillation
from dualenc.distill.setup import Distiller
from dualenc.distill.terms import affinity, anchor, dcd, feature, gradient, interactive, soft_labels, soft_sigmoid  # noqa: F401
from dualenc.distill.terms.term import HeadTerm, PairInputs, Term, TermConfig, features_of, terms

__all__ = ["Distillation", "Distiller", "HeadTerm", "PairInputs", "Term", "TermConfig", "features_of", "terms"]
