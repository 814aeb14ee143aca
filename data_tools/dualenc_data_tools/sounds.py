"""Audio clips on their way into a shard: checked, cut, resampled, re-encoded."""

from __future__ import annotations

import hashlib
import io
import math
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np

from dualenc.data.modalities import DecodeError
from dualenc_data_tools.sources.source import BadMedia, SourceConfig

if TYPE_CHECKING:
    from dualenc.data.modalities.sound_file import Sound

MAX_SECONDS = 3600.0
"""Longer clips are packed as they are but not re-encoded: they would have to fit into memory."""
_BLOCK_SECONDS = 60
_ENDINGS = {"WAV": "wav", "WAVEX": "wav", "RF64": "wav", "FLAC": "flac", "OGG": "ogg", "MP3": "mp3", "MPEG": "mp3"}
_FORMATS: dict[str, dict[str, Any]] = {
    "flac": {"format": "FLAC", "subtype": "PCM_16"},
    "wav": {"format": "WAV", "subtype": "PCM_16"},
    "ogg": {"format": "OGG", "subtype": "VORBIS"},
    "opus": {"format": "OGG", "subtype": "OPUS"},
}
_OPUS_RATE = 48_000
_REVERSED = bytes(int(f"{i:08b}"[::-1], 2) for i in range(256))


class BadSound(BadMedia):
    """An audio clip cannot be packed."""


def open_sound(raw: bytes) -> Sound:
    """Open an audio file and read its header.

    Raises:
        BadSound: "broken sound".
    """
    from dualenc.data.modalities.sound_file import Sound

    try:
        return Sound(raw)
    except DecodeError as e:
        raise BadSound("broken sound", str(e)) from e


def decode(sound: Sound) -> None:
    """Decode it once from start to end, a minute at a time.

    Raises:
        BadSound: "broken sound".
    """
    digest(sound)


def digest(sound: Sound) -> bytes:
    """64 bits of BLAKE2b over the sample rate and the decoded samples (channels averaged, rounded to 16 bits), so equal
    for a WAV and a FLAC of the same recording.

    Raises:
        BadSound: "broken sound".
    """
    step, out = _BLOCK_SECONDS * sound.rate, hashlib.blake2b(str(sound.rate).encode(), digest_size=8)
    blocks = (
        [(0, step)]
        if sound.frames is None
        else [(start, min(step, sound.frames - start)) for start in range(0, sound.frames, step)]
    )
    try:
        for start, count in blocks:
            out.update(np.rint(sound.read(start, count, sound.rate) * 32767).astype("<i2").tobytes())
    except DecodeError as e:
        raise BadSound("broken sound", str(e)) from e
    return out.digest()


def prepare(raw: bytes, cfg: SourceConfig) -> tuple[str, bytes]:
    """(ending, bytes) of an audio clip according to the settings: the original bytes wherever nothing has to change.

    Re-encoded clips are mono with 16 bits.

    Raises:
        BadSound: it is broken, or too long to be re-encoded.
    """
    sound = open_sound(raw)
    too_long = cfg.seconds is not None and sound.seconds > cfg.seconds
    other_rate = cfg.rate is not None and sound.rate != cfg.rate
    if cfg.encode_audio == "keep" and not too_long and not other_rate and sound.format in _ENDINGS:
        if cfg.verify:
            decode(sound)
        return _ENDINGS[sound.format], raw
    seconds = min(sound.seconds, cfg.seconds or math.inf)
    if seconds > MAX_SECONDS:
        raise BadSound("too long", f"{seconds:,.0f} s are more than {MAX_SECONDS:,.0f}; set seconds to cut clips")
    rate = cfg.rate or (_OPUS_RATE if cfg.encode_audio == "opus" else sound.rate)
    try:
        wave = sound.read(0, math.ceil(seconds * sound.rate), rate)
    except DecodeError as e:
        raise BadSound("broken sound", str(e)) from e
    ending = "flac" if cfg.encode_audio == "keep" else cfg.encode_audio
    return ending, encode(wave, rate, ending)


def encode(wave: Any, rate: int, ending: str) -> bytes:
    """Mono samples float32 [T] as FLAC or WAV (16 bits), Ogg Vorbis or Opus. Samples beyond full scale are clipped; the
    same samples give the same bytes.

    Raises:
        BadSound: the format does not support this rate.
    """
    import numpy as np
    import soundfile

    out = io.BytesIO()
    try:
        soundfile.write(out, np.clip(wave, -1, 1), rate, **_FORMATS[ending])
    except (soundfile.SoundFileError, RuntimeError) as e:
        raise BadSound("cannot be written", f"{ending} at {rate:,} Hz: {e}") from e
    raw = out.getvalue()
    return same_serial(raw) if _FORMATS[ending]["format"] == "OGG" else raw


def same_serial(raw: bytes) -> bytes:
    """An Ogg stream under serial number 1: libsndfile draws one at random, which would change the bytes of every build.

    The header of a page (RFC 3533) has the serial number at byte 14, a CRC-32 over the page with the CRC's own bytes at
    zero at byte 22, and the lengths of its segments from byte 27 on. The CRC is zlib's with the bits of every byte and
    of the result in reverse order, without inversion.
    """
    out, at = bytearray(raw), 0
    while at + 27 <= len(out):
        segments = out[at + 26]
        end = at + 27 + segments + sum(out[at + 27 : at + 27 + segments])
        out[at + 14 : at + 18] = (1).to_bytes(4, "little")
        out[at + 22 : at + 26] = bytes(4)
        crc = zlib.crc32(bytes(out[at:end]).translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
        out[at + 22 : at + 26] = int(f"{crc:032b}"[::-1], 2).to_bytes(4, "little")
        at = end
    return bytes(out)
