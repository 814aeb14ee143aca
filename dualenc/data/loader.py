"""Batches in step order: workers decode, one process consumes, nothing depends on how many there are."""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from dualenc.config import Data
from dualenc.data.batch import ABSENT, BadSample, Batch
from dualenc.data.modalities.base import DecodeError, ModalityInput
from dualenc.data.plan import Plan, Refs
from dualenc.data.remote import ShardCache, is_local
from dualenc.data.shards import ShardSet, build_plan, open_source
from dualenc.data.stream import Reader, SampleError, check_members
from dualenc.data.tarindex import Sample
from dualenc.errors import ConfigError, DataError, DualencError, did_you_mean

logger = logging.getLogger(__name__)

_HOPELESS = 16
_NO_END = 1 << 62
_ZEROS = np.zeros(4, np.uint64)
_thread = threading.local()


@dataclass(frozen=True, slots=True)
class Failure:
    """An error on its way from a worker to the consumer: the class and its sentence, without the worker's traceback."""

    error: DualencError


class Loader:
    """An iterable over steps; yields this rank's :class:`Batch` of every step from ``start_step`` on.

    Args:
        data: the recipe's ``data`` section.
        inputs: modality → its input.
        pairs: the recipe's pairs. A sample is used if it has both sides of at least one.
        seed: of the order and of all augmentation.
        batch_size: global; must be a multiple of ``world``.
        rank, world: this process and how many there are.
        start_step: the first step; resuming is setting it.
        pin_memory: copy batches into pinned memory (for a GPU).
        start_method: how workers start; default: fork where there is fork.

    Attributes:
        plan: the order.
        stop_step: iteration ends before this step; None: never. Set it before iterating.
        last_wait_s, data_wait: seconds the consumer waited for the last batch, and for all of them.

    Raises:
        ConfigError: for a batch that cannot be split, an unknown modality in a source's ``members``.
        DataError: for missing or broken shards; while iterating, for a source of which nothing can be used.
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
    ) -> None:
        if batch_size % world:
            raise ConfigError(f"batch.size ({batch_size}) must be a multiple of the {world} ranks.")
        wanted = [members_of(data, i, inputs, pairs) for i in range(len(data.sources))]
        check_mix(data, inputs, pairs)
        self.sets = [open_source(s, data.retries) for s in data.sources]
        self.plan: Plan = build_plan(data, self.sets, seed)
        self.rank, self.world, self.batch_size = rank, world, batch_size
        self.start_step = start_step
        self.stop_step: int | None = None
        self.last_wait_s = self.data_wait = 0.0
        self._data, self._pin, self._method = data, pin_memory, start_method
        self._cache = _open_cache(data, self.sets)
        self._finalizer = None
        if self._cache is not None and data.cache_dir is None:
            self._finalizer = weakref.finalize(self, self._cache.remove)
        self._steps = StepDataset(
            self.plan, self.sets, inputs, pairs, wanted, seed, batch_size, rank, world, self._cache, data
        )
        self._iterator: Any = None
        self._lost_worker = False
        self._watchdog: Watchdog | None = None

    def __iter__(self) -> Iterator[Batch]:
        """Batches from ``start_step`` to ``stop_step``; a new iteration starts there again."""
        self.close()
        stop = _NO_END if self.stop_step is None else self.stop_step
        iterator = self._iterator = iter(self._torch_loader(self.start_step, stop))
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
        # Releasing torch's iterator stops its workers, but a traceback on its way up may still hold it.
        shutdown = getattr(iterator, "_shutdown_workers", None)
        if shutdown is not None:
            try:
                shutdown()
            except RuntimeError as e:
                # torch's SIGCHLD handler reports a dead worker wherever the main thread is, so also here, once more.
                if not self._lost_worker or "killed by" not in str(e):
                    raise
                shutdown()
        self._steps.close()

    def _torch_loader(self, start: int, stop: int) -> DataLoader[Any]:
        workers = self._data.workers
        method = self._method or ("fork" if hasattr(os, "fork") else "spawn")
        more: dict[str, Any] = {}
        if workers:
            more = {
                "prefetch_factor": self._data.prefetch,
                "multiprocessing_context": method,
                "worker_init_fn": _quiet_worker,
            }
        return DataLoader(
            self._steps,
            batch_size=None,
            sampler=StepSampler(start, stop),
            num_workers=workers,
            collate_fn=_as_it_is,
            pin_memory=self._pin,
            **more,
        )

    def _next(self, iterator: Any, step: int) -> Batch | Failure:
        try:
            item: Batch | Failure = next(iterator)
            return item
        except (RuntimeError, OSError, EOFError) as e:
            # A dead worker shows itself as torch's message, or as a broken connection when its tensors are fetched.
            text = str(e) or type(e).__name__
            lost = isinstance(e, ConnectionError | EOFError) or "exited unexpectedly" in text or "killed by" in text
            if not self._data.workers or not lost or text.startswith("Caught "):
                raise
            self._lost_worker = True
            raise DataError(
                f"A data worker died while step {step} was read ({text.splitlines()[0]}); usually memory ran out: "
                "lower data.workers or data.prefetch."
            ) from e

    def _awaited(self, step: int) -> str:
        """What the stall message says about a step."""
        refs = self.plan.local(step, self.rank, self.world, self.batch_size)
        at = sorted({(int(s), int(h)) for s, h in zip(refs.source, refs.shard, strict=True)})
        names = [self.sets[s].urls[h] for s, h in at]
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        return f"step {step} on rank {self.rank} is awaited; it reads {', '.join(names[:4])}{more}"


class StepDataset(Dataset[Any]):
    """Step number → batch. Lives in every worker; opens its files on first use, so that nothing is shared."""

    def __init__(
        self,
        plan: Plan,
        sets: Sequence[ShardSet],
        inputs: Mapping[str, ModalityInput],
        pairs: Sequence[tuple[str, str]],
        wanted: Sequence[Mapping[str, Sequence[str]]],
        seed: int,
        batch_size: int,
        rank: int,
        world: int,
        cache: ShardCache | None,
        data: Data,
    ) -> None:
        self.plan, self.sets, self.inputs, self.pairs, self.wanted = plan, sets, inputs, list(pairs), wanted
        self.seed, self.batch_size, self.rank, self.world = seed, batch_size, rank, world
        self.cache, self.data = cache, data
        self.modalities = list(dict.fromkeys(m for pair in pairs for m in pair))
        self._reader: Reader | None = None
        self._owner = 0
        self._used = [0] * len(sets)
        self._lost = [0] * len(sets)

    def close(self) -> None:
        """Close this process's files."""
        if self._reader is not None and self._owner == os.getpid():
            self._reader.close()
        self._reader = None

    def __getitem__(self, step: int) -> Batch | Failure:
        begin = time.perf_counter()
        try:
            batch = self.make(self.plan.local(step, self.rank, self.world, self.batch_size), step)
        except DualencError as e:
            return Failure(e)
        batch.load_s = time.perf_counter() - begin
        return batch

    def make(self, refs: Refs, step: int) -> Batch:
        """Read, decode and collate the samples of ``refs``."""
        reader = self._open()
        rows: dict[str, list[Any]] = {m: [] for m in self.modalities}
        slots: dict[str, list[int]] = {m: [] for m in self.modalities}
        ids, keys, bad = [ABSENT] * len(refs), [], []
        at = zip(refs.source.tolist(), refs.shard.tolist(), refs.sample.tolist(), refs.passes.tolist(), strict=True)
        for slot, (source, shard, i, one) in enumerate(at):
            name = self.sets[source].names[shard]
            key = f"#{i}"
            try:
                sample = reader.locate(source, shard, i)
                key = sample.key
                made = self._rows(reader, source, shard, sample, one)
            except SampleError as e:
                bad.append(BadSample(self.sets[source].source, name, key, e.member, e.reason))
                self._lost[source] += 1
                made = {}
            full = f"{self.sets[source].source}/{name}/{key}"
            keys.append(full)
            if made:
                self._used[source] += 1
                ids[slot] = stable_id(full)
            for m, row in made.items():
                rows[m].append(row)
                slots[m].append(slot)
        self._refuse_hopeless(bad)
        return Batch(
            size=len(refs),
            inputs={m: self.inputs[m].collate(rows[m] or [self.inputs[m].dummy()]) for m in self.modalities},
            rows={m: torch.tensor(slots[m], dtype=torch.long) for m in self.modalities},
            ids=torch.tensor(ids, dtype=torch.long),
            keys=keys,
            step=step,
            bad=bad,
        )

    def _rows(self, reader: Reader, source: int, shard: int, sample: Sample, one: int) -> dict[str, Any]:
        """The rows of one sample, by modality."""
        wanted = self.wanted[source]
        found = reader.find(source, shard, sample, wanted)
        if not any(a in found.values and b in found.values for a, b in self.pairs):
            m, looked = next((m, e) for m, e in wanted.items() if m not in found.values)
            raise SampleError("", f"no member for {m} (looked for {', '.join(looked)})")
        full = f"{self.sets[source].source}/{self.sets[source].names[shard]}/{sample.key}"
        partner = self._partner(reader, source, shard, full, one)
        out: dict[str, Any] = {}
        for m, raw in found.values.items():
            part: Any = self.inputs[m]
            rng = sample_rng(self.seed, full, one, m)
            try:
                item = part.decode(raw)
                if partner.keys() >= found.values.keys():
                    item = part.mix(item, partner[m], rng)
                out[m] = part.train(item, rng)
            except DecodeError as e:
                raise SampleError(f"{sample.key}.{found.members[m]}", str(e)) from e
        return out

    def _partner(self, reader: Reader, source: int, shard: int, full: str, one: int) -> dict[str, Any]:
        """Decoded items of the sample that is mixed into this one: any of its shard, which is open already; empty
        where none is. One that cannot be used is left out here: it is counted when its own turn comes."""
        if not self.data.mix:
            return {}
        rng = sample_rng(self.seed, full, one, "mix")
        if rng.random() >= self.data.mix:
            return {}
        try:
            other = reader.locate(source, shard, int(rng.integers(self.sets[source].infos[shard].samples)))
            found = reader.find(source, shard, other, self.wanted[source])
            return {m: self.inputs[m].decode(raw) for m, raw in found.values.items()}
        except (SampleError, DecodeError) as e:
            logger.debug("nothing is mixed into %s: %s", full, e)
            return {}

    def _refuse_hopeless(self, bad: list[BadSample]) -> None:
        """A source of which nothing was usable so far has a wrong key or ending: say so now, not after a pass."""
        for source, (used, lost) in enumerate(zip(self._used, self._lost, strict=True)):
            if used == 0 and lost >= _HOPELESS:
                name = self.sets[source].source
                last = next((b for b in reversed(bad) if b.source == name), None)
                why = f": {last.shard}/{last.key}: {last.reason}" if last else ""
                raise DataError(f"None of the first {lost} samples of source {name!r} could be used{why}")

    def _open(self) -> Reader:
        if self._reader is None or self._owner != os.getpid():
            # After a fork the parent's file offsets and connections are not ours.
            self._reader = Reader(self.sets, self.cache, self.data.retries, self.data.window * self.data.lanes)
            self._owner = os.getpid()
        return self._reader


class StepSampler(Sampler[int]):
    """The steps from start to stop, in order; torch hands whole steps to its workers in turn."""

    def __init__(self, start: int, stop: int) -> None:
        self.start, self.stop = start, stop

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.stop))


class Watchdog:
    """Logs a line whenever a wait has lasted another ``every`` seconds."""

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


# --- parts -------------------------------------------------------------------------------------------------------


def members_of(
    data: Data, i: int, inputs: Mapping[str, ModalityInput], pairs: Sequence[tuple[str, str]]
) -> dict[str, list[str]]:
    """Modality → endings of source i.

    A source that has ``members`` brings the modalities named there and no others; one without brings every modality of
    the pairs, under the usual endings, as far as each sample has it.

    Raises:
        ConfigError: for an unknown modality, a source that cannot make any pair, an ending that holds pickles.
    """
    source = data.sources[i]
    where = f"data.sources.{i}.members"
    paired = list(dict.fromkeys(m for pair in pairs for m in pair))
    if "/" in source.name:
        raise ConfigError(f"data.sources.{i}.name: {source.name!r} must not have a '/' in it.")
    for m in source.members:
        if m not in inputs:
            raise ConfigError(f"{where}: there is no modality {m!r}. {did_you_mean(m, inputs)}")
    out = {m: list(source.members.get(m) or inputs[m].default_members) for m in paired}
    if source.members:
        out = {m: e for m, e in out.items() if m in source.members}
    if not any(a in out and b in out for a, b in pairs):
        raise ConfigError(f"{where}: {sorted(out)} make none of the pairs {[list(p) for p in pairs]}.")
    check_members(out, where)
    return out


def check_mix(data: Data, inputs: Mapping[str, ModalityInput], pairs: Sequence[tuple[str, str]]) -> None:
    """Refuse ``data.mix`` where a modality cannot be mixed.

    Raises:
        ConfigError: naming it.
    """
    rigid = sorted({m for pair in pairs for m in pair if not hasattr(inputs[m], "mix")})
    if data.mix and rigid:
        raise ConfigError(
            f"data.mix: {data.mix:g} needs modalities that can be mixed; {rigid[0]!r} cannot: leave it out."
        )


def stable_id(key: str) -> int:
    """A 63-bit number for a sample id, the same on every rank: a sample drawn twice is its own positive."""
    return (
        int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little") >> 1
    )


def sample_rng(seed: int, key: str, one: int, modality: str) -> np.random.Generator:
    """The generator for one sample's augmentation in one pass: Philox (Salmon et al. 2011) keyed by blake2b.

    A thread has one generator that is set to the key, which is several times faster than making one for each sample;
    what an earlier call returned must not be used any more.
    """
    text = f"{seed}\0{one}\0{modality}\0{key}".encode("utf-8", "surrogateescape")
    words = np.frombuffer(hashlib.blake2b(text, digest_size=16).digest(), np.dtype("<u8"))
    if not hasattr(_thread, "rng"):
        _thread.rng = np.random.Generator(np.random.Philox(key=0))
    rng: np.random.Generator = _thread.rng
    rng.bit_generator.state = {
        "bit_generator": "Philox",
        "state": {"counter": _ZEROS, "key": words},
        "buffer": _ZEROS,
        "buffer_pos": 4,
        "has_uint32": 0,
        "uinteger": 0,
    }
    return rng


def _open_cache(data: Data, sets: Sequence[ShardSet]) -> ShardCache | None:
    if all(is_local(u) for s in sets for u in s.urls):
        return None
    if data.cache_dir is not None:
        return ShardCache(data.cache_dir, data.cache_gb, data.retries)
    return ShardCache.temporary(data.cache_gb, data.retries)


def _as_it_is(item: Any) -> Any:
    return item


def _quiet_worker(worker: int) -> None:
    """One thread each, as workers are many and share the cores with training; signals are the main process's affair.

    Ctrl-C and a scheduler's SIGTERM reach every process of a job. Workers must outlive them, or the run could not
    finish its step and save; only a SIGTERM sent by the main process itself ends a worker.
    """
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_obey_parent, args=(os.getppid(),), name="dualenc-signals", daemon=True).start()
    _report_while_alive(os.getppid())


def _report_while_alive(parent: int) -> None:
    """A worker whose trainer was killed loses its connections: no error of its own, and nobody is left to read it."""
    report = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        lost = isinstance(error, OSError | EOFError)
        if lost:
            time.sleep(1.0)  # the connection goes before the process is seen to be gone
        if os.getppid() == parent or not lost:
            report(kind, error, trace)

    sys.excepthook = hook


def _obey_parent(parent: int) -> None:
    while True:
        if signal.sigwaitinfo({signal.SIGTERM}).si_pid == parent:
            os._exit(0)
