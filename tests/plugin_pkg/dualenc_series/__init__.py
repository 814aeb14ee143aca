"""Series of measurements (several channels over time) for dualenc."""

__version__ = "0.3.0"
