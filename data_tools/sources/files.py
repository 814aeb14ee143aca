"""A folder of pictures: texts beside them, or the folders' names as classes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from data_tools.sources.base import (
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
from dualenc.errors import ConfigError, DataError


class FolderConfig(SourceConfig):
    """``path=FOLDER``: NAME.jpg with NAME.txt or NAME.json beside it, or CLASS/NAME.jpg."""

    path: str = Field(description="the folder; folders below it are read too")
    layout: Literal["auto", "sidecar", "classes"] = Field(
        "auto", description="sidecar: texts beside the pictures; classes: the folder is the class; auto: what is there"
    )
    captions: Literal["file", "lines"] = Field("file", description="a .txt is one caption, or one caption a line")
    caption: str = Field("captions", description="key of the text in a .json; caption and text are tried too")
    template: str = Field("{class}", description="classes: the text of a picture, such as 'a photo of a {class}'")


def folder(cfg: FolderConfig) -> Iterator[Record | Dropped]:
    """Records of the pictures below a folder, in order of their paths.

    Raises:
        DataError: no folder, or no picture in it.
        ConfigError: texts and classes cannot be told apart.
    """
    root = need_folder(cfg.path, "folder.path")
    pictures = sorted(p for p in root.rglob("*") if p.suffix[1:].lower() in IMAGE_ENDINGS and p.is_file())
    if not pictures:
        raise DataError(f"folder.path: {root} holds no pictures ({', '.join(IMAGE_ENDINGS)})")
    layout = cfg.layout
    if layout == "auto":
        if any(_sidecar(p) for p in pictures):
            layout = "sidecar"
        elif all(p.parent != root for p in pictures):
            layout = "classes"
        else:
            raise ConfigError(
                f"folder.layout: {root} has neither .txt or .json beside its pictures, nor a folder for each class"
            )
    pictures = shuffled(pictures, cfg.shuffle_seed)
    if layout == "classes":
        return _classes(cfg, root, pictures)
    return (_with_text(cfg, root, p) for p in pictures)


def _sidecar(picture: Path) -> Path | None:
    for ending in (".json", ".txt"):
        beside = picture.with_suffix(ending)
        if beside.is_file():
            return beside
    return None


def _with_text(cfg: FolderConfig, root: Path, picture: Path) -> Record | Dropped:
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
    return Record(name, {"image": picture}, captions, fields, many=many)


def _classes(cfg: FolderConfig, root: Path, pictures: list[Path]) -> Iterator[Record | Dropped]:
    names = template_fields(cfg.template, "folder.template")
    if names != ["class"]:
        raise ConfigError(f"folder.template: {cfg.template!r} must hold {{class}} once, and nothing else in braces")
    classes = sorted({p.parent.relative_to(root).as_posix() for p in pictures})
    number = {c: i for i, c in enumerate(classes)}
    for p in pictures:
        label = p.parent.relative_to(root).as_posix()
        text = fill(cfg.template, {"class": label.replace("_", " ").replace("/", " ")})
        yield Record(
            p.relative_to(root).as_posix(), {"image": p}, (text,), members={"cls": str(number[label]).encode()}
        )


sources.register("folder")(
    SourceKind(FolderConfig, folder, "pictures with .txt or .json beside them, or a folder for each class")
)
