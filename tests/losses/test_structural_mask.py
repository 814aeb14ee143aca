"""Negatives of the row's own group left out: against a loop, symmetry, and InfoNCE."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import _every_jobs as jobs
from _papers import Items, compare, total, value

from dualenc.config import Component
from dualenc.losses import build_loss


def test_value_and_gradient_equal_the_papers() -> None:
    def loop(i: int, c: list[Tensor], s: Tensor, items: Items) -> Tensor:
        group, positives = items.labels["group"], items.positives(i)
        kept = [j for j in range(len(c)) if j in positives or group[j] != group[i] or group[i] == -1]
        log_z = torch.log(total([torch.exp(s * c[j]) for j in kept]))
        return -total([s * c[j] - log_z for j in positives]) / len(positives)

    compare({"name": "structural_mask"}, loop)


def test_groups_of_one_and_no_groups_are_info_nce() -> None:
    for group in (torch.arange(12), torch.full((12,), -1)):
        torch.testing.assert_close(value({"name": "structural_mask"}, group=group), value({"name": "info_nce"}))


def test_every_partition_is_masked_not_only_some() -> None:
    """The released code prunes with a fixed stride of 4: with 3 partitions it would leave most of them in."""
    inputs, _, extras = jobs.made(12, slice(0, 12), seed=2)
    a, b = (torch.nn.functional.normalize(x.nan_to_num(0.2), dim=1) for x in inputs[:2])
    extras.both["group"] = torch.arange(12) % 3
    b.requires_grad_()
    a[1:] = 0  # only row 0 of a, and rows of b towards a_0, have a gradient at b
    loss = build_loss(Component(name="structural_mask"))
    out = jobs.call(loss, a, b, torch.arange(12), inputs[2], extras).value
    grad = torch.autograd.grad(out, b)[0].norm(dim=1)
    assert (grad[[3, 6, 9]] == 0).all()
    assert (grad[[1, 2, 4, 5, 7, 8, 10, 11]] > 0).all()
