"""Choosing samples: filters give every sample scores, an expression over scores makes a selection."""

from dualenc_data_tools.choose import caption_filters, concepts, header_filters, model_filters, pseudo_labels
from dualenc_data_tools.choose.filter import Candidate, Filter, filters

__all__ = [
    "Candidate",
    "Filter",
    "caption_filters",
    "concepts",
    "filters",
    "header_filters",
    "model_filters",
    "pseudo_labels",
]
