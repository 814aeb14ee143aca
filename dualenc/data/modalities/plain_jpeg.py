"""Plain JPEGs without Pillow: their header read here, their pixels decoded by libjpeg-turbo, resized by torch.

Plain: 8 bits, grey or YCbCr, no Adobe marker. Pillow reads everything else, and everything that libjpeg-turbo objects
to: what is damaged, and what is said of it, is decided in one place. simplejpeg and Pillow both bring libjpeg-turbo and
ask it for the same transform, so the decoded pixels are equal.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Pixels = NDArray[np.uint8]
Box = tuple[int, int, int, int]

_SOF = (0xC0, 0xC1, 0xC2)
"""Frames of baseline, extended and progressive Huffman coding."""
_TABLES = (0xC4, 0xDB, 0xDD)
"""Huffman and quantization tables, restart interval."""
_APPS = range(0xE0, 0xF0)
_SOS, _APP0, _APP14, _COM = 0xDA, 0xE0, 0xEE, 0xFE
_GREY, _YCBCR = 1, 3
_JFIF = 18
"""Bytes of JFIF's segment without a thumbnail."""
SCALES = (8, 4, 2)


class Head(NamedTuple):
    """What is known of a plain JPEG before it is decoded; ``bare``: there is nothing in it but JFIF's own header."""

    width: int
    height: int
    bare: bool


def read_head(raw: bytes) -> Head | None:
    """The size of a plain JPEG; None for any other bytes.

    Not plain: Adobe's marker (CMYK, or RGB without a transform), other component ids than JFIF's, 12 bits, arithmetic
    coding, a header that is not in order. Metadata (EXIF, XMP, ICC, MPO …) is not read here: the head is not bare then.
    """
    if raw[:3] != b"\xff\xd8\xff":
        return None
    at, end, bare = 2, len(raw), True
    size: tuple[int, int] | None = None
    while at + 4 <= end and raw[at] == 0xFF:
        kind = raw[at + 1]
        stop = at + 2 + ((raw[at + 2] << 8) | raw[at + 3])
        if stop < at + 4 or stop > end:
            return None
        if kind == _SOS:
            return None if size is None else Head(*size, bare)
        if kind in _SOF and size is None:
            size = _frame(raw[at + 4 : stop])
            if size is None:
                return None
        elif kind == _APP14 or (kind not in _TABLES and kind not in _APPS and kind != _COM):
            return None
        elif kind in _APPS:
            bare = bare and kind == _APP0 and stop - at == _JFIF and raw.startswith(b"JFIF\0", at + 4)
        at = stop
    return None


def _frame(body: bytes) -> tuple[int, int] | None:
    """(width, height) in a frame header of 8 bits, grey or YCbCr; else None."""
    if len(body) < 6 or body[0] != 8:
        return None
    height, width, parts = (body[1] << 8) | body[2], (body[3] << 8) | body[4], body[5]
    ids = body[6::3]
    if not width or not height or len(body) != 6 + 3 * parts:
        return None
    return (width, height) if parts == _GREY or (parts == _YCBCR and ids == b"\x01\x02\x03") else None


def reduction(size: tuple[int, int], at_least: int | None) -> int:
    """The factor (1, 2, 4 or 8) that Pillow's ``draft`` decodes at for a shorter edge of ``at_least`` pixels."""
    width, height = size
    if at_least is None or at_least >= min(width, height):
        return 1
    scale = at_least / min(width, height)  # as Picture.rgb asks for it
    fits = min(width // math.ceil(width * scale), height // math.ceil(height * scale))
    return next((s for s in SCALES if fits >= s), 1)


def decoded(raw: bytes, head: Head, by: int) -> Pixels | None:
    """uint8 [H / by, W / by, 3]; None where simplejpeg is missing or has any objection to the bytes."""
    decode = _decoder()
    if decode is None:
        return None
    width, height = -(-head.width // by), -(-head.height // by)
    try:
        if by == 1:
            pixels: Pixels = decode(raw)
        else:
            pixels = decode(raw, min_height=height, min_width=width, min_factor=by)
    except Exception:  # noqa: BLE001 – Pillow reads it next and raises what is to be raised
        return None
    return pixels if pixels.shape == (height, width, 3) else None


@cache
def _decoder() -> Any:
    if importlib.util.find_spec("simplejpeg") is None:
        return None
    return importlib.import_module("simplejpeg").decode_jpeg


def resized(pixels: Pixels, box: Box, wh: tuple[int, int], mode: str, mirrored: bool = False) -> Tensor:
    """The part in ``box`` (left, top, right, bottom) resized to ``wh`` → uint8 [3, h, w], contiguous.

    Antialiased like Pillow, in 16-bit fixed-point weights (Pillow: 22 bits), and from the pixels in the box alone, as
    open_clip and torchvision do, which cut first (Pillow's ``resize(box=…)`` looks beyond the box).

    Args:
        mode: bicubic or bilinear.
    """
    left, top, right, bottom = box
    part = torch.from_numpy(pixels[top:bottom, left:right]).permute(2, 0, 1)
    if (right - left, bottom - top) != wh:
        size = (wh[1], wh[0])
        part = torch.nn.functional.interpolate(part[None], size=size, mode=mode, antialias=True)[0]
    return part.flip(2) if mirrored else part.contiguous()
