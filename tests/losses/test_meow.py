"""Cluster-weighted negatives against a loop, DCL's identity, and one cluster for all."""

from __future__ import annotations

import math
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
        clusters, positives = items.labels["clusters"], items.positives(i)
        w = [sum(x != y or x == -1 for x, y in zip(clusters[i], clusters[j], strict=True)) for j in range(len(c))]
        z = total([w[j] * torch.exp(s * c[j]) for j in items.negatives(i)])
        return torch.log(z) - total([s * c[j] for j in positives]) / len(positives)

    compare({"name": "meow", "scale_by": "loss"}, loop)


@pytest.mark.parametrize("k", [1, 3])
def test_clusters_of_one_are_dcl(k: int) -> None:
    alone = torch.arange(12)[:, None].expand(-1, k).contiguous()
    torch.testing.assert_close(value({"name": "meow"}, clusters=alone), value({"name": "dcl"}) + math.log(k))
    torch.testing.assert_close(value({"name": "meow"}, clusters=torch.arange(12)), value({"name": "dcl"}))


@pytest.mark.parametrize("impl", ["plain", "tiled"])
def test_all_in_one_cluster_is_no_division_by_zero(impl: str) -> None:
    """The released code has a denominator of 0 there."""
    inputs, ids, extras = jobs.made(8, slice(0, 8), seed=1)
    for x in inputs:
        x.requires_grad_()
    extras.both["clusters"] = torch.zeros(8, 2, dtype=torch.int64)
    out = jobs.call(build_loss(Component(name="meow", impl=impl)), *inputs[:2], ids, inputs[2], extras).value
    assert float(out.detach()) == 0
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(out, inputs))
