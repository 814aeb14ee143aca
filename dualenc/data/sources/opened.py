"""Opening the files a source names: local ones, and URLs through fsspec (http; s3 with its extra)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import IO, cast

from dualenc.data.shards.index import expand
from dualenc.errors import DataError, did_you_mean

MAX_BYTES = 256 * 2**20
"""Largest image, audio file or caption; a header that claims more is damaged."""


class NotThereError(DataError):
    """The data set itself is missing (not one of its items): the caller may add how to get it."""


def is_url(path: str) -> bool:
    """``scheme://…``"""
    return re.match(r"[a-z][a-z0-9+]*://", path) is not None


def open_binary(path: str) -> IO[bytes]:
    """Open for reading with seek.

    Raises:
        DataError: there is no such file (with the nearest name beside it), or it cannot be read.
    """
    if path.startswith("pipe:"):
        raise DataError(f"{path}: parts of the file are read, which is impossible with a pipe; download the file first")
    try:
        if is_url(path):
            import fsspec

            return cast(IO[bytes], fsspec.open(path, "rb").open())
        return Path(path).open("rb")
    except FileNotFoundError as e:
        raise NotThereError(missing(path)) from e
    except (OSError, ImportError, ValueError) as e:
        raise DataError(f"Cannot read {path}: {e}") from e


def missing(path: str) -> str:
    """The error message for a file that does not exist."""
    parent = Path(path).parent
    if is_url(path):
        return f"There is no file {path}."
    if not parent.is_dir():
        return f"There is no file {path}: the folder {parent} does not exist."
    return f"There is no file {path}. {did_you_mean(Path(path).name, (p.name for p in parent.iterdir()))}".rstrip()


def read_text(path: str) -> str:
    """A whole UTF-8 file (a byte order mark is dropped)."""
    with open_binary(path) as f:
        try:
            return f.read().decode("utf-8-sig")
        except UnicodeDecodeError as e:
            raise DataError(f"{path} is not UTF-8 text: {e}") from e


def listed(path: str | Sequence[str], where: str) -> list[str]:
    """The files that a path, or a list of paths, names: ``~``, brace patterns and wildcards are expanded.

    Raises:
        DataError: nothing is named, or a wildcard matches nothing.
    """
    given = [path] if isinstance(path, str) else list(path)
    if not any(given):
        raise DataError(f"{where}: names no file")
    return expand([str(Path(p).expanduser()) if p.startswith("~") else p for p in given])


def need_folder(path: str | Path, where: str) -> Path:
    """The path of a folder that exists.

    Raises:
        NotThereError: naming it.
    """
    p = Path(path).expanduser()
    if not p.is_dir():
        raise NotThereError(f"{where}: there is no folder {p}.")
    return p
