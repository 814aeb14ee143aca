"""Errors that a user can act on.

Everything that a user can cause is raised as a :class:`DualencError`: the command line prints its message and exits
with its code, without a traceback (``--debug`` shows it). Anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DualencError(Exception):
    """Base of all errors with a message meant for the user. ``exit_code`` is the process's exit status."""

    exit_code = 1


class ConfigError(DualencError):
    """A recipe, task or command line is invalid: the message names the key, the value and what to write instead."""

    exit_code = 2


class DataError(DualencError):
    """Shards, members or files are missing, empty or broken, beyond the allowed share."""

    exit_code = 3


class DecodeError(DataError):
    """These bytes cannot be used; the message is the reason. In training the sample is counted and named."""


class CheckpointError(DualencError):
    """A checkpoint is missing, damaged, or does not fit the model or run that needs it."""

    exit_code = 4


class DivergenceError(DualencError):
    """Training diverged: more non-finite steps in a row than allowed."""

    exit_code = 5


class GuardError(DualencError):
    """Fine-tuning made the model forget more than ``eval.guard`` allows; a checkpoint was written."""

    exit_code = 6


class Interrupted(DualencError):
    """The run was asked to stop (SIGTERM, Ctrl-C) and wrote a checkpoint; the message says how to resume."""

    exit_code = 130


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a sentence with the nearest of ``known``, or the list of them if none is near.

    >>> did_you_mean("info_nec", ["info_nce", "sigmoid"])
    "Did you mean 'info_nce'?"
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if near:
        return f"Did you mean {near[0]!r}?"
    shown = ", ".join(names[:20]) + (f", … ({len(names)} in all)" if len(names) > 20 else "")
    return f"Known: {shown}." if names else "None is known."
