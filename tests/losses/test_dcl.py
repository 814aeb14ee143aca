"""DCL and DCLW against loops from the paper, their identities, and the scale that would run away."""

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
from dualenc.losses.contrast import RowInputs
from dualenc.losses.dcl import dclw_weights


@pytest.mark.parametrize("weighted", [False, True])
def test_value_and_gradient_equal_the_papers(weighted: bool) -> None:
    def loop(i: int, c: list[Tensor], s: Tensor, items: Items) -> Tensor:
        w = 1.0
        if weighted:  # of the rows' own pairs, which both directions share
            inputs, ids, _ = jobs.made(11, slice(0, 11), seed=3)
            own = [float((inputs[0][k] * inputs[1][k]).sum()) / 0.5 for k in range(11) if int(ids[k]) >= 0]
            w = 2 - len(own) * math.exp(own[i]) / sum(math.exp(x) for x in own)
        wanted = total([s * c[j] for j in items.positives(i)]) / len(items.positives(i))
        return -w * wanted + torch.log(total([torch.exp(s * c[j]) for j in items.negatives(i)]))

    compare({"name": "dcl", "weighted": weighted, "scale_by": "loss"}, loop)


def of(settings: dict[str, object], scale: float, n: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Value, gradients of ``a`` and of the scale; orthogonal pairs at a cosine of 0.9."""
    a = torch.eye(n + 1, dtype=torch.float64)[:n].requires_grad_()
    b = torch.eye(n + 1, dtype=torch.float64)[:n] * 0.9
    b[:, n] = math.sqrt(1 - 0.81)
    s = torch.tensor([scale], dtype=torch.float64, requires_grad=True)
    out = build_loss(Component(**settings))(a, b, torch.arange(n), s).value
    return (out, *torch.autograd.grad(out, (a, s)))


def test_it_is_info_nce_plus_log_one_minus_p() -> None:
    """And its gradient at the logits is InfoNCE's / (1 − p_ii), for every row."""
    x = torch.nn.functional.normalize(torch.randn(9, 5, dtype=torch.float64), dim=1)
    y = torch.nn.functional.normalize(x + 0.4 * torch.randn(9, 5, dtype=torch.float64), dim=1)
    p = ((6 * x @ y.T).softmax(1).diag(), (6 * y @ x.T).softmax(1).diag())
    arguments = (x, y, torch.arange(9), torch.tensor([6.0], dtype=torch.float64))
    dcl, plain = (build_loss(Component(name=k))(*arguments).value for k in ("dcl", "info_nce"))
    torch.testing.assert_close(dcl, plain + sum(torch.log1p(-q).mean() for q in p) / 2)


def test_the_gradient_is_info_nces_over_one_minus_p() -> None:
    _, dcl, _ = of({"name": "dcl"}, 5.0)
    _, plain, _ = of({"name": "info_nce"}, 5.0)
    p = math.exp(4.5) / (math.exp(4.5) + 7)
    torch.testing.assert_close(dcl * (1 - p), plain)


def test_a_learned_scale_stops_growing_only_with_the_guard() -> None:
    """At perfect separation the derivative at the scale is −0.9 whatever the scale is; InfoNCE's vanishes."""
    for scale in (10.0, 100.0):
        assert float(of({"name": "dcl", "scale_by": "loss"}, scale)[2]) == pytest.approx(-0.9, abs=1e-9)
        guarded, plain = (float(of({"name": name}, scale)[2]) for name in ("dcl", "info_nce"))
        assert guarded == pytest.approx(plain, abs=1e-12)
        assert float(of({"name": "dcl", "scale_by": "nothing"}, scale)[2]) == pytest.approx(0, abs=1e-12)
    assert abs(float(of({"name": "dcl"}, 100.0)[2])) < 1e-12
    kept = [of({"name": "dcl", "scale_by": k}, 10.0) for k in ("nce", "loss", "nothing")]
    for value_, gradient, _ in kept[1:]:  # the guard changes neither the value nor the features' gradient
        torch.testing.assert_close(value_, kept[0][0])
        torch.testing.assert_close(gradient, kept[0][1])


def test_weights_average_to_one_and_a_wide_sigma_is_dcl() -> None:
    x, y = (torch.nn.functional.normalize(torch.randn(9, 5, dtype=torch.float64), dim=1) for _ in "ab")
    ids = torch.tensor([0, 1, -1, 3, 4, 5, 6, 7, 8])
    w = dclw_weights(RowInputs(x, y, ids, torch.ones(1), None), 0.5)[ids >= 0]
    torch.testing.assert_close(w.mean(), torch.tensor(1.0, dtype=torch.float64))
    assert float(w.std()) > 0.1
    wide = {"name": "dcl", "weighted": True, "sigma": 1e9}
    torch.testing.assert_close(value(wide), value({"name": "dcl"}))


@pytest.mark.parametrize("impl", ["plain", "tiled"])
def test_a_row_without_negatives_loses_nothing(impl: str) -> None:
    a = torch.eye(2, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([5.0], dtype=torch.float64, requires_grad=True)
    out = build_loss(Component(name="dcl", impl=impl))(a, a.detach(), torch.tensor([4, 4]), scale).value
    assert float(out) == 0
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(out, (a, scale)))
