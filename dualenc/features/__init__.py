"""Features on disk: one format for ``dualenc embed``, teachers' caches and the features that evaluations keep."""

from dualenc.features.store import Description, FeaturePart, FeatureStore, Lost
from dualenc.features.writer import FeatureWriter

__all__ = ["Description", "FeaturePart", "FeatureStore", "FeatureWriter", "Lost"]
