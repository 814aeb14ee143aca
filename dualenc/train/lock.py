"""One run at a time in a run folder: a file that says who is training, and that it is still there."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from dualenc.errors import ConfigError

NAME = "lock.json"
BEAT_S = 20.0
"""How often the holder touches the file."""
STALE_S = 300.0
"""Another machine's lock is taken over once untouched for this long; this machine's, once its process is gone."""


class RunLock:
    """Held while the context lasts.

    Args:
        run_dir: an existing folder.

    Raises:
        ConfigError: another process is training into the folder.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / NAME
        self._own = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "began": _began(os.getpid())})
        self._end = threading.Event()

    def __enter__(self) -> RunLock:
        for _ in range(3):
            if self._create():
                threading.Thread(target=self._beat, name="dualenc-lock", daemon=True).start()
                return self
            self._take_over()
        raise ConfigError(f"{self.path}: other processes keep taking this lock; start one run in this folder at a time")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        try:
            if self.path.read_text(encoding="utf-8") == self._own:
                self.path.unlink()
        except OSError:
            return  # gone with its folder or disk; the next run sees that this process has ended

    def _create(self) -> bool:
        try:
            fd = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return False
        with os.fdopen(fd, "w", encoding="utf-8") as f:
            f.write(self._own)
        return True

    def _take_over(self) -> None:
        """Move a stale lock out of the way; of several processes that try, one succeeds."""
        try:
            holder, age = _holder(self.path), time.time() - self.path.stat().st_mtime
        except FileNotFoundError:
            return
        if _is_alive(holder, age):
            raise ConfigError(
                f"{self.path.parent} is in use: process {holder.get('pid')} on {holder.get('host')} trains in it. "
                f"Stop that run, or use another folder: out=FOLDER. (If that process is gone, remove {self.path}.)"
            )
        stale = self.path.with_name(f".{NAME}.{os.getpid()}.tmp")
        try:
            self.path.rename(stale)
        except FileNotFoundError:
            return
        stale.unlink()

    def _beat(self) -> None:
        while not self._end.wait(BEAT_S):
            try:
                os.utime(self.path)
            except OSError:
                continue  # a file system that is away for a while; others wait STALE_S


def is_running(run_dir: Path) -> bool:
    """Whether a process is training into this folder."""
    path = run_dir / NAME
    try:
        return _is_alive(_holder(path), time.time() - path.stat().st_mtime)
    except OSError:
        return False


def _holder(path: Path) -> dict[str, Any]:
    """The content of a lock; empty if it was cut short or is not a lock."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_alive(holder: dict[str, Any], age_s: float) -> bool:
    pid = holder.get("pid")
    if holder.get("host") != socket.gethostname() or not isinstance(pid, int):
        return age_s < STALE_S
    return _began(pid) is not None and _began(pid) == holder.get("began")


def _began(pid: int) -> str | None:
    """When a process of this machine started, in a form that tells it from an earlier process with the same id."""
    stat = Path(f"/proc/{pid}/stat")
    if stat.parent.parent.is_dir():
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] == "Z" else fields[19]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except (PermissionError, OverflowError):
        return "unknown"
    return "unknown"
