"""Small pictures for reports."""

from __future__ import annotations

import base64
import io

from dualenc.data.modalities.image import Picture
from dualenc.data.modalities.modality import DecodeError

WHITE = (255, 255, 255)
MAX_PIXELS = 100_000_000


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
    out = io.BytesIO()
    image.save(out, "WEBP", quality=82, method=4)
    return out.getvalue()


def thumbnail_uri(raw: bytes, px: int = 96) -> str:
    """:func:`thumbnail` as a ``data:`` address that a page can hold."""
    return "data:image/webp;base64," + base64.b64encode(thumbnail(raw, px)).decode("ascii")
