"""Rows of a table → records: jsonl, json, csv, parquet, hf, and every table that another package registers."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import AliasChoices, Field, create_model

from dualenc.data.sources import Item, Layout, hub, tables
from dualenc.data.sources import sources as layouts
from dualenc.data.sources.columns import TEXT_COLUMNS, filled, is_there, named_columns, value_of
from dualenc.data.sources.samples import HEAD
from dualenc.errors import ConfigError, DataError, did_you_mean
from dualenc_data_tools.sources.named import NamedFields
from dualenc_data_tools.sources.source import (
    Dropped,
    Record,
    SourceConfig,
    SourceKind,
    as_captions,
    fill,
    jsonable,
    shuffled,
    sources,
    template_fields,
)

MEDIA = ("image", "audio")


class RowsConfig(SourceConfig, NamedFields):
    """Settings of table sources."""

    image: str | None = Field(
        "image", description="field with the image: a path relative to the file (or to root), or its bytes"
    )
    audio: str | None = Field(
        "audio",
        description="field with the audio, likewise; image and audio may be templates: '{youtube_id}.wav', {id:06}",
    )
    caption: str | list[str] | None = Field(
        None, description="field (or fields) with the text or a list of texts; default: captions, caption or text"
    )
    template: str | list[str] | None = Field(
        None,
        description="make the text (or texts) from fields: '{caption}, {colour} {type}'; {caption} is each caption",
    )
    members: dict[str, list[str]] = Field(
        default_factory=dict,
        description="image, audio and caption written as in a task: '{image: [file:filepath], text: [title]}'",
    )
    keep: Literal["all", "none"] | list[str] = Field("all", description="other fields that go into the .json member")
    root: str | None = Field(
        None,
        validation_alias=AliasChoices("root", "files"),
        description="folder that paths are relative to; default: the file's own",
    )
    split: str | None = Field(
        None, description="only rows of this split; default: all, with separate shards for each split"
    )
    split_field: str | None = Field("split", description="field that names a row's split; null: there is no such field")
    hold_out: int | None = Field(
        None, ge=2, description="leave out every n-th row (the first, …), for a task with every: {step: n, offset: 0}"
    )
    group: bool = Field(False, description="rows with the same image or audio become one sample with several captions")


def resolve(cfg: RowsConfig, fields: Iterable[str], where: str) -> RowsConfig:
    """Fill in the caption field, drop missing media, and check every named field.

    Raises:
        ConfigError: naming the setting, the field, and the nearest one.
    """
    known = list(dict.fromkeys([*fields, *cfg.name_fields(f"{where}.pattern")]))
    cfg = _as_members_say(cfg, known, where)
    caption = cfg.caption or next((f for f in TEXT_COLUMNS if f in known), None)
    names: dict[str, list[str]] = {}
    dropped: dict[str, None] = {}
    for m in MEDIA:
        spec = getattr(cfg, m)
        if spec is not None and (m in cfg.model_fields_set or spec in known):
            names[m] = _path_fields(spec, f"{where}.{m}")
        else:
            dropped[m] = None
    if not names:
        raise ConfigError(
            f"{where}.image: the data has no field 'image', nor 'audio'; name the field with the image or audio. "
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
            if not is_there(name, known):
                raise ConfigError(f"{where}.{setting}: the data has no field {name!r}. {did_you_mean(name, known)}")
    if caption is None and cfg.template is None:
        raise ConfigError(f"{where}.caption: name the field that holds the text. Known: {', '.join(known)}.")
    return cfg.model_copy(update={"caption": caption, **dropped})


def _as_members_say(cfg: RowsConfig, known: Sequence[str], where: str) -> RowsConfig:
    """The settings with image, audio and caption from ``members``: the first existing field of each."""
    update: dict[str, Any] = {}
    for modality, specs in cfg.members.items():
        setting = {"image": "image", "audio": "audio", "text": "caption"}.get(modality)
        if setting is None:
            raise ConfigError(f"{where}.members: rows are packed with image, audio and text, not {modality!r}")
        if setting in cfg.model_fields_set:
            raise ConfigError(f"{where}.members.{modality}: {where}.{setting} sets this too; keep one of them")
        if not specs:
            raise ConfigError(f"{where}.members.{modality}: name a field, for example [{setting}]")
        spec = next((s for s in specs if all(is_there(c, known) for c in named_columns(s))), specs[0])
        update[setting] = spec.split("+") if modality == "text" and "+" in spec else spec.removeprefix("file:")
    return cfg.model_copy(update=update) if update else cfg


def _path_fields(spec: str, where: str) -> list[str]:
    """The fields that a path is made of."""
    plain = spec.removeprefix("file:")
    if "{" not in plain:
        return [plain]
    if "}" in plain and named_columns(plain):
        # {id:06} is a number padded with zeros; any other format is refused, as in texts.
        return template_fields(re.sub(r":\d+\}", "}", plain), where)
    return template_fields(plain, where)


def to_records(cfg: RowsConfig, items: Iterable[Item]) -> Iterator[Record | Dropped]:
    """Records of rows; ``cfg`` comes from :func:`resolve`."""
    found = 0
    splits: set[str] = set()
    for item in items:
        given = item.fields
        media, label = _media(cfg, given, item.name or item.id, Path(cfg.root or item.folder).expanduser())
        row = {**given, **(cfg.fields_of(label) or {})}
        split = item.split
        if not split and cfg.split_field and row.get(cfg.split_field) is not None:
            split = str(row[cfg.split_field])
        splits.add(split)
        if (cfg.split is not None and split != cfg.split) or not cfg.wants(row):
            continue
        found += 1
        if cfg.hold_out is not None and (found - 1) % cfg.hold_out == 0:
            continue
        yield _record(cfg, label, row, media, split)
    if cfg.split is not None and not found and cfg.split not in splits:
        raise ConfigError(f"split: no row has {cfg.split_field}={cfg.split!r}. {did_you_mean(cfg.split, splits)}")


def _record(
    cfg: RowsConfig, label: str, row: tables.TableRow, media: dict[str, bytes | Path], split: str
) -> Record | Dropped:
    if not media:
        spec = cfg.image or cfg.audio
        kind = "image" if cfg.image else "audio"
        return Dropped(label, f"no {kind}", f"field {spec!r} holds {type(row.get(spec or '')).__name__}")
    fields_of_text = _listed(cfg.caption or [])
    values = [value_of(row, c) for c in fields_of_text]
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
        raise ConfigError(
            f"keep: field {bad!r} of {label} holds {type(row.get(bad)).__name__}, which JSON cannot represent"
        )
    return Record(label, media, captions, fields, {}, split, many)


def _listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def _media(cfg: RowsConfig, row: tables.TableRow, name: str, root: Path) -> tuple[dict[str, bytes | Path], str]:
    """Kind → bytes or file of the image or audio, and the sample's name: its first file."""
    media: dict[str, bytes | Path] = {}
    labels = []
    for m in MEDIA:
        spec = getattr(cfg, m)
        if spec is None:
            continue
        value, label = _bytes_or_file(filled(spec.removeprefix("file:"), row), name, root)
        if value is not None:
            media[m] = value
            labels.append(label)
    return media, labels[0] if labels else name


def _bytes_or_file(value: Any, name: str, root: Path) -> tuple[bytes | Path | None, str]:
    """The image or audio in a cell: bytes, a path, or the {bytes, path} struct of the datasets library."""
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
    """Merge records of the same image or audio, wherever they are, into the first; keeps all in memory."""
    first: dict[tuple[str, str], Record] = {}
    order: list[Record | Dropped] = []
    for r in records:
        if isinstance(r, Dropped):
            order.append(r)
        elif (r.split, r.name) in first:
            seen = first[r.split, r.name]
            seen.captions += r.captions
            # A field that differs between captions does not describe the image.
            seen.fields = {k: v for k, v in seen.fields.items() if r.fields.get(k) == v}
        else:
            first[r.split, r.name] = r
            order.append(r)
    yield from order


# --- one kind of table each ---------------------------------------------------------------------------------------


class JsonlConfig(tables.JsonlSettings, RowsConfig):
    """``path=captions.jsonl``: one JSON object per line."""


class JsonConfig(tables.JsonSettings, RowsConfig):
    """``path=pairs.json``: a list of objects, or an object whose values are the rows."""


class CsvConfig(tables.CsvSettings, RowsConfig):
    """``path=pairs.csv``: a header line, then rows."""


class ParquetConfig(tables.ParquetSettings, RowsConfig):
    """``path=data.parquet``, or a folder or pattern of them (``path=data/part-*.parquet``)."""


class HubConfig(hub.HubSettings, RowsConfig):
    """``path=FOLDER`` (save_to_disk) or ``path=owner/name`` (load_dataset), then ``split=train``."""


def table_records(kind: str, cfg: RowsConfig) -> Iterator[Record | Dropped]:
    """Records of a table, in its order.

    Raises:
        DataError: the table is missing, damaged or empty.
        ConfigError: a field that is not there (with the nearest).
    """
    layout: Layout[Any] = layouts[kind]
    items = iter(layout.read(cfg))
    head = list(itertools.islice(items, HEAD))
    if not head:
        raise DataError(f"{kind}: the table has no rows; check {kind}.path")
    # Rows may have different fields: a field is known if any of the first hundred rows has it.
    known = dict.fromkeys(k for item in head for k in item.fields)
    if head[0].split:  # the source knows its rows' split and has already selected it: it is not a field
        cfg = cfg.model_copy(update={"split": None, "split_field": None})
    cfg = resolve(cfg, known, kind)
    every: Iterable[Item] = itertools.chain(head, items)
    if cfg.shuffle_seed is not None and not layout.shuffles:
        every = shuffled(every, cfg.shuffle_seed)
    records = to_records(cfg, every)
    yield from grouped(records) if cfg.group else records


def hub_records(cfg: HubConfig) -> Iterator[Record | Dropped]:
    """Records of a data set of the datasets library.

    Raises:
        DataError: a folder written neither by the library nor in the hub's layout.
    """
    folder = Path(cfg.path).expanduser()
    if folder.is_dir() and not any(
        next(folder.glob(p), None) for p in ("dataset_info.json", "dataset_dict.json", "**/*.parquet", "**/*.arrow")
    ):
        raise DataError(
            f"hf.path: {folder} was not written by save_to_disk (no dataset_info.json, no dataset_dict.json) and holds "
            "no .parquet files; for plain files use the sources folder, jsonl, json or csv"
        )
    yield from table_records("hf", cfg)


def table_kind(name: str) -> SourceKind[Any]:
    """How to pack a table that another package registered: its own settings plus those of all tables."""
    layout: Layout[Any] = layouts[name]
    config: Any = create_model(f"{name}_packing", __base__=(layout.settings, RowsConfig))
    return SourceKind(config, partial(table_records, name), layout.about)


for _name, _config in (
    ("jsonl", JsonlConfig), ("json", JsonConfig), ("csv", CsvConfig), ("parquet", ParquetConfig),
):  # fmt: skip
    sources.register(_name)(SourceKind(_config, partial(table_records, _name), layouts[_name].about))
sources.register("hf")(SourceKind(HubConfig, hub_records, layouts["hf"].about))
