"""Rows that bring further items of their own, such as texts that are wrong for them: encoded with the rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dualenc.encoders.tower import Tower

NEGATIVES = "negatives"
"""Key of the collated rows, and the group of the model's outputs."""


def outputs_with_negatives(tower: Tower, x: Any) -> dict[str, Tensor]:
    """The tower's outputs of the rows; where they have ``negatives``, the group of that name too: [n, K, D] unit rows.

    Rows and negatives go through the tower together, in one forward: engines that shard parameters count forwards.
    """
    if not isinstance(x, Mapping) or NEGATIVES not in x:
        said: dict[str, Tensor] = tower(x, whole=True)
        return said
    of_rows = x[NEGATIVES]
    n, k = next(iter(of_rows.values())).shape[:2]
    said = tower({name: torch.cat([x[name], v.flatten(0, 1)]) for name, v in of_rows.items()}, whole=True)
    wrong = nn.functional.normalize(said["features"][n:].float(), dim=-1).view(n, k, -1)
    return {name: v[:n] for name, v in said.items()} | {NEGATIVES: wrong}
