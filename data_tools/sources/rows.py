"""Rows (of a table, a JSON-lines file, a data set) → records: what jsonl, csv, parquet and hf have in common."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from data_tools.sources.base import Dropped, Record, SourceConfig, as_captions, fill, jsonable, template_fields
from dualenc.errors import ConfigError, did_you_mean

Row = Mapping[str, Any]


class RowsConfig(SourceConfig):
    """Settings of sources made of rows."""

    image: str = Field(
        "image", description="field with the picture: a path relative to the file (or to root), or its bytes"
    )
    caption: str | None = Field(
        None, description="field with the text or a list of texts; default: captions, caption or text"
    )
    template: str | None = Field(
        None, description="make the text of fields: '{caption}, {colour} {type}'; {caption} is each caption"
    )
    keep: Literal["all", "none"] | list[str] = Field("all", description="other fields that go into the .json member")
    root: str | None = Field(None, description="folder that picture paths are relative to; default: the file's own")
    split: str | None = Field(
        None, description="only rows of this split; default: all, each split into shards of its own"
    )
    split_field: str | None = Field("split", description="field that names a row's split; none: there is no such field")
    hold_out: int | None = Field(
        None, ge=2, description="leave out every n-th row (the first, …), for a task with every: {step: n, offset: 0}"
    )
    group: bool = Field(False, description="several rows with the same picture are one sample with several captions")


CAPTION_FIELDS = ("captions", "caption", "text", "sentence", "title")


def resolve(cfg: RowsConfig, fields: Iterable[str], where: str) -> RowsConfig:
    """Fill in the caption field and check every named field against those there are.

    Raises:
        ConfigError: naming the setting, the field, and the nearest one.
    """
    known = list(fields)
    caption = cfg.caption or next((f for f in CAPTION_FIELDS if f in known), None)
    names: dict[str, list[str]] = {"image": [cfg.image]}
    if caption is not None and (cfg.caption is not None or cfg.template is None):
        names["caption"] = [caption]
    if cfg.template is not None:
        names["template"] = [
            n for n in template_fields(cfg.template, f"{where}.template") if n != "caption" or caption is None
        ]
    if isinstance(cfg.keep, list):
        names["keep"] = cfg.keep
    if cfg.split is not None:
        if cfg.split_field is None:
            raise ConfigError(f"{where}.split: {cfg.split!r} needs split_field, the field that names a row's split")
        names["split_field"] = [cfg.split_field]
    for setting, wanted in names.items():
        for name in wanted:
            if name not in known:
                raise ConfigError(f"{where}.{setting}: the data has no field {name!r}. {did_you_mean(name, known)}")
    if caption is None and cfg.template is None:
        raise ConfigError(f"{where}.caption: name the field that holds the text. Known: {', '.join(known)}.")
    return cfg.model_copy(update={"caption": caption})


def to_records(cfg: RowsConfig, rows: Iterable[tuple[str, Row]], folder: Path) -> Iterator[Record | Dropped]:
    """Records of (name, row) pairs; ``cfg`` comes from :func:`resolve`, picture paths are relative to ``folder``."""
    root = Path(cfg.root).expanduser() if cfg.root else folder
    found = 0
    splits: set[str] = set()
    for name, row in rows:
        split = str(row[cfg.split_field]) if cfg.split_field and row.get(cfg.split_field) is not None else ""
        splits.add(split)
        if cfg.split is not None and split != cfg.split:
            continue
        found += 1
        if cfg.hold_out is not None and (found - 1) % cfg.hold_out == 0:
            continue
        yield _record(cfg, name, row, root, split)
    if cfg.split is not None and not found:
        raise ConfigError(f"split: no row has {cfg.split_field}={cfg.split!r}. {did_you_mean(cfg.split, splits)}")


def _record(cfg: RowsConfig, name: str, row: Row, root: Path, split: str) -> Record | Dropped:
    image = row.get(cfg.image)
    media, label = _picture(image, name, root)
    if media is None:
        return Dropped(name, "no image", f"field {cfg.image!r} holds {type(image).__name__}")
    value = row.get(cfg.caption) if cfg.caption else None
    captions = as_captions(value)
    if cfg.template is not None:
        base = captions or ("",)
        captions = tuple(
            t for t in (fill(cfg.template, {**row, "caption": c} if cfg.caption else row) for c in base) if t
        )
    if not captions:
        return Dropped(label, "empty caption", "")
    taken = {cfg.image, cfg.caption, cfg.split_field}
    if cfg.keep == "none":
        kept: list[str] = []
    else:
        kept = cfg.keep if isinstance(cfg.keep, list) else [k for k in row if k not in taken]
    fields = {k: row[k] for k in kept if jsonable(row.get(k))}
    if isinstance(cfg.keep, list) and len(fields) < len(kept):
        bad = next(k for k in kept if k not in fields)
        raise ConfigError(f"keep: field {bad!r} of {label} holds {type(row.get(bad)).__name__}, which JSON cannot hold")
    many = cfg.group or (isinstance(value, Sequence) and not isinstance(value, str))
    return Record(label, {"image": media}, captions, fields, {}, split, many)


def _picture(value: Any, name: str, root: Path) -> tuple[bytes | Path | None, str]:
    """The picture a cell holds: bytes, a path, or the {bytes, path} struct that the datasets library writes."""
    if isinstance(value, Mapping):
        inner, path = value.get("bytes"), value.get("path")
        if inner is not None:
            return bytes(inner), str(path) if path else name
        value = path
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value), name
    if isinstance(value, str) and value.strip():
        return root / value.strip(), value.strip()
    return None, name


def grouped(records: Iterable[Record | Dropped]) -> Iterator[Record | Dropped]:
    """Merge records of the same picture, wherever they stand, into the first one. Keeps all of them in memory."""
    first: dict[tuple[str, str], Record] = {}
    order: list[Record | Dropped] = []
    for r in records:
        if isinstance(r, Dropped):
            order.append(r)
        elif (r.split, r.name) in first:
            seen = first[r.split, r.name]
            seen.captions += r.captions
            # A field that differs from caption to caption says nothing about the picture.
            seen.fields = {k: v for k, v in seen.fields.items() if r.fields.get(k) == v}
        else:
            first[r.split, r.name] = r
            order.append(r)
    yield from order
