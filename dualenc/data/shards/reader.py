"""Bytes of one sample: from a local tar by seeking, from a remote one by byte range or from the cache.

Only the members asked for are read. Nothing read here is decoded or run; a member's name is a dictionary key and
never becomes a path.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from dualenc.config import Data, Source
from dualenc.data.shards.ahead import Pool, Ranges, Span, at_once
from dualenc.data.shards.index import ShardSet, fits, index_local, open_source, refuse_pipes
from dualenc.data.shards.members import JOIN, JSON, JSON_KEY, SCORE_KEY, Wanted, members_of, needed
from dualenc.data.shards.members import REFUSED as REFUSED
from dualenc.data.shards.members import is_joined as is_joined
from dualenc.data.shards.open_file import OpenFile, read_whole
from dualenc.data.shards.remote import (
    Bounds,
    NoRanges,
    ReadFailed,
    ShardCache,
    fetch_bytes,
    is_local,
    is_pipe,
    local_path,
)
from dualenc.data.shards.tar import BLOCK, Sample, TarIndex, check_member, unsafe
from dualenc.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

_INDEX_BYTES = 256 << 20
_OPEN_FILES = 64
_FAILED_S = 60.0
_FAILURES = 3
_SHARDS_AT_ONCE = 4
_INDEXES_AT_ONCE = 16


Place = tuple[int, int, int]
"""(source, shard, sample) by number."""


class SampleError(Exception):
    """One sample cannot be used: the member and the reason, for the quarantine file."""

    def __init__(self, member: str, reason: str) -> None:
        super().__init__(f"{member}: {reason}" if member else reason)
        self.member, self.reason = member, reason


@dataclass(frozen=True, slots=True)
class Found:
    """A sample's raw values by modality, and the member each came from; a modality it lacks is not there."""

    values: dict[str, Any]
    members: dict[str, str]


def check_members(members: Mapping[str, Sequence[str]], where: str) -> None:
    """Refuse endings that would have to be unpickled.

    Raises:
        ConfigError: naming the modality and the ending.
    """
    for modality, endings in members.items():
        if not endings:
            raise ConfigError(f"{where}.{modality}: name at least one ending, such as [jpg, png].")
        for ending in [part for e in endings for part in e.split(JOIN)]:
            if ending.lower().rsplit(".", 1)[-1] in REFUSED:
                raise ConfigError(
                    f"{where}.{modality}: {ending!r} members hold pickled objects, which can run code when read; "
                    "store plain bytes, json or npy instead."
                )


class Reader:
    """Random access to the samples of opened sources. Make one in every process that reads.

    Args:
        sets: the opened sources; a sample is (source, shard, sample) by number, as ``Plan`` gives it.
        cache: where whole remote shards are kept.
        retries: further attempts after a transient failure.
        window: samples read in random order together. If the shards they span do not fit into the cache, single
            samples are fetched by byte range instead of whole shards.
        indexes: some that have been read already, by (source, shard).
        workers: how many processes read at the same time.
    """

    def __init__(
        self,
        sets: Sequence[ShardSet],
        cache: ShardCache | None,
        retries: int,
        window: int = 1,
        bounds: Bounds | None = None,
        indexes: Mapping[tuple[int, int], TarIndex] | None = None,
        workers: int = 1,
    ) -> None:
        self._bounds = bounds
        self.sets = sets
        self.cache = cache
        self.retries = retries
        self._ranged = [not fits(s, window, cache.max_bytes if cache else 0) for s in sets]
        self._proven: set[int] = set()  # sources whose server has answered with a byte range: many may be asked for
        self._indexes: OrderedDict[tuple[int, int], TarIndex] = OrderedDict(indexes or {})
        self._index_bytes = sum(x.nbytes for x in self._indexes.values())
        self._files: OrderedDict[tuple[int, int], OpenFile] = OrderedDict()
        self._failed: dict[tuple[int, int], tuple[int, float, str]] = {}
        self._kept = threading.Lock()
        self._planner = Pool(1, "dualenc-ahead")
        self._indexers = Pool(_INDEXES_AT_ONCE, "dualenc-index")
        self._fetchers = Pool(_SHARDS_AT_ONCE, "dualenc-shard")
        self._ranges = Ranges(lambda url, start, stop: fetch_bytes(url, retries, start, stop, bounds), at_once(workers))
        self._coming: dict[tuple[int, int], Future[Any]] = {}
        self._expected: dict[int, Future[Any]] = {}

    # --- ahead of reading -------------------------------------------------------------------------------------

    def expect(self, step: int, places: Sequence[Place], wanted: Sequence[Sequence[Wanted]]) -> None:
        """Start fetching what a later step reads from remote shards: its byte ranges at once, or the shards themselves.

        In the background; nothing is raised here, and what did not arrive is read as if it had not been asked for.

        Args:
            places: (source, shard, sample) of its samples.
            wanted: by source, what each ``find`` of a sample will be asked.
        """
        remote = [p for p in places if self._is_remote(p[:2])]
        if remote:
            self._expected[step] = self._planner.submit(lambda: self._fetch_ahead(step, remote, wanted))

    def settle(self, step: int) -> None:
        """Wait until everything that the step reads has been asked for."""
        if step in self._expected:
            self._expected.pop(step).result()

    def finish(self, step: int) -> None:
        """Drop what the step asked for and did not read."""
        self._ranges.forget(step)

    def _is_remote(self, at: tuple[int, int]) -> bool:
        """Whether it is to be fetched; not commands, nor a shard that is left alone after failures."""
        url = self.sets[at[0]].urls[at[1]]
        times = self._failed[at][0] if at in self._failed else 0
        return not is_local(url) and not is_pipe(url) and times < _FAILURES

    def _fetch_ahead(self, step: int, places: Sequence[Place], wanted: Sequence[Sequence[Wanted]]) -> None:
        shards = list(dict.fromkeys(p[:2] for p in places))
        for at in shards:
            if not self._ranged[at[0]]:
                self._shard_ahead(at)
        self._indexes_ahead(shards)
        spans: dict[tuple[int, int], list[Span]] = {}
        for source, shard, i in places:
            index = self._indexes.get((source, shard)) or self.sets[source].memory.get(shard)
            if self._ranged[source] and index is not None and i < len(index):
                sample = index.sample(i)
                members = [e for part in wanted[source] for e in needed(sample, part)]
                places_in = [sample.members[e] for e in members]
                spans.setdefault((source, shard), []).extend((at - BLOCK, at + size) for at, size in places_in)
        answers = {}
        for (source, shard), found in spans.items():
            url = self.sets[source].urls[shard]
            if source not in answers:
                answers[source] = self._answers_ranges(source, url, found[0])
            if answers[source]:
                self._ranges.ask(url, found, step)

    def _answers_ranges(self, source: int, url: str, span: Span) -> bool:
        """Whether many ranges may be asked for: a server without them answers each with the whole shard, so the first
        is asked for alone."""
        if source not in self._proven:
            try:
                fetch_bytes(url, 0, *span, self._bounds)
                self._proven.add(source)
            except NoRanges:
                self._read_whole_shards(source, url)
            except Exception as e:  # noqa: BLE001 – the reader asks again, with retries, and counts what it cannot read
                logger.debug("nothing was fetched ahead from %s: %s", url, e)
        return source in self._proven

    def _read_whole_shards(self, source: int, url: str) -> None:
        if self._ranged[source]:
            logger.warning("%s: the server does not support byte ranges; reading whole shards.", url)
        self._ranged[source] = False

    def indexes_of(self, shards: Sequence[tuple[int, int]]) -> dict[tuple[int, int], TarIndex]:
        """The sidecars of remote shards, read at once; what cannot be read is not there. No thread is left running."""
        self._indexes_ahead([at for at in shards if self._is_remote(at)])
        self._indexers.close(wait_s=5.0)
        return dict(self._indexes)

    def _indexes_ahead(self, shards: Sequence[tuple[int, int]]) -> None:
        without = [at for at in shards if at not in self._indexes and at[1] not in self.sets[at[0]].memory]
        for loading in [self._indexers.submit(lambda at=at: self._index_ahead(at)) for at in without]:  # type: ignore[misc]
            loading.result()

    def _index_ahead(self, at: tuple[int, int]) -> None:
        try:
            index = self._sidecar(at)
            if index is not None:
                self._check_headers(at, index)
                self._keep_index(at, index)
        except Exception as e:  # noqa: BLE001 – the reader meets it again, counts it and says it
            logger.debug("the index of %s was not fetched ahead: %s", self.sets[at[0]].urls[at[1]], e)

    def _shard_ahead(self, at: tuple[int, int]) -> None:
        cache, url, size = self.cache, self.sets[at[0]].urls[at[1]], self.sets[at[0]].infos[at[1]].bytes
        if cache is None or at in self._coming or at in self._files or cache.has(url, size):
            return
        coming = [a for a, f in list(self._coming.items()) if not f.done()]
        if sum(self.sets[s].infos[h].bytes for s, h in [*coming, at]) <= cache.max_bytes / 2:
            self._coming[at] = self._fetchers.submit(lambda: cache.get(url, size))

    # --- reading ----------------------------------------------------------------------------------------------

    def locate(self, source: int, shard: int, sample: int) -> Sample:
        """The key and members of a sample.

        Raises:
            DataError: if the shard's index names fewer samples than the plan was made from.
            SampleError: if the shard cannot be read.
        """
        index = self.index(source, shard)
        listed = self.sets[source].infos.samples[shard]
        if len(index) != listed:
            raise DataError(
                f"The index of {self.sets[source].urls[shard]} says {listed} samples, "
                f"its sidecar {len(index)}; rewrite both with: dualenc shards index"
            )
        return index.sample(sample)

    def find(self, source: int, shard: int, sample: Sample, wanted: Mapping[str, Sequence[str]]) -> Found:
        """Read, for each modality, the first of its endings that the sample has.

        Endings joined by ``+`` are read together, as a dictionary ending → value; one with ``*`` stands for every
        member that matches, which may be none; the others must all exist. So ``json:cameras+cam*`` is a calibration and
        its images.

        Raises:
            SampleError: if the key is unsafe, bytes cannot be read, or a json member is invalid.
            DataError: if the index is stale.
        """
        if unsafe(sample.key):
            raise SampleError("", f"the member name {sample.key!r} leaves the shard's folder; such samples are refused")
        values: dict[str, Any] = {}
        members: dict[str, str] = {}
        docs: list[dict[str, Any]] = []
        for modality, endings in wanted.items():
            for ending in endings:
                got = self._parts(source, shard, sample, ending.split(JOIN), docs)
                if got is not None:
                    values[modality] = got if is_joined(ending) else got[ending]
                    members[modality] = ending
                    break
        return Found(values, members)

    def lacks(self, source: int, shard: int, sample: Sample, ending: str) -> bool:
        """Whether :meth:`find` would pass this ending over; of the members, only ``json`` is read.

        Raises:
            SampleError: the json member cannot be read or is invalid.
        """
        plain = [p for p in ending.split(JOIN) if "*" not in p and not p.startswith((JSON_KEY, SCORE_KEY))]
        if any(p.lower() not in sample.members for p in plain):
            return True
        keys = [p for p in ending.split(JOIN) if p.startswith((JSON_KEY, SCORE_KEY))]
        return bool(keys) and self._parts(source, shard, sample, keys, []) is None

    def _parts(
        self, source: int, shard: int, sample: Sample, parts: Sequence[str], docs: list[dict[str, Any]]
    ) -> dict[str, Any] | None:
        """Part → value; None if one is missing. ``docs`` keeps the sample's json member once it has been read."""
        out: dict[str, Any] = {}
        for part in parts:
            if part.startswith(JSON_KEY):
                if JSON not in sample.members:
                    return None
                if not docs:
                    docs.append(self.document(source, shard, sample))
                value = docs[0].get(part[len(JSON_KEY) :])
                if value is None:
                    return None
                out[part] = value
            elif part.startswith(SCORE_KEY):
                value = self.sets[source].score(part[len(SCORE_KEY) :]).of(shard, sample.number)
                if value is None:
                    return None
                out[part] = value
            elif "*" in part:
                out |= {name: self.read(source, shard, sample, name) for name in members_of(sample, part)}
            elif part.lower() in sample.members:
                out[part] = self.read(source, shard, sample, part.lower())
            else:
                return None
        return out

    def read(self, source: int, shard: int, sample: Sample, ending: str) -> bytes:
        """Bytes of one member.

        Raises:
            SampleError: if they cannot be read after all retries.
            DataError: if something else is there (a stale index).
        """
        offset, size = sample.members[ending]
        name, url = f"{sample.key}.{ending}", self.sets[source].urls[shard]
        at = (source, shard)
        self._refuse_failed(at, name)
        try:
            block = self._ranged_read(source, url, offset - BLOCK, offset + size)
            if block is None:
                block = self._pread(at, offset - BLOCK, BLOCK + size)
        except (ReadFailed, OSError) as e:
            self._note_failure(at, str(e))
            raise SampleError(name, f"could not be read: {e}") from e
        self._failed.pop(at, None)
        header, contents = sample.checks.get(ending, (None, None))
        raw = check_member(block, name, size, url, header)
        if contents is not None and zlib.crc32(raw) != contents:
            raise SampleError(
                name,
                "its bytes are not those that were indexed: damaged, or changed in place (if that is intended, rewrite "
                "the index with: dualenc shards index)",
            )
        return raw

    def close(self) -> None:
        """Close all files, and ask for nothing any more."""
        self._files.clear()
        self._ranges.close()
        for pool in (self._planner, self._indexers, self._fetchers):
            pool.close()

    def document(self, source: int, shard: int, sample: Sample) -> dict[str, Any]:
        """The json member of a sample.

        Raises:
            SampleError: it cannot be read, or holds no keys and values.
        """
        try:
            doc = json.loads(self.read(source, shard, sample, JSON))
        except (ValueError, RecursionError) as e:
            raise SampleError(JSON, f"is not valid JSON ({e})") from e
        if not isinstance(doc, dict):
            raise SampleError(JSON, f"holds {type(doc).__name__}, not keys and values")
        return doc

    def _ranged_read(self, source: int, url: str, start: int, stop: int) -> bytes | None:
        """A byte range of a remote shard; None where whole shards are read."""
        if not self._ranged[source] or is_local(url) or is_pipe(url):
            return None
        try:
            raw = self._ranges.take(url, start, stop)
            if raw is None:
                raw = fetch_bytes(url, self.retries, start, stop, self._bounds)
                self._proven.add(source)
            return raw
        except FileNotFoundError as e:
            raise DataError(f"There is no shard {url}.") from e
        except NoRanges:
            self._read_whole_shards(source, url)
            return None

    def _pread(self, at: tuple[int, int], offset: int, size: int) -> bytes:
        file = self._files.get(at)
        if file is None:
            file = self._files[at] = OpenFile(self._path(at))
            while len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)
        return os.pread(file.fd, size, offset)

    def _path(self, at: tuple[int, int]) -> str:
        shards = self.sets[at[0]]
        url = shards.urls[at[1]]
        if is_local(url):
            return local_path(url)
        if self.cache is None:
            raise ReadFailed(
                f"{url} cannot be read in parts: its server does not support byte ranges; download the file first"
            )
        coming = self._coming.pop(at, None)
        if coming is not None:
            coming.result()  # raises what the fetch raised
        return str(self.cache.get(url, shards.infos[at[1]].bytes))

    def index(self, source: int, shard: int) -> TarIndex:
        """The index of a shard.

        Raises:
            DataError: if the index is damaged or stale.
            SampleError: if the shard cannot be read.
        """
        at = (source, shard)
        with self._kept:
            index = self._indexes.get(at)
            if index is not None:
                self._indexes.move_to_end(at)
                return index
        index = self.sets[source].memory.get(shard)
        if index is not None:
            return index
        index = self._load_index(at)
        self._keep_index(at, index)
        return index

    def _keep_index(self, at: tuple[int, int], index: TarIndex) -> None:
        with self._kept:
            if at in self._indexes:
                return
            self._indexes[at] = index
            self._index_bytes += index.nbytes
            while self._index_bytes > _INDEX_BYTES and len(self._indexes) > 1:
                self._index_bytes -= self._indexes.popitem(last=False)[1].nbytes

    def _load_index(self, at: tuple[int, int]) -> TarIndex:
        """From the sidecar; from the tar itself where there is none or it belongs to another tar."""
        self._refuse_failed(at, "")
        try:
            index = self._sidecar(at)
            if index is None:
                index = index_local(self._path(at))
        except (ReadFailed, OSError) as e:
            self._note_failure(at, str(e))
            raise SampleError("", f"the shard could not be read: {e}") from e
        self._check_headers(at, index)
        return index

    def _sidecar(self, at: tuple[int, int]) -> TarIndex | None:
        """The index beside a shard; None where there is none or it belongs to another tar."""
        sidecar, info = self.sets[at[0]].sidecar(at[1]), self.sets[at[0]].infos[at[1]]
        raw = None
        if sidecar is not None:
            with contextlib.suppress(FileNotFoundError):
                raw = read_whole(sidecar, self.retries, self._bounds)
        index = None if raw is None else TarIndex.from_bytes(raw, str(sidecar))
        return index if index is not None and index.tar_bytes == info.bytes else None

    def _check_headers(self, at: tuple[int, int], index: TarIndex) -> None:
        shards, info = self.sets[at[0]], self.sets[at[0]].infos[at[1]]
        if info.headers and index.digest and index.digest != info.headers:
            raise DataError(
                f"The index of {shards.urls[at[1]]} is stale: the shard's headers are not those that were indexed, so "
                "it was replaced; if that is intended, rewrite the index with: dualenc shards index"
            )

    def _note_failure(self, at: tuple[int, int], why: str) -> None:
        times = self._failed[at][0] if at in self._failed else 0
        self._failed[at] = (times + 1, time.monotonic(), why)

    def _refuse_failed(self, at: tuple[int, int], member: str) -> None:
        """After three failures in a row (each after all retries) a shard is not tried for a minute: its other samples
        fail at once, so that a server that is down does not cost hours of waiting."""
        times, when, why = self._failed.get(at, (0, 0.0, ""))
        if times >= _FAILURES:
            if time.monotonic() - when < _FAILED_S:
                raise SampleError(member, f"could not be read: {why}")
            del self._failed[at]


def iter_samples(
    shards: str | Sequence[str] | Source | ShardSet,
    wanted: Mapping[str, Sequence[str]],
    data: Data | None = None,
    only: Sequence[int] | None = None,
) -> Iterator[tuple[str, Found | SampleError]]:
    """Every sample of some shards once, in stored order: (key, raw values) or (key, error).

    For evaluation and tools: keys are "shard/key"; nothing is shuffled, and errors are yielded, never skipped.

    Args:
        shards: what to open, or an opened source.
        only: numbers of the shards to read; default: all.

    Raises:
        ConfigError: for ``pipe:`` shards of a recipe that does not allow them.
        DataError: as :func:`dualenc.data.shards.index.open_source`.
    """
    check_members(wanted, "members")
    retries = data.retries if data is not None else 3
    bounds = Bounds.of(data) if data is not None else None
    if isinstance(shards, ShardSet):
        opened = shards
    else:
        named = shards if isinstance(shards, Source) else Source.model_validate({"name": "eval", "shards": shards})
        if data is not None:
            refuse_pipes(named.shards, data.allow_pipe, "data.allow_pipe=true (or add --allow-pipe)")
        opened = open_source(named, retries, bounds=bounds)
    needs_cache = not all(is_local(u) for u in opened.urls)
    cache = ShardCache.temporary(data.cache_gb if data is not None else 50.0, retries, bounds) if needs_cache else None
    reader = Reader([opened], cache, retries, bounds=bounds)
    try:
        for shard in range(len(opened.names)) if only is None else only:
            name = opened.names[shard]
            for i in range(opened.infos[shard].samples):
                key = f"{name}/#{i}"
                try:
                    sample = reader.locate(0, shard, i)
                    key = f"{name}/{sample.key}"
                    found: Found | SampleError = reader.find(0, shard, sample, wanted)
                except SampleError as e:
                    found = e
                yield key, found
    finally:
        reader.close()
        if cache is not None:
            cache.remove()
