"""How one raw item is shown on a page: what a report embeds in itself, as small pictures, short sounds, or text.

A modality says so with a static method ``preview(raw) -> dict``; without one its bytes are looked at. A preview has
one of ``picture`` (a ``data:`` address), ``sound`` (likewise) or ``text``; a page shows it by what it is, never by the
modality's name.
"""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from dualenc.data.driving.geometry import F64
from dualenc.data.modalities import DecodeError, modalities
from dualenc.data.modalities.image import Picture

if TYPE_CHECKING:
    from PIL import Image

SOUND_BYTES = 400_000
"""Longer recordings are cut: a page holds dozens of them."""
SECONDS = 8.0
WHITE = (255, 255, 255)
MAX_PIXELS = 100_000_000
"""Larger pictures are not decoded for a thumbnail."""
SHOWN = 5000
"""Points drawn over a picture, about."""
FAR = 60.0
"""Metres at which the colours end."""
_STOPS = np.array([[255, 70, 40], [255, 200, 40], [80, 220, 100], [60, 170, 255], [90, 70, 220]], float)
_SOUNDS = ((b"OggS", "ogg"), (b"fLaC", "flac"), (b"RIFF", "wav"), (b"ID3", "mpeg"), (b"\xff\xfb", "mpeg"))


@runtime_checkable
class Previews(Protocol):
    """A modality that knows how its items are shown."""

    @staticmethod
    def preview(raw: Any) -> dict[str, str]:
        """``picture``, ``sound`` or ``text`` of a raw item. Raises DecodeError: it is damaged."""
        ...


def preview(raw: bytes | str, kind: str = "") -> dict[str, str]:
    """The preview of an item of a registered modality ``kind``, or of whatever its bytes are.

    Raises:
        DecodeError: neither the modality nor the bytes say how it can be shown.
    """
    if kind in modalities and isinstance(shows := modalities[kind], Previews):
        return dict(shows.preview(raw))
    if isinstance(raw, str):
        return {"text": raw}
    if sound_kind(raw):
        return {"sound": sound_uri(raw)}
    return {"picture": thumbnail_uri(raw)}


# --- sounds ----------------------------------------------------------------------------------------------------------


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


# --- pictures --------------------------------------------------------------------------------------------------------


def thumbnail(raw: bytes, px: int = 96) -> bytes:
    """``raw`` upright, flattened on white, as WebP whose longer side is at most ``px`` pixels.

    Raises:
        DecodeError: not a picture, damaged, or with too many pixels to be decoded for a thumbnail.
    """
    from PIL import Image

    picture = Picture(raw, WHITE)
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise DecodeError(f"{width}×{height} pixels are too many for a thumbnail")
    image = picture.rgb(at_least=px).copy()
    image.thumbnail((px, px), Image.Resampling.LANCZOS)
    return _webp(image, quality=82, method=4)


def thumbnail_uri(raw: bytes, px: int = 96) -> str:
    """:func:`thumbnail` as a ``data:`` address that a page can hold."""
    return _data_uri(thumbnail(raw, px))


def colours(metres: F64, far: float = FAR) -> npt.NDArray[np.uint8]:
    """Colour of each distance: [n] metres → [n, 3] RGB, red where near, blue at ``far`` and beyond."""
    place = np.clip(metres / far, 0, 1) * (len(_STOPS) - 1)
    return np.stack([np.interp(place, range(len(_STOPS)), _STOPS[:, c]) for c in range(3)], 1).astype(np.uint8)


def points_over(image: Image.Image, uv: F64, depth: F64, width: int, far: float = FAR, dot: float = 0.6) -> Image.Image:
    """The picture at ``width`` pixels with a dot for every point: ``uv [n, 2]`` in its own pixels, ``depth [n]`` in m.

    Near points are drawn last, over far ones. A dense sweep is thinned to about ``SHOWN`` points, so that the picture
    can still be seen.
    """
    from PIL import Image, ImageDraw

    scale = width / image.width
    image = image.resize((width, max(1, round(image.height * scale))), Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(image)
    order = np.argsort(-depth)[:: 1 + len(depth) // SHOWN]
    for (u, v), colour in zip((uv * scale)[order], colours(depth, far)[order], strict=True):
        draw.rectangle([u - dot, v - dot, u + dot, v + dot], fill=tuple(colour))
    return image


def webp_uri(image: Image.Image) -> str:
    """A picture as a ``data:`` address of a WebP."""
    return _data_uri(_webp(image, quality=85, method=2))


def _webp(image: Image.Image, quality: int, method: int) -> bytes:
    out = io.BytesIO()
    image.save(out, "WEBP", quality=quality, method=method)
    return out.getvalue()


def _data_uri(webp: bytes) -> str:
    return "data:image/webp;base64," + base64.b64encode(webp).decode("ascii")
