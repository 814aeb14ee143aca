"""How far apart the classes are in the features of one modality: no classifier, no prompts, no second split.

``fisher_ratio``: scatter between the classes over scatter within them, tr S_b / tr S_w (Fisher 1936). ``silhouette``
(Rousseeuw 1987): whether an item is nearer to its own class than to the nearest other one, from −1 to 1. Rows have
length 1, so the mean cosine distance of an item to a class is one minus a dot product with the class's mean: both cost
N · C · D, never N². The report that speech models are compared by (seed S53) adds the distances between class means.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from dualenc_evals.metrics.scores import Floats, Ints, block_starts

METRICS = ("fisher_ratio", "silhouette")


def separability(x: Tensor, labels: Ints, classes: int, wanted: list[str]) -> dict[str, float]:
    """Those of :data:`METRICS` that are ``wanted``, of the rows ``x [N, D]`` with class numbers ``labels [N]``."""
    out = {}
    if "fisher_ratio" in wanted:
        out["fisher_ratio"] = fisher_ratio(x, labels, classes)
    if "silhouette" in wanted:
        out["silhouette"] = float(silhouette(x, labels, classes).mean())
    return out


def sums_by_class(x: Tensor, labels: Ints, classes: int) -> tuple[Tensor, Tensor]:
    """(sum of each class's rows [C, D], how many they are [C, 1]) of ``x [N, D]``, fp64."""
    owners = torch.from_numpy(labels)
    sums = torch.zeros(classes, x.shape[1], dtype=torch.float64).index_add_(0, owners, x.double())
    return sums, torch.bincount(owners, minlength=classes)[:, None].double()


def fisher_ratio(x: Tensor, labels: Ints, classes: int) -> float:
    """tr S_b / tr S_w of ``x [N, D]``; times (N − C) / (C − 1) it is the Calinski–Harabasz index.

    NaN where fewer than two classes have items, infinite where the items of every class are equal.
    """
    sums, counts = sums_by_class(x, labels, classes)
    there = counts[:, 0] > 0
    if int(there.sum()) < 2:
        return math.nan
    means = sums / counts.clamp_min(1)
    centre = sums.sum(0) / counts.sum()
    between = float((counts * (means - centre).square()).sum())  # a class without items has the weight 0
    owners = torch.from_numpy(labels)
    within = sum(
        float((x[s:e].double() - means[owners[s:e]]).square().sum()) for s, e in block_starts(len(x), x.shape[1])
    )
    return between / within if within > 0 else math.inf


def silhouette(x: Tensor, labels: Ints, classes: int) -> Floats:
    """[N] (b − a) / max(a, b): a is the mean cosine distance to the other items of the item's own class, b that to the
    nearest other class. As in scikit-learn, the only item of a class has 0.

    Args:
        x: [N, D] rows of length 1; labels: [N]. With items of one class alone every value is NaN.
    """
    sums, counts = sums_by_class(x, labels, classes)
    out = np.full(len(x), math.nan)
    if int((counts > 0).sum()) < 2:
        return out
    for s, e in block_starts(len(x), classes + x.shape[1]):
        d = x[s:e].double()
        own = torch.from_numpy(labels[s:e])[:, None]
        dots = d @ sums.T
        others = counts[:, 0][own] - 1
        # An item's distance to itself counts as 0, whatever its norm rounds to.
        near = 1 - (dots.gather(1, own) - d.square().sum(1, keepdim=True)) / others.clamp_min(1)
        far = (1 - dots / counts.T.clamp_min(1)).masked_fill(counts.T == 0, torch.inf)
        next_class = far.scatter(1, own, torch.inf).amin(1, keepdim=True)
        value = (next_class - near) / torch.maximum(near, next_class).clamp_min(1e-12)
        out[s:e] = torch.where(others > 0, value, 0.0)[:, 0].numpy()
    return out


def centroid_distances(x: Tensor, labels: Ints, classes: int) -> list[list[float | None]]:
    """[C][C] cosine distances between the mean features of every two classes; None for a class without items."""
    sums, counts = sums_by_class(x, labels, classes)
    means = torch.nn.functional.normalize(sums, dim=1)
    distances = (1 - means @ means.T).fill_diagonal_(0.0).clamp_min(0)
    there = (counts[:, 0] > 0).tolist()
    return [
        [round(v, 4) if there[i] and there[j] else None for j, v in enumerate(row)]
        for i, row in enumerate(distances.tolist())
    ]
