"""Remote bytes fetched before they are read: the byte ranges of a step at once, shards while earlier steps are decoded.

Which samples a step has is known beforehand (the plan is a pure function), so nothing here is guessed. Nothing here
decides anything either: bytes that did not arrive are asked for again by the reader, and checked by it.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from dualenc.data.shards.remote import ReadFailed

AT_ONCE = 128
"""Requests in flight of all workers of a rank: 30 ms each are then about 4,000 a second."""
GAP = 128 << 10
"""Bytes between two ranges up to which one request is cheaper than two (30 ms at 35 Mbit/s)."""
LARGEST = 8 << 20
HELD = 256 << 20
"""Bytes that are in flight or wait to be read, in one process."""

Span = tuple[int, int]


def merged(spans: Sequence[Span], gap: int = GAP, largest: int = LARGEST) -> list[tuple[Span, int]]:
    """Spans [start, stop) of one file → fewer ones that cover them, and how many of them each covers.

    Neighbours with at most ``gap`` bytes between them become one of at most ``largest`` bytes (a longer span stays
    alone).
    """
    out: list[tuple[Span, int]] = []
    for start, stop in sorted(spans):
        if out:
            (first, last), count = out[-1]
            if start <= last + gap and max(stop, last) - first <= largest:
                out[-1] = ((first, max(stop, last)), count + 1)
                continue
        out.append(((start, stop), 1))
    return out


def at_once(workers: int) -> int:
    """Requests in flight of one of a rank's workers: from 16 to 64."""
    return max(16, min(64, AT_ONCE // max(workers, 1)))


class Pool:
    """Daemon threads: a request that hangs does not keep the process from ending, as an executor's would."""

    def __init__(self, threads: int, name: str) -> None:
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._limit, self._name = threads, name
        self._threads: list[threading.Thread] = []

    def submit(self, do: Callable[[], Any]) -> Future[Any]:
        """Call it in a thread."""
        future: Future[Any] = Future()
        self._jobs.put((future, do))
        if len(self._threads) < self._limit:
            self._threads.append(threading.Thread(target=self._work, name=self._name, daemon=True))
            self._threads[-1].start()
        return future

    def close(self, wait_s: float = 0.0) -> None:
        """End the threads, and wait for each to end; calls that have not begun are cancelled."""
        with contextlib.suppress(queue.Empty):
            while True:
                job = self._jobs.get_nowait()
                if job is not None:
                    job[0].cancel()
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            if wait_s > 0:
                thread.join(wait_s)
        self._threads = []

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            future, do = job
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(do())
            except BaseException as e:  # noqa: BLE001 – it is raised where the result is asked for
                future.set_exception(e)


@dataclass(slots=True, eq=False)
class _Wanted:
    span: Span
    tag: int
    left: int
    """Members in it that have not been read."""
    alone: bool
    future: Future[bytes] | None = None


class Ranges:
    """Blocks that were asked for ahead, by URL, until their members are read.

    Args:
        fetch: (url, start, stop) → bytes, with its own retries.
        requests: how many are in flight at once.
    """

    def __init__(self, fetch: Callable[[str, int, int], bytes], requests: int = 32, held: int = HELD) -> None:
        self._fetch, self._limit = fetch, held
        self._pool = Pool(requests, "dualenc-range")
        self._shards: dict[str, list[_Wanted]] = {}
        self._waiting: deque[tuple[str, _Wanted]] = deque()
        self._held = 0
        self._lock = threading.Lock()

    def ask(self, url: str, spans: Sequence[Span], tag: int) -> None:
        """Start fetching members of a shard; ``take`` gives them. ``tag``: the step, for ``forget``."""
        with self._lock:
            blocks = self._shards.setdefault(url, [])
            for span, count in merged(spans):
                block = _Wanted(span, tag, count, count == 1)
                blocks.append(block)
                self._waiting.append((url, block))
            self._pump()

    def take(self, url: str, start: int, stop: int) -> bytes | None:
        """Bytes ``start:stop`` if they were asked for; None if not, or if the request for several members failed.

        Raises:
            ReadFailed: the request for this member alone failed, after all retries.
        """
        with self._lock:
            blocks = self._shards.get(url, ())
            block = next((b for b in blocks if b.span[0] <= start and stop <= b.span[1]), None)
            if block is None:
                return None
            if block.future is None:
                self._start(url, block)
            future = block.future
        assert future is not None
        try:
            raw = future.result()
        except Exception as e:
            self._drop(url, block)
            if block.alone and isinstance(e, ReadFailed):
                raise
            return None  # the reader asks again, for this member only, and says what is wrong
        part = raw[start - block.span[0] : stop - block.span[0]]
        block.left -= 1
        if block.left <= 0:
            self._drop(url, block)
        return part

    def forget(self, tag: int) -> None:
        """Drop what is left of a step: members of samples that were lost before all of them were read."""
        for url, block in [(u, b) for u, blocks in list(self._shards.items()) for b in list(blocks) if b.tag == tag]:
            self._drop(url, block)

    def close(self) -> None:
        """Ask for nothing any more."""
        with self._lock:
            self._shards.clear()
            self._waiting.clear()
        self._pool.close()

    def _drop(self, url: str, block: _Wanted) -> None:
        with self._lock:
            blocks = self._shards.get(url, [])
            if block not in blocks:
                return
            blocks.remove(block)
            if not blocks:
                del self._shards[url]
            if block.future is not None:
                self._held -= block.span[1] - block.span[0]
            block.left = 0
            self._pump()

    def _pump(self) -> None:
        while self._waiting and self._held < self._limit:
            url, block = self._waiting.popleft()
            if block.future is None and block.left:
                self._start(url, block)

    def _start(self, url: str, block: _Wanted) -> None:
        start, stop = block.span
        self._held += stop - start
        block.future = self._pool.submit(lambda: self._fetch(url, start, stop))
