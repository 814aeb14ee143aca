"""A model and how its inputs are made: what a checkpoint describes."""

from dualenc.bundle.bundle import Bundle, build_bundle
from dualenc.bundle.embedder import Embedder
from dualenc.bundle.load import load_model

__all__ = ["Bundle", "Embedder", "build_bundle", "load_model"]
