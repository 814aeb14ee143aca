"""Images on their way into a shard: checked, resized, re-encoded."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from dualenc.data.modalities import DecodeError
from dualenc.data.modalities.picture import Picture
from dualenc_data_tools.sources.source import BadMedia, SourceConfig
from dualenc_data_tools.wanted import MAX_PIXELS

if TYPE_CHECKING:
    from PIL import Image

_HARD_LIMIT = 8 * MAX_PIXELS
_ENDINGS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "AVIF": "avif", "JPEG2000": "jp2"}
_WHITE = (255, 255, 255)


class BadPicture(BadMedia):
    """An image cannot be packed."""


def open_picture(raw: bytes, max_pixels: int = MAX_PIXELS) -> Picture:
    """Open an image and read its header.

    Raises:
        BadPicture: "broken image" or "too large" (judged by the header, without decoding).
    """
    from PIL import Image

    try:
        picture = Picture(raw, _WHITE)
    except DecodeError as e:
        bomb = isinstance(e.__cause__, Image.DecompressionBombError)
        raise BadPicture("too large" if bomb else "broken image", str(e)) from e
    width, height = picture.size
    if width * height > max_pixels:
        raise BadPicture("too large", f"{width}×{height} is more than {max_pixels:,} pixels")
    return picture


def decode(picture: Picture) -> Image.Image:
    """The pixels as upright RGB on white.

    Raises:
        BadPicture: "broken image".
    """
    try:
        return picture.rgb()
    except DecodeError as e:
        raise BadPicture("broken image", str(e)) from e


def prepare(raw: bytes, cfg: SourceConfig) -> tuple[str, bytes]:
    """(ending, bytes) of an image according to the settings: the original bytes wherever nothing has to change.

    Raises:
        BadPicture: it is broken, or too large.
    """
    from PIL import Image

    # An image that will be resized may be larger than the trainer accepts.
    picture = open_picture(raw, _HARD_LIMIT if cfg.size else MAX_PIXELS)
    kind = format_of(raw)
    too_long = cfg.size is not None and max(picture.size) > cfg.size
    keep = cfg.encode == "keep" and not too_long and kind in _ENDINGS
    if keep and not cfg.verify:
        return _ENDINGS[kind], raw
    image = decode(picture)
    if keep:
        return _ENDINGS[kind], raw
    if too_long and cfg.size is not None:
        scale = cfg.size / max(image.size)
        image = image.resize([max(round(v * scale), 1) for v in image.size], Image.Resampling.LANCZOS)
    # Formats that shards do not keep (TIFF, PPM) become PNG, which is lossless; so do GIF and BMP once decoded.
    target = cfg.encode.upper() if cfg.encode != "keep" else kind if kind in ("JPEG", "WEBP") else "PNG"
    return _ENDINGS[target], encode(image, target, cfg.quality)


def encode(image: Image.Image, target: str, quality: int) -> bytes:
    """RGB pixels as JPEG (4:4:4 from quality 90), WebP or PNG."""
    out = io.BytesIO()
    if target == "JPEG":
        image.save(out, "JPEG", quality=quality, subsampling=0 if quality >= 90 else 2)
    elif target == "WEBP":
        image.save(out, "WEBP", quality=quality, method=6)
    else:
        image.save(out, "PNG", optimize=True)
    return out.getvalue()


def format_of(raw: bytes) -> str:
    """Pillow's name of the format, by content, as file names can be wrong."""
    from PIL import Image

    with Image.open(io.BytesIO(raw)) as image:
        return str(image.format)
