"""How one raw item is shown on a page: what a report embeds in itself.

A modality says so with a static method ``preview(raw) -> dict``; without one its bytes are looked at. A preview has
one of ``picture`` (a ``data:`` address), ``sound`` (likewise) or ``text``; a page shows it by what it is, never by the
modality's name.
"""

from __future__ import annotations

import base64
import io

from dualenc.data.modalities import DecodeError, modalities
from dualenc.data.thumbnails import thumbnail_uri

SOUND_BYTES = 400_000
"""Longer recordings are cut: a page holds dozens of them."""
SECONDS = 8.0
_SOUNDS = ((b"OggS", "ogg"), (b"fLaC", "flac"), (b"RIFF", "wav"), (b"ID3", "mpeg"), (b"\xff\xfb", "mpeg"))


def preview(raw: bytes | str, kind: str = "") -> dict[str, str]:
    """The preview of an item of a registered modality ``kind``, or of whatever its bytes are.

    Raises:
        DecodeError: neither the modality nor the bytes say how it can be shown.
    """
    own = getattr(modalities[kind], "preview", None) if kind in modalities else None
    if own is not None:
        return dict(own(raw))
    if isinstance(raw, str):
        return {"text": raw}
    if sound_kind(raw):
        return {"sound": sound_uri(raw)}
    return {"picture": thumbnail_uri(raw)}


def sound_kind(raw: bytes) -> str:
    """The audio type that the first bytes say (``ogg``, ``flac``, ``wav``, ``mpeg``), else an empty string."""
    return next(
        (kind for head, kind in _SOUNDS if raw.startswith(head) and (kind != "wav" or raw[8:12] == b"WAVE")), ""
    )


def sound_uri(raw: bytes) -> str:
    """A recording as a ``data:`` address: as it is when small, else its first seconds as mono FLAC.

    Raises:
        DecodeError: not audio, or damaged.
    """
    kind = sound_kind(raw)
    if not kind:
        raise DecodeError(f"no recording in a known format ({len(raw)} bytes)")
    if len(raw) > SOUND_BYTES:
        raw, kind = _excerpt(raw), "flac"
    return f"data:audio/{kind};base64," + base64.b64encode(raw).decode("ascii")


def _excerpt(raw: bytes) -> bytes:
    try:
        import soundfile
    except ImportError as e:
        raise DecodeError(f"{len(raw)} bytes are too many for a page, and soundfile, which cuts them, is absent") from e
    try:
        with soundfile.SoundFile(io.BytesIO(raw)) as f:
            rate = f.samplerate
            wave = f.read(int(SECONDS * rate), dtype="float32", always_2d=True).mean(1)
    except (soundfile.LibsndfileError, RuntimeError) as e:
        raise DecodeError(f"the recording is damaged ({e})") from e
    if rate > 32_000:
        # Pairs averaged: a crude low-pass, good enough to listen to on a page, at half the bytes.
        wave, rate = wave[: len(wave) // 2 * 2].reshape(-1, 2).mean(1), rate // 2
    out = io.BytesIO()
    soundfile.write(out, wave, rate, format="FLAC", subtype="PCM_16")
    return out.getvalue()
