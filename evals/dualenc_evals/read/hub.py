"""Hugging Face data sets, by name or as a local folder, read through the ``datasets`` library.

The tables stay in their memory-mapped files; pictures and sounds come as their own bytes, undecoded. Data sets that
need code of their own to load are refused by the library.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from dualenc.errors import ConfigError, DataError, did_you_mean
from dualenc_evals.read.lists import check_columns, grouped
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
from dualenc_evals.task import Task, paths_of


def read_hub(task: Task) -> Rows:
    """Rows of one split.

    Raises:
        DataError: the library is not there, or the data cannot be had.
        ConfigError: a column that is not there.
    """
    table = _open(task)
    columns = list(table.column_names)
    check_columns(task, columns)
    media = {m: _media(task, m, columns) for m in needed(task)}
    spec = label_spec(task)
    named = {c for c in (spec or "").split("+") if c} | set(task.source.where)
    named |= {task.source.group} if task.source.group else set()
    plain = _plain(task, table, sorted(named | {c for cs in media.values() for c in cs if not _is_bytes(table, c)}))
    rows: list[Row] = []
    groups: list[str] = []
    for i in range(len(table)):
        value = partial(_at, plain, i)
        if not kept(task, value):
            continue
        name = f"{task.source.split}:{i}"
        contents = {m: _contents(table, plain, i, cs, name) for m, cs in media.items()}
        rows.append(Row(name, contents, label(task, spec, value, name), labels(task, spec, value)))
        groups.append(str(value(task.source.group)) if task.source.group else "")
    require_some(task, rows, column_specs)
    return Rows(grouped(rows, groups) if task.source.group else rows)


def _open(task: Task) -> Any:
    """The split as a ``datasets.Dataset`` whose pictures and sounds are left undecoded."""
    try:
        import datasets
    except ImportError as e:
        raise DataError(
            f"Task {task.name} reads a Hugging Face data set: install the datasets package (the tools extra)."
        ) from e
    source = task.source
    path = paths_of(task)[0]
    how = f" How to get it: {source.obtain}" if source.obtain else ""
    try:
        table = datasets.load_dataset(path, source.subset, split=source.split, revision=source.revision)
    # The library raises its own errors, OSError and ValueError (an unknown split or subset) for what a name can get
    # wrong; each says what it is.
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as e:
        raise DataError(
            f"task {task.name}: the data set {path} cannot be read: {' '.join(str(e).split())}.{how}"
        ) from e
    for column, feature in table.features.items():
        if isinstance(feature, datasets.Image | datasets.Audio):
            table = table.cast_column(column, type(feature)(decode=False))
    return table


def _is_bytes(table: Any, column: str) -> bool:
    return type(table.features[column]).__name__ in ("Image", "Audio")


def _media(task: Task, modality: str, columns: list[str]) -> list[str]:
    """The columns of a modality: the first spec that is there; ``a+b`` gives both."""
    specs = column_specs(task, modality)
    for spec in specs:
        wanted = [part.removeprefix("file:") for part in spec.split("+")]
        if all(w in columns for w in wanted):
            return wanted
    raise ConfigError(
        f"task {task.name}: source.members.{modality}: there is no column {specs[0]!r}. "
        f"{did_you_mean(specs[0].removeprefix('file:'), columns)}"
    )


def _plain(task: Task, table: Any, columns: list[str]) -> dict[str, list[Any]]:
    """Whole columns of strings and numbers; class numbers become names where the task does not number its classes."""
    out: dict[str, list[Any]] = {}
    for column in columns:
        values = list(table.select_columns([column])[:][column])
        feature = table.features[column]
        if hasattr(feature, "int2str") and not task.numbers_classes:
            values = [None if v is None or v < 0 else feature.int2str(v) for v in values]
        out[column] = values
    return out


def _at(plain: dict[str, list[Any]], row: int, column: str) -> Any:
    return plain[column][row]


def _contents(table: Any, plain: dict[str, list[Any]], row: int, columns: list[str], name: str) -> list[Content]:
    out: list[Content] = []
    texts: list[str] = []
    for column in columns:
        if column in plain:
            value = plain[column][row]
            texts += [str(v) for v in (value if isinstance(value, list) else [value]) if v is not None]
        else:
            out.append(Content(f"{name}/{column}", load=partial(_bytes, table, row, column)))
    return out + captions(name, texts)


def _bytes(table: Any, row: int, column: str) -> bytes:
    cell = table.select_columns([column])[row][column]
    if cell is None:
        raise DataError(f"row {row} has no {column}")
    if cell.get("bytes") is not None:
        return bytes(cell["bytes"])
    from dualenc_evals.read.files import open_binary

    with open_binary(str(cell["path"])) as f:
        return f.read()
