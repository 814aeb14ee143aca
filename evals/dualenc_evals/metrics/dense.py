"""Numbers of class maps: where a pixel of the original image is in what a model saw, its scores there, mean IoU."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dualenc.data.modalities.image import ImageConfig
from dualenc.errors import ConfigError
from dualenc_evals.metrics.scores import Floats, Ints, class_ranks


def positions(config: ImageConfig, width: int, height: int, x: Ints, y: Ints) -> Floats:
    """[n, 2] where the centres of pixels (x, y) of a ``width`` × ``height`` image are in the square that ``config``'s
    resizing makes of it, from −1 to 1 along either edge; beyond that they were cut off.

    Raises:
        ConfigError: the input has no square.
    """
    size, edge = config.size, config.shortest_edge or config.size
    if config.resize == "naflex":
        raise ConfigError("dense: a model with input.resize: naflex has no fixed grid of places; use another resize")
    if config.resize == "squash":
        wh = (edge, edge)
    elif config.resize == "shortest":
        wh = (edge, int(edge * height / width)) if width <= height else (int(edge * width / height), edge)
    else:
        ratio = max(width, height) / size
        wh = (max(round(width / ratio), 1), max(round(height / ratio), 1))
    columns = []
    for at, whole, resized in ((x, width, wh[0]), (y, height, wh[1])):
        cut = resized - size
        start = cut // 2 if config.centre == "floor" else round(cut / 2)
        start = -(-cut // 2) if cut < 0 else start  # a border is added: an odd pixel goes right and below
        columns.append(((at + 0.5) * resized / whole - start) / size * 2 - 1)
    return np.stack(columns, 1)


def scores_at(scores: Tensor, at: Floats) -> Tensor:
    """[n, C] the maps ``scores [h, w, C]`` at positions ``at [n, 2]`` (x, y; −1 … 1), bilinear between the centres of
    places, as of the nearest ones beyond them."""
    grid = torch.from_numpy(at).float()[None, None]
    maps = scores.permute(2, 0, 1)[None]
    found = torch.nn.functional.grid_sample(maps, grid, "bilinear", "border", align_corners=False)
    return found[0, :, 0].T


def counts(scores: Tensor, truth: Ints, classes: int) -> Ints:
    """[3, classes]: pixels of each class that are right, all that are predicted as it, all that are of it; a tie is
    wrong. ``scores [n, classes]``, ``truth [n]``."""
    out = np.zeros((3, classes), dtype=np.int64)
    if len(truth):
        _, predicted = class_ranks(scores, truth)
        for row, chosen in enumerate((truth[predicted == truth], predicted, truth)):
            out[row] = np.bincount(chosen, minlength=classes)
    return out


def ious(summed: Floats | Ints) -> Floats:
    """[C] intersection over union of ``summed [3, C]``, as :func:`counts`; NaN for a class without a pixel of it."""
    right, predicted, there = summed
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(there > 0, right / (predicted + there - right), np.nan)


def mean_iou(by_image: Ints) -> Callable[[Floats], float]:
    """The mean IoU over classes as a function of the weights [N] of images; ``by_image [N, 3, C]``."""
    flat = by_image.reshape(len(by_image), -1).astype(np.float64)

    def statistic(weights: Floats) -> float:
        each = ious((weights @ flat).reshape(3, -1))
        return float(np.nanmean(each)) if np.isfinite(each).any() else float("nan")

    return statistic


def chance_iou(there: Ints) -> float:
    """Mean IoU of guessing each pixel's class at random; ``there [C]`` pixels of each class."""
    share = there[there > 0] / there.sum()
    guess = 1 / len(there)
    return float(np.mean(share * guess / (share + guess - share * guess)))
