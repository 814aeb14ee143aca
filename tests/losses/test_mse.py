"""Squared distance against a loop: value, gradient, absent rows, ranks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
from _spawn import spawn

from dualenc.config import Component
from dualenc.distributed.world import World
from dualenc.losses import build_loss
from dualenc.losses.mse import mse

IDS = [3, -1, 5, 3, 7, -1]


def made() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    a, b = (torch.nn.functional.normalize(torch.randn(6, 5, generator=g, dtype=torch.float64), dim=-1) for _ in "ab")
    return a.requires_grad_(), b, torch.tensor(IDS)


def naive(a: Tensor, b: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for i, one in enumerate(IDS):
        if one >= 0:
            for k in range(a.shape[1]):
                total = total + (a[i, k] - b[i, k]) ** 2
    return total / sum(i >= 0 for i in IDS)


def test_value_and_gradient() -> None:
    a, b, ids = made()
    out, want = mse(a, b, ids), naive(a, b)
    torch.testing.assert_close(out.value, want)
    torch.testing.assert_close(*(torch.autograd.grad(x, a)[0] for x in (out.value, want)))
    assert float(out.value.detach()) == pytest.approx(2 - 2 * float(out.metrics["cosine"]))
    with torch.no_grad():
        assert float(mse(a, a, ids).value) == 0
        assert float(mse(a, b, torch.full((6,), -1)).value) == 0
    loss = build_loss(Component(name="mse"))
    assert torch.equal(loss(a, b, ids, torch.ones(1)).value, out.value)


def on_ranks(world: World) -> dict[str, Any]:
    a, b, ids = made()
    mine = slice(3 * world.rank, 3 * world.rank + 3)
    value = mse(a[mine], b[mine], ids[mine]).value
    (grad,) = torch.autograd.grad(value, a)
    return {"value": value.detach(), "grad": grad}


@pytest.mark.dist
def test_two_ranks_are_one() -> None:
    a, b, _ = made()
    got = spawn(__file__, "on_ranks", 2, {})
    want = naive(a, b)
    torch.testing.assert_close((got[0]["value"] + got[1]["value"]) / 2, want.detach())
    torch.testing.assert_close((got[0]["grad"] + got[1]["grad"]) / 2, torch.autograd.grad(want, a)[0])
