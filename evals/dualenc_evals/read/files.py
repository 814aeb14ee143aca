"""Reading what a task names: local files, and URLs through fsspec (http, s3 with its extra)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import IO, cast

from dualenc.data.shards.index import expand as expand
from dualenc.errors import DataError, did_you_mean

MAX_BYTES = 256 * 2**20
"""No picture, sound or caption of an evaluation is larger; a header that claims so is damaged."""


def is_url(path: str) -> bool:
    """``scheme://…``"""
    return re.match(r"[a-z][a-z0-9+]*://", path) is not None


def open_binary(path: str) -> IO[bytes]:
    """Open for reading with seek.

    Raises:
        DataError: not there (with the nearest name beside it), or not readable.
    """
    if path.startswith("pipe:"):
        raise DataError(f"{path}: an evaluation reads parts of a file, a pipe cannot be; fetch the file first")
    try:
        if is_url(path):
            import fsspec

            return cast(IO[bytes], fsspec.open(path, "rb").open())
        return Path(path).open("rb")
    except FileNotFoundError as e:
        raise DataError(missing(path)) from e
    except (OSError, ImportError, ValueError) as e:
        raise DataError(f"Cannot read {path}: {e}") from e


def missing(path: str) -> str:
    """The sentence for a file that is not there."""
    parent = Path(path).parent
    if is_url(path) or not parent.is_dir():
        return f"There is no file {path}."
    return f"There is no file {path}. {did_you_mean(Path(path).name, (p.name for p in parent.iterdir()))}"


def read_text(path: str) -> str:
    """A whole UTF-8 file (a byte order mark is dropped)."""
    with open_binary(path) as f:
        try:
            return f.read().decode("utf-8-sig")
        except UnicodeDecodeError as e:
            raise DataError(f"{path} is not UTF-8 text: {e}") from e
