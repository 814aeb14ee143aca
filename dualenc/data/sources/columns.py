"""Which column of a table is which modality: one syntax for packing, tasks and embedding.

``members: {MODALITY: [SPEC, …]}`` names columns, tried in turn for each row. A SPEC is::

    captions                     a column; for text the string or list of strings itself, for any other modality the
                                 path of a file beside the table, or bytes
    image.path                   a key inside an object, unless a column has exactly that name
    fold{fold}/{name}.wav        a path made from several columns; {id:06} pads with zeros
    caption_0+caption_1          both, in that order
    file:audio                   the same as audio: a file (needed only where the modality is text)

``image: filepath``, ``audio: …`` and ``caption: title`` are short for it in all three (:func:`with_short_members`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from dualenc.data.sources.item import Content, Item, captions
from dualenc.errors import ConfigError, DataError, did_you_mean

Members = Mapping[str, Sequence[str]]
TEXT_COLUMNS = ("captions", "caption", "text", "sentence", "transcript", "title")
"""Columns tried for text when the settings name none."""


class ColumnBlock(Protocol):
    """Some rows of a columnar table, read on demand."""

    columns: Sequence[str]

    def cell(self, column: str, row: int) -> Any:
        """One value; bytes and {bytes, path} objects as they are."""

    def holds_bytes(self, column: str) -> bool:
        """Whether the column holds images or audio rather than plain values."""


class LazyRow(Mapping[str, Any]):
    """A row whose cells are read on access."""

    __slots__ = ("block", "row")

    def __init__(self, block: ColumnBlock, row: int) -> None:
        self.block, self.row = block, row

    def __getitem__(self, column: str) -> Any:
        if column not in self.block.columns:
            raise KeyError(column)
        return self.block.cell(column, self.row)

    def __iter__(self) -> Iterator[str]:
        return iter(self.block.columns)

    def __len__(self) -> int:
        return len(self.block.columns)

    def __contains__(self, column: object) -> bool:
        return column in self.block.columns


SHORT = {"image": "image", "audio": "audio", "caption": "text"}
"""``image: filepath`` is short for ``members: {image: [filepath]}``: key → modality."""


def with_short_members(settings: Mapping[str, Any], own: Sequence[str] | set[str] = ()) -> dict[str, Any]:
    """Settings of a table with ``image``, ``audio`` and ``caption`` moved into ``members``, as packing takes them.

    Args:
        own: keys that the source itself has under these names; they stay.

    Raises:
        ConfigError: both forms name the same modality.
    """
    short = {k: settings[k] for k in SHORT if k in settings and k not in own and settings[k] is not None}
    if not short:
        return dict(settings)
    members = dict(settings.get("members") or {})
    for key, spec in short.items():
        if SHORT[key] in members:
            raise ConfigError(f"{key}: members.{SHORT[key]} names the column, too; keep one of them")
        members[SHORT[key]] = [spec] if isinstance(spec, str) else ["+".join(spec)]
    return {**{k: v for k, v in settings.items() if k not in short}, "members": members}


def value_of(fields: Mapping[str, Any], column: str) -> Any:
    """A column's value; ``a.b`` reads a key of an object unless a column has that name. None where it is missing."""
    if column in fields:
        return fields[column]
    node: Any = fields
    for part in column.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


def filled(pattern: str, fields: Mapping[str, Any]) -> Any:
    """A column's value; with braces, the pattern with each ``{column}`` filled in. None where one is empty."""
    if "{" not in pattern:
        return value_of(fields, pattern)
    lacking = False

    def put(m: re.Match[str]) -> str:
        nonlocal lacking
        got = value_of(fields, m.group(1))
        lacking = lacking or got in (None, "")
        return str(got).zfill(int(m.group(2) or 0))

    name = re.sub(r"\{([^{}:]+)(?::(\d+))?\}", put, pattern)
    return None if lacking else name


def specs_of(members: Members, modality: str) -> list[str]:
    """The columns of a modality: those in ``members``, else the usual ones."""
    return list(members.get(modality) or (TEXT_COLUMNS if modality == "text" else (modality,)))


def named_columns(spec: str) -> list[str]:
    """Every column that a spec names."""
    out: list[str] = []
    for part in spec.split("+"):
        plain = part.removeprefix("file:")
        out += re.findall(r"\{([^{}:]+)(?::\d+)?\}", plain) if "{" in plain else [plain]
    return out


def is_there(column: str, known: Mapping[str, Any] | Sequence[str]) -> bool:
    """Whether a table with these columns can have this one: ``a.b`` may be a key inside ``a``."""
    return column in known or ("." in column and column.split(".")[0] in known)


def check_members(members: Members, modality: str, known: Sequence[str], where: str) -> None:
    """Raises ConfigError (with the nearest name) when none of the specs for a modality can match these columns."""
    specs = list(members.get(modality) or ())
    if specs and not any(all(is_there(c, known) for c in named_columns(s)) for s in specs):
        column = next(c for c in named_columns(specs[0]) if not is_there(c, known))
        raise ConfigError(f"{where}: there is no column {column!r}. {did_you_mean(column, known)}")


def contents_of(item: Item, modality: str, members: Members, files: str = "") -> list[Content]:
    """The contents of one modality of a table's row, from the first spec that yields any.

    Args:
        files: folder that paths start from; default: the table's own.

    Raises:
        DataError: a path that leads out of that folder.
    """
    for spec in specs_of(members, modality):
        texts: list[str] = []
        found: list[Content] = []
        for part in spec.split("+"):
            column = part.removeprefix("file:")
            raw = cell_bytes(item, column)
            if raw is not None:
                found.append(raw)
                continue
            value = filled(column, item.fields)
            if value is None or value in ("", []):
                continue
            many = value if isinstance(value, list) else [value]
            if part == column and modality == "text":
                texts += [str(v) for v in many if v is not None]
            else:
                found += [_content(item, column, v, files) for v in many]
        if texts or found:
            return found + captions(item.id, texts)
    return []


def cell_bytes(item: Item, column: str) -> Content | None:
    """The image or audio in a cell of a columnar table, as a content that is read later."""
    fields = item.fields
    if isinstance(fields, LazyRow) and column in fields and fields.block.holds_bytes(column):
        return Content(f"{item.id}/{column}", load=partial(_cell, fields, column, item.folder))
    return None


def _cell(fields: LazyRow, column: str, folder: str) -> bytes:
    value = fields[column]
    if isinstance(value, Mapping):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if value is None:
        raise DataError(f"row {fields.row} has no value in column {column!r}")
    if isinstance(value, str):
        raw = Content(value, path=value if os.path.isabs(value) or not folder else f"{folder}/{value}").read()
        assert isinstance(raw, bytes), "a file is bytes"
        return raw
    return bytes(value)


def _content(item: Item, column: str, value: Any, files: str) -> Content:
    if isinstance(value, bytes):
        return Content(f"{item.id}/{column}", load=lambda: value)
    # A table is data: it may name files in its own folder (or in that of the settings), but no others.
    inside = os.path.normpath(str(value))
    if os.path.isabs(inside) or inside.startswith(".."):
        raise DataError(f"{item.id} names {str(value)!r}: paths must stay inside the list's folder")
    folder = (files or item.folder or ".").rstrip("/")
    return Content(inside, path=f"{folder}/{inside}")
