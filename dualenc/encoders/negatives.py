"""Rows that bring further items of their own, such as texts that are wrong for them: encoded with the rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

NEGATIVES = "negatives"
"""Key of the collated rows, and the group of the model's outputs."""


def joined(x: Any) -> tuple[Any, int]:
    """The collated rows and their negatives as rows of one batch, and K, the negatives of each row (0: there are none).

    They go through the tower together, in one forward: engines that shard parameters count forwards.
    """
    if not isinstance(x, Mapping) or NEGATIVES not in x:
        return x, 0
    of_rows = x[NEGATIVES]
    k = next(iter(of_rows.values())).shape[1]
    return {name: torch.cat([x[name], v.flatten(0, 1)]) for name, v in of_rows.items()}, k


def parted(said: Mapping[str, Tensor], k: int) -> dict[str, Tensor]:
    """A tower's outputs of :func:`joined` rows → those of the n rows, and ``negatives``: [n, K, D] unit rows."""
    if not k:
        return dict(said)
    n = len(said["features"]) // (1 + k)
    wrong = nn.functional.normalize(said["features"][n:].float(), dim=-1).view(n, k, -1)
    return {name: v[:n] for name, v in said.items()} | {NEGATIVES: wrong}
