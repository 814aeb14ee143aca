"""The kinds of evaluation, one file each; :data:`kinds` finds them by the ``kind`` of a task."""

from dualenc_evals.kinds import classification, compositional, dense, instances, multilabel, probes, retrieval  # noqa: F401
from dualenc_evals.kinds.kind import Collected, Kind, Measured, kinds

__all__ = ["Collected", "Kind", "Measured", "kinds"]
