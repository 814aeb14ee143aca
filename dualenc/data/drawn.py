"""Points drawn over the picture they fall into: near ones red, far ones blue."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dualenc.data.driving.geometry import F64

if TYPE_CHECKING:
    from PIL import Image

SHOWN = 5000
"""Points drawn over a picture, about."""
FAR = 60.0
"""Metres at which the colours end."""
_STOPS = np.array([[255, 70, 40], [255, 200, 40], [80, 220, 100], [60, 170, 255], [90, 70, 220]], float)


def colours(metres: F64, far: float = FAR) -> npt.NDArray[np.uint8]:
    """[n] → [n, 3]."""
    place = np.clip(metres / far, 0, 1) * (len(_STOPS) - 1)
    return np.stack([np.interp(place, range(len(_STOPS)), _STOPS[:, c]) for c in range(3)], 1).astype(np.uint8)


def points_over(image: Image.Image, uv: F64, depth: F64, width: int, far: float = FAR, dot: float = 0.6) -> Image.Image:
    """The picture at ``width`` pixels with a dot for every point: ``uv [n, 2]`` in its own pixels, ``depth [n]`` in m.

    Near points are drawn last, over far ones; of a dense sweep a part, so that the picture is still seen.
    """
    from PIL import Image, ImageDraw

    scale = width / image.width
    image = image.resize((width, max(1, round(image.height * scale))), Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(image)
    order = np.argsort(-depth)[:: 1 + len(depth) // SHOWN]
    for (u, v), colour in zip((uv * scale)[order], colours(depth, far)[order], strict=True):
        draw.rectangle([u - dot, v - dot, u + dot, v + dot], fill=tuple(colour))
    return image


def uri(image: Image.Image) -> str:
    """As a ``data:`` address of a WebP."""
    out = io.BytesIO()
    image.save(out, "WEBP", quality=85, method=2)
    return "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode("ascii")
