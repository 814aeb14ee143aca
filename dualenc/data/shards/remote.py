"""Bytes from elsewhere: http(s), s3 and every other fsspec URL, ``pipe:`` commands, and the cache they are kept in."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from dualenc.errors import DataError

logger = logging.getLogger(__name__)

T = TypeVar("T")
_PIPE = "pipe:"


def is_pipe(url: str) -> bool:
    """Whether the shard is a command's output."""
    return url.startswith(_PIPE)


def is_local(url: str) -> bool:
    """Whether the shard is a file that can be opened by its path."""
    return not is_pipe(url) and ("://" not in url or url.startswith("file://"))


def local_path(url: str) -> str:
    """The path of a local shard."""
    return url.removeprefix("file://")


class ReadFailed(Exception):
    """Bytes could not be had after all retries; the reader counts the samples that needed them."""


class NoRanges(Exception):
    """The server sent the whole file where a part was asked for."""


def retry(do: Callable[[], T], what: str, retries: int) -> T:
    """Call until it succeeds, at most ``retries`` times more, with growing pauses (0.2, 0.4, … at most 8 s).

    Raises:
        FileNotFoundError: at once: a name that is wrong stays wrong.
        ReadFailed: with the last error, when all tries failed.
    """
    for attempt in range(retries + 1):
        try:
            return do()
        except FileNotFoundError:
            raise
        except Exception as e:
            if not _passing(e):
                raise
            if attempt == retries:
                raise ReadFailed(f"{what}: {type(e).__name__}: {e} (tried {retries + 1} times)") from e
            pause = min(0.2 * 2**attempt, 8.0)
            logger.warning("%s failed (%s: %s); trying again in %.1f s", what, type(e).__name__, e, pause)
            time.sleep(pause)
    raise AssertionError("unreachable")


def _passing(e: Exception) -> bool:
    """Errors of the connection or the disk. aiohttp's and botocore's own share no base with OSError."""
    return isinstance(e, OSError | EOFError | TimeoutError) or type(e).__module__.startswith(("aiohttp", "botocore"))


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec filesystem of a URL and the path in it.

    Raises:
        DataError: if the protocol is unknown or its package is not installed.
    """
    import fsspec

    try:
        fs, path = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as e:
        raise DataError(f"{url}: {e}; for s3:// install dualenc[s3]") from e
    return fs, path


def fetch_bytes(url: str, retries: int, start: int | None = None, stop: int | None = None) -> bytes:
    """Bytes ``start:stop`` of a URL (all of it by default).

    Raises:
        FileNotFoundError: if there is nothing at the URL.
        NoRanges: if the server knows no byte ranges.
        ReadFailed: after all retries.
    """

    def read() -> bytes:
        fs, path = filesystem(url)
        raw: bytes = fs.cat_file(path, start=start, end=stop)
        if start is not None and stop is not None and len(raw) != stop - start:
            if len(raw) > stop - start:
                raise NoRanges(url)
            raise EOFError(f"{len(raw)} bytes came instead of {stop - start}")
        return raw

    return retry(read, f"Reading {url}", retries)


class ShardCache:
    """Whole shards on local disk, at most ``max_gb`` of them: the least recently used go first.

    Several processes may share one folder: a lock per shard keeps them from fetching it twice, and a file appears
    under its name only when it is complete. File names are hashes of URLs, never parts of them.
    """

    def __init__(self, folder: str | Path, max_gb: float, retries: int) -> None:
        self.folder = Path(folder)
        self.max_bytes = int(max_gb * 1e9)
        self.retries = retries

    @classmethod
    def temporary(cls, max_gb: float, retries: int) -> ShardCache:
        """A cache in a new temporary folder; :meth:`remove` deletes it."""
        return cls(tempfile.mkdtemp(prefix="dualenc-shards-"), max_gb, retries)

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def get(self, url: str, expected: int | None = None) -> Path:
        """The local copy of a shard, fetched if it is not there; ``expected`` is its size by the index.

        Raises:
            DataError: if there is nothing at the URL.
            ReadFailed: if it could not be had whole after all retries.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / (hashlib.blake2b(url.encode(), digest_size=12).hexdigest() + ".tar")
        if not self._touch(path):
            with self._lock(path):
                if not self._touch(path):
                    try:
                        retry(lambda: self._fetch(url, path, expected), f"Reading {url}", self.retries)
                    except FileNotFoundError as e:
                        raise DataError(f"There is no shard {url}.") from e
                    self._evict(keep=path)
        return path

    def _touch(self, path: Path) -> bool:
        try:
            os.utime(path)
        except FileNotFoundError:
            return False
        return True

    @contextlib.contextmanager
    def _lock(self, path: Path) -> Iterator[None]:
        with open(path.with_suffix(".lock"), "w") as f:
            fcntl.flock(f, fcntl.LOCK_EX)
            yield

    def _fetch(self, url: str, path: Path, expected: int | None) -> None:
        temporary = path.with_suffix(f".{os.getpid()}.part")
        try:
            if is_pipe(url):
                with open(temporary, "wb") as out:
                    _run_pipe(url.removeprefix(_PIPE), out)
            else:
                fs, at = filesystem(url)
                fs.get_file(at, str(temporary))
            size = os.path.getsize(temporary)
            if expected is not None and size != expected:
                raise EOFError(
                    f"{size} bytes came, the index says {expected}; if the shard was replaced, index it anew"
                )
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def _evict(self, keep: Path) -> None:
        entries = []
        for p in self.folder.glob("*.tar"):
            with contextlib.suppress(FileNotFoundError):  # another process may be evicting too
                st = p.stat()
                entries.append((st.st_mtime_ns, st.st_size, p))
        total = sum(size for _, size, _ in entries)
        for _, size, p in sorted(entries):
            if total <= self.max_bytes:
                break
            if p != keep:
                p.unlink(missing_ok=True)
                total -= size


def _run_pipe(command: str, out: Any) -> None:
    """Write a command's output; a command that fails halfway is an error, not a short shard."""
    # pipefail: in `curl … | zstd -d` the first failure counts, not only the last command's status.
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], stdout=out, stderr=subprocess.PIPE, check=False)
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise OSError(f"the command exited with status {done.returncode}{': ' + said[-1] if said else ''}")
