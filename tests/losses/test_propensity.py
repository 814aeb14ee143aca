"""Inverse-propensity weights of negatives against a loop; constant propensities are InfoNCE."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from _papers import Items, compare, total, value

from dualenc.errors import ConfigError


@pytest.mark.parametrize("semantic", [0.0, 0.4])
def test_value_and_gradient_equal_a_loop(semantic: float) -> None:
    def p(items: Items, i: int, j: int) -> float:
        x, y = items.labels["length"][i], items.labels["length"][j]
        surface = 0.5 if math.isnan(x) or math.isnan(y) else math.exp(-abs(x - y) / 2)
        meaning = (float(items.frozen[i] @ items.frozen[j]) + 1) / 2
        return 0.1 + 0.9 * ((1 - semantic) * surface + semantic * meaning)

    def loop(i: int, c: list[Tensor], s: Tensor, items: Items) -> Tensor:
        positives, negatives = items.positives(i), items.negatives(i)
        w = [1 / p(items, i, j) for j in negatives]
        weights = [x * len(w) / sum(w) for x in w]
        z = total([torch.exp(s * c[j]) for j in positives])
        z = z + total([v * torch.exp(s * c[j]) for v, j in zip(weights, negatives, strict=True)])
        return torch.log(z) - total([s * c[j] for j in positives]) / len(positives)

    compare({"name": "propensity", "width": 2.0, "semantic": semantic}, loop)


def test_equal_lengths_and_a_floor_of_one_are_info_nce() -> None:
    plain = value({"name": "info_nce"})
    same = torch.full((12,), 7.0, dtype=torch.float64)
    torch.testing.assert_close(value({"name": "propensity"}, length=same), plain)
    torch.testing.assert_close(value({"name": "propensity", "floor": 1.0}), plain)
    assert abs(float(value({"name": "propensity", "width": 0.5}) - plain)) > 1e-3


def test_errors_say_what_to_write() -> None:
    with pytest.raises(ConfigError, match="one number per sample, and 'words' is a list"):
        value({"name": "propensity", "label": "words"})
