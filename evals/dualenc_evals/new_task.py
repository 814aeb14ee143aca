"""A task's YAML from a look at the data: which column is a path, a caption, a class. ``dualenc task new``."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dualenc.config import settings_as
from dualenc.config.commented import commented_yaml
from dualenc.data.modalities import modalities
from dualenc.data.shards.names import expand
from dualenc.data.shards.reader import SampleError, iter_samples
from dualenc.data.sources import Item, sources
from dualenc.data.sources.columns import TEXT_COLUMNS, LazyRow
from dualenc.data.sources.folder import AUDIO_ENDINGS, IMAGE_ENDINGS, FolderSettings, layout_of, walk
from dualenc.data.sources.opened import open_binary
from dualenc.errors import ConfigError, DataError, did_you_mean
from dualenc_evals.catalog import parse_task
from dualenc_evals.read.shards import read_rows

KindName = Literal["retrieval", "classification", "multilabel"]
KINDS: tuple[KindName, ...] = ("retrieval", "classification", "multilabel")
TABLES = {".csv": "csv", ".tsv": "csv", ".jsonl": "jsonl", ".json": "json", ".parquet": "parquet"}
LABELS = ("label", "labels", "class", "classes", "category", "categories", "tags", "target", "cls")
ROWS = 2000
"""Rows that are looked at."""
MOST_CLASSES = 200
"""With more classes their names are not listed in the file."""
PROMPTS = {"image": "a photo of a {}.", "audio": "the sound of {}"}
_SPLITS = ("test", "val", "valid", "validation", "dev")


@dataclass
class Look:
    """What the data have.

    Attributes:
        source: the task's ``source``, without members.
        modality: what is looked at, image or audio …
        members: modality → columns or endings.
        label: column or ending of the class.
        classes: the labels that occur.
        several: an item has several labels.
        splits: values of a column ``split``.
    """

    source: dict[str, Any]
    modality: str = "image"
    members: dict[str, list[str]] = field(default_factory=dict)
    label: str | None = None
    classes: list[str] = field(default_factory=list)
    several: bool = False
    splits: list[str] = field(default_factory=list)
    repeated: bool = False


def new_task(data: str, out: Path, kind: str | None = None, label: str | None = None) -> tuple[str, str]:
    """The YAML of a task for ``data``, and a sentence on what it measures. The data are read once to see that it works.

    Args:
        data: a .csv, .tsv, .jsonl, .json or .parquet file; a folder with a folder for each class, or with texts beside
            its files; shards (a folder or pattern of .tar files).
        out: where the YAML will be: its paths are relative to that.
        kind: retrieval, classification or multilabel; default: what the data have.
        label: the column (for shards the ending) of the class; default: one that looks like it.

    Raises:
        ConfigError: the kind needs what the data do not have, or nothing is recognised.
        DataError: the data cannot be read.
    """
    if kind is not None and kind not in KINDS:
        raise ConfigError(
            f"--kind {kind}: {did_you_mean(kind, KINDS)} Other kinds are written by hand: docs/evaluation.md"
        )
    look = _look(data, label)
    chosen = kind or _kind(look, data)
    raw, why = _task(look, chosen, out, data)
    text = commented_yaml(raw, why, f"Written by dualenc task new --data {data}.\n    dualenc eval MODEL --tasks {out}")
    located = {"name": "new", **raw, "source": {**raw["source"], "path": look.source["path"]}}
    if "files" in raw["source"]:
        located["source"]["files"] = look.source["files"]
    rows = read_rows(parse_task(located, where=f"the task for {data}"))
    return text, f"{chosen}: {len(rows.rows):,} items" + (
        f", {len(look.classes)} classes" if chosen != "retrieval" else ""
    )


# --- looking -----------------------------------------------------------------------------------------------------


def _look(data: str, label: str | None) -> Look:
    path = Path(data).expanduser()
    suffix = Path(data.removesuffix(".gz")).suffix.lower()
    if suffix in TABLES:
        return _table(data, TABLES[suffix], label)
    if suffix == ".tar" or (path.is_dir() and any(path.glob("*.tar"))):
        return _shards(data if suffix == ".tar" else str(path / "*.tar"), label)
    if path.is_dir():
        return _folder(path)
    if not path.exists():
        raise DataError(f"--data: there is no file or folder {data}")
    raise ConfigError(f"--data {data}: give a {', '.join(TABLES)} file, a folder of images or audio, or shards (.tar)")


def _folder(path: Path) -> Look:
    cfg = settings_as(FolderSettings, {"path": str(path)}, "folder")
    samples = walk(cfg)
    found = Counter(m for s in samples for m in s.files)
    look = Look({"kind": "folder", "path": str(path)}, modality=found.most_common(1)[0][0])
    look.members = {look.modality: sorted({p.suffix[1:].lower() for s in samples for p in s.files.values()})}
    if layout_of(cfg, samples) == "sidecar":
        look.members["text"] = []
        texts = [c.text for i in sources["folder"].read(cfg) for c in i.contents["text"] if not c.error]
        look.repeated = len(set(texts)) < len(texts)
    else:
        look.source["layout"] = "classes"
        look.classes = sorted({s.label for s in samples if s.label is not None})
    return look


def _shards(pattern: str, label: str | None) -> Look:
    look = Look({"kind": "shards", "path": pattern})
    wanted: dict[str, Sequence[str]] = {m: modalities[m].default_members for m in ("image", "audio", "text")}
    classes = [label] if label else ["cls", *(f"json:{n}" for n in LABELS)]
    found: dict[str, Counter[str]] = {}
    labels: Counter[str] = Counter()
    texts: Counter[str] = Counter()
    samples = (s for url in expand(pattern) for s in iter_samples(url, {**wanted, "label": classes}))
    for _, sample in itertools.islice(samples, ROWS):
        if isinstance(sample, SampleError):
            continue
        for m, ending in sample.members.items():
            found.setdefault(m, Counter())[ending] += 1
        if "label" in sample.values:
            value = sample.values["label"]
            look.several = look.several or isinstance(value, list)
            labels.update(_words(value.decode("utf-8", "replace") if isinstance(value, bytes) else value))
        if "text" in sample.values:
            texts[str(sample.values["text"])] += 1
    media = [m for m in ("image", "audio") if m in found]
    if not media:
        raise ConfigError(f"--data {pattern}: no sample has an image or audio ({', '.join(wanted['image'])} …)")
    look.modality = media[0]
    look.members = {m: [e for e, _ in found[m].most_common()] for m in (look.modality, "text") if m in found}
    look.label = found["label"].most_common(1)[0][0] if "label" in found else None
    look.classes = sorted(labels)
    look.repeated = len(texts) < sum(texts.values())
    return look


def _words(value: Any) -> list[str]:
    return [str(v) for v in value] if isinstance(value, list) else [str(value)]


def _table(path: str, kind: str, label: str | None) -> Look:
    settings: dict[str, Any] = {"path": path}
    layout: Any = sources[kind]
    look = Look({"kind": kind, "path": path})
    if kind == "csv" and (delimiter := _delimiter(path)) is not None:
        settings["delimiter"] = look.source["delimiter"] = delimiter
    items = list(itertools.islice(layout.read(settings_as(layout.settings, settings, kind)), ROWS))
    if not items:
        raise DataError(f"--data {path}: the table has no rows")
    columns = list(dict.fromkeys(k for item in items[:100] for k in item.fields))
    if label is not None and label not in columns:
        raise ConfigError(f"--label {label}: there is no such column in {path}. {did_you_mean(label, columns)}")
    values = {c: [] if _is_bytes(items[0], c) else [i.fields.get(c) for i in items] for c in columns}
    media = next(((m, c) for c in columns if (m := _media(items[0], c, values[c])) is not None), None)
    if media is None:
        raise ConfigError(
            f"--data {path}: no column holds paths of images or audio, or their bytes; the columns are "
            f"{', '.join(columns)}"
        )
    look.modality, column = media
    look.members = {look.modality: [column]}
    _find_files(look, path, column, values[column])
    rest = [c for c in columns if c != column and values[c]]
    look.label = label or _label(rest, values)
    captions = [c for c in rest if c != look.label and _is_text(c, values[c])]
    captions.sort(key=lambda c: TEXT_COLUMNS.index(c) if c in TEXT_COLUMNS else len(TEXT_COLUMNS))
    if captions:
        look.members["text"] = captions[:1]
        texts = [str(v) for v in values[captions[0]]]
        look.repeated = len(set(texts)) < len(texts)
    if look.label is not None:
        labels = values[look.label]
        look.several = any(isinstance(v, list) for v in labels)
        look.classes = sorted({w for v in labels if v not in (None, "") for w in _words(v)})
    if "split" in rest:
        look.splits = sorted({str(v) for v in values["split"]})
    return look


def _delimiter(path: str) -> str | None:
    """Of a .csv whose header has no comma: a semicolon or tab; None: the usual one."""
    with open_binary(path) as raw:
        first = raw.readline(1 << 20).decode("utf-8-sig", "replace")
    usual = "\t" if path.lower().endswith(".tsv") else ","
    return next((d for d in (";", "\t", ",", "|") if d in first and d != usual), None) if usual not in first else None


def _is_bytes(item: Item, column: str) -> bool:
    return isinstance(item.fields, LazyRow) and item.fields.block.holds_bytes(column)


def _media(item: Item, column: str, values: Sequence[Any]) -> str | None:
    """The modality whose files (or bytes) a column holds."""
    if _is_bytes(item, column):
        return "audio" if "audio" in column.lower() or "sound" in column.lower() else "image"
    names = [str(v).lower() for v in values if isinstance(v, str) and v]
    for modality, endings in (("image", IMAGE_ENDINGS), ("audio", AUDIO_ENDINGS)):
        fitting = sum(n.rsplit(".", 1)[-1] in endings and " " not in n.rsplit(".", 1)[-1] for n in names)
        if names and fitting > 0.8 * len(names):
            return modality
    return None


def _find_files(look: Look, path: str, column: str, values: Sequence[Any]) -> None:
    """Where the paths of a column start: the table's folder, else the working folder.

    Raises:
        ConfigError: they are absolute.
    """
    first = next((str(v) for v in values if v), None)
    if first is None or "://" in path:
        return
    if os.path.isabs(first):
        raise ConfigError(
            f"--data {path}: column {column!r} has absolute paths ({first}); a table may only name files below one "
            "folder: "
            "write them relative to the table"
        )
    if (
        not (Path(path).expanduser().parent / first).is_file()
        and Path(first).is_file()
        and look.source["kind"] != "parquet"
    ):
        look.source["files"] = "."


def _label(columns: Sequence[str], values: Mapping[str, Sequence[Any]]) -> str | None:
    """The column of the class: one of the usual names, else short words of which there are few."""
    named = [c for n in LABELS for c in columns if c.lower() == n]
    if named:
        return named[0]
    for c in columns:
        words = [str(v) for v in values[c] if v not in (None, "")]
        few = 1 < len(set(words)) <= max(len(words) // 4, 2)
        if c.lower() not in (*TEXT_COLUMNS, "split", "id") and words and few and max(map(len, words)) <= 40:
            return c
    return None


def _is_text(column: str, values: Sequence[Any]) -> bool:
    if column in TEXT_COLUMNS:
        return True
    words = [w for v in values[:200] for w in (v if isinstance(v, list) else [v]) if isinstance(w, str)]
    return bool(words) and sum(" " in w.strip() for w in words) > 0.5 * len(words)


# --- writing -----------------------------------------------------------------------------------------------------


def _kind(look: Look, data: str) -> KindName:
    if "text" in look.members:
        return "retrieval"
    if look.several:
        return "multilabel"
    if look.classes:
        return "classification"
    raise ConfigError(
        f"--data {data}: found {look.modality} but neither captions nor classes; name the class with --label COLUMN"
    )


def _task(look: Look, kind: str, out: Path, data: str) -> tuple[dict[str, Any], dict[str, str]]:
    why: dict[str, str] = {}
    source = dict(look.source)
    source["path"] = _from(out, source["path"])
    if "files" in source:
        source["files"] = _from(out, source["files"]) + "/"
        why["source.files"] = "Where the paths in the table start."
    held_out = next((s for s in _SPLITS if s in look.splits), None)
    if held_out is not None:
        source["split"] = held_out
        why["source.split"] = f"The splits are {', '.join(look.splits)}."
    members = {m: list(v) for m, v in look.members.items() if (m != "text" or kind == "retrieval") and v}
    if members and source["kind"] != "folder":
        source["members"] = members
        why["source.members"] = "Modality → columns (of shards: endings), tried in order, as in dualenc shards build."
    raw: dict[str, Any] = {"kind": kind, "description": f"zero-shot {kind} on {Path(data).name}", "source": source}
    if look.modality != "image":
        raw["modalities"] = [look.modality, "text"]
    if kind == "retrieval":
        return _retrieval(raw, why, look)
    return _classes(raw, why, look, kind, data)


def _retrieval(raw: dict[str, Any], why: dict[str, str], look: Look) -> tuple[dict[str, Any], dict[str, str]]:
    if "text" not in look.members:
        raise ConfigError("--kind retrieval: no column or member looks like captions")
    if look.repeated:
        raw["identical"] = "merge"
        why["identical"] = "Equal captions are one, right for all their items; distinct: each item has its own."
    raw["metrics"] = ["R@1", "R@5", "R@10"]
    why["metrics"] = "Both directions; medR and mAP@K are there, too."
    return raw, why


def _classes(
    raw: dict[str, Any], why: dict[str, str], look: Look, kind: str, data: str
) -> tuple[dict[str, Any], dict[str, str]]:
    if not look.classes:
        raise ConfigError(f"--kind {kind}: nothing in {data} looks like a class; name it with --label COLUMN")
    if look.label is not None:
        raw["label"] = look.label
    numbers = all(c.isdigit() for c in look.classes)
    if len(look.classes) <= MOST_CLASSES:
        raw["classes"] = {c: c.replace("_", " ").replace("/", " ") for c in look.classes}
        why["classes"] = (
            "label → the name the model sees. These are numbers: write the names."
            if numbers
            else "label → the name the model sees; a list gives several."
        )
    raw["templates"] = [PROMPTS.get(look.modality, "{}")]
    why["templates"] = "{} is the class name; the features of several prompts are averaged."
    if kind == "classification":
        raw["metrics"] = ["top1", "top5", "mean_per_class_recall"] if len(look.classes) > 5 else ["top1"]
    return raw, why


def _from(out: Path, path: str) -> str:
    """A path as the YAML names it: relative to the YAML's folder where it is on this machine."""
    if "://" in path:
        return path
    inside = os.path.relpath(Path(path).expanduser().resolve(), out.resolve().parent)
    return inside if inside.startswith("..") else f"./{inside}"
