"""Images: JPEG, PNG, WebP, AVIF, TIFF … → uint8 RGB; mean and std are kept here and applied on the device."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import BaseModel, Field, SerializerFunctionWrapHandler, model_serializer, model_validator
from torch import Tensor
from torch.utils.data import default_collate

from dualenc.config import Positive, Section, Share
from dualenc.data.batch import ABSENT
from dualenc.data.modalities.modality import DecodeError, modalities
from dualenc.data.modalities.naflex import cut, grid, stack
from dualenc.data.modalities.picture import Picture, png_of
from dualenc.data.modalities.plain_jpeg import Box, resized

if TYPE_CHECKING:
    from PIL import Image

Triple = tuple[float, float, float]
Spread = Annotated[float, Field(gt=0)]
Byte = Annotated[int, Field(ge=0, le=255)]
_WORST_ASPECT = 16
"""Images with a more extreme aspect ratio are cropped before they are resized: otherwise 60,000 × 1 pixels would become
13 million pixels wide."""
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


class Blur(Section):
    """Gaussian blur (SimCLR, Chen et al. 2020)."""

    p: Share = Field(default=0.5, description="share of images that are blurred")
    sigma: tuple[_Positive, _Positive] = Field(default=(0.1, 2.0), description="range of the radius in px of the row")


class ImageAugment(Section):
    """Random resized crop (fraction of the area ``scale``, aspect ``ratio``), horizontal flip, colour jitter, blur,
    solarizing (BYOL, Grill et al. 2020: values from 128 on are inverted). ``quarter_turns`` is for a view whose turn a
    loss asks for (``rotation``)."""

    scale: tuple[_Fraction, _Fraction] = Field(default=(0.9, 1.0), description="range of the crop's share of the area")
    ratio: tuple[_Positive, _Positive] = Field(default=(0.75, 4 / 3), description="range of the crop's aspect ratio")
    flip: bool = Field(default=False, description="mirror half of the images left and right")
    colour: Colour | None = Field(default=None, description="colour jitter; null: none")
    blur: Blur | None = Field(default=None, description="Gaussian blur; null: none")
    solarize_p: Share = Field(default=0.0, description="share of images whose bright values are inverted")
    quarter_turns: bool = Field(
        default=False, description="turn each image by 0, 90, 180 or 270 degrees, and tell losses by which of them"
    )

    @model_serializer(mode="wrap")
    def _as_before(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what is left out: descriptions are those that were saved before it existed."""
        out: dict[str, Any] = write(self)
        idle = {"blur": None, "solarize_p": 0, "quarter_turns": False}
        return {k: v for k, v in out.items() if k not in idle or v != idle[k]}

    @property
    def on_pixels(self) -> bool:
        """Whether pixels are changed after the crop."""
        return self.colour is not None or self.blur is not None or self.solarize_p > 0


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
        description="before the centre is cut, resize: shortest scales the shorter edge to this, squash both; default: "
        "size (DINOv2: 256 for size 224)",
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
    decode: Literal["reference", "fast"] = Field(
        default="reference",
        description="training pixels: reference is Pillow's; fast resizes with torch and decodes JPEGs with simplejpeg "
        "(the fast extra): the same crops, three times the speed, values that differ by 0.01 of 255 on average",
    )
    eval_decode: Literal["reference", "fast"] = Field(
        default="reference", description="the same for evaluation and embedding; fast moves published numbers"
    )
    augment: ImageAugment = Field(default=ImageAugment(), description="training only")

    @model_validator(mode="after")
    def _turns_squares(self) -> Self:
        if self.augment.quarter_turns and self.resize == "naflex":
            raise ValueError("augment.quarter_turns needs square images, which resize: naflex does not make")
        return self


@modalities.register("image")
class ImageInput:
    """Images as rows uint8 [3, S, S]; ``collate`` → uint8 [B, 3, S, S]. With ``resize: naflex`` rows are grids of
    patches and ``collate`` gives ``patches`` uint8 [B, max_patches, patch · patch · 3] and ``grid`` [B, 2]. With
    ``augment.quarter_turns`` training rows are ``pixels`` with the label ``turns``, by how many quarters an image was
    turned against the clock: 0 to 3.

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
        # torch has no Lanczos
        fast = config.interpolation != "lanczos"
        self._fast = fast and config.decode == "fast"
        self._fast_eval = fast and config.eval_decode == "fast" and not self._naflex

    # --- the protocol -----------------------------------------------------------------------------------------

    def decode(self, raw: Any) -> Picture:
        """Read the header and check the size; the pixels are decoded when a view asks for them.

        Raises:
            DecodeError: if it is not an image, or has more than ``max_pixels``.
        """
        if not isinstance(raw, bytes | bytearray | memoryview):
            raise DecodeError(f"an image must be bytes, got {type(raw).__name__}")
        picture = Picture(bytes(raw), self.config.background, self._fast or self._fast_eval)
        width, height = picture.size
        if width * height > self.config.max_pixels:
            raise DecodeError(f"{width}×{height} pixels are more than max_pixels ({self.config.max_pixels:,})")
        return picture

    def train(self, x: Picture, rng: np.random.Generator) -> Any:
        """A random resized crop, flipped, changed and turned as ``augment`` says → a row."""
        row = self._train(x, rng)
        if not self.config.augment.quarter_turns:
            return row
        turns = int(rng.integers(4))
        return _turned(torch.rot90(row, turns, (1, 2)), turns)

    def _train(self, x: Picture, rng: np.random.Generator) -> Tensor:
        from PIL import Image

        augment = self.config.augment
        size = min(self._pixels(*x.size)) if self._naflex else self.config.size
        # The smallest crop keeps half again as many pixels as the row: enough for the filter to average, and a large
        # JPEG is decoded at 1/2, 1/4 or 1/8.
        least = math.ceil(1.5 * size / self._smallest)
        if self._fast:
            return self._train_fast(x, rng, least)
        image = x.rgb(at_least=least)
        own = image.width / image.height if self._naflex else 1.0
        box = _random_crop(image.width, image.height, augment, rng, own)
        wh = self._pixels(box[2] - box[0], box[3] - box[1]) if self._naflex else (size, size)
        image = image.resize(wh, self._filter, box=box)
        if augment.flip and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return self._row(changed(image, augment, rng))

    def _train_fast(self, x: Picture, rng: np.random.Generator, least: int) -> Tensor:
        """:meth:`_train` with ``decode: fast``: the same draws, so the same crops."""
        from PIL import Image

        augment, size = self.config.augment, self.config.size
        pixels = x.pixels(least)
        height, width = pixels.shape[:2]
        box = _random_crop(width, height, augment, rng, width / height if self._naflex else 1.0)
        wh = self._pixels(box[2] - box[0], box[3] - box[1]) if self._naflex else (size, size)
        mirrored = augment.flip and rng.random() < 0.5
        row = resized(pixels, box, wh, self.config.interpolation, mirrored)
        if not augment.on_pixels and not self._naflex:
            return row
        image = Image.fromarray(np.ascontiguousarray(row.permute(1, 2, 0).numpy()))
        return self._row(changed(image, augment, rng))

    def _resize(self, x: Picture, wh: tuple[int, int]) -> Image.Image:
        """The whole image resized for evaluation."""
        if not self._fast_eval:
            image = x.rgb()
            return image if wh == image.size else image.resize(wh, self._filter)
        from PIL import Image

        pixels = x.pixels(None)
        row = resized(pixels, (0, 0, pixels.shape[1], pixels.shape[0]), wh, self.config.interpolation)
        return Image.fromarray(np.ascontiguousarray(row.permute(1, 2, 0).numpy()))

    def eval(self, x: Picture) -> Tensor:
        """The image resized and cropped as ``resize`` says → a row."""
        size = self.config.size
        w, h = x.size
        if self._naflex:
            return self._row(x.rgb().resize(self._pixels(w, h), self._filter))
        if self.config.resize == "squash":
            edge = self.config.shortest_edge or size
            return to_tensor(_centre(self._resize(x, (edge, edge)), size, self.config.pad, self.config.centre))
        if self.config.resize == "shortest":
            edge = self.config.shortest_edge or size
            wh = (edge, int(edge * h / w)) if w <= h else (int(edge * w / h), edge)
        else:
            ratio = max(w, h) / size
            wh = (max(round(w / ratio), 1), max(round(h / ratio), 1))
        if max(wh) > _WORST_ASPECT * size:
            return to_tensor(_resized_centre(x.rgb(), wh, size, self._filter))
        return to_tensor(_centre(self._resize(x, wh), size, self.config.pad, self.config.centre))

    def collate(self, rows: list[Any]) -> Any:
        """→ uint8 [B, 3, S, S], or ``patches`` and ``grid``, or ``pixels`` and ``labels``; a data worker copies rows
        straight into shared memory."""
        return stack(rows, self.config.max_patches) if self._naflex else default_collate(rows)

    def dummy(self) -> Any:
        """A black image."""
        if self._naflex:
            return torch.zeros(*grid(1, 1, 1, self.config.max_patches), 3 * self.config.patch**2, dtype=torch.uint8)
        row = torch.zeros(3, self.config.size, self.config.size, dtype=torch.uint8)
        return _turned(row, ABSENT) if self.config.augment.quarter_turns else row

    def describe(self) -> dict[str, Any]:
        """The kind and its settings; ``decode`` and ``eval_decode`` are left out where they are reference, as they were
        before there was a choice."""
        config = self.config.model_dump(mode="json")
        for key in ("decode", "eval_decode"):
            if config[key] == "reference":
                del config[key]
        return {"kind": "image", "config": config}

    def as_raw(self, x: Any, rate: int | None = None) -> bytes | None:
        """A PIL image, or uint8 [H, W], [H, W, 3] or [H, W, 4] → the bytes of a PNG."""
        return png_of(x)

    def _pixels(self, width: float, height: float) -> tuple[int, int]:
        """(width, height) in pixels that an image is resized to: whole patches."""
        rows, columns = grid(int(width), int(height), self.config.patch, self.config.max_patches)
        return columns * self.config.patch, rows * self.config.patch

    def _row(self, image: Image.Image) -> Tensor:
        return cut(image, self.config.patch) if self._naflex else to_tensor(image)


def _turned(row: Tensor, turns: int) -> dict[str, Any]:
    """A row that says by how many quarters it was turned."""
    return {"pixels": row, "labels": {"turns": turns}}


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


def _random_crop(w: int, h: int, augment: ImageAugment, rng: np.random.Generator, own: float) -> Box:
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


def changed(image: Image.Image, augment: ImageAugment, rng: np.random.Generator) -> Image.Image:
    """The crop with colours, blur and solarizing as ``augment`` says; what is left out draws nothing."""
    from PIL import ImageFilter, ImageOps

    if augment.colour is not None:
        image = coloured(image, augment.colour, rng)
    if augment.blur is not None and rng.random() < augment.blur.p:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(*augment.blur.sigma)))
    if augment.solarize_p > 0 and rng.random() < augment.solarize_p:
        image = ImageOps.solarize(image, 128)
    return image


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
