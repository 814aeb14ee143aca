"""For those who name this module under ``plugins:``: the package's parts under the names of its entry points."""

from dualenc.data.modalities import modalities
from dualenc.data.plans import plans
from dualenc.data.sources import sources
from dualenc.distill import terms
from dualenc.encoders import own_towers
from dualenc.losses import losses
from dualenc_evals.kinds import kinds
from dualenc_series.as_it_lies import AsItLies
from dualenc_series.hinge import Hinge
from dualenc_series.same_cosines import SameCosines
from dualenc_series.series import SeriesCNN, SeriesInput
from dualenc_series.series_csv import SERIES_CSV
from dualenc_series.two_choices import TwoChoices

modalities.register("gauge")(SeriesInput)
own_towers.register("gauge_cnn")(SeriesCNN)
losses.register("hinge")(Hinge)
terms.register("same_cosines")(SameCosines)
sources.register("series_csv")(SERIES_CSV)
plans.register("as_it_lies")(AsItLies)
kinds.register("two_choices")(TwoChoices)
