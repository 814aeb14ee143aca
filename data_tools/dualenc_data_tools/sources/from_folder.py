"""A folder of images or audio → records, with texts beside the files or from folder or file names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from dualenc.data.sources import sources as layouts
from dualenc.data.sources.folder import Beside, FolderSettings, item_of, layout_of, sidecar, text_key, walk
from dualenc.errors import ConfigError, did_you_mean
from dualenc_data_tools.sources.named import NamedFields
from dualenc_data_tools.sources.source import (
    Dropped,
    Record,
    SourceConfig,
    SourceKind,
    fill,
    jsonable,
    shuffled,
    sources,
    template_fields,
)


class FolderConfig(FolderSettings, SourceConfig, NamedFields):
    """``path=FOLDER``: NAME.jpg or .wav with NAME.txt or .json beside it, CLASS/NAME.wav, or names with fields."""

    template: str | list[str] = Field(
        "{class}", description="classes and names: the text or texts, such as 'the sound of {class}'"
    )


def folder(cfg: FolderConfig) -> Iterator[Record | Dropped]:
    """Records of the images and audio files below a folder, in order of their paths.

    Raises:
        DataError: no folder, or neither images nor audio in it.
        ConfigError: there are neither texts nor class folders, or a setting names an unknown field.
    """
    samples = walk(cfg)
    layout = "names" if cfg.layout == "auto" and cfg.pattern is not None else layout_of(cfg, samples)
    samples = shuffled(samples, cfg.shuffle_seed)
    if layout == "sidecar":
        made: Iterator[Record | Dropped | None] = (_with_text(cfg, s) for s in samples)
    else:
        made = _named(cfg, samples, layout)
    return (r for r in made if r is not None)


def _with_text(cfg: FolderConfig, sample: Beside) -> Record | Dropped | None:
    item = item_of(cfg, sample, with_text=True)
    texts = item.contents["text"]
    if texts[0].error:
        reason, _, detail = texts[0].error.partition(": ")
        return Dropped(item.id, reason, detail)
    beside = sidecar(sample.first)
    of_json = beside is not None and beside.suffix == ".json"
    key = text_key(cfg, item.fields) if of_json else None
    many = isinstance(item.fields[key], list) if key is not None else cfg.captions == "lines"
    own = {k: v for k, v in item.fields.items() if of_json and k != key and jsonable(v)}
    fields = {**own, **(cfg.fields_of(item.id) or {})}
    if not cfg.wants(fields):
        return None
    captions = tuple(cfg.as_words(c.text) for c in texts)
    return Record(item.id, media(sample), captions, fields, split=cfg.split or "", many=many)


def media(sample: Beside) -> dict[str, bytes | Path]:
    """Images and audio by their kind, other files by their ending; not the text of a sample that is a text alone."""
    files = {m: p for m, p in sample.files.items() if m != "text"}
    return {m if m in ("image", "audio") else p.suffix[1:].lower(): p for m, p in files.items()}


def _named(cfg: FolderConfig, samples: list[Beside], layout: str) -> Iterator[Record | Dropped | None]:
    """Texts made from the folder's name (the class; its number goes into .cls) or from the fields in the file name."""
    if layout == "names" and cfg.pattern is None:
        raise ConfigError("folder.layout: names needs a pattern, such as pattern='{digit}_{speaker}_{take}'")
    known = [*cfg.name_fields("folder.pattern"), *(["class"] if layout == "classes" else [])]
    templates = [cfg.template] if isinstance(cfg.template, str) else cfg.template
    for template in templates:
        used = template_fields(template, "folder.template")
        for field in used:
            if field not in known:
                raise ConfigError(f"folder.template: there is no field {field!r}. {did_you_mean(field, known)}")
        if not used:
            raise ConfigError(f"folder.template: {template!r} must contain a field in braces, such as {{{known[0]}}}")
    for setting, named in (("where", cfg.where), ("unless", cfg.unless), ("words", cfg.words)):
        for field in named:
            if field not in known:
                raise ConfigError(f"folder.{setting}: there is no field {field!r}. {did_you_mean(field, known)}")
    number = {c: i for i, c in enumerate(sorted({s.label or "." for s in samples}))}
    for sample in samples:
        name, label = sample.name, sample.label or "."
        fields: dict[str, Any] | None = cfg.fields_of(name)
        if fields is None:
            yield Dropped(name, "name does not fit", f"pattern {cfg.pattern!r}")
            continue
        members = {}
        if layout == "classes":
            fields = {"class": label.replace("_", " ").replace("/", " "), **fields}
            members["cls"] = str(number[label]).encode()
        if cfg.wants(fields):
            texts = tuple(dict.fromkeys(fill(t, cfg.in_words(fields)) for t in templates))
            kept = {k: v for k, v in fields.items() if k != "class"}
            yield Record(name, media(sample), texts, kept, members, cfg.split or "", many=len(templates) > 1)


sources.register("folder")(SourceKind(FolderConfig, folder, layouts["folder"].about))
