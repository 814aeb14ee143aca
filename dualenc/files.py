"""Atomic writes: a reader, or a restart after a kill, sees the old file or the new one, never a part of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A hidden path beside ``path`` to write to; at the end it becomes ``path``, after an error it is removed.

    The folder is created if needed. Files get the mode that the umask gives, as with a plain ``open``.

    Raises:
        OSError: the folder cannot be made or written to, or the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield hidden
        os.replace(hidden, path)
    except BaseException:
        hidden.unlink(missing_ok=True)
        raise


def write_atomically(path: str | Path, content: str | bytes) -> Path:
    """Write ``content`` and return the path: text as UTF-8, half characters (of a shard's names that are no UTF-8) as
    ``\\udcXX``, which JSON reads back. Raises OSError as :func:`replacing` does."""
    with replacing(path) as hidden:
        hidden.write_bytes(content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)
    return Path(path)
