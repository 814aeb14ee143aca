"""A task's source, in any registered layout, as rows: contents by modality, label, groups."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from dualenc.config import settings_as
from dualenc.data.modalities import modalities
from dualenc.data.sources import Item, Layout, NotThereError, sources
from dualenc.data.sources.columns import check_members, contents_of, specs_of, value_of
from dualenc.data.sources.folder import ENDINGS
from dualenc.data.sources.samples import accepted
from dualenc.errors import ConfigError, DataError, did_you_mean
from dualenc_evals.read.rows import Row, Rows, kept, label, label_spec, labels, needed, require_some
from dualenc_evals.task import Task, locate, paths_of


def read_items(task: Task) -> Rows:
    """Rows of a task whose source is not shards.

    Raises:
        DataError: the data set is missing (says how to get it) or broken.
        ConfigError: a column, setting or modality that does not exist.
    """
    layout: Layout[Any] = sources[task.source.kind]
    items: list[Item] = []
    notes: list[str] = []
    try:
        for cfg in _settings(task, layout):
            items += layout.read(cfg)
            notes += layout.notes(cfg) if layout.notes is not None else []
        if items:
            check_columns(task, layout, items)
        rows, groups = _rows(task, layout, items)
    except NotThereError as e:
        how = f" How to get it: {task.source.obtain}" if task.source.obtain else ""
        raise DataError(f"task {task.name}: {e}{how}") from e
    except DataError as e:
        raise e if str(e).startswith("task ") else DataError(f"task {task.name}: {e}") from e
    require_some(task, rows, lambda t, m: specs_of(t.source.members, m) if layout.table else [m])
    return Rows(grouped(rows, groups) if task.source.group else rows, notes)


def _settings(task: Task, layout: Layout[Any]) -> list[Any]:
    """The layout's settings as the task's source says them, one for each of its paths."""
    own = accepted(layout.settings)
    given = task.source.settings()
    if "class_names" in own:
        # A task that numbers its classes wants the numbers.
        given.setdefault("class_names", not task.numbers_classes)
    if "members" in own:
        given["members"] = {m: _endings(task, m) for m in needed(task) if m != "text"}
    where = f"task {task.name}: source"
    if "path" not in own:
        return [settings_as(layout.settings, given, where)]
    return [settings_as(layout.settings, {**given, "path": path}, where) for path in paths_of(task)]


def _endings(task: Task, modality: str) -> list[str]:
    """Endings of a modality's files: the task's, else the usual ones; empty: every file."""
    named = task.source.members.get(modality)
    if named is not None:
        return list(named)
    usual = modalities[modality].default_members if modality in modalities else []
    return list(dict.fromkeys([*ENDINGS.get(modality, ()), *(e for e in usual if e.replace(".", "").isalnum())]))


def _rows(task: Task, layout: Layout[Any], items: Sequence[Item]) -> tuple[list[Row], list[str]]:
    spec = label_spec(task)
    by_layout = spec is None and task.one_class
    files = locate(task.source.files, task) if task.source.files else ""
    in_rows = layout.table and "split" not in accepted(layout.settings)
    rows: list[Row] = []
    groups: list[str] = []
    for item in items:
        value = partial(_value, item)
        if not kept(task, value, in_rows):
            continue
        if layout.table:
            contents = {m: contents_of(item, m, task.source.members, files) for m in needed(task)}
            name = next((c.id for cs in contents.values() for c in cs if c.path), item.id)
        else:
            contents = {m: list(item.contents.get(m, ())) for m in needed(task)}
            name = item.id
        own = _class(task, item) if by_layout else label(task, spec, value, item.id)
        rows.append(Row(name, contents, own, labels(task, spec, value, item.id)))
        groups.append(str(value(task.source.group)) if task.source.group else "")
    return rows, groups


def _class(task: Task, item: Item) -> str | None:
    if item.label is None and not task.drops_unlabelled:
        raise DataError(
            f"task {task.name}: label: {item.id} has no class: {task.source.kind} gives none for it; put it in a "
            "folder named after its class, or name a column with label: COLUMN"
        )
    return item.label


def _value(item: Item, column: str) -> Any:
    got = value_of(item.fields, column)
    return item.label if got is None and column == "class" else got


def check_columns(task: Task, layout: Layout[Any], items: Sequence[Item]) -> None:
    """Raises ConfigError (with the nearest name) when the task names a column or modality that no item has."""
    source = task.source
    columns = list(dict.fromkeys(k for item in items for k in item.fields))
    asked = [(f"source.where.{k}", k) for k in source.where]
    key, spec = task.label_place() or ("", "")
    asked += [(key, c) for c in spec.split("+") if c]
    if source.split is not None and layout.table and "split" not in accepted(layout.settings):
        asked.append(("source.split", "split"))
    asked += [("source.group", source.group)] if source.group is not None else []
    for key, column in asked:
        if column not in columns and _value(items[0], column) is None:
            raise ConfigError(
                f"task {task.name}: {key}: there is no column {column!r}. {did_you_mean(column, columns)}"
            )
    if layout.table:
        for m in needed(task):
            check_members(source.members, m, columns, f"task {task.name}: source.members.{m}")
        return
    made = list(dict.fromkeys(m for item in items for m in item.contents))
    for m in needed(task):
        if m not in made:
            raise ConfigError(
                f"task {task.name}: modalities: the source {source.kind} has {' and '.join(made) or 'nothing'}, not "
                f"{m!r}. {did_you_mean(m, made)}"
            )


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
