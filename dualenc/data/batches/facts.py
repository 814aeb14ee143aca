"""What batch plans know of samples: one int64 a sample, read once and kept in a file beside the shards.

``batches-NAME-DIGEST.npy`` holds a value (``data.sources.N.values``) of every sample of a source, in the order of its
shards: numbers as they are, text as the 63-bit id that losses get, −1 where a sample has none. ``batches-ids-….npy``
holds a 63-bit number of every sample's ``SHARD/KEY``, by which files of clusters and neighbours find it. The digest is
of the shards' names, sizes and headers and of what is read, so a file of other data is never taken. The files are
mapped, so the processes of a machine share their memory.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from dualenc.config import Data
from dualenc.data.batch import ABSENT
from dualenc.data.order import Ints
from dualenc.data.shards.index import ShardSet, window_of
from dualenc.data.shards.members import SCORE_KEY
from dualenc.data.shards.reader import Reader, SampleError
from dualenc.data.shards.remote import Bounds, ShardCache, is_local, local_path
from dualenc.data.values import PREFIX, ValueKind, kinds_of, stable_id
from dualenc.errors import ConfigError, DataError, did_you_mean
from dualenc.files import replacing

logger = logging.getLogger(__name__)
_EVERY_S = 5.0


class Facts(Protocol):
    """Numbers of the samples of a source, by their place in its shards."""

    def values(self, source: int, name: str) -> Ints:
        """int64 [n]: a value of every sample, −1 where it has none."""
        ...

    def ids(self, source: int) -> Ints:
        """int64 [n]: :func:`sample_id` of every sample."""
        ...


def sample_id(shard: str, key: str) -> int:
    """The number by which files of clusters and neighbours name a sample: 63 bits of BLAKE2b of ``SHARD/KEY``."""
    return stable_id(f"{shard}/{key}")


class ReadFacts:
    """Facts of opened sources: from their files, or read now.

    Args:
        data: the recipe's section; sets: its opened sources; cache: of remote shards.
    """

    def __init__(self, data: Data, sets: Sequence[ShardSet], cache: ShardCache | None = None) -> None:
        self.data, self.sets, self.cache = data, list(sets), cache
        self._kinds: Mapping[str, ValueKind] | None = None

    def values(self, source: int, name: str) -> Ints:
        """See :class:`Facts`.

        Raises:
            ConfigError: the source names no such value, or it is not one label a sample.
            DataError: no sample has it, or the shards cannot be read.
        """
        named = self.data.sources[source].values
        own = self.data.sources[source].name
        if name not in named:
            near = did_you_mean(name, named) + " " if named else ""
            raise ConfigError(
                f"data.batches: source {own!r} has no value {name!r}. {near}Write data.sources.{source}.values: "
                f"{{{name}: json:KEY}}, with the key of the samples' json (or the ending of a member) that holds it"
            )
        kind = self._kinds_of()[name]
        if kind.width is not None or kind.of == "float":
            what = "a list" if kind.width is not None else "a real number"
            raise ConfigError(
                f"data.batches: the value {name!r} is {what} ({kind.name}), and batches are composed by one label "
                "per sample; use a value of type id or int"
            )
        member = named[name].member
        of = [member, kind.name]
        if member.startswith(SCORE_KEY):  # the file may be another one next time
            of.append(self.sets[source].score(member.removeprefix(SCORE_KEY)).digest)
        found = self._kept(source, f"{name}", of, lambda r: self._read(source, name, kind, r))
        if not bool((found != ABSENT).any()):
            raise DataError(
                f"data.batches: none of the {len(found):,} samples of source {own!r} has the value {name!r} ({member})"
            )
        return found

    def ids(self, source: int) -> Ints:
        """See :class:`Facts`."""
        return self._kept(source, "ids", [], lambda r: self._read_ids(source, r))

    # --- reading ----------------------------------------------------------------------------------------------

    def _kinds_of(self) -> Mapping[str, ValueKind]:
        if self._kinds is None:
            reader = self._reader()
            try:
                self._kinds = kinds_of(self.data, reader)
            finally:
                reader.close()
        return self._kinds

    def _reader(self) -> Reader:
        span = window_of(self.data, self.sets) * self.data.lanes
        return Reader(self.sets, self.cache, self.data.retries, span, Bounds.of(self.data))

    def _read(self, source: int, name: str, kind: ValueKind, reader: Reader) -> Ints:
        out, unread = np.full(sum(self.sets[source].counts), ABSENT, np.int64), 0
        wanted = {PREFIX + name: [self.data.sources[source].values[name].member]}
        for at, shard, i in _every(self.sets[source], f"the value {name!r}"):
            try:
                found = reader.find(source, shard, reader.locate(source, shard, i), wanted).values
                if PREFIX + name in found:
                    number = kind.read(found[PREFIX + name])
                    assert isinstance(number, int)
                    out[at] = number
            except (SampleError, ValueError) as e:  # training counts the sample as lost when its turn comes
                unread += 1
                logger.debug("no value %s of sample %d of %s: %s", name, at, self.sets[source].source, e)
        if unread:
            logger.warning("%d samples of %s could not be read for %r.", unread, self.sets[source].source, name)
        return out

    def _read_ids(self, source: int, reader: Reader) -> Ints:
        out = np.empty(sum(self.sets[source].counts), np.int64)
        for at, shard, i in _every(self.sets[source], "ids"):
            try:
                out[at] = sample_id(self.sets[source].names[shard], reader.locate(source, shard, i).key)
            except SampleError as e:
                raise DataError(f"{self.sets[source].urls[shard]}: its keys cannot be read ({e})") from e
        return out

    # --- keeping ----------------------------------------------------------------------------------------------

    def _kept(self, source: int, what: str, said: Sequence[str], read: _Read) -> Ints:
        """An array from its file; if there is none, it is read and written there."""
        shards = self.sets[source]
        about = [[n, i.samples, i.bytes, i.headers] for n, i in zip(shards.names, shards.infos, strict=True)]
        text = json.dumps([1, what, list(said), about], ensure_ascii=True)
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=6).hexdigest()
        safe = "".join(c if c.isalnum() or c in "-_" else "_" for c in what)[:40]
        path = self._folder(source) / f"batches-{safe}-{digest}.npy"
        if not path.is_file():
            reader = self._reader()
            try:
                found = read(reader)
            finally:
                reader.close()
            _write(path, found)
        return _mapped(path, sum(shards.counts))

    def _folder(self, source: int) -> Path:
        if self.data.cache_dir is not None:
            folder = Path(self.data.cache_dir)
            folder.mkdir(parents=True, exist_ok=True)
            return folder
        first = self.sets[source].urls[0]
        folder = Path(os.path.dirname(local_path(first)) or ".")
        if not is_local(first) or not os.access(folder, os.W_OK):
            raise DataError(
                f"data.batches: the values read from source {self.sets[source].source!r} are kept in a file beside its "
                f"shards, but the folder of {first} cannot be written to; set data.cache_dir to another folder"
            )
        return folder


class _Read(Protocol):
    def __call__(self, reader: Reader) -> Ints: ...


def _every(shards: ShardSet, what: str) -> Iterator[tuple[int, int, int]]:
    """(number, shard, number in it) of every sample; says from time to time how far it is."""
    total, at, said = sum(shards.counts), 0, time.monotonic()
    for shard, count in enumerate(shards.counts):
        for i in range(count):
            if time.monotonic() - said > _EVERY_S:
                said = time.monotonic()
                logger.info("Source %r: read %s of %d of %d samples.", shards.source, what, at, total)
            yield at, shard, i
            at += 1


def _write(path: Path, array: Ints) -> None:
    with replacing(path) as hidden, hidden.open("wb") as f:
        np.save(f, array, allow_pickle=False)


def _mapped(path: Path, count: int) -> Ints:
    """A file's array, mapped.

    Raises:
        DataError: it is not the array of the source.
    """
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        raise DataError(f"{path} cannot be read ({e}); remove it, and it is written again") from e
    if found.dtype != np.int64 or found.shape != (count,):
        raise DataError(f"{path} does not hold {count:,} int64 values; remove it, and it is written again")
    return np.asarray(found)
