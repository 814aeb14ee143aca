"""How one raw item is shown on a page: reports embed small images, short audio clips, or text.

A modality may have a static method ``preview(raw) -> dict``; otherwise the bytes decide. A preview has one of
``picture`` (a ``data:`` URI), ``sound`` (likewise) or ``text``; pages decide by this, never by the modality's name.
"""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from dualenc.data.driving.geometry import F64
from dualenc.data.modalities import DecodeError, modalities
from dualenc.data.modalities.picture import Picture

if TYPE_CHECKING:
    from PIL import Image

SOUND_BYTES = 400_000
"""Larger recordings are cut, as a page holds dozens of them."""
SECONDS = 8.0
WHITE = (255, 255, 255)
MAX_PIXELS = 100_000_000
"""Larger images are not decoded for a thumbnail."""
SHOWN = 5000
"""Approximate number of points drawn over an image."""
FAR = 60.0
"""Distance in metres at which the colour scale ends."""
_STOPS = np.array([[255, 70, 40], [255, 200, 40], [80, 220, 100], [60, 170, 255], [90, 70, 220]], float)
_SOUNDS = ((b"OggS", "ogg"), (b"fLaC", "flac"), (b"RIFF", "wav"), (b"ID3", "mpeg"), (b"\xff\xfb", "mpeg"))


@runtime_checkable
class Previews(Protocol):
    """A modality that defines how its items are shown."""

    @staticmethod
    def preview(raw: Any) -> dict[str, str]:
        """``picture``, ``sound`` or ``text`` of a raw item. Raises DecodeError: it is damaged."""
        ...


def preview(raw: bytes | str, kind: str = "") -> dict[str, str]:
    """The preview of an item of the registered modality ``kind``, or according to its bytes.

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


# --- audio -----------------------------------------------------------------------------------------------------------


def sound_kind(raw: bytes) -> str:
    """The audio type recognised by the first bytes (``ogg``, ``flac``, ``wav``, ``mpeg``), else an empty string."""
    return next(
        (kind for head, kind in _SOUNDS if raw.startswith(head) and (kind != "wav" or raw[8:12] == b"WAVE")), ""
    )


def sound_uri(raw: bytes) -> str:
    """A recording as a ``data:`` URI: unchanged if small, else its first seconds as mono FLAC.

    Raises:
        DecodeError: not audio, or damaged.
    """
    kind = sound_kind(raw)
    if not kind:
        raise DecodeError(f"not a recording in a known format ({len(raw)} bytes)")
    if len(raw) > SOUND_BYTES:
        raw, kind = _excerpt(raw), "flac"
    return f"data:audio/{kind};base64," + base64.b64encode(raw).decode("ascii")


def _excerpt(raw: bytes) -> bytes:
    try:
        import soundfile
    except ImportError as e:
        raise DecodeError(f"{len(raw)} bytes are too many for a page; to shorten recordings, install soundfile") from e
    try:
        with soundfile.SoundFile(io.BytesIO(raw)) as f:
            rate = f.samplerate
            wave = f.read(int(SECONDS * rate), dtype="float32", always_2d=True).mean(1)
    except (soundfile.LibsndfileError, RuntimeError) as e:
        raise DecodeError(f"the recording is damaged ({e})") from e
    if rate > 32_000:
        # Average pairs of samples: a crude low-pass, good enough for listening on a page, at half the bytes.
        wave, rate = wave[: len(wave) // 2 * 2].reshape(-1, 2).mean(1), rate // 2
    out = io.BytesIO()
    soundfile.write(out, wave, rate, format="FLAC", subtype="PCM_16")
    return out.getvalue()


# --- images --------------------------------------------------------------------------------------------------------


def thumbnail(raw: bytes, px: int = 96) -> bytes:
    """``raw`` upright, flattened on white, as WebP whose longer side is at most ``px`` pixels.

    Raises:
        DecodeError: not an image, damaged, or with too many pixels to be decoded for a thumbnail.
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
    """:func:`thumbnail` as a ``data:`` URI for a page."""
    return _data_uri(thumbnail(raw, px))


def colours(metres: F64, far: float = FAR) -> npt.NDArray[np.uint8]:
    """Colour of each distance: [n] metres → [n, 3] RGB, red where near, blue at ``far`` and beyond."""
    place = np.clip(metres / far, 0, 1) * (len(_STOPS) - 1)
    return np.stack([np.interp(place, range(len(_STOPS)), _STOPS[:, c]) for c in range(3)], 1).astype(np.uint8)


def points_over(image: Image.Image, uv: F64, depth: F64, width: int, far: float = FAR, dot: float = 0.6) -> Image.Image:
    """The image at ``width`` pixels with a dot for every point: ``uv [n, 2]`` in its own pixels, ``depth [n]`` in m.

    Near points are drawn last, over far ones. A dense sweep is thinned to about ``SHOWN`` points, so that the image
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
    """An image as a ``data:`` URI of a WebP."""
    return _data_uri(_webp(image, quality=85, method=2))


def _webp(image: Image.Image, quality: int, method: int) -> bytes:
    out = io.BytesIO()
    image.save(out, "WEBP", quality=quality, method=method)
    return out.getvalue()


def _data_uri(webp: bytes) -> str:
    return "data:image/webp;base64," + base64.b64encode(webp).decode("ascii")
