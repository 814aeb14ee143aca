"""What every source has in common: the record it yields, the settings it takes, how keys and captions are made."""

from __future__ import annotations

import hashlib
import json
import random
import re
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, Protocol, TypeVar, runtime_checkable

from pydantic import Field

from dualenc.config import Positive, Section
from dualenc.data.sources import sources as layouts
from dualenc.errors import ConfigError
from dualenc.plugins import is_reference
from dualenc.registry import Registry

MAX_KEY = 80

C = TypeVar("C", bound="SourceConfig")
T = TypeVar("T")


@runtime_checkable
class OfOneSplit(Protocol):
    """Settings that may choose one split of a data set."""

    split: str | None


class StepConfig(Section):
    """One step of a build: a filter, and which samples go on."""

    filter: str = Field(description="a filter; dualenc list filters shows all and their settings")
    set: dict[str, Any] = Field(default_factory=dict, description="settings of the filter")
    keep: str | None = Field(
        None,
        description="keep samples for which this holds: 'shorter >= 64 and aspect < 3'; default: those it calls ok",
    )
    each: Literal["sample", "caption"] = Field(
        "sample", description="caption: judge each caption alone and leave out only those that fail"
    )
    note: bool = Field(False, description="store the scores among the fields of the .json member, as for language")


class SourceConfig(Section):
    """Settings that every source takes."""

    name: str = Field("train", description="first part of the shards' names if the source names no split")
    size: Positive | None = Field(None, description="longest side in px; larger images are downscaled; default: as is")
    encode: Literal["keep", "jpeg", "webp", "png"] = Field(
        "keep", description="write images in this format; keep: the original bytes"
    )
    quality: Annotated[int, Field(ge=1, le=100)] = Field(
        90, description="quality of JPEG and WebP when an image is re-encoded"
    )
    rate: Positive | None = Field(
        None,
        description="resample audio to this many Hz, as mono FLAC unless encode_audio says otherwise; default: as is",
    )
    seconds: Annotated[float, Field(gt=0)] | None = Field(
        None, description="keep only the first so many seconds of audio clips"
    )
    encode_audio: Literal["keep", "flac", "wav", "ogg", "opus"] = Field(
        "keep", description="write audio in this format, as mono (opus: at 48 kHz); keep: the original bytes"
    )
    verify: bool = Field(True, description="decode every image and audio clip once and drop broken ones")
    text: Literal["auto", "txt", "json", "both"] = Field(
        "auto",
        description="txt: KEY.txt, one caption; json: KEY.json with 'captions' and all other fields; both: the first "
        "caption as .txt too, for open_clip and others that read only that",
    )
    shuffle_seed: int | None = Field(None, description="shuffle the samples; default: the source's own order")
    limit: Positive | None = Field(None, description="stop after this many records")
    shard_samples: Positive = Field(1000, description="most samples per shard")
    shard_mb: Annotated[float, Field(gt=0)] = Field(500.0, description="most megabytes (10^6 bytes) per shard")
    val_every: int | None = Field(
        None, ge=2, description="put every n-th sample (the first, …) into shards named val- instead, to evaluate on"
    )
    overwrite: bool = Field(False, description="replace shards of the same name")
    max_dropped_share: Annotated[float, Field(ge=0, le=1)] = Field(
        0.05,
        description="fail if more than this share of the records is broken; what steps and distinct leave out is not",
    )
    steps: list[StepConfig] = Field(
        default_factory=list, description="filters each sample passes before it is stored: '[{filter: caption_rules}]'"
    )
    distinct: Literal["image", "audio", "text"] | None = Field(
        None, description="leave out samples whose image (audio, text) equals an earlier one's once decoded"
    )
    origin: str | None = Field(None, description="written as 'source' into every .json member: where the data is from")
    threads: Positive = Field(4, description="threads that read and check media, where there is one process")
    processes: Positive = Field(
        1,
        description="processes that read, filter, check and re-encode (--engine ray: its actors); shards are the same",
    )


@dataclass(slots=True)
class Record:
    """One sample before it is packed.

    Attributes:
        name: its origin, for keys and reports ("images/17.jpg", "row 12").
        media: "image", "audio" or an ending → the bytes, or the file that holds them. Images and audio are checked
            and may be re-encoded.
        captions: the texts, in order; empty for a sample without text.
        fields: further entries of the .json member.
        members: ending → bytes that are packed as they are ("cls").
        split: first part of the shards' names; "" for the config's ``name``.
        many: the source has lists of captions, so the .json layout is used whatever their number in this record.
        exact_key: use ``name`` as the key, unchanged.
    """

    name: str
    media: dict[str, bytes | Path]
    captions: tuple[str, ...] = ()
    fields: dict[str, Any] = field(default_factory=dict)
    members: dict[str, bytes] = field(default_factory=dict)
    split: str = ""
    many: bool = False
    exact_key: bool = False


@dataclass(frozen=True, slots=True)
class Dropped:
    """A record that is not packed: its name, why ("broken image"), and the details. ``asked``: a step or ``distinct``
    left it out, which is no fault."""

    name: str
    reason: str
    detail: str = ""
    asked: bool = False


class BadMedia(Exception):
    """An image or audio clip cannot be packed: ``reason`` is counted, ``detail`` goes into the report."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class SourceKind(Generic[C]):
    """A registered source: its settings, its records, and what it adds to the output folder at the end (if anything).

    ``finish(config, out)`` runs after the shards are written and returns lines for the report.
    """

    config: type[C]
    records: Callable[[C], Iterator[Record | Dropped]]
    about: str
    finish: Callable[[C, Path], list[str]] | None = None


class Packings(Registry[SourceKind[Any]]):
    """What can be packed: the sources that say how, and every other one that can be read at all."""

    def __getitem__(self, name: str) -> SourceKind[Any]:
        from dualenc_data_tools.sources.from_items import item_kind
        from dualenc_data_tools.sources.from_tables import table_kind

        if self._says_how(name) or name not in layouts:
            return super().__getitem__(name)
        return table_kind(name) if layouts[name].table else item_kind(name)

    def __contains__(self, name: object) -> bool:
        return self._says_how(name) or name in layouts

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*super().__iter__(), *layouts}))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def source(self, name: str) -> str:
        """Where ``name`` comes from, as its layout says."""
        return layouts.source(name) if not self._says_how(name) else super().source(name)

    def _says_how(self, name: object) -> bool:
        """Whether it was registered here; ``pkg.mod:Name`` names a layout."""
        return isinstance(name, str) and not is_reference(name) and super().__contains__(name)


sources = Packings("source")


# --- keys --------------------------------------------------------------------------------------------------------


class Keys:
    """Makes unique keys that are safe as member names.

    A key has only ASCII letters, digits, ``_`` and ``-``: no dot (a key ends at the first dot), no slash (a member
    name never becomes a path). A shortened key gets a hash, a repeated one a number.
    """

    def __init__(self) -> None:
        self._seen: dict[str, int] = {}

    def make(self, name: str) -> str:
        """The key of a record's name; the same names in the same order give the same keys."""
        stem = re.sub(r"\.[A-Za-z0-9]{1,5}$", "", name)
        key = re.sub(r"[^A-Za-z0-9_\-]+", "_", stem).strip("_") or "sample"
        if len(key) > MAX_KEY:
            key = f"{key[: MAX_KEY - 11]}_{hashlib.sha256(name.encode()).hexdigest()[:10]}"
        number = self._seen.get(key, 0)
        self._seen[key] = number + 1
        if number:
            return self.make(f"{key}-{number}")
        return key


# --- captions ----------------------------------------------------------------------------------------------------


def template_fields(template: str, where: str) -> list[str]:
    """The names a caption template uses.

    Raises:
        ConfigError: for anything but plain ``{name}`` fields: data may not use attributes and formats.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as e:
        raise ConfigError(
            f"{where}: {template!r} is not a valid template ({e}); write for example '{{caption}}, {{colour}}'"
        ) from e
    names = []
    for _, name, spec, conversion in parts:
        if name is None:
            continue
        if not re.fullmatch(r"[^\W\d][\w\- ]*", name) or spec or conversion:
            raise ConfigError(
                f"{where}: {{{name}}} must be the plain name of a field, for example '{{caption}}, {{colour}}'"
            )
        names.append(name)
    return names


def fill(template: str, row: Mapping[str, Any]) -> str:
    """Fill ``{name}`` from ``row`` (missing or null: nothing); collapse spaces and remove dangling commas."""
    out = ""
    for literal, name, _, _ in string.Formatter().parse(template):
        value = row.get(name) if name is not None else None
        out += literal + ("" if value is None else str(value))
    out = re.sub(r"\s+", " ", out)
    out = re.sub(r"\s*,(?:\s*,)+", ",", out)
    return out.strip(" ,")


def as_captions(value: Any) -> tuple[str, ...]:
    """A string or a list of strings as captions, spaces stripped, empty ones left out."""
    items = (
        [value]
        if isinstance(value, str)
        else value
        if isinstance(value, Sequence)
        else []
        if value is None
        else [value]
    )
    texts = (" ".join(str(v).split()) for v in items if v is not None)
    return tuple(t for t in texts if t)


def jsonable(value: Any) -> bool:
    """Whether a value can be stored in a .json member as it is."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def shuffled(items: Iterable[T], seed: int | None) -> list[T]:
    """A list of ``items``, shuffled when a seed is given (Python's Mersenne Twister: the same everywhere)."""
    out = list(items)
    if seed is not None:
        random.Random(seed).shuffle(out)
    return out
