"""Scores from the headers of images and audio files; nothing is decoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import Field

from dualenc.config import Section
from dualenc.config.section import Positive
from dualenc_data_tools import sounds
from dualenc_data_tools.choose.caption_filters import words_of
from dualenc_data_tools.choose.filter import AUDIO, IMAGE, TEXT, Candidate, Filter, Score, filters
from dualenc_data_tools.images import decode, open_picture
from dualenc_data_tools.sources.source import BadMedia


def size_of(raw: bytes | None) -> tuple[int, int] | None:
    """Width and height of an image in pixels; None: there is none, or its header is broken."""
    if raw is None:
        return None
    try:
        return open_picture(raw).size
    except BadMedia:
        return None


@filters.register("size")
class Size(Filter):
    """``width``, ``height`` and ``shorter`` side of the image in px, ``aspect`` (longer side / shorter side)."""

    reads: Mapping[str, Sequence[str]] = {"image": IMAGE}

    def score(self, rows: Sequence[Candidate]) -> dict[str, list[Score]]:
        sizes = [size_of(r.values.get("image")) for r in rows]
        return {
            "width": [float(s[0]) if s else None for s in sizes],
            "height": [float(s[1]) if s else None for s in sizes],
            "shorter": [float(min(s)) if s else None for s in sizes],
            "aspect": [max(s) / min(s) if s else None for s in sizes],
        }


@filters.register("duration")
class Duration(Filter):
    """``seconds`` of the audio clip and its ``rate`` in Hz."""

    reads: Mapping[str, Sequence[str]] = {"audio": AUDIO}

    def score(self, rows: Sequence[Candidate]) -> dict[str, list[Score]]:
        clips = [self._clip(r.values.get("audio")) for r in rows]
        return {"seconds": [c[0] if c else None for c in clips], "rate": [c[1] if c else None for c in clips]}

    @staticmethod
    def _clip(raw: bytes | None) -> tuple[float, float] | None:
        if raw is None:
            return None
        try:
            clip = sounds.open_sound(raw)
        except BadMedia:
            return None
        # A stream that does not state its length has none here.
        return None if clip.frames is None else (clip.frames / clip.rate, float(clip.rate))


class BasicConfig(Section):
    """Bounds of DataComp's basic filter (Gadre et al. 2023, section 3.3)."""

    min_words: Positive = Field(default=3, description="words of the caption, at least (DataComp: more than two)")
    min_chars: Positive = Field(default=6, description="characters of the caption, at least (DataComp: more than five)")
    min_side: Positive = Field(default=200, description="shorter side in px, at least")
    max_aspect: float = Field(default=3.0, ge=1, description="longer side / shorter side, less than")


@filters.register("datacomp_basic")
class Basic(Filter):
    """``datacomp_basic``: ``ok``, or what DataComp's basic filter leaves the sample out for: words, chars, side,
    aspect, image. Its language rule is the filter ``language``: datacomp_basic and language == en."""

    Config = BasicConfig
    reads: Mapping[str, Sequence[str]] = {"image": IMAGE, "text": TEXT}

    def score(self, rows: Sequence[Candidate]) -> dict[str, list[Score]]:
        return {"datacomp_basic": [self._judge(r) for r in rows]}

    def _judge(self, row: Candidate) -> str:
        c, captions, size = self.config, row.captions, size_of(row.values.get("image"))
        if size is None:
            return "image"
        if max((len(words_of(t)) for t in captions), default=0) < c.min_words:
            return "words"
        if max((len(t.strip()) for t in captions), default=0) < c.min_chars:
            return "chars"
        if min(size) < c.min_side:
            return "side"
        return "ok" if max(size) < c.max_aspect * min(size) else "aspect"


@filters.register("usable")
class Usable(Filter):
    """``usable``: ``ok``, or why training could not use the sample: unreadable, no caption, broken image, broken sound.
    Everything is decoded, which takes about as long as training's own reading."""

    reads: Mapping[str, Sequence[str]] = {"image": IMAGE, "audio": AUDIO, "text": TEXT}

    def score(self, rows: Sequence[Candidate]) -> dict[str, list[Score]]:
        return {"usable": [self._judge(r) for r in rows]}

    @staticmethod
    def _judge(row: Candidate) -> str:
        if row.problem:
            return "unreadable"
        if not any(c.strip() for c in row.captions):
            return "no caption"
        try:
            if "image" in row.values:
                decode(open_picture(row.values["image"]))
            if "audio" in row.values:
                sounds.decode(sounds.open_sound(row.values["audio"]))
        except BadMedia as e:
            return e.reason
        return "ok"
