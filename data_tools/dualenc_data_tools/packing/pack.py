"""Records of a source → samples as they are stored: numbered, in chunks, each chunk a pure function of its records."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dualenc_data_tools import images, sounds
from dualenc_data_tools.packing.steps import LoadedRecord, Steps
from dualenc_data_tools.sources import BadMedia, Dropped, Keys, Record, SourceConfig

CHUNK = 32
"""Records packed together. Chunks start at multiples of it, so a resumed build has the same ones."""
PREPARE = {"image": images.prepare, "audio": sounds.prepare}
"""Kinds of media that are checked and may be re-encoded; anything else is packed as it is."""


@dataclass(frozen=True, slots=True)
class Numbered:
    """A record with its place in the source's order.

    Attributes:
        names: digest of the splits and keys of all records up to this one, by which a resumed build knows its source.
    """

    number: int
    split: str
    key: str
    names: str
    record: Record | Dropped


@dataclass(frozen=True, slots=True)
class Packed:
    """A sample as it is stored. ``digest``: of its decoded item, where repeats are left out."""

    key: str
    members: Mapping[str, bytes]
    captions: int
    digest: str = ""


Outcome = Packed | Dropped
Chunk = Sequence[Numbered]


def chunks(records: Iterable[Record | Dropped], cfg: SourceConfig) -> Iterator[Chunk]:
    """The records in their order, numbered, with unique keys, ``CHUNK`` at a time."""
    keys: dict[str, Keys] = {}
    names = hashlib.blake2b(digest_size=8)
    chunk: list[Numbered] = []
    for number, record in enumerate(records):
        if cfg.limit is not None and number >= cfg.limit:
            break
        if isinstance(record, Dropped):
            split, key = "", record.name
        else:
            held_out = cfg.val_every is not None and number % cfg.val_every == 0
            split = "val" if held_out else record.split or cfg.name
            key = record.name if record.exact_key else keys.setdefault(split, Keys()).make(record.name)
        names.update(f"{split}\0{key}\n".encode("utf-8", "surrogatepass"))
        chunk.append(Numbered(number, split, key, names.hexdigest(), record))
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


class Packer:
    """Packs chunks: reads, filters, checks and re-encodes. It holds the models of its steps, so make one a process."""

    def __init__(self, cfg: SourceConfig) -> None:
        self.cfg, self.steps = cfg, Steps(cfg.steps)

    def pack(self, chunk: Chunk) -> list[Outcome]:
        """The outcome of every record of a chunk."""
        out: list[Outcome | None] = [None] * len(chunk)
        rows: list[tuple[int, LoadedRecord]] = []
        for i, item in enumerate(chunk):
            got = _read(item.record)
            if isinstance(got, Dropped):
                out[i] = got
            else:
                rows.append((i, got))
        for (i, _), judged in zip(rows, self.steps.run([r for _, r in rows]), strict=True):
            out[i] = judged if isinstance(judged, Dropped) else self._store(judged, chunk[i].key)
        return [o for o in out if o is not None]

    def _store(self, row: LoadedRecord, key: str) -> Outcome:
        record, members = row.record, dict[str, bytes]()
        digest = ""
        for what, raw in row.media.items():
            try:
                if what == self.cfg.distinct:
                    digest = digest_of(what, raw)
                if what in PREPARE:
                    ending, raw = PREPARE[what](raw, self.cfg)
                    members[ending] = raw
                else:
                    members[what] = raw
            except BadMedia as e:
                return Dropped(record.name, e.reason, e.detail)
        members |= record.members
        texts = text_members(record, self.cfg)
        if isinstance(texts, Dropped):
            return texts
        if self.cfg.distinct == "text":
            digest = digest_of("text", list(record.captions))
        return Packed(key, members | texts, len(record.captions), digest)


def digest_of(what: str, raw: Any) -> str:
    """The exact fingerprint of an item, equal for equal pixels, audio samples or texts. Raises BadMedia."""
    from dualenc_data_tools.choose.fingerprints import PRINTS

    return f"{PRINTS[what](raw).exact:016x}"


def _read(record: Record | Dropped) -> LoadedRecord | Dropped:
    if isinstance(record, Dropped):
        return record
    media: dict[str, bytes] = {}
    for what, value in record.media.items():
        try:
            media[what] = value.read_bytes() if isinstance(value, Path) else value
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return Dropped(record.name, f"{what} file missing", str(value))
        except OSError as e:
            return Dropped(record.name, f"{what} file unreadable", str(e))
    return LoadedRecord(replace(record, media={}), media)


def text_members(record: Record, cfg: SourceConfig) -> dict[str, bytes] | Dropped:
    """The .txt or .json member of a record (see :func:`dualenc_data_tools.build.build` for which)."""
    layout = cfg.text
    fields = record.fields if cfg.origin is None else {**record.fields, "source": cfg.origin}
    if layout == "auto":
        layout = "json" if record.many or fields or len(record.captions) > 1 else "txt"
    if not record.captions and not fields:
        return {}
    if layout == "txt":
        if len(record.captions) != 1:
            return Dropped(record.name, "several captions", f"text=txt holds one caption, not {len(record.captions)}")
        return {"txt": record.captions[0].encode()}
    short = {"txt": record.captions[0].encode()} if layout == "both" and record.captions else {}
    doc: dict[str, Any] = {"captions": list(record.captions)} if record.captions or record.many else {}
    doc |= {k: v for k, v in fields.items() if k != "captions"}
    return short | {"json": json.dumps(doc, ensure_ascii=False).encode()}
