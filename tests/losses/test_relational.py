"""Rows that follow a locked tower's rows: against a loop, and its minimum."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from _papers import Items, compare, total

from dualenc.config import Component
from dualenc.errors import ConfigError
from dualenc.losses import Extras, build_loss


def test_value_and_gradient_equal_a_loop() -> None:
    def loop(i: int, c: list[Tensor], s: Tensor, items: Items) -> Tensor:
        e = [torch.exp(items.frozen[i] @ items.frozen[j] / 0.2) for j in range(len(c))]
        log_z = torch.log(total([torch.exp(s * x) for x in c]))
        return -total([e[j] / total(e) * (s * c[j] - log_z) for j in range(len(c))])

    compare({"name": "relational", "temperature": 0.2}, loop)


@pytest.mark.parametrize("impl", ["plain", "tiled"])
def test_a_student_that_equals_the_frozen_tower_has_no_excess_and_no_gradient(impl: str) -> None:
    f = torch.nn.functional.normalize(torch.randn(9, 5, dtype=torch.float64), dim=1)
    a, scale = f.clone().requires_grad_(), torch.tensor([5.0], dtype=torch.float64, requires_grad=True)
    loss = build_loss(Component(name="relational", temperature=0.2, impl=impl))
    out = loss(a, f, torch.arange(9), scale, None, Extras(("image", "text"), {}, {"frozen": f}))
    assert abs(float(out.metrics["excess_ab"])) < 1e-12
    for g in torch.autograd.grad(out.value, (a, scale)):
        assert float(g.abs().max()) < 1e-12


def test_without_a_locked_tower_it_says_what_to_write() -> None:
    with pytest.raises(ConfigError, match=r"modalities\.NAME\.lock: true"):
        build_loss(Component(name="relational"))(torch.eye(3), torch.eye(3), torch.arange(3), torch.ones(1))
