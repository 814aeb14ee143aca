"""From a task's source to rows: what each item is called, where its bytes are, its captions, its class.

Only indexes are held: names, offsets, captions. Bytes are read when they are embedded, so an ImageNet-sized set
costs memory for its names only.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dualenc.config import Source
from dualenc.data.modalities import modalities
from dualenc.data.shards.index import expand, open_source
from dualenc.data.shards.reader import Reader, SampleError, check_members, is_joined
from dualenc.data.shards.remote import is_pipe
from dualenc.data.shards.tar import Sample, unsafe
from dualenc.data.sources.opened import MAX_BYTES, is_url, open_binary, read_text
from dualenc.errors import ConfigError, DataError
from dualenc_evals.read.items import read_items
from dualenc_evals.read.rows import (
    Content,
    Row,
    Rows,
    captions,
    kept,
    label,
    label_spec,
    labels,
    member_specs,
    needed,
    require_some,
)
from dualenc_evals.task import Task, locate, paths_of

__all__ = ["Content", "Row", "Rows", "read_rows", "tar_samples"]

TEXTS = [ending for ending in modalities["text"].default_members if ":" not in ending]
"""Members that hold a caption."""


def read_rows(task: Task) -> Rows:
    """Read the index of a task's source.

    Raises:
        DataError: files missing or broken, or nothing left.
        ConfigError: a column, member or split that does not exist.
    """
    got = READERS.get(task.source.kind, read_items)(task)
    rows = got.rows
    if task.source.every is not None:
        rows = task.source.every.of(rows)
    if task.source.limit is not None:
        rows = rows[: task.source.limit]
    if not rows:
        raise DataError(f"task {task.name}: no items in {', '.join(paths_of(task))}{_filters(task)}")
    return Rows(rows, got.notes)


def _filters(task: Task) -> str:
    source = task.source
    parts = [f"split {source.split!r}"] if source.split else []
    parts += [f"{k} {v!r}" for k, v in source.where.items()]
    return f" with {', '.join(parts)}" if parts else ""


# --- shards -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a sample is read."""

    reader: Reader
    shard: int
    sample: Sample


@dataclass(frozen=True, slots=True)
class TarSample:
    """One sample of a shard, as training finds it, and how its members are read.

    Two are equal if they are at the same position in the same shard, whichever reader they came from.
    """

    shard: str
    key: str
    members: dict[str, tuple[int, int]] = field(hash=False)
    _at: _Place = field(compare=False, repr=False)

    def lacks(self, ending: str) -> bool:
        """Whether training, too, would look for another ending."""
        try:
            return self._at.reader.lacks(0, self._at.shard, self._at.sample, ending)
        except SampleError as e:
            raise DataError(f"{self.shard}: {e}") from e

    def find(self, ending: str) -> Any:
        """What training gets for an ending such as ``json:cameras+cam*``.

        Raises:
            DataError: a member cannot be read, or all members together are larger than an item may be.
        """
        together = sum(size for _, size in self.members.values())
        if together > MAX_BYTES:
            raise DataError(f"{self.shard}: {self.key} claims to have {together} bytes; the limit is {MAX_BYTES}")
        try:
            return self._at.reader.find(0, self._at.shard, self._at.sample, {"": [ending]}).values.get("")
        except SampleError as e:
            raise DataError(f"{self.shard}: {e}") from e

    def read(self, ending: str) -> bytes:
        """Bytes of one member.

        Raises:
            DataError: they cannot be read, or are larger than an item of an evaluation may be.
        """
        _, size = self.members[ending]
        if size > MAX_BYTES:
            raise DataError(f"{self.shard}: {self.key}.{ending} claims to have {size} bytes; the limit is {MAX_BYTES}")
        try:
            return self._at.reader.read(0, self._at.shard, self._at.sample, ending)
        except SampleError as e:
            raise DataError(f"{self.shard}: {e}") from e


@dataclass(frozen=True, slots=True)
class _Later:
    """Reads a member, or several that make one item, when it is called."""

    sample: TarSample
    ending: str

    def __call__(self) -> Any:
        return self.sample.find(self.ending) if is_joined(self.ending) else self.sample.read(self.ending)


def tar_samples(shards: Sequence[str], name: str = "shards") -> Iterator[TarSample]:
    """Every sample of some plain tars, by their headers only; remote ones are read by byte ranges.

    Raises:
        DataError: a tar is missing, broken or compressed, or does not match its index.
    """
    pipe = next((s for s in shards if is_pipe(s)), None)
    if pipe is not None:
        raise DataError(f"{pipe}: evaluations read parts of files, not a command's output; download the shard first")
    opened = open_source(Source(name=name, shards=list(shards)), scan_remote=True)
    reader = Reader([opened], None, retries=3)
    for i, url in enumerate(opened.urls):
        for n in range(opened.infos[i].samples):
            try:
                sample = reader.locate(0, i, n)
            except SampleError as e:
                raise DataError(f"{url}: {e}") from e
            yield TarSample(url, sample.key, sample.members, _Place(reader, i, sample))


class _Sample:
    """One sample of a shard: finds members, reads the small ones (text, json, class)."""

    def __init__(self, sample: TarSample, extra: Mapping[str, Any]) -> None:
        self.sample, self.extra = sample, extra
        self.key, self.shard, self.members = sample.key, sample.shard, sample.members
        self.name = f"{Path(self.shard).stem}/{self.key}"
        self._json: dict[str, Any] | None = None

    def text(self, ending: str) -> str:
        try:
            return self.sample.read(ending).decode("utf-8").strip()
        except UnicodeDecodeError as e:
            raise DataError(f"{self.shard}: {self.key}.{ending} is not UTF-8 text: {e}") from e

    def content(self, ending: str) -> Content:
        offset, size = self.members[ending]
        return Content(self.name, path=self.shard, offset=offset, size=size, load=_Later(self.sample, ending))

    def joined(self, ending: str) -> Content:
        return Content(self.name, path=self.shard, load=_Later(self.sample, ending))

    def value(self, spec: str) -> Any:
        """A label or filter value: a member's text, ``json:KEY`` or ``metadata:KEY``; None if it is missing."""
        kind, _, key = spec.rpartition(":")
        if kind == "metadata":
            return self.extra.get(key)
        if kind == "json":
            return self.json().get(key)
        if spec.rpartition(".")[2] == "npy" and spec in self.members:
            return self.sample.read(spec)
        return self.text(spec) if spec in self.members else None

    def json(self) -> dict[str, Any]:
        if self._json is None:
            try:
                got = json.loads(self.text("json")) if "json" in self.members else {}
            except (ValueError, RecursionError) as e:
                raise DataError(f"{self.shard}: {self.key}.json is not valid JSON: {e}") from e
            self._json = got if isinstance(got, dict) else {}
        return self._json

    def contents(self, specs: list[str], lines: bool) -> list[Content]:
        """What the first of ``specs`` that is there gives: strings for texts and json:KEY, bytes for other members, a
        dictionary of parts where they are joined (``json:cameras+cam*``), as in training.

        A sample that cannot be used is skipped and reported when it is embedded, like a broken image.
        """
        if unsafe(self.key):
            why = f"the member name {self.key!r} points outside the shard's folder; such samples are refused"
            return [Content(f"{self.name}#0", error=why)]
        try:
            return self._contents(specs, lines)
        except DataError as e:
            return [Content(f"{self.name}#0", error=str(e))]

    def _contents(self, specs: list[str], lines: bool) -> list[Content]:
        for spec in specs:
            if spec in TEXTS and spec in self.members:
                text = self.text(spec)
                return captions(self.name, text.splitlines() if lines and spec == "txt" else text)
            if is_joined(spec):
                if not self.sample.lacks(spec):
                    return [self.joined(spec)]
            elif spec.startswith(("json:", "metadata:")):
                value = self.value(spec)
                if value is not None:
                    return captions(self.name, value)
            elif spec.lower() in self.members:
                return [self.content(spec.lower())]
        return []


def _read_shards(task: Task) -> Rows:
    if task.source.split is not None:
        raise ConfigError(
            f"task {task.name}: source.split: shards have no splits, got {task.source.split!r}; "
            "name the split's shards in source.path, or write source.where: {metadata:split: …}"
        )
    shards = expand(paths_of(task))
    return _rows_of_shards(task, shards, label_spec(task), lines=False)


def _read_clip_benchmark(task: Task) -> Rows:
    root = paths_of(task)[0].rstrip("/")
    if not is_url(root) and not Path(root).is_dir():
        how = f" How to get it: {task.source.obtain}" if task.source.obtain else ""
        raise DataError(f"task {task.name}: there is no folder {root}.{how}")
    folder = f"{root}/{task.source.split or 'test'}"
    count = read_text(f"{folder}/nshards.txt").strip()
    if not count.isdigit():
        raise DataError(f"{folder}/nshards.txt must hold a number, not {count!r}")
    shards = [f"{folder}/{i}.tar" for i in range(int(count))]
    spec = label_spec(task) or ("cls" if task.one_class else None)
    return _rows_of_shards(task, shards, spec, lines=True)


def _rows_of_shards(task: Task, shards: list[str], spec: str | None, lines: bool) -> Rows:
    extra = _metadata(task)
    specs = {m: member_specs(task, m) for m in needed(task)}
    check_members(specs, f"task {task.name}: source.members")
    rows = []
    for found in tar_samples(shards, task.name):
        sample = _Sample(found, extra.get(found.key, {}))
        if not kept(task, sample.value):
            continue
        contents = {m: sample.contents(s, lines) for m, s in specs.items()}
        own = label(task, spec, sample.value, found.key)
        rows.append(Row(sample.name, contents, own, labels(task, spec, sample.value, found.key)))
    require_some(task, rows, member_specs)
    return Rows(rows)


def _metadata(task: Task) -> dict[str, dict[str, Any]]:
    if task.source.metadata is None:
        return {}
    path = locate(task.source.metadata, task)
    with open_binary(path) as f:
        raw = f.read()
    try:
        text = (gzip.decompress(raw) if path.endswith(".gz") else raw).decode("utf-8")
        return {row["key"]: row for row in map(json.loads, text.splitlines())}
    except (gzip.BadGzipFile, EOFError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as e:
        raise DataError(f"{path} must hold one JSON object with a 'key' per line: {e!r}") from e


READERS: dict[str, Callable[[Task], Rows]] = {"shards": _read_shards, "clip_benchmark": _read_clip_benchmark}
"""Sources that are shards; every other kind is a layout in :data:`dualenc.data.sources.sources`."""
