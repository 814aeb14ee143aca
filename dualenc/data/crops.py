"""Parts of pictures, for evaluations that look at labelled objects."""

from __future__ import annotations

import io

from PIL import Image

from dualenc.data.modalities.image import Picture

WHITE = (255, 255, 255)


def open_picture(raw: bytes) -> Picture:
    """The picture with its ``size``; pixels are decoded once, when first cut. Raises DecodeError: not a picture."""
    return Picture(raw, WHITE)


def crop(picture: Picture, box: tuple[float, float, float, float]) -> bytes:
    """The part inside ``box`` (left, top, right, bottom in pixels, whole pixels around it) as PNG.

    Raises:
        DecodeError: damaged pixels.
    """
    width, height = picture.size
    left, top = max(0, int(box[0])), max(0, int(box[1]))
    right, bottom = min(width, max(left + 1, round(box[2]))), min(height, max(top + 1, round(box[3])))
    out = io.BytesIO()
    picture.rgb().crop((left, top, right, bottom)).save(out, "PNG", compress_level=1)
    return out.getvalue()


def black(size: tuple[int, int]) -> bytes:
    """A PNG of (width, height) black pixels: what a camera that failed shows."""
    out = io.BytesIO()
    Image.new("RGB", size).save(out, "PNG")
    return out.getvalue()
