"""Sources that are lists: jsonl, json, csv; one row an item, files beside the list or in ``source.files``."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from dualenc.errors import ConfigError, DataError, did_you_mean
from dualenc_evals.read.files import expand, read_text
from dualenc_evals.read.rows import (
    Content,
    Row,
    Rows,
    captions,
    column_specs,
    kept,
    label,
    label_spec,
    labels,
    needed,
    require_some,
)
from dualenc_evals.task import Task, locate, paths_of

Objects = list[dict[str, Any]]


def read_jsonl(task: Task) -> Rows:
    """One JSON object a line."""
    return _rows_of_lists(task, _jsonl_objects)


def read_json(task: Task) -> Rows:
    """A list of objects, or an object whose values are the rows (SugarCrepe)."""
    return _rows_of_lists(task, _json_objects)


def read_csv(task: Task) -> Rows:
    """A table with a line of names, or without one and ``source.columns``."""
    return _rows_of_lists(task, lambda path: _csv_objects(path, task.source.columns))


def _jsonl_objects(path: str) -> Objects:
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


def _json_objects(path: str) -> Objects:
    try:
        got = json.loads(read_text(path))
    except json.JSONDecodeError as e:
        raise DataError(f"{path} is not valid JSON: {e}") from e
    rows = list(got.values()) if isinstance(got, dict) else got
    if not isinstance(rows, list) or not all(isinstance(r, dict) for r in rows):
        raise DataError(f"{path} must hold a list of objects, or an object of them")
    return rows


def _csv_objects(path: str, columns: list[str] | None) -> Objects:
    try:
        return list(csv.DictReader(io.StringIO(read_text(path), newline=""), fieldnames=columns, strict=True))
    except csv.Error as e:
        raise DataError(f"{path} is not a valid CSV table: {e}") from e


def value_of(values: Mapping[str, Any], column: str) -> Any:
    """A column; ``a.b`` reaches into an object where there is no column of that very name. None: not there."""
    if column in values:
        return values[column]
    node: Any = values
    for part in column.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


def _rows_of_lists(task: Task, read: Callable[[str], Objects]) -> Rows:
    rows: list[Row] = []
    groups: list[str] = []
    spec = label_spec(task)
    for path in (p for pattern in paths_of(task) for p in expand(pattern)):
        objects = read(path)
        columns = list(dict.fromkeys(k for row in objects for k in row))
        check_columns(task, columns, objects[0] if objects else {})
        for n, values in enumerate(objects, 1):
            value = partial(value_of, values)
            if not kept(task, value):
                continue
            name = f"{Path(path).stem}:{n}"
            contents = {m: _cells(task, values, m, path, name) for m in needed(task)}
            first = next((c.id for cs in contents.values() for c in cs if c.path), name)
            rows.append(Row(first, contents, label(task, spec, value, name), labels(task, spec, value)))
            groups.append(str(value(task.source.group)) if task.source.group else "")
    require_some(task, rows, column_specs)
    return Rows(grouped(rows, groups) if task.source.group else rows)


def check_columns(task: Task, columns: list[str], first: Mapping[str, Any] | None = None) -> None:
    """Raises ConfigError (with the nearest name) when the task names a column that is not there."""
    source = task.source
    asked = [(f"source.where.{k}", k) for k in source.where]
    key, spec = task.label_place() or ("", "")
    asked += [(key, c) for c in spec.split("+") if c]
    asked += [("source.split", "split")] if source.split is not None and source.kind != "hf" else []
    asked += [("source.group", source.group)] if source.group is not None else []
    for key, column in asked:
        if column not in columns and value_of(first or {}, column) is None:
            raise ConfigError(
                f"task {task.name}: {key}: there is no column {column!r}. {did_you_mean(column, columns)}"
            )


def _cells(task: Task, values: Mapping[str, Any], modality: str, path: str, row: str) -> list[Content]:
    """The first spec that gives something. ``file:COLUMN`` holds a file's path, ``file:fold{fold}/{name}.wav`` makes
    one of several columns; any other column is the string (or strings) itself. ``a+b`` takes both, in that order."""
    for spec in column_specs(task, modality):
        texts: list[str] = []
        files: list[Content] = []
        for part in spec.split("+"):
            column = part.removeprefix("file:")
            value = _filled(column, values) if column != part else value_of(values, column)
            if value in (None, "", []):
                continue
            many = value if isinstance(value, list) else [value]
            if part == column:
                texts += [str(v) for v in many]
            else:
                files += [_beside(path, str(v), task) for v in many]
        if texts or files:
            return files + captions(row, texts)
    return []


def _filled(pattern: str, values: Mapping[str, Any]) -> Any:
    """A column's value; with braces, the pattern with each ``{column}`` put in (``{column:06}``: zeros before)."""
    if "{" not in pattern:
        return value_of(values, pattern)
    missing = False

    def put(m: re.Match[str]) -> str:
        nonlocal missing
        got = value_of(values, m.group(1))
        missing = missing or got in (None, "")
        return str(got).zfill(int(m.group(2) or 0))

    name = re.sub(r"\{([^{}:]+)(?::(\d+))?\}", put, pattern)
    return None if missing else name


def _beside(listing: str, name: str, task: Task) -> Content:
    # A list is data: it may name files in its own folder (or the one the task names), not reach for others.
    folder = locate(task.source.files, task).rstrip("/") if task.source.files else listing.rpartition("/")[0] or "."
    inside = os.path.normpath(name)
    if os.path.isabs(inside) or inside.startswith(".."):
        raise DataError(f"task {task.name}: {listing} names {name!r}: paths must stay inside the list's folder")
    return Content(inside, path=f"{folder}/{inside}")


def grouped(rows: list[Row], groups: list[str]) -> list[Row]:
    """Rows of one group become one item: its files once each, all its strings (AudioCaps: a caption a row)."""
    out: dict[str, Row] = {}
    for row, group in zip(rows, groups, strict=True):
        if group not in out:
            out[group] = row
            continue
        for modality, contents in row.contents.items():
            there = out[group].contents[modality]
            seen = {c.id for c in there}
            there += [c for c in contents if c.id not in seen]
    return list(out.values())
