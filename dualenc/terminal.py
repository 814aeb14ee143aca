"""Standard streams that are closed, or that nobody reads any more, end no work that writes its results to files."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Any

from rich.console import Console


def open_standard_streams() -> None:
    """Put the null device where stdin, stdout or stderr is closed (``2>&-``): otherwise the next file that is opened,
    a checkpoint say, gets its number, and whatever a library prints goes into that file."""
    for fd, flags in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(fd)
        except OSError:
            made = os.open(os.devnull, flags)
            if made != fd:
                os.dup2(made, fd)
                os.close(made)
    if sys.stdin is None:
        sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False)


class PatientConsole(Console):
    """A console that stops printing when nobody reads it any more (a closed pipe, a closed terminal)."""

    def print(self, *args: Any, **more: Any) -> None:
        try:
            super().print(*args, **more)
        except (OSError, ValueError):
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        """Also drops what Python still holds back for the stream, which would fail once more when the process ends."""
        self.quiet = True
        with suppress(OSError, ValueError, AttributeError):  # a stream of a test, or one that is closed
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.file.fileno())
            os.close(null)


def say(text: str) -> None:
    """Print a line as it is to stdout, if anybody reads it."""
    PatientConsole().print(text, markup=False, highlight=False, soft_wrap=True)
