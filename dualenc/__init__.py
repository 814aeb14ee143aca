"""dualenc: a trainer for CLIP-style dual encoders of any pair of modalities."""

__version__ = "0.1.0"
