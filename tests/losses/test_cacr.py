"""CACR against a loop from the paper, its limits, and when it is InfoNCE by another name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import _every_jobs as jobs
from _papers import Items, compare, total, value

from dualenc.config import Component
from dualenc.losses import build_loss


def test_value_and_gradient_equal_the_papers() -> None:
    def loop(i: int, c: list[Tensor], s: Tensor, items: Items) -> Tensor:
        cost = [2 - 2 * x for x in c]
        pull = [torch.exp(1.5 * cost[j]) for j in items.positives(i)]
        push = [torch.exp(-0.9 * cost[j]) for j in items.negatives(i)]
        attract = total([w * cost[j] for w, j in zip(pull, items.positives(i), strict=True)]) / total(pull)
        repel = total([w * cost[j] for w, j in zip(push, items.negatives(i), strict=True)]) / total(push)
        return attract - repel

    compare({"name": "cacr", "t_plus": 1.5, "t_minus": 0.9}, loop)


def test_the_large_scale_form_equals_a_loop() -> None:
    def loop(i: int, c: list[Tensor], s: Tensor, items: Items) -> Tensor:
        pull = [torch.exp(1.5 * (2 - 2 * c[j].detach())) for j in items.positives(i)]
        log_z = torch.log(total([torch.exp(s * x) for x in c]))
        terms = [w * (log_z - s * c[j]) for w, j in zip(pull, items.positives(i), strict=True)]
        return 2 / s.detach() * total(terms) / total(pull)

    compare({"name": "cacr", "form": "nce", "t_plus": 1.5}, loop)


def test_with_one_positive_a_row_the_large_scale_form_is_info_nce() -> None:
    """The trap of the released ImageNet command: with two views it trains MoCo-v3's loss. ``t_plus`` does nothing."""
    for t_plus in (0.0, 1.0, 7.0):
        got = value({"name": "cacr", "form": "nce", "t_plus": t_plus})
        torch.testing.assert_close(got, 2 / 6 * value({"name": "info_nce"}), rtol=1e-12, atol=0)
    several = torch.arange(12) // 2
    one, other = (value({"name": "cacr", "form": "nce", "t_plus": t}, ids=several) for t in (0.0, 7.0))
    assert abs(float(one - other)) > 1e-3


@pytest.mark.parametrize(("t_minus", "reduce"), [(1e-9, "mean"), (1e4, "hardest")])
def test_repulsion_is_uniform_or_of_the_hardest_negative_at_its_limits(t_minus: float, reduce: str) -> None:
    inputs, _, extras = jobs.made(8, slice(0, 8), seed=1)
    a, b = (torch.nn.functional.normalize(x.nan_to_num(0.2), dim=1) for x in inputs[:2])
    loss = build_loss(Component(name="cacr", t_minus=t_minus))
    got = jobs.call(loss, a, b, torch.arange(8), inputs[2], extras).value
    cost = 2 - 2 * a @ b.T
    off = cost[~torch.eye(8, dtype=torch.bool)].view(8, 7)
    off_t = cost.T[~torch.eye(8, dtype=torch.bool)].view(8, 7)
    ends = [x.mean(1) if reduce == "mean" else x.amin(1) for x in (off, off_t)]
    torch.testing.assert_close(got, cost.diag().mean() - (ends[0].mean() + ends[1].mean()) / 2, atol=1e-6, rtol=1e-6)


def test_it_uses_no_temperature() -> None:
    inputs, ids, extras = jobs.made(8, slice(0, 8), seed=1)
    scale = inputs[2].requires_grad_()
    out = jobs.call(build_loss(Component(name="cacr")), *inputs[:2], ids, scale, extras).value
    assert float(torch.autograd.grad(out, scale)[0].abs()) < 1e-12
