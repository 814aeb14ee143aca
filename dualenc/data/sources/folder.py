"""A folder of files with texts beside them (NAME.jpg and NAME.txt or NAME.json), or with one folder per class."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from dualenc.config import Section
from dualenc.data.sources.item import Content, Item, Layout, sources
from dualenc.data.sources.opened import NotThereError, need_folder
from dualenc.errors import ConfigError, DataError

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
AUDIO_ENDINGS = ("flac", "wav", "ogg", "oga", "opus", "mp3", "aif", "aiff", "au", "caf")
ENDINGS: dict[str, tuple[str, ...]] = {
    "image": IMAGE_ENDINGS,
    "audio": AUDIO_ENDINGS,
    "camera": IMAGE_ENDINGS,
    "lidar": ("npy", "npz", "bin", "pcd"),
}
TEXT_KEYS = ("captions", "caption", "text")


class FolderSettings(Section):
    """``path=FOLDER``; subfolders are read too, hidden files and folders are not."""

    path: str = Field(description="the folder; subfolders are read too")
    split: str | None = Field(None, description="the subfolder with this split")
    layout: Literal["auto", "sidecar", "classes", "names"] = Field(
        "auto",
        description="sidecar: texts beside the files; classes: the folder is the class; names: fields in the file "
        "names, as pattern says; auto: detect it",
    )
    captions: Literal["file", "lines"] = Field("file", description="a .txt is one caption, or one caption per line")
    caption: str = Field("captions", description="key of the text in a .json; caption and text are tried too")
    members: dict[str, list[str]] = Field(
        default_factory=lambda: {"image": list(IMAGE_ENDINGS), "audio": list(AUDIO_ENDINGS)},
        description="modality → endings of its files; an empty list: every file",
    )


@dataclass(frozen=True, slots=True)
class Beside:
    """Files of one name: an image and an audio file are one sample, two images are two."""

    root: Path
    files: Mapping[str, Path]

    @property
    def first(self) -> Path:
        """The file that the sample is named after."""
        return next(iter(self.files.values()))

    @property
    def name(self) -> str:
        """Its path below the root."""
        return self.first.relative_to(self.root).as_posix()

    @property
    def label(self) -> str | None:
        """Its folder below the root; None: it is in the root itself."""
        return None if self.first.parent == self.root else self.first.parent.relative_to(self.root).as_posix()


def root_of(cfg: FolderSettings) -> Path:
    """The folder that is read. Raises NotThereError when it does not exist."""
    base = Path(cfg.path).expanduser()
    return need_folder(base / cfg.split if cfg.split else base, "folder.path")


def walk(cfg: FolderSettings) -> list[Beside]:
    """Every sample, in the order of the paths.

    Raises:
        DataError: no folder, or nothing of these modalities in it.
    """
    root = root_of(cfg)
    kinds = {m: tuple(f".{e.lower()}" for e in endings) for m, endings in _media_of(cfg).items()}
    samples: dict[str, list[tuple[str, Path]]] = {}
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        inside = path.relative_to(root)
        if any(part.startswith(".") for part in inside.parts):
            continue
        for modality, endings in kinds.items():
            ending = next((e for e in endings if path.name.lower().endswith(e)), None if endings else "")
            if ending is not None:
                whole = inside.as_posix()
                samples.setdefault(whole[: len(whole) - len(ending)], []).append((modality, path))
                break
    out: list[Beside] = []
    for same in samples.values():
        files = dict(same)
        parts = [files] if len(files) == len(same) else [{m: p} for m, p in same]
        out += [Beside(root, part) for part in parts]
    if not out:
        raise NotThereError(f"folder.path: {root} has no files of {_wanted(cfg)}, nor have the folders in it")
    return out


def _wanted(cfg: FolderSettings) -> str:
    return " or ".join(f"{m} ({', '.join(e) or 'any ending'})" for m, e in _media_of(cfg).items())


def _media_of(cfg: FolderSettings) -> dict[str, list[str]]:
    """Modality → endings of the files that make samples: the media, which texts stand beside; texts where only these
    are asked for."""
    return {m: endings for m, endings in cfg.members.items() if m != "text"} or cfg.members


def layout_of(cfg: FolderSettings, samples: list[Beside]) -> Literal["sidecar", "classes", "names"]:
    """The layout in the settings, or the one detected.

    Raises:
        ConfigError: there are neither texts nor class folders.
    """
    if cfg.layout != "auto":
        return cfg.layout
    if any(sidecar(p) for s in samples for p in s.files.values()):
        return "sidecar"
    if all(s.label is not None for s in samples):
        return "classes"
    raise ConfigError(
        f"folder.layout: {samples[0].root} has neither .txt or .json beside its files, nor a folder for each class; "
        "if the file names say it, set for example pattern='{class}_{number}'"
    )


def sidecar(file: Path) -> Path | None:
    """The .json or .txt beside a file."""
    return next((p for p in (file.with_suffix(".json"), file.with_suffix(".txt")) if p.is_file()), None)


def read(cfg: FolderSettings) -> Iterator[Item]:
    """Items with their class folder as ``label`` and the texts beside them."""
    samples = walk(cfg)
    layout = cfg.layout if cfg.layout != "auto" else "sidecar" if any(sidecar(s.first) for s in samples) else "classes"
    return (item_of(cfg, s, layout == "sidecar") for s in samples)


def item_of(cfg: FolderSettings, sample: Beside, with_text: bool) -> Item:
    """One sample; a problem with its text is the error of that content."""
    name, label = sample.name, sample.label
    contents = {
        m: [Content(name if p == sample.first else p.relative_to(sample.root).as_posix(), path=str(p))]
        for m, p in sample.files.items()
    }
    fields: dict[str, Any] = {} if label is None else {"class": label}
    if with_text:
        try:
            texts, more = _texts(cfg, sample.first)
            contents["text"] = [Content(f"{name}#{i}", text=t) for i, t in enumerate(texts)]
            fields = fields if more is None else more
        except DataError as e:
            contents["text"] = [Content(f"{name}#0", error=str(e))]
    return Item(name, contents, fields, label=label)


def text_key(cfg: FolderSettings, row: Mapping[str, Any]) -> str | None:
    """The key of a .json that holds the text."""
    return next((k for k in (cfg.caption, *TEXT_KEYS) if k in row), None)


def _texts(cfg: FolderSettings, file: Path) -> tuple[list[str], dict[str, Any] | None]:
    """The texts beside a file, and the fields of a .json (None: a .txt has none)."""
    beside = sidecar(file)
    if beside is None:
        raise DataError(f"no caption: neither {file.stem}.json nor {file.stem}.txt is beside it")
    try:
        text = beside.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise DataError(f"broken caption: {beside.name} is not UTF-8 ({e.reason})") from e
    except OSError as e:
        raise DataError(f"broken caption: {beside.name} cannot be read ({e.strerror})") from e
    fields: dict[str, Any] | None = None
    given: Any = text.splitlines() if cfg.captions == "lines" else [text]
    if beside.suffix == ".json":
        try:
            row = json.loads(text)
        except json.JSONDecodeError as e:
            raise DataError(f"broken caption: {beside.name} is not JSON ({e.msg})") from e
        except RecursionError as e:
            raise DataError(f"broken caption: {beside.name} is nested too deeply") from e
        if not isinstance(row, dict):
            raise DataError(f"broken caption: {beside.name} holds {type(row).__name__}, not an object")
        key = text_key(cfg, row)
        fields = dict(row)
        value = row.get(key) if key is not None else None
        given = value if isinstance(value, list) else [value]
    texts = [t for v in given if v is not None if (t := " ".join(str(v).split()))]
    if not texts:
        raise DataError(f"empty caption: {beside.name}")
    return texts, fields


def notes(cfg: FolderSettings) -> list[str]:
    """Class folders without files, and files outside all class folders."""
    samples = walk(cfg)
    root = samples[0].root
    full = {s.label.split("/")[0] for s in samples if s.label is not None}
    if not full:
        return []
    folders = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    out = [
        f"The class folder {name!r} is empty: the class remains among the candidates, as a wrong answer."
        for name in folders
        if name not in full
    ]
    loose = sum(s.label is None for s in samples)
    return out + ([f"{loose} files are outside the class folders of {root.name}."] if loose else [])


sources.register("folder")(
    Layout(
        FolderSettings,
        read,
        "images or audio with .txt or .json beside them, a folder for each class, or fields in their names",
        notes=notes,
    )
)
