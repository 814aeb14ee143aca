"""One HTML page that shows samples as images, audio and calibrated sensors with their captions; it needs no other
file."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dualenc.config import Source
from dualenc.data.driving.places import MEMBER
from dualenc.data.modalities import DecodeError, modalities
from dualenc.data.modalities.modality import of_one_item
from dualenc.data.shards.index import ShardSet, expand, open_source
from dualenc.data.shards.reader import Reader, SampleError
from dualenc.data.shards.remote import ShardCache, is_local
from dualenc.data.shards.tar import Sample
from dualenc.data.show import Previews, preview, thumbnail_uri
from dualenc.errors import DataError
from dualenc.pages import environment, write_page
from dualenc_data_tools.choose.expression import evaluate
from dualenc_data_tools.overlay import overlay_uri, side_by_side
from dualenc_data_tools.wanted import AUDIO, IMAGE

THUMBNAIL_PX = 256
MAX_SOUND = 2_000_000
"""Largest audio file embedded in the page, in bytes."""
_SENSORS = {m: modalities[m].default_members[:1] for m in ("lidar", "camera")} | {
    "boxes": ["json:boxes"],
    "regions": [MEMBER],
}
_SWEEPS = ("json:lidar+lidar.npy", "json:lidar+lidar.bin")
_POINTS = ("lidar.npy", "npy", "bin", "pcd", "npz")
MOST_IMAGES = 6
_MIME = {"flac": "audio/flac", "wav": "audio/wav", "ogg": "audio/ogg", "opus": "audio/ogg", "mp3": "audio/mpeg"}
TEMPLATES = Path(__file__).parent / "templates"


@dataclass(slots=True)
class Card:
    """What one card of the page shows."""

    key: str
    picture: str
    size: str
    small: bool
    captions: list[str]
    fields: dict[str, str]
    members: list[str]
    problem: str = ""
    sound: str = ""
    wide: bool = False


def view(shards: str | Sequence[str], out_html: str | Path, n: int = 48, seed: int = 0, select: str = "") -> Path:
    """Write a page with ``n`` samples drawn by ``seed`` (all of them if there are fewer), in stored order.

    Args:
        select: an expression (:mod:`dualenc_data_tools.choose.expression`); only samples it selects are shown.

    Everything read from the shards is escaped; images are re-encoded thumbnails. Broken samples are shown as such.

    Raises:
        ConfigError: ``select`` cannot be read.
        DataError: no such shard; a remote shard without an index; nothing is selected.
    """
    opened = open_source(Source(name="view", shards=list(expand(shards)), index=None))
    total = opened.total
    if n < 1:
        raise DataError(f"n is {n}: show at least one sample")
    among = np.flatnonzero(evaluate(select, opened)).tolist() if select else range(total)
    if not among:
        raise DataError(f"--select {select!r} selects none of {total:,} samples")
    picked = sorted(random.Random(seed).sample(among, min(n, len(among))))
    cache = None if all(is_local(u) for u in opened.urls) else ShardCache.temporary(50.0, 3)
    reader = Reader([opened], cache, 3)
    try:
        cards = [show(reader, opened, *_place(opened.counts, i)) for i in picked]
    finally:
        reader.close()
        if cache is not None:
            cache.remove()
    title = opened.names[0] if len(opened.names) == 1 else f"{opened.names[0]} … {opened.names[-1]}"
    plural = "s" if len(opened.names) > 1 else ""
    whole = f"{len(among):,} samples with {select}, of {total:,}" if select else f"{total:,} samples"
    about = f"{len(cards):,} of {whole} in {len(opened.names):,} shard{plural}, drawn with seed {seed}"
    page = environment(TEMPLATES).get_template("view.html.j2").render(title=title, about=about, cards=cards)
    return write_page(Path(out_html), page)


def _place(counts: Sequence[int], i: int) -> tuple[int, int]:
    """The shard of sample ``i`` of all, and its place in that shard."""
    for shard, count in enumerate(counts):
        if i < count:
            return shard, i
        i -= count
    raise IndexError(i)


def show(reader: Reader, opened: ShardSet, shard: int, place: int) -> Card:
    """The card of one sample; what cannot be read or decoded is told on it."""
    name = opened.names[shard]
    card = Card(f"{name}/#{place}", "", "", False, [], {}, [])
    try:
        sample = reader.locate(0, shard, place)
        card.key = f"{name.removesuffix('.tar')}/{sample.key}"
        card.members = [f".{e} {_bytes(size)}" for e, (_, size) in sample.members.items()]
        wanted = {"image": IMAGE, "audio": AUDIO, "txt": ["txt"], "json": ["json"], **_SENSORS}
        found = reader.find(0, shard, sample, wanted)
    except SampleError as e:
        card.problem = str(e)
        return card
    raw = found.values.get("image")
    if raw is not None:
        try:
            card.picture = thumbnail_uri(raw, THUMBNAIL_PX)
            width, height = _size(raw)
            card.size, card.small = f"{width}×{height}", max(width, height) <= 128
        except DecodeError as e:
            card.problem = str(e)
    if isinstance(found.values.get("lidar"), dict) and isinstance(found.values.get("camera"), dict):
        _overlay(card, found.values)
    if not card.picture:
        _parts(card, reader, shard, sample)
    if not card.picture and not {"image", "audio", "lidar", "camera"} & found.values.keys():
        _preview(card, reader, shard, sample)
    sound = found.values.get("audio")
    if sound is not None and len(sound) <= MAX_SOUND:
        mime = _MIME[found.members["audio"]]
        card.sound = f"data:{mime};base64,{base64.b64encode(sound).decode()}"
    try:
        if "txt" in found.values:
            card.captions = [found.values["txt"].decode("utf-8")]
        doc = json.loads(found.values["json"]) if "json" in found.values else {}
    except ValueError as e:
        card.problem = card.problem or f"text: {e}"
        return card
    if isinstance(doc, dict):
        key = next((k for k in ("captions", "caption", "text") if k in doc), None)
        if key is not None and not card.captions:
            card.captions = [str(v) for v in doc[key]] if isinstance(doc[key], list) else [str(doc[key])]
        card.fields |= {k: _short(v) for k, v in doc.items() if k != key and v not in ("", None)}
    return card


def _parts(card: Card, reader: Reader, shard: int, sample: Sample) -> None:
    """Images under names of their own (``cam.jpg``, ``left.png``) side by side, and points from above."""
    images = [e for e in sample.members if e.rpartition(".")[2] in IMAGE and "." in e][:MOST_IMAGES]
    wanted: dict[str, list[str]] = {e: [e] for e in images} | {"lidar": [*_SWEEPS, *_POINTS]}
    try:
        found = reader.find(0, shard, sample, wanted)
        tiles = [found.values[e] for e in images]
        if "lidar" in found.values or tiles:
            card.picture, card.size = side_by_side(tiles, found.values.get("lidar"))
            card.wide = len(tiles) > 2
    except (SampleError, DecodeError, DataError) as e:
        card.problem = card.problem or str(e)


def _preview(card: Card, reader: Reader, shard: int, sample: Sample) -> None:
    """What a modality of a plugin says of its own items."""
    foreign = {n: modalities[n] for n in modalities if modalities.source(n) != "dualenc"}
    wanted = {n: cls.default_members for n, cls in foreign.items() if isinstance(cls, Previews)}
    try:
        for name, raw in reader.find(0, shard, sample, wanted).values.items():
            with of_one_item():
                shown = preview(raw, name)
            card.picture, card.sound = shown.get("picture", card.picture), shown.get("sound", card.sound)
            if "text" in shown:
                card.fields[name] = shown["text"]
    except (SampleError, DecodeError) as e:
        card.problem = str(e)


def _overlay(card: Card, values: dict[str, Any]) -> None:
    """The calibrated images with the points over them."""
    try:
        card.picture, card.size = overlay_uri(
            values["lidar"], values["camera"], values.get("boxes"), values.get("regions")
        )
        card.wide = True
    except DataError as e:
        card.problem = str(e)


def _short(value: Any) -> str:
    """A field as text of at most 80 characters; for longer values (calibrations, boxes) only their size."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if isinstance(value, dict | list) and len(json.dumps(value)) > 80:
        text = f"{len(value)} {'keys' if isinstance(value, dict) else 'items'}"
    return text[:80]


def _size(raw: bytes) -> tuple[int, int]:
    from dualenc.data.modalities.picture import Picture

    return Picture(raw, (255, 255, 255)).size


def _bytes(n: int) -> str:
    return f"{n} B" if n < 1000 else f"{n / 1000:.1f} kB" if n < 1e6 else f"{n / 1e6:.1f} MB"
