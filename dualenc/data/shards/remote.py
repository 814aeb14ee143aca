"""Remote bytes: http(s), s3 and every other fsspec URL, ``pipe:`` commands, and the cache that keeps them."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import parent_process
from pathlib import Path
from typing import IO, Any, TypeVar

from dualenc.config import Data
from dualenc.data.shards.http_ranges import NotPlain, WholeFile, read_range
from dualenc.errors import DataError

logger = logging.getLogger(__name__)

T = TypeVar("T")
pause = time.sleep
_PIPE = "pipe:"
_PROGRESS = 1 << 20
_TRUE_BYTES = {"Accept-Encoding": "identity"}


@dataclass(frozen=True, slots=True)
class Bounds:
    """How long a server may take to connect, and a server or command between two pieces of data. The total is not
    limited."""

    connect_s: float = 15.0
    idle_s: float = 60.0

    @classmethod
    def of(cls, data: Data) -> Bounds:
        """The bounds of a recipe's ``data`` section."""
        return cls(data.connect_s, data.idle_s)


def is_pipe(url: str) -> bool:
    """Whether the shard is a command's output."""
    return url.startswith(_PIPE)


def is_local(url: str) -> bool:
    """Whether the shard is a file that can be opened by its path."""
    return not is_pipe(url) and ("://" not in url or url.startswith("file://"))


def local_path(url: str) -> str:
    """The path of a local shard."""
    return url.removeprefix("file://")


class ReadFailed(DataError):
    """Bytes could not be read after all retries; the reader counts the samples that needed them."""


class NoRanges(Exception):
    """The server sent the whole file when part of it was requested."""


def retry(do: Callable[[], T], what: str, retries: int, progress: Callable[[], int] | None = None) -> T:
    """Call until it succeeds, at most ``retries`` times more, with growing pauses (0.2, 0.4, … at most 8 s).

    ``progress``: bytes received so far, for a call that continues where the last one stopped: one that received 1 MiB
    or more does not count as a failed attempt.

    Raises:
        FileNotFoundError: immediately, as retrying cannot help.
        ReadFailed: with the last error, when all attempts failed.
    """
    attempt, had = 0, 0
    while True:
        try:
            return do()
        except FileNotFoundError:
            raise
        except Exception as e:
            if not _passing(e):
                raise
            now = progress() if progress is not None else 0
            if now - had >= _PROGRESS:
                attempt, had = 0, now
            if attempt == retries:
                raise ReadFailed(f"{what}: {_said(e)} (tried {retries + 1} times)") from e
            seconds = min(0.2 * 2**attempt, 8.0)
            logger.warning("%s failed (%s); trying again in %.1f s", what, _said(e), seconds)
            pause(seconds)
            attempt += 1


def _said(e: Exception) -> str:
    return f"{type(e).__name__}: {e}" if str(e) else type(e).__name__


def _passing(e: Exception) -> bool:
    """Whether it is an error of the connection or disk. aiohttp's and botocore's errors are not OSErrors."""
    return isinstance(e, OSError | EOFError | TimeoutError) or type(e).__module__.startswith(("aiohttp", "botocore"))


def filesystem(url: str, bounds: Bounds | None = None) -> tuple[Any, str]:
    """The fsspec filesystem of a URL and the path in it.

    Raises:
        DataError: if the protocol is unknown or its package is not installed.
    """
    import fsspec

    try:
        fs, path = fsspec.core.url_to_fs(url, **_options(url, bounds or Bounds()))
    except (ValueError, ImportError) as e:
        raise DataError(f"{url}: {e}; for s3:// install dualenc[s3]") from e
    _opened[id(fs)] = fs
    return fs, path


_opened: dict[int, Any] = {}
"""Filesystems are never dropped (fsspec keeps one for each set of options anyway). In a forked worker fsspec empties
its own store; the parent's client would be closed there, and with it, in the epoll that both share, the parent's
connections: the parent's next request would wait until ``idle_s`` has passed."""


def _options(url: str, bounds: Bounds) -> dict[str, Any]:
    """The bounds as options of the protocol's client, merged with fsspec's own configuration."""
    from fsspec.config import conf

    protocol = url.split("://", 1)[0]
    if protocol in ("http", "https"):
        from aiohttp import ClientTimeout

        # aiohttp's default is 5 minutes in total, which would abort the healthy download of a large shard.
        timeout = ClientTimeout(total=None, sock_connect=bounds.connect_s, sock_read=bounds.idle_s)
        return {"client_kwargs": {**conf.get(protocol, {}).get("client_kwargs", {}), "timeout": timeout}}
    if protocol in ("s3", "s3a"):
        limits = {"connect_timeout": bounds.connect_s, "read_timeout": bounds.idle_s}
        return {"config_kwargs": {**conf.get(protocol, {}).get("config_kwargs", {}), **limits}}
    return {}


def fetch_bytes(
    url: str, retries: int, start: int | None = None, stop: int | None = None, bounds: Bounds | None = None
) -> bytes:
    """Bytes ``start:stop`` of a URL (all of it by default).

    Raises:
        FileNotFoundError: if there is nothing at the URL.
        NoRanges: if the server does not support byte ranges.
        ReadFailed: after all retries.
    """

    def read() -> bytes:
        plain = _plain_range(url, start, stop, bounds or Bounds())
        if plain is not None:
            return plain
        fs, path = filesystem(url, bounds)
        raw: bytes = fs.cat_file(path, start=start, end=stop)
        if start is not None and stop is not None and len(raw) != stop - start:
            if len(raw) > stop - start:
                raise NoRanges(url)
            raise EOFError(f"received {len(raw)} bytes instead of {stop - start}")
        return raw

    return retry(read, f"Reading {url}", retries)


def _plain_range(url: str, start: int | None, stop: int | None, bounds: Bounds) -> bytes | None:
    """A byte range by the lighter client; None where fsspec's is needed."""
    from fsspec.config import conf

    scheme = url.split("://", 1)[0]
    if start is None or stop is None or scheme not in ("http", "https") or conf.get(scheme) or _host(url) in _by_fsspec:
        return None
    try:
        raw = read_range(url, start, stop, bounds.connect_s, bounds.idle_s)
    except WholeFile as e:
        raise NoRanges(url) from e
    except NotPlain:
        _by_fsspec.add(_host(url))
        return None
    if len(raw) != stop - start:
        raise EOFError(f"received {len(raw)} bytes instead of {stop - start}")
    return raw


_by_fsspec: set[str] = set()
"""Hosts that need more than a plain GET."""


def _host(url: str) -> str:
    return "/".join(url.split("/", 3)[:3])


async def _stream_http(fs: Any, url: str, target: Path, mark: list[str]) -> None:
    """Download ``url`` to ``target``, continuing where an earlier call stopped.

    ``mark`` keeps the entity tag between calls, so that a file that has been replaced is read from its beginning.
    """
    have = target.stat().st_size if target.exists() else 0
    headers = {**fs.kwargs.get("headers", {}), **_TRUE_BYTES}
    if have:
        headers |= {"Range": f"bytes={have}-"} | ({"If-Range": mark[0]} if mark else {})
    session = await fs.set_session()
    async with session.get(fs.encode_url(url), **{**fs.kwargs, "headers": headers}) as answer:
        if answer.status in (404, 410):
            raise FileNotFoundError(url)
        if answer.status == 416 and have:
            return  # nothing is missing: the caller compares the size with the index
        answer.raise_for_status()
        tag = answer.headers.get("ETag", "")
        mark[:] = [tag] if tag and not tag.startswith("W/") else []
        goes_on = answer.status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        with open(target, "ab" if goes_on else "wb") as out:
            async for piece in answer.content.iter_chunked(1 << 18):
                out.write(piece)


class ShardCache:
    """Whole shards on local disk, at most ``max_gb`` of them: the least recently used are evicted first.

    Several processes may share one folder: a lock per shard keeps them from fetching it twice, and a file appears
    under its name only when it is complete. File names are hashes of URLs, never parts of them.
    """

    def __init__(self, folder: str | Path, max_gb: float, retries: int, bounds: Bounds | None = None) -> None:
        self.folder = Path(folder)
        self.max_bytes = int(max_gb * 1e9)
        self.retries = retries
        self.bounds = bounds

    @classmethod
    def temporary(cls, max_gb: float, retries: int, bounds: Bounds | None = None) -> ShardCache:
        """A cache in a new temporary folder; :meth:`remove` deletes it."""
        return cls(tempfile.mkdtemp(prefix="dualenc-shards-"), max_gb, retries, bounds)

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def get(self, url: str, expected: int | None = None) -> Path:
        """The local copy of a shard, fetched if missing; ``expected`` is its size in the index.

        Raises:
            DataError: if there is nothing at the URL.
            ReadFailed: if it could not be read completely after all retries.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._file(url)
        if not self._touch(path, expected):
            with self._lock(path):
                if not self._touch(path, expected):
                    self._fetch(url, path, expected)
                    self._evict(keep=path)
        return path

    def has(self, url: str, expected: int | None = None) -> bool:
        """Whether a shard need not be fetched; it then counts as used."""
        return self._touch(self._file(url), expected)

    def _file(self, url: str) -> Path:
        return self.folder / (hashlib.blake2b(url.encode(), digest_size=12).hexdigest() + ".tar")

    def _touch(self, path: Path, expected: int | None) -> bool:
        """Whether there is a usable copy; one of another size belongs to a shard that has since been replaced."""
        try:
            os.utime(path)
            return expected is None or path.stat().st_size == expected
        except FileNotFoundError:
            return False

    @contextlib.contextmanager
    def _lock(self, path: Path) -> Iterator[None]:
        with open(path.with_suffix(".lock"), "w") as f:
            fcntl.flock(f, fcntl.LOCK_EX)
            yield

    def _fetch(self, url: str, path: Path, expected: int | None) -> None:
        temporary = path.with_suffix(f".{os.getpid()}.part")
        mark: list[str] = []

        def had() -> int:
            return temporary.stat().st_size if temporary.exists() else 0

        def read() -> None:
            if is_pipe(url):
                with open(temporary, "wb") as out:
                    _run_pipe(url.removeprefix(_PIPE), out, (self.bounds or Bounds()).idle_s)
            else:
                fs, at = filesystem(url, self.bounds)
                if url.startswith(("http://", "https://")):
                    from fsspec.asyn import sync

                    sync(fs.loop, _stream_http, fs, at, temporary, mark)
                else:
                    fs.get_file(at, str(temporary))
            size = had()
            if expected is not None and size != expected:
                if size > expected:
                    temporary.unlink()
                raise EOFError(
                    f"received {size} bytes, the index says {expected}; if the shard was replaced, index it again"
                )

        try:
            retry(read, f"Reading {url}", self.retries, None if is_pipe(url) else had)
            os.replace(temporary, path)
        except FileNotFoundError as e:
            raise DataError(f"There is no shard {url}.") from e
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


_GUARDED = """
( read -r _ <&0; kill -KILL 0 ) <&0 >/dev/null 2>&1 &
watch=$!
disown
( eval "$1" ) </dev/null
code=$?
kill -KILL $watch
exit $code
"""
"""Runs a command in a process group of its own. Its input is a pipe that only this process holds open: when the process
ends, in whatever way, the pipe closes and the whole group is killed."""


def _run_pipe(command: str, out: IO[bytes], idle_s: float) -> None:
    """Write a command's output; a command that fails halfway is an error, not a short shard.

    The command ends with this process, and with the trainer if this process is one of its workers.

    Raises:
        TimeoutError: it wrote nothing for ``idle_s`` and was killed, with all that it had started.
        OSError: it failed.
    """
    # pipefail: in `curl … | zstd -d` the first failure counts, not only the last command's status.
    child = subprocess.Popen(
        ["bash", "-o", "pipefail", "-c", _GUARDED, "dualenc-pipe", command],
        stdin=subprocess.PIPE,
        stdout=out,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    trainer = parent_process()
    said: list[bytes] = []
    reader = threading.Thread(target=lambda: said.append(child.stderr.read()), daemon=True)  # type: ignore[union-attr]
    reader.start()
    written, since = 0, time.monotonic()
    try:
        while True:
            try:
                child.wait(min(0.5, idle_s / 2))
                break
            except subprocess.TimeoutExpired:
                if os.fstat(out.fileno()).st_size > written:
                    written, since = os.fstat(out.fileno()).st_size, time.monotonic()
                elif time.monotonic() - since > idle_s:
                    raise TimeoutError(
                        f"the command wrote nothing for {idle_s:g} s (data.idle_s) after {written:,} bytes"
                    ) from None
                # A worker that waits here would not notice that its trainer was killed.
                if trainer is not None and os.getppid() != trainer.pid:
                    raise DataError("the trainer of this data worker has exited") from None
    finally:
        if child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        child.stdin.close()  # type: ignore[union-attr]
    reader.join(timeout=5.0)
    if child.returncode:
        lines = b"".join(said).decode("utf-8", "replace").strip().splitlines()
        raise OSError(f"the command exited with status {child.returncode}{': ' + lines[-1] if lines else ''}")
