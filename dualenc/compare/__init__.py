"""Methods compared under one budget: the same data order, steps and seeds for each, and which differences are noise.

``study`` says what is compared, ``study_runs`` trains it and can be interrupted, ``intervals`` is the arithmetic.
"""

from dualenc.compare.study import Comparison, from_recipes, read_comparison
from dualenc.compare.study_runs import Study, run_study

__all__ = ["Comparison", "Study", "from_recipes", "read_comparison", "run_study"]
