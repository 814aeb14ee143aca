"""Files of shards: one kept open for reading, and a small one read whole from wherever it is."""

from __future__ import annotations

import contextlib
import os

from dualenc.data.shards.remote import Bounds, fetch_bytes, is_local, local_path


class OpenFile:
    """A file descriptor that is closed with its last user: a thread may still read it while another evicts it."""

    def __init__(self, path: str) -> None:
        self.fd = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):
            os.close(self.fd)


def read_whole(path: str, retries: int, bounds: Bounds | None) -> bytes:
    """The bytes of a local or remote file."""
    if not is_local(path):
        return fetch_bytes(path, retries, bounds=bounds)
    with open(local_path(path), "rb") as f:
        return f.read()
