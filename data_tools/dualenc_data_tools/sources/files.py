"""A folder of pictures or sounds: texts beside them, or the names of folders or files as classes and fields."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from dualenc.errors import ConfigError, DataError, did_you_mean
from dualenc_data_tools.sources.named import NamedFields
from dualenc_data_tools.sources.source import (
    AUDIO_ENDINGS,
    IMAGE_ENDINGS,
    Dropped,
    Record,
    SourceConfig,
    SourceKind,
    as_captions,
    fill,
    jsonable,
    need_folder,
    shuffled,
    sources,
    template_fields,
)

KINDS = dict.fromkeys(IMAGE_ENDINGS, "image") | dict.fromkeys(AUDIO_ENDINGS, "audio")


class FolderConfig(SourceConfig, NamedFields):
    """``path=FOLDER``: NAME.jpg or .wav with NAME.txt or .json beside it, CLASS/NAME.wav, or names with fields."""

    path: str = Field(description="the folder; folders below it are read too")
    layout: Literal["auto", "sidecar", "classes", "names"] = Field(
        "auto",
        description="sidecar: texts beside the files; classes: the folder is the class; names: fields in the files' "
        "names, as pattern says; auto: names where there is a pattern, else what is there",
    )
    captions: Literal["file", "lines"] = Field("file", description="a .txt is one caption, or one caption a line")
    caption: str = Field("captions", description="key of the text in a .json; caption and text are tried too")
    template: str | list[str] = Field(
        "{class}", description="classes and names: the text or texts, such as 'the sound of {class}'"
    )


def folder(cfg: FolderConfig) -> Iterator[Record | Dropped]:
    """Records of the pictures and sounds below a folder, in order of their paths.

    Raises:
        DataError: no folder, or neither pictures nor sounds in it.
        ConfigError: texts and classes cannot be told apart.
    """
    root = need_folder(cfg.path, "folder.path")
    files = sorted(p for p in root.rglob("*") if p.suffix[1:].lower() in KINDS and p.is_file())
    if not files:
        raise DataError(f"folder.path: {root} holds neither pictures nor sounds ({', '.join(KINDS)})")
    layout = "names" if cfg.layout == "auto" and cfg.pattern is not None else cfg.layout
    if layout == "auto":
        if any(_sidecar(p) for p in files):
            layout = "sidecar"
        elif all(p.parent != root for p in files):
            layout = "classes"
        else:
            raise ConfigError(
                f"folder.layout: {root} has neither .txt or .json beside its files, nor a folder for each class; "
                "where the names say it, give pattern='{class}_{number}'"
            )
    samples = shuffled(_together(files), cfg.shuffle_seed)
    if layout == "sidecar":
        made: Iterator[Record | Dropped | None] = (_with_text(cfg, root, files) for files in samples)
    else:
        made = _named(cfg, root, samples, layout)
    return (r for r in made if r is not None)


def _together(files: list[Path]) -> list[dict[str, Path]]:
    """Kind → file of each sample: a picture and a sound of one name are one sample, two pictures are two."""
    beside: dict[Path, list[Path]] = {}
    for p in files:
        beside.setdefault(p.with_suffix(""), []).append(p)
    out: list[dict[str, Path]] = []
    for same in beside.values():
        kinds = {KINDS[p.suffix[1:].lower()]: p for p in same}
        out += [kinds] if len(kinds) == len(same) else [{KINDS[p.suffix[1:].lower()]: p} for p in same]
    return out


def _sidecar(picture: Path) -> Path | None:
    for ending in (".json", ".txt"):
        beside = picture.with_suffix(ending)
        if beside.is_file():
            return beside
    return None


def _with_text(cfg: FolderConfig, root: Path, files: dict[str, Path]) -> Record | Dropped | None:
    picture = next(iter(files.values()))
    name = picture.relative_to(root).as_posix()
    beside = _sidecar(picture)
    if beside is None:
        return Dropped(name, "no caption", f"neither {picture.stem}.json nor {picture.stem}.txt is beside it")
    fields: dict[str, Any] = {}
    many = False
    try:
        text = beside.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        return Dropped(name, "broken caption", f"{beside.name} is not UTF-8 ({e.reason})")
    if beside.suffix == ".txt":
        many = cfg.captions == "lines"
        captions = as_captions(text.splitlines() if many else text)
    else:
        try:
            row = json.loads(text)
        except json.JSONDecodeError as e:
            return Dropped(name, "broken caption", f"{beside.name} is not JSON ({e.msg})")
        if not isinstance(row, dict):
            return Dropped(name, "broken caption", f"{beside.name} holds {type(row).__name__}, not an object")
        key = next((k for k in (cfg.caption, "captions", "caption", "text") if k in row), None)
        captions = as_captions(row.get(key)) if key else ()
        many = key is not None and isinstance(row[key], list)
        fields = {k: v for k, v in row.items() if k != key and jsonable(v)}
    if not captions:
        return Dropped(name, "empty caption", beside.name)
    fields = {**fields, **(cfg.fields_of(name) or {})}
    if not cfg.wants(fields):
        return None
    return Record(name, dict(files), tuple(map(cfg.as_words, captions)), fields, many=many)


def _named(
    cfg: FolderConfig, root: Path, samples: list[dict[str, Path]], layout: str
) -> Iterator[Record | Dropped | None]:
    """Texts made of the folder's name (class; its number goes into .cls) or of the fields in the file's name."""
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
            raise ConfigError(f"folder.template: {template!r} must hold a field in braces, such as {{{known[0]}}}")
    for setting, named in (("where", cfg.where), ("unless", cfg.unless), ("words", cfg.words)):
        for field in named:
            if field not in known:
                raise ConfigError(f"folder.{setting}: there is no field {field!r}. {did_you_mean(field, known)}")
    firsts = [next(iter(files.values())) for files in samples]
    number = {c: i for i, c in enumerate(sorted({p.parent.relative_to(root).as_posix() for p in firsts}))}
    for files, first in zip(samples, firsts, strict=True):
        name, label = first.relative_to(root).as_posix(), first.parent.relative_to(root).as_posix()
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
            yield Record(name, dict(files), texts, kept, members, many=len(templates) > 1)


sources.register("folder")(
    SourceKind(
        FolderConfig,
        folder,
        "pictures or sounds with .txt or .json beside them, a folder for each class, or fields in their names",
    )
)
