"""Versions of installed distributions, read without importing them: what a number depends on besides code and data."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import metadata

from dualenc import __version__


def versions(names: Iterable[str], absent: str | None = None) -> dict[str, str]:
    """Name → version of each distribution, in this order; ``dualenc`` is this package.

    Args:
        names: as ``pip`` knows them.
        absent: value for one that is not installed; None: leave it out.
    """
    out: dict[str, str] = {}
    for name in names:
        try:
            out[name] = __version__ if name == "dualenc" else metadata.version(name)
        except metadata.PackageNotFoundError:
            if absent is not None:
                out[name] = absent
    return out
