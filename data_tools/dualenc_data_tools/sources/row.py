"""Rows (of a table, a JSON-lines file, a data set) → records: what jsonl, csv, parquet and hf have in common."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from dualenc.errors import ConfigError, did_you_mean
from dualenc_data_tools.sources.named import NamedFields
from dualenc_data_tools.sources.source import (
    Dropped,
    Record,
    SourceConfig,
    as_captions,
    fill,
    jsonable,
    template_fields,
)

Row = Mapping[str, Any]
MEDIA = ("image", "audio")


class RowsConfig(SourceConfig, NamedFields):
    """Settings of sources made of rows."""

    image: str | None = Field(
        "image", description="field with the picture: a path relative to the file (or to root), or its bytes"
    )
    audio: str | None = Field(
        "audio", description="field with the sound, likewise; image and audio may be templates: '{youtube_id}.wav'"
    )
    caption: str | list[str] | None = Field(
        None, description="field (or fields) with the text or a list of texts; default: captions, caption or text"
    )
    template: str | list[str] | None = Field(
        None, description="make the text (or texts) of fields: '{caption}, {colour} {type}'; {caption} is each caption"
    )
    keep: Literal["all", "none"] | list[str] = Field("all", description="other fields that go into the .json member")
    root: str | None = Field(None, description="folder that paths are relative to; default: the file's own")
    split: str | None = Field(
        None, description="only rows of this split; default: all, each split into shards of its own"
    )
    split_field: str | None = Field("split", description="field that names a row's split; none: there is no such field")
    hold_out: int | None = Field(
        None, ge=2, description="leave out every n-th row (the first, …), for a task with every: {step: n, offset: 0}"
    )
    group: bool = Field(
        False, description="several rows with the same picture or sound are one sample with several captions"
    )


CAPTION_FIELDS = ("captions", "caption", "text", "sentence", "transcript", "title")


def resolve(cfg: RowsConfig, fields: Iterable[str], where: str) -> RowsConfig:
    """Fill in the caption field, drop the media that are not there, and check every named field.

    Raises:
        ConfigError: naming the setting, the field, and the nearest one.
    """
    known = list(dict.fromkeys([*fields, *cfg.name_fields(f"{where}.pattern")]))
    caption = cfg.caption or next((f for f in CAPTION_FIELDS if f in known), None)
    names: dict[str, list[str]] = {}
    dropped: dict[str, None] = {}
    for m in MEDIA:
        spec = getattr(cfg, m)
        if spec is not None and (m in cfg.model_fields_set or spec in known):
            names[m] = template_fields(spec, f"{where}.{m}") if "{" in spec else [spec]
        else:
            dropped[m] = None
    if not names:
        raise ConfigError(
            f"{where}.image: the data has no field 'image', nor 'audio': name the one with the picture or sound. "
            f"{did_you_mean('image', known)}"
        )
    if caption is not None and (cfg.caption is not None or cfg.template is None):
        names["caption"] = _listed(caption)
    if cfg.template is not None:
        used = [n for t in _listed(cfg.template) for n in template_fields(t, f"{where}.template")]
        names["template"] = [n for n in used if n != "caption" or caption is None]
    if isinstance(cfg.keep, list):
        names["keep"] = cfg.keep
    names |= {"where": list(cfg.where), "unless": list(cfg.unless), "words": list(cfg.words)}
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
    return cfg.model_copy(update={"caption": caption, **dropped})


def to_records(cfg: RowsConfig, rows: Iterable[tuple[str, Row]], folder: Path) -> Iterator[Record | Dropped]:
    """Records of (name, row) pairs; ``cfg`` comes from :func:`resolve`, file paths are relative to ``folder``."""
    root = Path(cfg.root).expanduser() if cfg.root else folder
    found = 0
    splits: set[str] = set()
    for name, given in rows:
        media, label = _media(cfg, given, name, root)
        row = {**given, **(cfg.fields_of(label) or {})}
        split = str(row[cfg.split_field]) if cfg.split_field and row.get(cfg.split_field) is not None else ""
        splits.add(split)
        if (cfg.split is not None and split != cfg.split) or not cfg.wants(row):
            continue
        found += 1
        if cfg.hold_out is not None and (found - 1) % cfg.hold_out == 0:
            continue
        yield _record(cfg, label, row, media, split)
    if cfg.split is not None and not found and cfg.split not in splits:
        raise ConfigError(f"split: no row has {cfg.split_field}={cfg.split!r}. {did_you_mean(cfg.split, splits)}")


def _record(cfg: RowsConfig, label: str, row: Row, media: dict[str, bytes | Path], split: str) -> Record | Dropped:
    if not media:
        spec = cfg.image or cfg.audio
        kind = "image" if cfg.image else "audio"
        return Dropped(label, f"no {kind}", f"field {spec!r} holds {type(row.get(spec or '')).__name__}")
    fields_of_text = _listed(cfg.caption or [])
    values = [row.get(c) for c in fields_of_text]
    captions = tuple(t for v in values for t in as_captions(v))
    many = (
        cfg.group or len(fields_of_text) > 1 or any(isinstance(v, Sequence) and not isinstance(v, str) for v in values)
    )
    if cfg.template is not None:
        templates = _listed(cfg.template)
        many = many or len(templates) > 1
        said = cfg.in_words(row)
        base = captions or ("",)
        texts = [fill(t, {**said, "caption": c} if cfg.caption else said) for c in base for t in templates]
        captions = tuple(dict.fromkeys(t for t in texts if t))
    else:
        captions = tuple(cfg.as_words(c) for c in captions)
    if not captions:
        return Dropped(label, "empty caption", "")
    taken = {cfg.image, cfg.audio, *fields_of_text, cfg.split_field}
    if cfg.keep == "none":
        kept: list[str] = []
    else:
        kept = cfg.keep if isinstance(cfg.keep, list) else [k for k in row if k not in taken]
    fields = {k: row[k] for k in kept if jsonable(row.get(k))}
    if isinstance(cfg.keep, list) and len(fields) < len(kept):
        bad = next(k for k in kept if k not in fields)
        raise ConfigError(f"keep: field {bad!r} of {label} holds {type(row.get(bad)).__name__}, which JSON cannot hold")
    return Record(label, media, captions, fields, {}, split, many)


def _listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def _media(cfg: RowsConfig, row: Row, name: str, root: Path) -> tuple[dict[str, bytes | Path], str]:
    """Kind → the picture's or sound's bytes or file, and what the sample is called: its first file."""
    media: dict[str, bytes | Path] = {}
    labels = []
    for m in MEDIA:
        spec = getattr(cfg, m)
        if spec is None:
            continue
        value, label = _bytes_or_file(fill(spec, row) if "{" in spec else row.get(spec), name, root)
        if value is not None:
            media[m] = value
            labels.append(label)
    return media, labels[0] if labels else name


def _bytes_or_file(value: Any, name: str, root: Path) -> tuple[bytes | Path | None, str]:
    """The picture or sound a cell holds: bytes, a path, or the {bytes, path} struct of the datasets library."""
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
    """Merge records of the same picture or sound, wherever they stand, into the first; keeps all in memory."""
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
