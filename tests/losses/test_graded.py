"""Targets graded by a tree against a loop, and where they are SupCon's and InfoNCE's."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from _papers import Items, compare, total, value

from dualenc.errors import ConfigError


@pytest.mark.parametrize(("weights", "power"), [(None, 1.0), ([0.5, 1.0, 2.0], 2.0)])
def test_value_and_gradient_equal_a_loop(weights: list[float] | None, power: float) -> None:
    w = weights or [1.0] * 3

    def score(items: Items, i: int, j: int) -> float:
        x, y = items.labels["tree"][i], items.labels["tree"][j]
        if items.ids[i] == items.ids[j]:
            return 1.0
        depth = max(sum(v for v, p in zip(w, path, strict=True) if p != -1) for path in (x, y))
        return (sum(v for v, p, q in zip(w, x, y, strict=True) if p == q != -1) / depth) ** power if depth else 0.0

    def loop(i: int, c: list[Tensor], s: Tensor, items: Items) -> Tensor:
        t = [score(items, i, j) for j in range(len(c))]
        log_z = torch.log(total([torch.exp(s * x) for x in c]))
        return -total([t[j] / sum(t) * (s * c[j] - log_z) for j in range(len(c))])

    compare({"name": "graded", "level_weights": weights, "power": power}, loop)


def test_paths_that_agree_or_differ_at_the_root_are_supcon() -> None:
    groups = torch.arange(12) // 3
    tree = groups[:, None].expand(-1, 2).contiguous()
    torch.testing.assert_close(value({"name": "graded"}, tree=tree), value({"name": "supcon"}, label=groups))
    alone = torch.arange(12)[:, None]
    torch.testing.assert_close(value({"name": "graded"}, tree=alone), value({"name": "info_nce"}))


def test_errors_say_what_to_write() -> None:
    with pytest.raises(ConfigError, match="'tree' is one value per sample; give it type: tree"):
        value({"name": "graded"}, tree=torch.arange(12))
    with pytest.raises(ConfigError, match="level_weights has 2 numbers for a tree of 3 levels"):
        value({"name": "graded", "level_weights": [1, 2]})
