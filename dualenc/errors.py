"""Errors a person can act on.

Everything that a user can cause is raised as a :class:`DualencError`: the command line prints its one sentence and
exits with its code, without a traceback (``--debug`` shows it). Anything else is a bug and is shown whole.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DualencError(Exception):
    """Base of all errors with a message meant for the user. ``exit_code`` is the process's exit status."""

    exit_code = 1


class ConfigError(DualencError):
    """A recipe, task or command line says something that cannot be: names the key, the value and the remedy."""

    exit_code = 2


class DataError(DualencError):
    """Shards, members or files are missing, empty or broken beyond the share that was allowed."""

    exit_code = 3


class DecodeError(DataError):
    """These bytes cannot be used; the message is the reason. In training the sample is counted and named."""


class CheckpointError(DualencError):
    """A checkpoint is missing, damaged, or does not fit what is to be built from it."""

    exit_code = 4


class DivergenceError(DualencError):
    """Training cannot go on: non-finite losses beyond the allowed number of steps in a row."""

    exit_code = 5


class GuardError(DualencError):
    """Fine-tuning unlearned more than the recipe allows (``eval.guard``); the run is saved."""

    exit_code = 6


class Interrupted(DualencError):
    """The run was asked to stop (SIGTERM, Ctrl-C), saved, and says how to go on."""

    exit_code = 130


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a sentence with the nearest of ``known``, or the list of them when nothing is near.

    >>> did_you_mean("info_nec", ["info_nce", "sigmoid"])
    "Did you mean 'info_nce'?"
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if near:
        return f"Did you mean {near[0]!r}?"
    shown = ", ".join(names[:20]) + (f", … ({len(names)} in all)" if len(names) > 20 else "")
    return f"Known: {shown}." if names else "Nothing is registered here."
