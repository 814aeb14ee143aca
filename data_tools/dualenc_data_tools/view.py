"""One HTML page that shows samples as pictures, sounds and calibrated sensors with their captions; it needs no other
file."""

from __future__ import annotations

import base64
import html
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualenc.config import Source
from dualenc.data.driving.places import MEMBER
from dualenc.data.modalities import DecodeError, modalities
from dualenc.data.shards.index import ShardSet, expand, open_source
from dualenc.data.shards.reader import Reader, SampleError
from dualenc.data.shards.remote import ShardCache, is_local
from dualenc.data.show import thumbnail_uri
from dualenc.errors import DataError
from dualenc_data_tools.check import AUDIO, CAPTIONS, IMAGE
from dualenc_data_tools.overlay import overlay_uri

THUMBNAIL_PX = 256
MAX_SOUND = 2_000_000
"""Bytes of a sound that is put into the page."""
_SENSORS = {m: modalities[m].default_members[:1] for m in ("lidar", "camera")} | {
    "boxes": ["json:boxes"],
    "regions": [MEMBER],
}
_MIME = {"flac": "audio/flac", "wav": "audio/wav", "ogg": "audio/ogg", "opus": "audio/ogg", "mp3": "audio/mpeg"}

_STYLE = """
:root { --ground:#f6f7f9; --card:#fff; --ink:#1c2430; --soft:#667085; --line:#e4e7ec; --bad:#b42318 }
@media (prefers-color-scheme: dark) {
  :root { --ground:#12161c; --card:#1b212a; --ink:#e8ebf0; --soft:#98a2b3; --line:#2c3440; --bad:#f97066 }
}
* { box-sizing:border-box }
body { margin:0; background:var(--ground); color:var(--ink);
  font:15px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif }
header { padding:28px 32px 18px }
h1 { margin:0 0 4px; font-size:22px; letter-spacing:-.01em }
header p { margin:0; color:var(--soft) }
main { display:grid; gap:16px; padding:0 32px 40px; grid-template-columns:repeat(auto-fill,minmax(210px,1fr)) }
article { background:var(--card); border:1px solid var(--line); border-radius:12px; overflow:hidden;
  display:flex; flex-direction:column }
.pic { position:relative; aspect-ratio:1; display:grid; place-items:center; background:#fff;
  border-bottom:1px solid var(--line) }
.pic img { position:absolute; inset:10px; width:calc(100% - 20px); height:calc(100% - 20px); object-fit:contain }
.pic img.small { image-rendering:pixelated }
.wide { grid-column:1/-1 } .wide .pic { aspect-ratio:auto; display:block; background:#121212 }
.wide .pic img { position:static; width:100%; height:auto; display:block }
.none { color:#98a2b3 }
audio { width:100%; height:32px; margin-bottom:8px }
.bad { color:var(--bad); padding:0 8px; text-align:center; overflow-wrap:anywhere }
.text { padding:12px 14px; flex:1 }
.text p { margin:0 0 6px } .text p:last-child { margin:0 }
ol { margin:0; padding-left:20px } ol li { margin-bottom:4px } ol li::marker { color:var(--soft) }
dl { display:flex; flex-wrap:wrap; gap:4px; margin:10px 0 0 }
dl div { font-size:12px; background:var(--ground); border-radius:6px; padding:1px 7px; color:var(--soft);
  max-width:100%; overflow-wrap:anywhere }
footer { padding:8px 14px; border-top:1px solid var(--line); color:var(--soft);
  font:12px/1.5 ui-monospace,"DejaVu Sans Mono",monospace; overflow-wrap:anywhere }
footer span { white-space:nowrap }
"""


@dataclass(slots=True)
class Shown:
    """What one card of the page shows."""

    key: str
    picture: str
    size: str
    small: bool
    captions: list[str]
    fields: dict[str, Any]
    members: list[str]
    problem: str = ""
    sound: str = ""
    wide: bool = False


def view(shards: str | Sequence[str], out_html: str | Path, n: int = 48, seed: int = 0) -> Path:
    """Write a page with ``n`` samples drawn by ``seed`` (all of them if there are fewer), in the order they lie.

    Everything read from the shards is escaped; pictures are re-encoded thumbnails. Broken samples are shown as such.

    Raises:
        DataError: no such shard; a remote shard without an index.
    """
    opened = open_source(Source(name="view", shards=list(expand(shards)), index=None))
    total = sum(opened.counts)
    if n < 1:
        raise DataError(f"n is {n}: show at least one sample")
    picked = sorted(random.Random(seed).sample(range(total), min(n, total)))
    cache = None if all(is_local(u) for u in opened.urls) else ShardCache.temporary(50.0, 3)
    reader = Reader([opened], cache, 3)
    try:
        cards = [_show(reader, opened, *_place(opened.counts, i)) for i in picked]
    finally:
        reader.close()
        if cache is not None:
            cache.remove()
    title = opened.names[0] if len(opened.names) == 1 else f"{opened.names[0]} … {opened.names[-1]}"
    plural = "s" if len(opened.names) > 1 else ""
    about = f"{len(cards):,} of {total:,} samples in {len(opened.names):,} shard{plural}, drawn with seed {seed}"
    out = Path(out_html)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(_page(title, about, cards), encoding="utf-8")
    return out


def _place(counts: Sequence[int], i: int) -> tuple[int, int]:
    """The shard and the place in it of sample ``i`` of all."""
    for shard, count in enumerate(counts):
        if i < count:
            return shard, i
        i -= count
    raise IndexError(i)


def _show(reader: Reader, opened: ShardSet, shard: int, place: int) -> Shown:
    name = opened.names[shard]
    card = Shown(f"{name}/#{place}", "", "", False, [], {}, [])
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
        key = next((k for k in CAPTIONS if k in doc), None)
        if key is not None and not card.captions:
            card.captions = [str(v) for v in doc[key]] if isinstance(doc[key], list) else [str(doc[key])]
        card.fields = {k: _short(v) for k, v in doc.items() if k != key}
    return card


def _overlay(card: Shown, values: dict[str, Any]) -> None:
    """The calibrated pictures with the points over them."""
    try:
        card.picture, card.size = overlay_uri(
            values["lidar"], values["camera"], values.get("boxes"), values.get("regions")
        )
        card.wide = True
    except DataError as e:
        card.problem = str(e)


def _short(value: Any) -> Any:
    """Calibrations and boxes are drawn: of those only the number is told."""
    if isinstance(value, dict | list) and len(json.dumps(value)) > 80:
        return f"{len(value)} {'keys' if isinstance(value, dict) else 'items'}"
    return value


def _size(raw: bytes) -> tuple[int, int]:
    from dualenc.data.modalities.image import Picture

    return Picture(raw, (255, 255, 255)).size


def _bytes(n: int) -> str:
    return f"{n} B" if n < 1000 else f"{n / 1000:.1f} kB" if n < 1e6 else f"{n / 1e6:.1f} MB"


def _page(title: str, about: str, cards: list[Shown]) -> str:
    body = "\n".join(map(_card, cards))
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width,initial-scale=1'>"
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><header><h1>{html.escape(title)}</h1><p>{html.escape(about)}</p></header>\n<main>\n{body}\n</main></body></html>\n"
    )


def _card(card: Shown) -> str:
    if card.picture:
        small = " class='small'" if card.small else ""
        picture = f"<img{small} loading='lazy' alt='' src='{card.picture}'>"
    else:
        picture = (
            f"<span class='none'>{'sound' if card.sound else 'no picture'}</span>"
            if not card.problem
            else f"<span class='bad'>{html.escape(card.problem)}</span>"
        )
    if len(card.captions) > 1:
        text = "<ol>" + "".join(f"<li>{html.escape(c)}</li>" for c in card.captions) + "</ol>"
    else:
        text = (
            f"<p>{html.escape(card.captions[0])}</p>"
            if card.captions
            else ""
            if card.wide
            else "<p class='none'>no text</p>"
        )
    if card.sound:
        text = f"<audio controls preload='none' src='{card.sound}'></audio>{text}"
    if card.picture and card.problem:
        text += f"<p class='bad'>{html.escape(card.problem)}</p>"
    rows = [(k, v if isinstance(v, str) else json.dumps(v, ensure_ascii=False)) for k, v in card.fields.items()]
    fields = "".join(f"<div>{html.escape(k)}: {html.escape(v[:80])}</div>" for k, v in rows)
    sizes = " · ".join(f"<span>{html.escape(x)}</span>" for x in (card.size, *card.members) if x)
    details = f"{html.escape(card.key)}<br>{sizes}"
    text += f"<dl>{fields}</dl>" if fields else ""
    wide = " class='wide'" if card.wide else ""
    return (
        f"<article{wide}><div class='pic'>{picture}</div><div class='text'>{text}</div>"
        f"<footer>{details}</footer></article>"
    )
