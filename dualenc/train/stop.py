"""Signals that ask the run to stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = [signal.SIGTERM, signal.SIGINT, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]


class StopFlag:
    """Set by SIGTERM, SIGINT and SIGHUP (a closed terminal); a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.raised = False
        self.name = ""

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals inside the context, restore the old handlers after.

        What the shell told the process to ignore stays ignored (SIGHUP under ``nohup``); outside the main thread Python
        allows no handlers, so there nothing is changed.
        """
        main = threading.current_thread() is threading.main_thread()
        wanted = [s for s in SIGNALS if main and signal.getsignal(s) is not signal.SIG_IGN]
        old = {s: signal.signal(s, self._handle) for s in wanted}
        try:
            yield
        finally:
            for s, handler in old.items():
                signal.signal(s, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.raised and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.raised, self.name = True, signal.Signals(number).name
