"""One image: its header first, its pixels when they are asked for, as RGB; and what is made of images elsewhere."""

from __future__ import annotations

import importlib.util
import io
import logging
import math
import zlib
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from dualenc.data.modalities.modality import DecodeError, reason_of
from dualenc.data.modalities.plain_jpeg import Pixels, decoded, read_head, reduction

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger(__name__)

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF", "JPEG2000", "AVIF")
_HEIC = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
_ORIENTATION = 0x0112
_PILLOW_OPENS = 1 << 26
"""Pixels up to which Pillow opens an image without a word (its bound is 89,478,485)."""


class Picture:
    """An opened image: its header has been read, its pixels have not.

    Attributes:
        size: (width, height) as displayed: with the EXIF orientation applied.
    """

    def __init__(self, raw: bytes, background: tuple[int, int, int], fast: bool = False) -> None:
        """``fast``: :meth:`pixels` may decode without Pillow, which then opens the image only where it has to."""
        self._raw, self._background = raw, background
        self._cached: tuple[int | None, Image.Image] | None = None
        self._opened: Image.Image | None = None
        self._head = read_head(raw) if fast else None
        if self._head is not None and self._head.bare and self._head.width * self._head.height <= _PILLOW_OPENS:
            self.size = (self._head.width, self._head.height)
            return
        self._opened = self._open()
        orientation, (w, h) = _orientation(self._opened), self._opened.size
        self.size = (h, w) if orientation in (5, 6, 7, 8) else (w, h)
        if self._head is not None and (self._opened.format, orientation, w, h) != ("JPEG", 1, *self._head[:2]):
            self._head = None

    def pixels(self, at_least: int | None = None) -> Pixels:
        """As :meth:`rgb`, as an array uint8 [H, W, 3]; not kept."""
        if self._head is not None:
            array = decoded(self._raw, self._head, reduction(self.size, at_least))
            if array is not None:
                return array
        return np.array(self.rgb(at_least))

    def rgb(self, at_least: int | None = None) -> Image.Image:
        """The pixels as RGB, rotated as EXIF says, transparency composited on the background.

        Args:
            at_least: the smallest shorter edge the caller can use, in pixels; larger JPEGs are then decoded at 1/2, 1/4
                or 1/8 of their size. None: full size.

        Raises:
            DecodeError: if the data is damaged or cut short.
        """
        if self._cached is not None and self._cached[0] == at_least:
            return self._cached[1]
        from PIL import Image

        image, self._opened = self._opened or self._open(), None
        try:
            if at_least is not None and image.format == "JPEG":
                scale = at_least / min(image.size)
                if scale < 1:
                    image.draft(None, (math.ceil(image.width * scale), math.ceil(image.height * scale)))
            if image.format == "PNG":
                _check_png(self._raw)
            orientation = _orientation(image)
            image.load()
            if orientation in _UPRIGHT:  # not ImageOps.exif_transpose, which rewrites all of the EXIF
                image = image.transpose(Image.Transpose[_UPRIGHT[orientation]])
            image = _to_rgb(image, self._background)
        except DecodeError:
            raise
        except (
            Exception
        ) as e:  # Pillow's readers raise whatever their parsers do: struct.error, KeyError, MemoryError …
            raise DecodeError(f"the image is damaged or cut short ({reason_of(e)})") from e
        self._cached = (at_least, image)
        return image

    def _open(self) -> Image.Image:
        from PIL import Image, UnidentifiedImageError

        try:
            formats = readable()
            if self._raw[4:8] == b"ftyp" and self._raw[8:12] in _HEIC and "HEIF" not in formats:
                raise DecodeError("HEIC images need a package: pip install 'dualenc[heic]'")
            return Image.open(io.BytesIO(self._raw), formats=formats)
        except DecodeError:
            raise
        except UnidentifiedImageError as e:
            raise DecodeError(f"not a {', '.join(_FORMATS)} image ({len(self._raw)} bytes)") from e
        except Image.DecompressionBombError as e:
            raise DecodeError(f"far too many pixels, rejected before decoding ({e})") from e
        except Exception as e:
            raise DecodeError(f"the image's header is damaged ({reason_of(e)})") from e


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 (upright) where it is absent or unreadable, as every viewer does."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception as e:  # noqa: BLE001 – only this number matters, whatever the rest holds
        logger.debug("unreadable EXIF: %s", reason_of(e))
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


_UPRIGHT = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
"""EXIF orientation (TIFF tag 274) → the transposition that makes it upright."""


@lru_cache(maxsize=1)
def readable() -> tuple[str, ...]:
    """Pillow's names of the formats that can be read here: those its build has, and HEIF with the heic extra."""
    from PIL import Image

    if importlib.util.find_spec("pillow_heif") is not None:
        import pillow_heif

        pillow_heif.register_heif_opener()
    Image.init()
    return tuple(f for f in (*_FORMATS, "HEIF") if f in Image.OPEN)


def _check_png(raw: bytes) -> None:
    """Raise DecodeError where a chunk's CRC does not match its bytes: Pillow does not check those of the pixels."""
    at = 8
    while at + 12 <= len(raw):
        length = int.from_bytes(raw[at : at + 4], "big")
        kind, end = raw[at + 4 : at + 8], at + 8 + length
        if end + 4 > len(raw):
            raise DecodeError(f"the image is damaged or cut short in chunk {kind.decode('ascii', 'replace')}")
        if zlib.crc32(raw[at + 4 : end]) != int.from_bytes(raw[end : end + 4], "big"):
            raise DecodeError(f"the image is damaged (wrong checksum in chunk {kind.decode('ascii', 'replace')})")
        if kind == b"IEND":
            return
        at = end + 4
    raise DecodeError("the image is damaged or cut short (no IEND chunk)")


def _to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Any PIL mode → RGB."""
    from PIL import Image

    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        # 16-bit grey: PIL would clip instead of scale.
        grey = np.asarray(image).astype(np.int64)
        return Image.fromarray((np.clip(grey, 0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise DecodeError("a floating-point image has no stated range")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        ground = Image.new("RGBA", rgba.size, (*background, 255))
        return Image.alpha_composite(ground, rgba).convert("RGB")
    return image.convert("RGB")


def label_map(raw: bytes) -> Pixels:
    """The numbers that a grey or palette image holds (a segmentation mask): [H, W], not scaled, not looked up.

    Raises:
        DecodeError: not an image, a damaged one, or one of colours.
    """
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(raw), formats=readable())
        image.load()
    except Exception as e:  # as above: whatever the parsers raise
        raise DecodeError(f"the mask is not a readable image ({reason_of(e)})") from e
    if image.mode not in ("1", "L", "P", "I", "I;16"):
        raise DecodeError(f"a mask is a grey or palette image, one number a pixel, not {image.mode}")
    return np.array(image)


def png_of(x: Any) -> bytes | None:
    """The bytes of a PNG with the same pixels; None where ``x`` is neither an array nor a PIL image.

    Args:
        x: a PIL image (its EXIF orientation goes with it), or a NumPy array or tensor uint8 [H, W], [H, W, 3] (RGB) or
            [H, W, 4] (RGBA).

    Raises:
        DecodeError: an array of another shape or type.
    """
    from PIL import Image

    if isinstance(x, Tensor):
        x = x.detach().cpu().numpy()
    if isinstance(x, np.ndarray):
        if x.dtype != np.uint8 or not (x.ndim == 2 or (x.ndim == 3 and x.shape[2] in (3, 4))) or x.size == 0:
            raise DecodeError(
                f"an image array must be uint8 [H, W, 3], [H, W, 4] or [H, W], got {x.dtype} {list(x.shape)}; "
                "give a batch as list(batch)"
            )
        x = Image.fromarray(np.ascontiguousarray(x))
    if not isinstance(x, Image.Image):
        return None
    if x.mode == "F":
        raise DecodeError("a floating-point image has no stated range; convert it to uint8 first")
    if x.mode not in ("1", "L", "LA", "P", "RGB", "RGBA") and not x.mode.startswith("I"):
        x = x.convert("RGBA" if x.has_transparency_data else "RGB")
    out = io.BytesIO()
    x.save(out, "PNG", compress_level=1, exif=x.getexif())
    return out.getvalue()


# --- parts of images, for evaluations that look at labelled objects -----------------------------------------------


def open_picture(raw: bytes) -> Picture:
    """The image with its ``size``; pixels are decoded once, when first cut. Raises DecodeError: not an image."""
    return Picture(raw, (255, 255, 255))


def cut_out(picture: Picture, box: tuple[float, float, float, float]) -> bytes:
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


def black_picture(size: tuple[int, int]) -> bytes:
    """A PNG of (width, height) black pixels: what a camera that failed shows."""
    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", size).save(out, "PNG")
    return out.getvalue()
