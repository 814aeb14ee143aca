"""Batches in step order: workers decode, one process consumes, and the number of workers changes nothing."""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch.utils.data import DataLoader

from dualenc.config import Data
from dualenc.data.batch import Batch
from dualenc.data.batches import Composed, ReadFacts, compose
from dualenc.data.dataset import Failure, StepDataset, StepSampler, TeacherView, check_mix, members_of
from dualenc.data.modalities.modality import ModalityInput
from dualenc.data.order import Plan
from dualenc.data.shards.index import ShardSet, build_plan, how_read, open_sources, window_of
from dualenc.data.shards.reader import Reader
from dualenc.data.shards.remote import Bounds, ShardCache, is_local
from dualenc.data.values import ValueKind, kinds_of
from dualenc.data.workers import init_worker, sigterm_blocked, start_workers
from dualenc.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

_NO_END = 1 << 62


class Loader:
    """An iterable over steps; yields this rank's :class:`Batch` of every step from ``start_step`` on.

    Args:
        data: the recipe's ``data`` section.
        inputs: modality → its input.
        pairs: the recipe's pairs. A sample is used if it has both sides of at least one.
        seed: for the order and all augmentation.
        batch_size: global; must be a multiple of ``world``.
        rank, world: this process and how many there are.
        start_step: the first step; set it to resume.
        pin_memory: copy batches into pinned memory (for a GPU).
        start_method: how workers start; default: fork where available.
        views: name → a further version of a modality's items.
        redraw: modality → (seed, passes): its augmentation is drawn as in run ``seed``, with epoch p as epoch
            p % ``passes``, so that stored views are repeated.
        order_from: the step from which on batches are counted, after the first ``order_offset`` positions of the order;
            a phase with other data begins it anew, one with another batch goes on in it.

    Attributes:
        plan: the order.
        how_read: a line for each source with remote shards; described: a line for each whose batches are composed.
        stop_step: iteration ends before this step; None: never. Set it before iterating.
        last_wait_s, data_wait: seconds the consumer waited for the last batch, and for all of them.

    Raises:
        ConfigError: for a batch that cannot be split, an unknown modality in a source's ``members``, ``pipe:`` shards
            without ``data.allow_pipe``.
        DataError: for missing or broken shards; while iterating, for a source without usable samples.
    """

    def __init__(
        self,
        data: Data,
        inputs: Mapping[str, ModalityInput],
        pairs: Sequence[tuple[str, str]],
        seed: int,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        start_step: int = 0,
        pin_memory: bool = False,
        start_method: str | None = None,
        views: Mapping[str, TeacherView] | None = None,
        redraw: Mapping[str, tuple[int, int]] | None = None,
        order_from: int = 0,
        order_offset: int = 0,
    ) -> None:
        if batch_size % world:
            raise ConfigError(f"batch.size ({batch_size}) must be a multiple of the {world} ranks.")
        wanted = [members_of(data, i, inputs, pairs) for i in range(len(data.sources))]
        check_mix(data, inputs, pairs)
        self.sets = open_sources(data)
        self.rank, self.world, self.batch_size = rank, world, batch_size
        self.start_step = start_step
        self.stop_step: int | None = None
        self.last_wait_s = self.data_wait = 0.0
        self._data, self._pin, self._method = data, pin_memory, start_method
        self._cache = _open_cache(data, self.sets)
        facts = ReadFacts(data, self.sets, self._cache)
        self.plan: Plan = compose(build_plan(data, self.sets, seed), data, batch_size, facts)
        self.how_read = how_read(data, self.sets)
        self.described = self.plan.describe() if isinstance(self.plan, Composed) else []
        self._finalizer = None
        if self._cache is not None and data.cache_dir is None:
            self._finalizer = weakref.finalize(self, self._cache.remove)
        self._steps = StepDataset(
            self.plan,
            self.sets,
            inputs,
            pairs,
            wanted,
            seed,
            batch_size,
            rank,
            world,
            self._cache,
            data,
            views,
            redraw,
            _kinds(data, self.sets, self._cache),
            order_from,
            order_offset,
        )
        self._iterator: Any = None
        self._lost_worker = False
        self._watchdog: Watchdog | None = None

    def __iter__(self) -> Iterator[Batch]:
        """Batches from ``start_step`` to ``stop_step``; a new iteration starts there again."""
        self.close()
        stop = _NO_END if self.stop_step is None else self.stop_step
        iterator = self._iterator = self._start(self.start_step, stop)
        watchdog = self._watchdog = Watchdog(self._data.stall_s, self._awaited)
        try:
            for step in range(self.start_step, stop):
                begin = time.perf_counter()
                with watchdog.waiting(step):
                    item = self._next(iterator, step)
                self.last_wait_s = time.perf_counter() - begin
                self.data_wait += self.last_wait_s
                if isinstance(item, Failure):
                    raise item.error
                yield item
        finally:
            if self._iterator is iterator:
                self.close()

    def close(self) -> None:
        """Stop the workers. Safe to call twice; iteration starts them again."""
        if self._watchdog is not None:
            self._watchdog.stop()
            self._watchdog = None
        iterator, self._iterator = self._iterator, None
        # Releasing torch's iterator stops its workers, but the traceback of a pending exception may still hold it. The
        # iterator of data.workers: 0 has none to stop, and there may be no iterator.
        shutdown = getattr(iterator, "_shutdown_workers", None)
        if shutdown is not None:
            try:
                shutdown()
            except RuntimeError as e:
                # torch's SIGCHLD handler reports a dead worker wherever the main thread is, so possibly here again.
                if not self._lost_worker or "killed by" not in str(e):
                    raise
                shutdown()
        self._steps.close()

    def _start(self, start: int, stop: int) -> Any:
        """Torch's iterator over the steps, its workers running."""
        workers = self._data.workers
        method = self._method or ("fork" if hasattr(os, "fork") else "spawn")

        def build(init: Any) -> Any:
            more: dict[str, Any] = {}
            if workers:
                prefetch = self._data.prefetch
                more = {"prefetch_factor": prefetch, "multiprocessing_context": method, "worker_init_fn": init}
            return iter(
                DataLoader(
                    self._steps,
                    batch_size=None,
                    sampler=StepSampler(start, stop),
                    num_workers=workers,
                    collate_fn=_as_it_is,
                    pin_memory=self._pin,
                    **more,
                )
            )

        if workers and method == "fork":
            self._steps.share_indexes(start, workers)
            return start_workers(workers, build)
        with sigterm_blocked():
            return build(init_worker)

    def _next(self, iterator: Any, step: int) -> Batch | Failure:
        try:
            item: Batch | Failure = next(iterator)
            return item
        except (RuntimeError, OSError, EOFError) as e:
            lost = self.lost_worker(e, step)
            if lost is None:
                raise
            raise lost from e

    def lost_worker(self, error: Exception, step: int) -> DataError | None:
        """What to raise instead of ``error`` if it means that a data worker died; else None.

        A dead worker shows itself as a broken connection when its tensors are fetched, or as torch's RuntimeError; the
        latter comes out of a signal handler, so wherever the main thread is, also in the middle of a step.
        """
        text = str(error) or type(error).__name__
        lost = isinstance(error, ConnectionError | EOFError) or "exited unexpectedly" in text or "killed by" in text
        if not self._data.workers or not lost or text.startswith("Caught "):
            return None
        self._lost_worker = True
        return DataError(
            f"A data worker died while reading step {step} ({text.splitlines()[0]}), usually for lack of memory: "
            "lower data.workers or data.prefetch."
        )

    def _awaited(self, step: int) -> str:
        """The part of the stall message that describes a step."""
        refs = self._steps.planned(step)
        at = sorted({(int(s), int(h)) for s, h in zip(refs.source, refs.shard, strict=True)})
        names = [self.sets[s].urls[h] for s, h in at]
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        return f"rank {self.rank} is waiting for step {step}, which reads {', '.join(names[:4])}{more}"


class Watchdog:
    """Logs a line for every ``every`` seconds that a wait lasts."""

    def __init__(self, every: float, describe: Any) -> None:
        self.every, self._describe = every, describe
        self._since: tuple[int, float] | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="dualenc-stall", daemon=True)
        self._thread.start()

    def waiting(self, step: int) -> Watchdog:
        """Use as ``with watchdog.waiting(step):`` around the wait."""
        self._since = (step, time.monotonic())
        return self

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        self._since = None

    def stop(self) -> None:
        """End the thread."""
        self._end.set()

    def _watch(self) -> None:
        said: tuple[int, int] | None = None
        while not self._end.wait(min(self.every / 4, 5.0)):
            since = self._since
            if since is None:
                continue
            step, begin = since
            waited = time.monotonic() - begin
            times = int(waited / self.every)
            if times and said != (step, times):
                said = (step, times)
                logger.warning("Stalled for %.0f s: %s.", waited, self._describe(step))


def _kinds(data: Data, sets: Sequence[ShardSet], cache: ShardCache | None) -> dict[str, ValueKind]:
    """The kinds of the recipe's values; some samples are read where it leaves out a type."""
    if not any(s.values for s in data.sources):
        return {}
    reader = Reader(sets, cache, data.retries, window_of(data, sets) * data.lanes, Bounds.of(data))
    try:
        return kinds_of(data, reader)
    finally:
        reader.close()


def _open_cache(data: Data, sets: Sequence[ShardSet]) -> ShardCache | None:
    if all(is_local(u) for s in sets for u in s.urls):
        return None
    if data.cache_dir is not None:
        return ShardCache(data.cache_dir, data.cache_gb, data.retries, Bounds.of(data))
    return ShardCache.temporary(data.cache_gb, data.retries, Bounds.of(data))


def _as_it_is(item: Any) -> Any:
    return item
