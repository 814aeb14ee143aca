"""HCL and HN-NCE against loops from the papers, and where they are InfoNCE."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from _papers import Items, compare, total, value


@pytest.mark.parametrize(
    ("beta", "alpha", "tau"), [(0.25, 1.0, 0.0), (1.0, 0.9, 0.0), (1.0, 1.0, 0.1), (0.5, 1.0, 0.6)]
)
def test_value_and_gradient_equal_the_papers(beta: float, alpha: float, tau: float) -> None:
    """τ⁺ = 0.6 is so large that the floor exp(−s) holds in some rows."""

    def loop(i: int, c: list[Tensor], s: Tensor, items: Items) -> Tensor:
        positives, negatives = items.positives(i), items.negatives(i)
        e = [torch.exp(s * x) for x in c]
        importance = [torch.exp(beta * s * c[j]) for j in negatives]
        mean = total([w * e[j] for w, j in zip(importance, negatives, strict=True)]) / total(importance)
        of_positives = total([e[j] for j in positives])
        if tau:
            mean = torch.maximum((mean - tau * of_positives / len(positives)) / (1 - tau), torch.exp(-s))
        wanted = total([s * c[j] for j in positives]) / len(positives)
        return torch.log(alpha * of_positives + len(negatives) * mean) - wanted

    compare({"name": "hcl", "beta": beta, "alpha": alpha, "tau_plus": tau}, loop)


def test_without_hardness_it_is_info_nce() -> None:
    torch.testing.assert_close(value({"name": "hcl", "beta": 0.0}), value({"name": "info_nce"}))
    assert float(value({"name": "hcl", "beta": 1.0})) > float(value({"name": "hcl", "beta": 0.1}))


def test_great_hardness_leaves_the_hardest_negative_alone() -> None:
    """w → the number of negatives at the hardest: −z_ii + log(e^z_ii + m e^max)."""
    a, b = torch.eye(3, dtype=torch.float64), torch.tensor([[0.8, 0.6, 0], [0, 0.8, 0.6], [0.6, 0, 0.8]]).double()
    from dualenc.config import Component
    from dualenc.losses import build_loss

    got = build_loss(Component(name="hcl", beta=500.0))(a, b, torch.arange(3), torch.tensor([2.0]).double()).value
    want = torch.log(torch.exp(torch.tensor(1.6)) + 2 * torch.exp(torch.tensor(1.2))) - 1.6
    assert float(got) == pytest.approx(float(want), abs=1e-6)
