"""A look at some samples of shards: how many there are, image sizes, lengths of captions and clips. What ``dualenc
init`` knows of a data set."""

from __future__ import annotations

import random
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from dualenc.config import Source
from dualenc.data.modalities import DecodeError, modalities
from dualenc.data.modalities.picture import Picture
from dualenc.data.shards.index import ShardSet, expand, open_source
from dualenc.data.shards.reader import Found, Reader, SampleError
from dualenc.data.shards.remote import ShardCache, is_local, local_path
from dualenc.errors import DataError
from dualenc_data_tools.sounds import BadSound, open_sound

LOOKED_AT = 512
"""Samples, spread over all shards."""
HELD_OUT = ("val", "valid", "validation", "test", "dev", "eval")
_NAME = re.compile(r"(.+)-\d+\.tar$")
_CAMERAS = "json:cameras+cam*"
_SWEEP = ("json:lidar+lidar.npy", "json:lidar+lidar.bin")


@dataclass
class Survey:
    """What was seen.

    Attributes:
        total: samples in all shards.
        looked: samples that were looked at.
        members: modality → the ending it was found under, by how often.
        shorter: shorter sides of the images, in px.
        captions: the texts that were seen.
        several: whether a sample has several captions.
        seconds, rates: of the audio clips.
    """

    total: int = 0
    looked: int = 0
    members: dict[str, Counter[str]] = field(default_factory=dict)
    shorter: list[int] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    several: bool = False
    seconds: list[float] = field(default_factory=list)
    rates: Counter[int] = field(default_factory=Counter)

    def endings(self, modality: str) -> list[str]:
        """Endings of a modality, the most frequent first."""
        return [e for e, _ in self.members[modality].most_common()]

    def share(self, modality: str) -> float:
        """Share of the samples that have it."""
        return sum(self.members.get(modality, Counter()).values()) / max(self.looked, 1)

    @property
    def repeated(self) -> float:
        """Share of the captions that another sample has, too."""
        counts = Counter(c.strip().lower() for c in self.captions)
        return sum(n for n in counts.values() if n > 1) / max(len(self.captions), 1)


@dataclass(frozen=True)
class Splits:
    """Shards to train on and to evaluate on; the latter may be none."""

    train: list[str]
    held_out: list[str]


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` of the values are."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def splits_of(shards: str) -> Splits:
    """A folder or pattern → its shards by split, told apart by their names (``train-000000.tar``, ``val-000000.tar``).

    Beside a pattern that names training shards, the folder's held-out ones are found.

    Raises:
        DataError: there are no shards.
    """
    folder = Path(local_path(shards)) if is_local(shards) else None
    if folder is None or not folder.is_dir():
        named = expand(shards)
        parents = {str(Path(local_path(u)).parent) for u in named if is_local(u)}
        beside = [p for d in sorted(parents) for p in sorted(Path(d).glob("*.tar")) if _split(p.name) in HELD_OUT]
        return Splits(named, [str(p) for p in beside if str(p) not in named])
    found = sorted(str(p) for p in folder.glob("*.tar"))
    if not found:
        raise DataError(
            f"{shards} has no .tar files; pack a data set into shards: dualenc shards build SOURCE --out DIR"
        )
    held_out = [p for p in found if _split(Path(p).name) in HELD_OUT]
    train = [p for p in found if p not in held_out]
    named_train = [p for p in train if _split(Path(p).name) == "train"]
    return Splits(named_train or train or found, held_out if train else [])


def _split(name: str) -> str:
    found = _NAME.match(name)
    return found[1].split("-")[0].lower() if found else ""


def survey(urls: Sequence[str], looked_at: int = LOOKED_AT) -> Survey:
    """Look at ``looked_at`` samples of these shards, drawn with seed 0.

    Raises:
        DataError: the shards are missing, remote without an index, or have no two modalities together.
    """
    opened = open_source(Source(name="init", shards=list(urls)))
    out = Survey(total=opened.total)
    cache = None if all(is_local(u) for u in opened.urls) else ShardCache.temporary(50.0, 3)
    reader = Reader([opened], cache, 3)
    try:
        for found in _samples(reader, opened, looked_at):
            _note(found, out)
    finally:
        reader.close()
        if cache is not None:
            cache.remove()
    if not out.looked:
        raise DataError(f"none of the {out.total:,} samples could be read; see dualenc shards check")
    return out


def _samples(reader: Reader, opened: ShardSet, looked_at: int) -> Iterator[Found]:
    cameras = (_CAMERAS, *(f"cam.{e}" for e in modalities["image"].default_members))
    sensors = {"camera": cameras, "lidar": (*_SWEEP, *modalities["lidar"].default_members)}
    wanted: dict[str, Sequence[str]] = {
        **{m: modalities[m].default_members for m in ("image", "audio", "text")},
        **sensors,
    }
    counts = opened.counts
    ends = list(accumulate(counts))  # samples are numbered, not listed: there may be billions
    total = ends[-1] if ends else 0
    for number in sorted(random.Random(0).sample(range(total), min(looked_at, total))):
        shard = bisect_right(ends, number)
        place = number - (ends[shard] - counts[shard])
        try:
            yield reader.find(0, shard, reader.locate(0, shard, place), wanted)
        except SampleError:
            continue  # training counts it; dualenc shards check names it


def _note(found: Found, out: Survey) -> None:
    out.looked += 1
    for modality, ending in found.members.items():
        out.members.setdefault(modality, Counter())[ending] += 1
    if "image" in found.values:
        _note_image(found.values["image"], out)
    if "audio" in found.values:
        try:
            sound = open_sound(found.values["audio"])
        except BadSound:
            return
        out.seconds.append(sound.seconds)
        out.rates[sound.rate] += 1
    if "text" in found.values:
        text = found.values["text"]
        texts = text if isinstance(text, list) else [text]
        out.several = out.several or len(texts) > 1
        out.captions += [t.decode("utf-8", "replace") if isinstance(t, bytes) else str(t) for t in texts]


def _note_image(raw: Any, out: Survey) -> None:
    try:
        out.shorter.append(min(Picture(raw, (255, 255, 255)).size))
    except DecodeError:
        return
