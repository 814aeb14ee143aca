"""Pictures: JPEG, PNG, WebP, GIF, BMP → uint8 RGB; mean and std are kept here and applied on the device."""

from __future__ import annotations

import io
import logging
import math
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import BaseModel, Field
from torch import Tensor

from dualenc.config import Positive, Section, Share
from dualenc.data.modalities.modality import DecodeError, modalities
from dualenc.data.modalities.naflex import cut, grid, stack

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger(__name__)

Triple = tuple[float, float, float]
Spread = Annotated[float, Field(gt=0)]
Byte = Annotated[int, Field(ge=0, le=255)]
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM")
_ORIENTATION = 0x0112
_Fraction = Annotated[float, Field(gt=0, le=1)]
_Positive = Annotated[float, Field(gt=0)]
_NonNegative = Annotated[float, Field(ge=0)]


class Colour(Section):
    """Colour jitter, with torchvision's meaning of each strength, then greyscale."""

    brightness: _NonNegative = 0.0
    contrast: _NonNegative = 0.0
    saturation: _NonNegative = 0.0
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    p: Share = 0.8
    grayscale_p: Share = 0.0


class Augment(Section):
    """Random resized crop (area share ``scale``, aspect ``ratio``), mirror, colour."""

    scale: tuple[_Fraction, _Fraction] = (0.9, 1.0)
    ratio: tuple[_Positive, _Positive] = (0.75, 4 / 3)
    flip: bool = False
    colour: Colour | None = None


class ImageConfig(Section):
    """``resize``: shortest edge to ``size`` then centre crop; squash; or longest edge, padded with ``pad``. ``naflex``:
    no ``size``; the picture's own aspect in at most ``max_patches`` patches of ``patch`` px (augment.ratio is then
    relative to it)."""

    size: Positive = 224
    mean: Triple = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[Spread, Spread, Spread] = (0.26862954, 0.26130258, 0.27577711)
    interpolation: Literal["bicubic", "bilinear", "lanczos"] = "bicubic"
    resize: Literal["shortest", "squash", "longest", "naflex"] = "shortest"
    patch: Positive = 16
    max_patches: Positive = 256
    crop: Literal["center"] = "center"
    background: tuple[Byte, Byte, Byte] = Field(default=(255, 255, 255), description="what transparent pixels stand on")
    pad: tuple[Byte, Byte, Byte] = Field(default=(0, 0, 0), description="the border that resize: longest adds")
    max_pixels: Positive = Field(default=25_000_000, description="larger pictures are refused before they are decoded")
    augment: Augment = Augment()


@modalities.register("image")
class ImageInput:
    """Pictures as rows uint8 [3, S, S]; ``collate`` → uint8 [B, 3, S, S]. With ``resize: naflex`` rows are grids of
    patches and ``collate`` gives ``patches`` uint8 [B, max_patches, patch · patch · 3] and ``grid`` [B, 2].

    ``eval`` is the resize and crop of torchvision and open_clip, pixel for pixel (PIL, antialiased).
    """

    Config: ClassVar[type[BaseModel]] = ImageConfig
    default_members: ClassVar[list[str]] = ["jpg", "jpeg", "png", "webp", "gif", "bmp"]

    def __init__(self, config: ImageConfig, base_dir: str | Path | None = None) -> None:
        from PIL import Image

        self.config = config
        low, high = config.augment.ratio
        self._smallest = math.sqrt(max(config.augment.scale[0], 1e-3) * min(low, 1 / high, 1.0))
        self._filter = getattr(Image.Resampling, config.interpolation.upper())
        self._naflex = config.resize == "naflex"

    # --- the protocol -----------------------------------------------------------------------------------------

    def decode(self, raw: Any) -> Picture:
        """Read the header and check the size; the pixels are decoded when a view asks for them.

        Raises:
            DecodeError: if it is no picture, or has more than ``max_pixels``.
        """
        if not isinstance(raw, bytes | bytearray | memoryview):
            raise DecodeError(f"a picture must be bytes, got {type(raw).__name__}")
        picture = Picture(bytes(raw), self.config.background)
        width, height = picture.size
        if width * height > self.config.max_pixels:
            raise DecodeError(f"{width}×{height} pixels are more than max_pixels ({self.config.max_pixels:,})")
        return picture

    def train(self, x: Picture, rng: np.random.Generator) -> Tensor:
        """A random resized crop, mirrored and coloured as ``augment`` says → a row."""
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
        """The picture at evaluation → a row."""
        size, image = self.config.size, x.rgb()
        if self._naflex:
            return self._row(image.resize(self._pixels(*image.size), self._filter))
        if self.config.resize == "squash":
            return to_tensor(image.resize((size, size), self._filter))
        w, h = image.size
        if self.config.resize == "shortest":
            wh = (size, int(size * h / w)) if w <= h else (int(size * w / h), size)
        else:
            ratio = max(w, h) / size
            wh = (max(round(w / ratio), 1), max(round(h / ratio), 1))
        if wh != image.size:
            image = image.resize(wh, self._filter)
        return to_tensor(_centre(image, size, self.config.pad))

    def collate(self, rows: list[Tensor]) -> Tensor | dict[str, Tensor]:
        """→ uint8 [B, 3, S, S], or ``patches`` and ``grid``."""
        return stack(rows, self.config.max_patches) if self._naflex else torch.stack(rows)

    def dummy(self) -> Tensor:
        """A black picture."""
        if self._naflex:
            return torch.zeros(*grid(1, 1, 1, self.config.max_patches), 3 * self.config.patch**2, dtype=torch.uint8)
        return torch.zeros(3, self.config.size, self.config.size, dtype=torch.uint8)

    def describe(self) -> dict[str, Any]:
        """The settings; there is nothing else."""
        return {"kind": "image", "config": self.config.model_dump(mode="json")}

    def _pixels(self, width: float, height: float) -> tuple[int, int]:
        """(width, height) of the whole patches that a picture is resized to."""
        rows, columns = grid(int(width), int(height), self.config.patch, self.config.max_patches)
        return columns * self.config.patch, rows * self.config.patch

    def _row(self, image: Image.Image) -> Tensor:
        return cut(image, self.config.patch) if self._naflex else to_tensor(image)


class Picture:
    """An opened picture: its header is read, its pixels not yet.

    Attributes:
        size: (width, height) as shown, that is with the EXIF orientation applied.
    """

    def __init__(self, raw: bytes, background: tuple[int, int, int]) -> None:
        self._raw, self._background = raw, background
        self._cached: tuple[int | None, Image.Image] | None = None
        self._opened = self._open()
        w, h = self._opened.size
        self.size = (h, w) if _orientation(self._opened) in (5, 6, 7, 8) else (w, h)

    def rgb(self, at_least: int | None = None) -> Image.Image:
        """The pixels as RGB, turned as EXIF says, transparency on the background.

        Args:
            at_least: the caller can do with a smaller picture whose shorter edge has this many pixels; JPEGs are then
                decoded at a half, quarter or eighth. None: full size.

        Raises:
            DecodeError: if the data is damaged or cut short.
        """
        if self._cached is not None and self._cached[0] == at_least:
            return self._cached[1]
        from PIL import Image, ImageOps

        image = self._opened if self._cached is None else self._open()
        try:
            if at_least is not None and image.format == "JPEG":
                scale = at_least / min(image.size)
                if scale < 1:
                    image.draft(None, (math.ceil(image.width * scale), math.ceil(image.height * scale)))
            image.load()
            if _orientation(image) != 1:
                image = ImageOps.exif_transpose(image)
            image = _to_rgb(image, self._background)
        except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as e:
            raise DecodeError(f"the picture is damaged or cut short ({e})") from e
        self._cached = (at_least, image)
        return image

    def _open(self) -> Image.Image:
        from PIL import Image, UnidentifiedImageError

        try:
            return Image.open(io.BytesIO(self._raw), formats=_FORMATS)
        except UnidentifiedImageError as e:
            raise DecodeError(f"no {', '.join(_FORMATS)} picture ({len(self._raw)} bytes)") from e
        except Image.DecompressionBombError as e:
            raise DecodeError(f"far too many pixels, refused before decoding ({e})") from e
        except (OSError, ValueError, SyntaxError, EOFError) as e:
            raise DecodeError(f"the picture's header is damaged ({e})") from e


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 (upright) where it is absent or unreadable, as every viewer does."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except (OSError, ValueError, SyntaxError, EOFError, struct.error) as e:
        logger.debug("unreadable EXIF: %s", e)
        return 1
    return value if value in range(1, 9) else 1


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
        raise DecodeError("a floating-point picture has no stated range")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        ground = Image.new("RGBA", rgba.size, (*background, 255))
        return Image.alpha_composite(ground, rgba).convert("RGB")
    return image.convert("RGB")


def to_tensor(image: Image.Image) -> Tensor:
    # A view: stacking makes it contiguous.
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _centre(image: Image.Image, size: int, pad: tuple[int, int, int]) -> Image.Image:
    """Centre crop; where the picture is smaller, pad (an odd pixel goes right and below), as torchvision does."""
    from PIL import Image

    w, h = image.size
    if w < size or h < size:
        ground = Image.new("RGB", (max(w, size), max(h, size)), pad)
        ground.paste(image, (max(size - w, 0) // 2, max(size - h, 0) // 2))
        image, (w, h) = ground, ground.size
    if (w, h) == (size, size):
        return image
    left, top = round((w - size) / 2.0), round((h - size) / 2.0)
    return image.crop((left, top, left + size, top + size))


def _random_crop(
    w: int, h: int, augment: Augment, rng: np.random.Generator, own: float
) -> tuple[float, float, float, float]:
    """A box of random area and aspect inside the picture (Szegedy et al. 2015); after ten misses the whole of it.

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
