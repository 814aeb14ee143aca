"""From a task's source to rows: what each item is called, where its bytes lie, its captions, its class.

Only indexes are held: names, offsets, captions. Bytes are read when they are embedded, so an ImageNet-sized set
costs memory for its names only.
"""

from __future__ import annotations

import gzip
import itertools
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dualenc.errors import ConfigError, DataError
from dualenc_evals.read.files import expand, is_url, open_binary, read_text
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


def read_rows(task: Task) -> Rows:
    """Read the index of a task's source.

    Raises:
        DataError: files missing or broken, or nothing left.
        ConfigError: a column, member or split that is not there.
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


def tar_samples(path: str) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """(key, ending → (offset, size)) of each sample of a plain tar, by headers only.

    Members of one sample stand together; the key is the name up to the first dot of its last part (webdataset's
    rule). Names are labels here, never paths. Raises DataError for a broken or compressed tar.
    """
    try:
        with open_binary(path) as f, tarfile.open(fileobj=f, mode="r:") as tar:
            members = ((m, *_key_ending(m.name)) for m in tar if m.isfile())
            for key, group in itertools.groupby(members, key=lambda x: x[1]):
                yield key, {ending: (m.offset_data, m.size) for m, _, ending in group}
    except (tarfile.TarError, EOFError, OSError) as e:
        raise DataError(f"{path} is not a whole, plain tar: {e}") from e


def _key_ending(name: str) -> tuple[str, str]:
    folder, _, base = name.rpartition("/")
    stem, _, ending = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), ending.lower()


class _Sample:
    """One sample of a shard: finds members, reads the small ones (text, json, class)."""

    def __init__(self, key: str, shard: str, members: Mapping[str, tuple[int, int]], extra: Mapping[str, Any]) -> None:
        self.key, self.shard, self.members, self.extra = key, shard, members, extra
        self._json: dict[str, Any] | None = None

    def text(self, ending: str) -> str:
        raw = self.content(ending).read()
        assert isinstance(raw, bytes), "a shard's member is bytes"
        try:
            return raw.decode("utf-8").strip()
        except UnicodeDecodeError as e:
            raise DataError(f"{self.shard}: {self.key}.{ending} is not UTF-8 text: {e}") from e

    def content(self, ending: str) -> Content:
        offset, size = self.members[ending]
        return Content(f"{Path(self.shard).stem}/{self.key}", path=self.shard, offset=offset, size=size)

    def value(self, spec: str) -> Any:
        """A label or filter value: a member's text, ``json:KEY`` or ``metadata:KEY``; None when it is not there."""
        kind, _, key = spec.rpartition(":")
        if kind == "metadata":
            return self.extra.get(key)
        if kind == "json":
            return self.json().get(key)
        if spec.rpartition(".")[2] == "npy" and spec in self.members:
            return self.content(spec).read()
        return self.text(spec) if spec in self.members else None

    def json(self) -> dict[str, Any]:
        if self._json is None:
            try:
                got = json.loads(self.text("json")) if "json" in self.members else {}
            except json.JSONDecodeError as e:
                raise DataError(f"{self.shard}: {self.key}.json is not valid JSON: {e}") from e
            self._json = got if isinstance(got, dict) else {}
        return self._json

    def contents(self, specs: list[str], lines: bool) -> list[Content]:
        """What the first of ``specs`` that is there gives: strings for txt and json:KEY, bytes for the rest."""
        for spec in specs:
            if spec == "txt" and spec in self.members:
                try:
                    text = self.text(spec)
                except DataError as e:  # one broken caption is skipped and named, like a broken picture
                    return [Content(f"{Path(self.shard).stem}/{self.key}#0", error=str(e))]
                return self._strings(text.splitlines() if lines else text)
            if spec.startswith(("json:", "metadata:")):
                value = self.value(spec)
                if value is not None:
                    return self._strings(value)
            elif spec in self.members:
                return [self.content(spec)]
        return []

    def _strings(self, value: Any) -> list[Content]:
        return captions(f"{Path(self.shard).stem}/{self.key}", value)


def _read_shards(task: Task) -> Rows:
    if task.source.split is not None:
        raise ConfigError(
            f"task {task.name}: source.split: shards have no splits, got {task.source.split!r}; "
            "name the split's shards in source.path, or write source.where: {metadata:split: …}"
        )
    shards = [s for p in paths_of(task) for s in expand(p)]
    return _rows_of_shards(task, shards, label_spec(task), lines=False)


def _read_clip_benchmark(task: Task) -> Rows:
    root = paths_of(task)[0].rstrip("/")
    if not is_url(root) and not Path(root).is_dir():
        how = f" How to get it: {task.source.obtain}" if task.source.obtain else ""
        raise DataError(f"task {task.name}: there is no folder {root}.{how}")
    folder = f"{root}/{task.source.split or 'test'}"
    count = read_text(f"{folder}/nshards.txt").strip()
    if not count.isdigit():
        raise DataError(f"{folder}/nshards.txt must hold a number, it holds {count!r}")
    shards = [f"{folder}/{i}.tar" for i in range(int(count))]
    spec = "cls" if task.label is None and task.kind in ("classification", "probe") else label_spec(task)
    return _rows_of_shards(task, shards, spec, lines=True)


def _rows_of_shards(task: Task, shards: list[str], spec: str | None, lines: bool) -> Rows:
    extra = _metadata(task)
    rows = []
    for shard in shards:
        for key, members in tar_samples(shard):
            sample = _Sample(key, shard, members, extra.get(key, {}))
            if not kept(task, sample.value):
                continue
            contents = {m: sample.contents(member_specs(task, m), lines) for m in needed(task)}
            name = f"{Path(shard).stem}/{key}"
            rows.append(
                Row(name, contents, label(task, spec, sample.value, key), labels(task, spec, sample.value, key))
            )
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
        raise DataError(f"{path} must hold one JSON object with a 'key' a line: {e!r}") from e


READERS: dict[str, Callable[[Task], Rows]] = {"shards": _read_shards, "clip_benchmark": _read_clip_benchmark}
"""Sources that are shards; every other kind is a layout in :data:`dualenc.data.sources.sources`."""
