"""From a task's source to rows: what each item is called, where its bytes lie, its captions, its class.

Only indexes are held: names, offsets, captions. Bytes are read when they are embedded, so an ImageNet-sized set
costs memory for its names only.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dualenc.data.modalities import modalities
from dualenc.errors import ConfigError, DataError, did_you_mean
from evals.files import MAX_BYTES, expand, is_url, open_binary, read_text
from evals.tasks import Task, paths_of

MEMBERS = {"text": ["txt", "json:captions", "json:caption"]}
COLUMNS = {"text": ["captions", "caption", "text"]}


@dataclass(frozen=True, slots=True)
class Content:
    """One item of one modality: a string, or bytes in a file (a part of it: a shard's member).

    Attributes:
        id: what reports call it; never a path on this machine.
    """

    id: str
    text: str | None = None
    path: str = ""
    offset: int = 0
    size: int = -1
    error: str = ""

    def read(self) -> bytes | str:
        """The string, or the bytes. Raises DataError when they cannot be read."""
        if self.error:
            raise DataError(self.error)
        if self.text is not None:
            return self.text
        if self.size > MAX_BYTES:
            raise DataError(f"claims {self.size} bytes, more than {MAX_BYTES}")
        with open_binary(self.path) as f:
            f.seek(self.offset)
            raw = f.read(self.size if self.size >= 0 else MAX_BYTES + 1)
        if len(raw) > MAX_BYTES or (self.size >= 0 and len(raw) != self.size):
            raise DataError(f"has {len(raw)} bytes where {self.size if self.size >= 0 else MAX_BYTES} were expected")
        return raw


@dataclass(frozen=True, slots=True)
class Row:
    """One sample: contents per modality (several captions: several contents) and its label."""

    id: str
    contents: dict[str, list[Content]]
    label: str | None = None


@dataclass(slots=True)
class Rows:
    """What a source holds, and what a person should know about it."""

    rows: list[Row]
    notes: list[str] = field(default_factory=list)


def read_rows(task: Task) -> Rows:
    """Read the index of a task's source.

    Raises:
        DataError: files missing or broken, or nothing left.
        ConfigError: a column, member or split that is not there.
    """
    got = READERS[task.source.kind](task)
    rows = got.rows
    if task.source.every is not None:
        rows = rows[task.source.every.offset :: task.source.every.step]
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
        return _captions(f"{Path(self.shard).stem}/{self.key}", value)


def _captions(row: str, value: Any) -> list[Content]:
    texts = [str(v).strip() for v in (value if isinstance(value, list) else [value])]
    return [Content(f"{row}#{i}", text=t) for i, t in enumerate(texts) if t]


def _read_shards(task: Task) -> Rows:
    if task.source.split is not None:
        raise ConfigError(
            f"task {task.name}: source.split: shards have no splits, got {task.source.split!r}; "
            "name the split's shards in source.path, or write source.where: {metadata:split: …}"
        )
    shards = [s for p in paths_of(task) for s in expand(p)]
    return _rows_of_shards(task, shards, task.label, lines=False)


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
    label = (task.label or "cls") if task.kind == "classification" else None
    return _rows_of_shards(task, shards, label, lines=True)


def _rows_of_shards(task: Task, shards: list[str], label: str | None, lines: bool) -> Rows:
    extra = _metadata(task)
    rows = []
    for shard in shards:
        for key, members in tar_samples(shard):
            sample = _Sample(key, shard, members, extra.get(key, {}))
            if not _kept(task, sample.value):
                continue
            contents = {m: sample.contents(_member_specs(task, m), lines) for m in _needed(task)}
            rows.append(Row(f"{Path(shard).stem}/{key}", contents, _label(task, label, sample.value, key)))
    _require_some(task, rows, _member_specs)
    return Rows(rows)


def _metadata(task: Task) -> dict[str, dict[str, Any]]:
    if task.source.metadata is None:
        return {}
    from evals.tasks import locate

    path = locate(task.source.metadata, task)
    with open_binary(path) as f:
        raw = f.read()
    try:
        text = (gzip.decompress(raw) if path.endswith(".gz") else raw).decode("utf-8")
        return {row["key"]: row for row in map(json.loads, text.splitlines())}
    except (gzip.BadGzipFile, EOFError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as e:
        raise DataError(f"{path} must hold one JSON object with a 'key' a line: {e!r}") from e


# --- lists and folders --------------------------------------------------------------------------------------------


def _read_jsonl(task: Task) -> Rows:
    return _rows_of_lists(task, _jsonl_objects)


def _read_csv(task: Task) -> Rows:
    return _rows_of_lists(task, lambda path: list(csv.DictReader(io.StringIO(read_text(path)))))


def _jsonl_objects(path: str) -> list[dict[str, Any]]:
    out = []
    for n, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as e:
            raise DataError(f"{path}, line {n}, is not valid JSON: {e}") from e
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {n}, must be an object with keys, it is {type(row).__name__}")
        out.append(row)
    return out


def _rows_of_lists(task: Task, read: Callable[[str], list[dict[str, Any]]]) -> Rows:
    rows: list[Row] = []
    for path in (p for pattern in paths_of(task) for p in expand(pattern)):
        objects = read(path)
        columns = list(dict.fromkeys(k for row in objects for k in row))
        _check_columns(task, columns)
        for n, values in enumerate(objects, 1):
            if not _kept(task, values.get):
                continue
            name = f"{Path(path).stem}:{n}"
            contents = {m: _cells(task, values, m, path, name) for m in _needed(task)}
            first = next((c.id for cs in contents.values() for c in cs if c.path), name)
            rows.append(Row(first, contents, _label(task, task.label, values.get, name)))
    _require_some(task, rows, _column_specs)
    return Rows(rows)


def _check_columns(task: Task, columns: list[str]) -> None:
    asked = [(f"source.where.{k}", k) for k in task.source.where]
    asked += [("label", task.label)] if task.label is not None else []
    asked += [("source.split", "split")] if task.source.split is not None else []
    for key, column in asked:
        if column not in columns:
            raise ConfigError(
                f"task {task.name}: {key}: there is no column {column!r}. {did_you_mean(column, columns)}"
            )


def _cells(task: Task, values: Mapping[str, Any], modality: str, path: str, row: str) -> list[Content]:
    """``file:COLUMN`` holds a file's path relative to the list; any other column the string (or strings) itself."""
    for spec in _column_specs(task, modality):
        column = spec.removeprefix("file:")
        value = values.get(column)
        if value in (None, "", []):
            continue
        if spec == column:
            return _captions(row, value)
        return [_beside(path, str(v), task) for v in (value if isinstance(value, list) else [value])]
    return []


def _beside(listing: str, name: str, task: Task) -> Content:
    # A list is data: it may name files in its own folder, not reach for others on this machine.
    folder = listing.rpartition("/")[0] or "."
    inside = os.path.normpath(name)
    if os.path.isabs(inside) or inside.startswith(".."):
        raise DataError(f"task {task.name}: {listing} names {name!r}: paths must stay inside the list's folder")
    return Content(inside, path=f"{folder}/{inside}")


def _read_folder(task: Task) -> Rows:
    rows: list[Row] = []
    notes: list[str] = []
    item = task.modalities[0]
    endings = tuple(f".{e}" for e in task.source.members.get(item, []))
    if task.kind != "classification":
        raise ConfigError(f"task {task.name}: source.kind: a folder a class is for classification, got {task.kind!r}")
    for base in paths_of(task):
        root = Path(base, task.source.split) if task.source.split else Path(base)
        if not root.is_dir():
            how = f" How to get it: {task.source.obtain}" if task.source.obtain else ""
            raise DataError(f"task {task.name}: there is no folder {root}.{how}")
        folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
        if not folders:
            raise DataError(
                f"task {task.name}: {root} has no class folders in it (one folder a class, its files inside)"
            )
        for folder in folders:
            files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
            files = [p for p in files if not endings or p.name.lower().endswith(endings)]
            if not files:
                notes.append(
                    f"The class folder {folder.name!r} is empty: the class stays a wrong answer to choose from."
                )
                continue
            for p in files:
                name = f"{folder.name}/{p.name}"
                rows.append(Row(name, {item: [Content(name, path=str(p))]}, folder.name))
    return Rows(rows, notes)


# --- what all share -----------------------------------------------------------------------------------------------


def _needed(task: Task) -> list[str]:
    """Modalities read from the source: prompts are made, not read."""
    return [task.modalities[0]] if task.kind == "classification" else list(task.modalities)


def _member_specs(task: Task, modality: str) -> list[str]:
    """Shard endings of a modality: the task's, else those that training reads."""
    default = modalities[modality].default_members if modality in modalities else [modality]
    return task.source.members.get(modality) or MEMBERS.get(modality, default)


def _column_specs(task: Task, modality: str) -> list[str]:
    """List columns of a modality: the task's, else strings for text and files for the rest."""
    return task.source.members.get(modality) or COLUMNS.get(modality, [f"file:{modality}"])


def _kept(task: Task, value: Callable[[str], Any]) -> bool:
    rules: dict[str, str | list[str]] = dict(task.source.where)
    if task.source.split is not None and task.source.kind in ("jsonl", "csv"):
        rules["split"] = task.source.split
    for key, allowed in rules.items():
        if str(value(key)) not in ([allowed] if isinstance(allowed, str) else allowed):
            return False
    return True


def _label(task: Task, spec: str | None, value: Callable[[str], Any], row: str) -> str | None:
    if task.kind != "classification" or spec is None:
        return None
    got = value(spec)
    if got is None:
        raise DataError(f"task {task.name}: label: {row} has no {spec!r}")
    return str(got).strip()


def _require_some(task: Task, rows: list[Row], specs: Callable[[Task, str], list[str]]) -> None:
    for m in _needed(task) if rows else []:
        if not any(r.contents[m] for r in rows):
            where = ", ".join(specs(task, m))
            raise ConfigError(f"task {task.name}: source.members.{m}: no row has any of {where}; say where {m} stands")


READERS: dict[str, Callable[[Task], Rows]] = {
    "shards": _read_shards,
    "clip_benchmark": _read_clip_benchmark,
    "folder": _read_folder,
    "jsonl": _read_jsonl,
    "csv": _read_csv,
}
