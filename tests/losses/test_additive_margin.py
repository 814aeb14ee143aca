"""The additive margin against a loop from the paper, and where it is InfoNCE."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from _papers import Items, compare, nce, value


@pytest.mark.parametrize("margin", [0.3, 1.0])
def test_value_and_gradient_equal_the_papers(margin: float) -> None:
    def loop(i: int, c: list[Tensor], s: Tensor, items: Items) -> Tensor:
        positives = items.positives(i)
        return nce(i, [x - margin * (j in positives) for j, x in enumerate(c)], s, positives)

    compare({"name": "additive_margin", "margin": margin}, loop)


def test_without_a_margin_it_is_info_nce_and_a_margin_costs() -> None:
    plain = value({"name": "info_nce"})
    torch.testing.assert_close(value({"name": "additive_margin", "margin": 0.0}), plain)
    assert float(value({"name": "additive_margin"})) > float(plain)
