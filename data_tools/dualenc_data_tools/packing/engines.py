"""Who packs the chunks of a build: threads of this process, or processes of this machine. Another engine is a class
with the same two methods (:mod:`dualenc_data_tools.packing.on_ray`); the samples and their order are the same."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Protocol, TypeVar

from dualenc.errors import DataError
from dualenc_data_tools.packing.pack import Chunk, Outcome, Packer
from dualenc_data_tools.packing.steps import uses_model
from dualenc_data_tools.sources import SourceConfig
from dualenc_data_tools.writer import ShardWriter

F = TypeVar("F")


class PackingEngine(Protocol):
    """Packs chunks and makes the writers of shards."""

    def pack(self, chunks: Iterable[Chunk], needed: Callable[[Chunk], bool]) -> Iterator[tuple[Chunk, list[Outcome]]]:
        """Every chunk in order with its outcomes; none for a chunk that is not needed."""
        ...

    def writer(self, folder: Path, split: str, complete: int) -> ShardWriter:
        """The writer of a split whose first ``complete`` shards are there already."""
        ...

    def close(self) -> None:
        """Nothing more is packed or written."""
        ...


class Local:
    """Threads (decoders release the GIL), or with ``processes`` above 1, or a model in a step, processes.

    Raises:
        ConfigError: a step cannot be built.
    """

    def __init__(self, cfg: SourceConfig) -> None:
        self.cfg = cfg
        self._pool: Executor
        if cfg.processes == 1 and not uses_model(cfg.steps):
            self._workers, self._work = cfg.threads, Packer(cfg).pack
            self._pool = ThreadPoolExecutor(cfg.threads)
            return
        if not uses_model(cfg.steps):
            Packer(cfg)  # an error in the settings is raised here and not in a process
        self._workers, self._work = cfg.processes, _work
        # A fork starts in milliseconds; it comes before a progress bar starts its thread.
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        self._pool = ProcessPoolExecutor(cfg.processes, context, _begin, (cfg,))
        self._pool.submit(int)

    def writer(self, folder: Path, split: str, complete: int) -> ShardWriter:
        """A writer of this process."""
        return ShardWriter(
            folder,
            max_samples=self.cfg.shard_samples,
            max_bytes=self.cfg.shard_mb * 1e6,
            split=split,
            overwrite=self.cfg.overwrite,
            complete=complete,
        )

    def close(self) -> None:
        """End the threads or processes."""
        self._pool.shutdown(cancel_futures=True)

    def pack(self, chunks: Iterable[Chunk], needed: Callable[[Chunk], bool]) -> Iterator[tuple[Chunk, list[Outcome]]]:
        """As :meth:`PackingEngine.pack`, with few chunks in memory.

        Raises:
            DataError: a process was killed.
        """
        try:
            yield from ahead(
                chunks,
                lambda chunk: self._pool.submit(self._work, chunk) if needed(chunk) else None,
                lambda future: [] if future is None else future.result(),
                2 * self._workers + 1,
            )
        except BrokenProcessPool as e:
            raise DataError(
                "a process of the build ended early: either it was killed, often for want of memory (run the same "
                "command with fewer processes or smaller shards to resume), or a step's model cannot be loaded (see "
                "the lines above)."
            ) from e


def ahead(
    chunks: Iterable[Chunk], begin: Callable[[Chunk], F], result: Callable[[F], list[Outcome]], most: int
) -> Iterator[tuple[Chunk, list[Outcome]]]:
    """Begin up to ``most`` chunks ahead of the one whose result is asked for. If the source fails, what came before
    it is handed over first, so that it is not lost to a resumed build."""
    waiting: deque[tuple[Chunk, F]] = deque()
    failed: DataError | None = None
    try:
        for chunk in chunks:
            waiting.append((chunk, begin(chunk)))
            while len(waiting) > most:
                done, future = waiting.popleft()
                yield done, result(future)
    except DataError as e:
        failed = e
    while waiting:
        done, future = waiting.popleft()
        yield done, result(future)
    if failed is not None:
        raise failed


# --- in a process -------------------------------------------------------------------------------------------------

_packer: list[Packer] = []


def _begin(cfg: SourceConfig) -> None:
    """Make this process ready, and let it end with the one that started it, whose kill it would not notice."""
    one_thread(cfg)
    _packer[:] = [Packer(cfg)]
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def one_thread(cfg: SourceConfig) -> None:
    """Let models compute in one thread, so that a score does not depend on the machine's cores."""
    if uses_model(cfg.steps):
        import torch

        torch.set_num_threads(1)


def _work(chunk: Chunk) -> list[Outcome]:
    return _packer[0].pack(chunk)
