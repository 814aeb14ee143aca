"""Images: JPEG, PNG, WebP, AVIF, TIFF … → uint8 RGB; mean and std are kept here and applied on the device."""

from __future__ import annotations

import importlib.util
import io
import logging
import math
import zlib
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import BaseModel, Field
from torch import Tensor

from dualenc.config import Positive, Section, Share
from dualenc.data.modalities.modality import DecodeError, modalities, reason_of
from dualenc.data.modalities.naflex import cut, grid, stack

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger(__name__)

Triple = tuple[float, float, float]
Spread = Annotated[float, Field(gt=0)]
Byte = Annotated[int, Field(ge=0, le=255)]
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF", "JPEG2000", "AVIF")
_HEIC = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
_WORST_ASPECT = 16
"""Images with a more extreme aspect ratio are cropped before they are resized: otherwise 60,000 × 1 pixels would become
13 million pixels wide."""
_ORIENTATION = 0x0112
_Fraction = Annotated[float, Field(gt=0, le=1)]
_Positive = Annotated[float, Field(gt=0)]
_NonNegative = Annotated[float, Field(ge=0)]


class Colour(Section):
    """Colour jitter, with torchvision's meaning of each strength, then greyscale."""

    brightness: _NonNegative = Field(default=0.0, description="strength")
    contrast: _NonNegative = Field(default=0.0, description="strength")
    saturation: _NonNegative = Field(default=0.0, description="strength")
    hue: Annotated[float, Field(ge=0, le=0.5)] = Field(default=0.0, description="strength")
    p: Share = Field(default=0.8, description="share of images that are jittered")
    grayscale_p: Share = Field(default=0.0, description="share of images that become grey")


class ImageAugment(Section):
    """Random resized crop (fraction of the area ``scale``, aspect ``ratio``), horizontal flip, colour jitter."""

    scale: tuple[_Fraction, _Fraction] = Field(default=(0.9, 1.0), description="range of the crop's share of the area")
    ratio: tuple[_Positive, _Positive] = Field(default=(0.75, 4 / 3), description="range of the crop's aspect ratio")
    flip: bool = Field(default=False, description="mirror half of the images left and right")
    colour: Colour | None = Field(default=None, description="colour jitter; null: none")


class ImageConfig(Section):
    """``resize``: shortest scales the shorter edge to ``size`` and crops the centre; squash ignores the aspect ratio;
    longest scales the longer edge and pads with ``pad``; naflex has no ``size``: the image keeps its aspect ratio, in
    at most ``max_patches`` patches of ``patch`` px (``augment.ratio`` is then relative to it)."""

    size: Positive = Field(default=224, description="side of the square in px")
    mean: Triple = Field(default=(0.48145466, 0.4578275, 0.40821073), description="subtracted from RGB in 0…1")
    std: tuple[Spread, Spread, Spread] = Field(
        default=(0.26862954, 0.26130258, 0.27577711), description="RGB is divided by this"
    )
    interpolation: Literal["bicubic", "bilinear", "lanczos"] = Field(
        default="bicubic", description="filter for resizing"
    )
    resize: Literal["shortest", "squash", "longest", "naflex"] = Field(
        default="shortest", description="how an image becomes a square"
    )
    patch: Positive = Field(default=16, description="naflex: side of a patch in px")
    max_patches: Positive = Field(default=256, description="naflex: most patches of an image")
    crop: Literal["center"] = Field(default="center", description="where the square is cut")
    shortest_edge: Positive | None = Field(
        default=None,
        description="resize: shortest scales the shorter edge to this; default: size (DINOv2: 256 for size 224)",
    )
    centre: Literal["round", "floor"] = Field(
        default="round",
        description="rounding of an odd crop border: as torchvision and open_clip (half to even), or transformers",
    )
    background: tuple[Byte, Byte, Byte] = Field(default=(255, 255, 255), description="colour behind transparent pixels")
    pad: tuple[Byte, Byte, Byte] = Field(
        default=(0, 0, 0), description="colour of the border that resize: longest adds"
    )
    max_pixels: Positive = Field(default=25_000_000, description="larger images are rejected before decoding")
    augment: ImageAugment = Field(default=ImageAugment(), description="training only")


@modalities.register("image")
class ImageInput:
    """Images as rows uint8 [3, S, S]; ``collate`` → uint8 [B, 3, S, S]. With ``resize: naflex`` rows are grids of
    patches and ``collate`` gives ``patches`` uint8 [B, max_patches, patch · patch · 3] and ``grid`` [B, 2].

    ``eval`` is the resize and crop of torchvision and open_clip, or with ``centre: floor`` of transformers, pixel for
    pixel (PIL, antialiased).
    """

    Config: ClassVar[type[BaseModel]] = ImageConfig
    default_members: ClassVar[list[str]] = ["jpg", "jpeg", "png", "webp", "gif", "bmp", "avif", "tif", "tiff", "jp2"]
    prompt: ClassVar[str] = "a photo of a {}."

    def __init__(self, config: ImageConfig, base_dir: str | Path | None = None) -> None:
        from PIL import Image

        self.config = config
        low, high = config.augment.ratio
        self._smallest = math.sqrt(max(config.augment.scale[0], 1e-3) * min(low, 1 / high, 1.0))
        self._filter = Image.Resampling[config.interpolation.upper()]
        self._naflex = config.resize == "naflex"

    # --- the protocol -----------------------------------------------------------------------------------------

    def decode(self, raw: Any) -> Picture:
        """Read the header and check the size; the pixels are decoded when a view asks for them.

        Raises:
            DecodeError: if it is not an image, or has more than ``max_pixels``.
        """
        if not isinstance(raw, bytes | bytearray | memoryview):
            raise DecodeError(f"an image must be bytes, got {type(raw).__name__}")
        picture = Picture(bytes(raw), self.config.background)
        width, height = picture.size
        if width * height > self.config.max_pixels:
            raise DecodeError(f"{width}×{height} pixels are more than max_pixels ({self.config.max_pixels:,})")
        return picture

    def train(self, x: Picture, rng: np.random.Generator) -> Tensor:
        """A random resized crop, flipped and colour-jittered as ``augment`` says → a row."""
        from PIL import Image

        augment = self.config.augment
        size = min(self._pixels(*x.size)) if self._naflex else self.config.size
        # The smallest crop keeps half again as many pixels as the row: enough for the filter to average, and a large
        # JPEG is decoded at 1/2, 1/4 or 1/8.
        image = x.rgb(at_least=math.ceil(1.5 * size / self._smallest))
        own = image.width / image.height if self._naflex else 1.0
        box = _random_crop(image.width, image.height, augment, rng, own)
        wh = self._pixels(box[2] - box[0], box[3] - box[1]) if self._naflex else (size, size)
        image = image.resize(wh, self._filter, box=box)
        if augment.flip and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if augment.colour is not None:
            image = coloured(image, augment.colour, rng)
        return self._row(image)

    def eval(self, x: Picture) -> Tensor:
        """The image resized and cropped as ``resize`` says → a row."""
        size, image = self.config.size, x.rgb()
        if self._naflex:
            return self._row(image.resize(self._pixels(*image.size), self._filter))
        if self.config.resize == "squash":
            return to_tensor(image.resize((size, size), self._filter))
        w, h = image.size
        if self.config.resize == "shortest":
            edge = self.config.shortest_edge or size
            wh = (edge, int(edge * h / w)) if w <= h else (int(edge * w / h), edge)
        else:
            ratio = max(w, h) / size
            wh = (max(round(w / ratio), 1), max(round(h / ratio), 1))
        if max(wh) > _WORST_ASPECT * size:
            return to_tensor(_resized_centre(image, wh, size, self._filter))
        if wh != image.size:
            image = image.resize(wh, self._filter)
        return to_tensor(_centre(image, size, self.config.pad, self.config.centre))

    def collate(self, rows: list[Tensor]) -> Tensor | dict[str, Tensor]:
        """→ uint8 [B, 3, S, S], or ``patches`` and ``grid``."""
        return stack(rows, self.config.max_patches) if self._naflex else torch.stack(rows)

    def dummy(self) -> Tensor:
        """A black image."""
        if self._naflex:
            return torch.zeros(*grid(1, 1, 1, self.config.max_patches), 3 * self.config.patch**2, dtype=torch.uint8)
        return torch.zeros(3, self.config.size, self.config.size, dtype=torch.uint8)

    def describe(self) -> dict[str, Any]:
        """The kind and its settings."""
        return {"kind": "image", "config": self.config.model_dump(mode="json")}

    def as_raw(self, x: Any, rate: int | None = None) -> bytes | None:
        """A PIL image, or uint8 [H, W], [H, W, 3] or [H, W, 4] → the bytes of a PNG."""
        return png_of(x)

    def _pixels(self, width: float, height: float) -> tuple[int, int]:
        """(width, height) in pixels that an image is resized to: whole patches."""
        rows, columns = grid(int(width), int(height), self.config.patch, self.config.max_patches)
        return columns * self.config.patch, rows * self.config.patch

    def _row(self, image: Image.Image) -> Tensor:
        return cut(image, self.config.patch) if self._naflex else to_tensor(image)


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


class Picture:
    """An opened image: its header has been read, its pixels have not.

    Attributes:
        size: (width, height) as displayed: with the EXIF orientation applied.
    """

    def __init__(self, raw: bytes, background: tuple[int, int, int]) -> None:
        self._raw, self._background = raw, background
        self._cached: tuple[int | None, Image.Image] | None = None
        self._opened = self._open()
        w, h = self._opened.size
        self.size = (h, w) if _orientation(self._opened) in (5, 6, 7, 8) else (w, h)

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

        image = self._opened if self._cached is None else self._open()
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


def to_tensor(image: Image.Image) -> Tensor:
    # A view: stacking makes it contiguous.
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _centre(image: Image.Image, size: int, pad: tuple[int, int, int], centre: Literal["round", "floor"]) -> Image.Image:
    """Centre crop; where the image is smaller, pad (an odd pixel goes right and below), as torchvision does."""
    from PIL import Image

    w, h = image.size
    if w < size or h < size:
        ground = Image.new("RGB", (max(w, size), max(h, size)), pad)
        ground.paste(image, (max(size - w, 0) // 2, max(size - h, 0) // 2))
        image, (w, h) = ground, ground.size
    if (w, h) == (size, size):
        return image
    if centre == "floor":
        left, top = (w - size) // 2, (h - size) // 2
    else:
        left, top = round((w - size) / 2.0), round((h - size) / 2.0)
    return image.crop((left, top, left + size, top + size))


def _resized_centre(image: Image.Image, wh: tuple[int, int], size: int, how: Any) -> Image.Image:
    """The pixels of resizing to ``wh`` and cutting the centre, without making the rest; the shorter of wh is ``size``.

    Pillow resamples one axis after the other, rounding to integers in between: horizontally first, but vertically
    first where a tall image shrinks. The same order gives the same pixels.
    """
    tall = wh[1] > wh[0]
    if not tall:
        image, wh = image.transpose(_image().Transpose.TRANSPOSE), (wh[1], wh[0])
    scale = image.height / wh[1]
    top = round((wh[1] - size) / 2.0)
    reach = math.ceil(4 * max(scale, 1.0))  # beyond the support of every filter
    first, last = top * scale, (top + size) * scale
    low, high = max(math.floor(first) - reach, 0), min(math.ceil(last) + reach, image.height)
    part = image.crop((0, low, image.width, high))
    down = (first - low, last - low)
    if not tall or scale > 1:
        part = part.resize((part.width, size), how, box=(0, down[0], part.width, down[1]))
        out = part.resize((size, size), how)
    else:
        part = part.resize((size, part.height), how)
        out = part.resize((size, size), how, box=(0, down[0], size, down[1]))
    return out if tall else out.transpose(_image().Transpose.TRANSPOSE)


def _image() -> Any:
    from PIL import Image

    return Image


def _random_crop(
    w: int, h: int, augment: ImageAugment, rng: np.random.Generator, own: float
) -> tuple[float, float, float, float]:
    """A box of random area and aspect in the image (Szegedy et al. 2015); after ten misses, the largest central one.

    ``own``: the aspect that ``augment.ratio`` is relative to."""
    low, high = math.log(own * augment.ratio[0]), math.log(own * augment.ratio[1])
    for _ in range(10):
        area = w * h * rng.uniform(*augment.scale)
        aspect = math.exp(rng.uniform(low, high))
        cw, ch = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < cw <= w and 0 < ch <= h:
            left, top = int(rng.integers(0, w - cw + 1)), int(rng.integers(0, h - ch + 1))
            return (left, top, left + cw, top + ch)
    aspect = min(max(w / h, own * augment.ratio[0]), own * augment.ratio[1])
    cw, ch = (w, min(round(w / aspect), h)) if w / h < aspect else (min(round(h * aspect), w), h)
    left, top = (w - cw) // 2, (h - ch) // 2
    return (left, top, left + max(cw, 1), top + max(ch, 1))


def coloured(image: Image.Image, colour: Colour, rng: np.random.Generator) -> Image.Image:
    from PIL import Image, ImageEnhance

    if rng.random() < colour.p:
        enhancers: list[tuple[float, Any]] = [
            (colour.brightness, ImageEnhance.Brightness),
            (colour.contrast, ImageEnhance.Contrast),
            (colour.saturation, ImageEnhance.Color),
        ]
        for strength, enhancer in enhancers:
            if strength > 0:
                image = enhancer(image).enhance(rng.uniform(max(0.0, 1 - strength), 1 + strength))
        if colour.hue > 0:
            shift = round(rng.uniform(-colour.hue, colour.hue) * 255)
            hue, saturation, value = image.convert("HSV").split()
            hue = hue.point([(i + shift) % 256 for i in range(256)])
            image = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    if rng.random() < colour.grayscale_p:
        image = image.convert("L").convert("RGB")
    return image


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
