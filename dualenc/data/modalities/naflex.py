"""Images as grids of patches that keep the aspect ratio (NaFlex: SigLIP 2, arXiv 2502.14786)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image


def grid(width: int, height: int, patch: int, limit: int) -> tuple[int, int]:
    """The largest grid of at most ``limit`` patches for an image of this size → (rows, columns), each at least 1.

    Both edges are scaled alike and rounded up to whole patches. The scale is found by bisection, to 1e-5 and up to 100,
    as transformers does: an exact solution would differ by a row for a few images in a thousand.
    """

    def at(scale: float) -> tuple[int, int]:
        return max(math.ceil(scale * height / patch), 1), max(math.ceil(scale * width / patch), 1)

    low, high = 1e-6, 100.0
    while high - low >= 1e-5:
        middle = (low + high) / 2
        rows, columns = at(middle)
        low, high = (middle, high) if rows * columns <= limit else (low, middle)
    return at(low)


def cut(image: Image.Image, patch: int) -> Tensor:
    """An image whose edges are whole patches → uint8 [rows, columns, patch · patch · 3], channels innermost."""
    pixels = np.asarray(image)
    rows, columns = pixels.shape[0] // patch, pixels.shape[1] // patch
    blocks = pixels.reshape(rows, patch, columns, patch, 3).transpose(0, 2, 1, 3, 4)
    return torch.from_numpy(np.ascontiguousarray(blocks)).view(rows, columns, -1)


def stack(rows: list[Tensor], length: int) -> dict[str, Tensor]:
    """Images [rows, columns, width] → ``patches`` uint8 [n, length, width], zeros after the last one, and ``grid``
    int64 [n, 2]."""
    patches = torch.zeros(len(rows), length, rows[0].shape[-1], dtype=torch.uint8)
    for k, row in enumerate(rows):
        patches[k, : row.shape[0] * row.shape[1]] = row.flatten(0, 1)
    return {"patches": patches, "grid": torch.tensor([row.shape[:2] for row in rows])}
