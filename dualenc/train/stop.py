"""Being asked to stop."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopFlag:
    """Set by SIGTERM and SIGINT; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.raised = False
        self.name = ""

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals inside the context, restore the old handlers after."""
        old = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for s, handler in old.items():
                signal.signal(s, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.raised and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.raised, self.name = True, signal.Signals(number).name
