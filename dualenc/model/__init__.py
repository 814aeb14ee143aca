"""A model and how its inputs are made: what a checkpoint describes."""

from dualenc.model.bundle import Bundle, build_bundle
from dualenc.model.embedder import Embedder
from dualenc.model.load import load_model

__all__ = ["Bundle", "Embedder", "build_bundle", "load_model"]
