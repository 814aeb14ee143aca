"""Features moved along the gradient: against a loop with an analytic gradient, its limits, and that they are harder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
import _every_jobs as jobs
from _papers import value
from _tiny import naive_info_nce

from dualenc.config import Component
from dualenc.losses import Extras, build_loss
from dualenc.losses.adversarial import spread


def gradient(a: Tensor, b: Tensor, ids: Tensor, s: float) -> Tensor:
    """Of InfoNCE at b, written out: each row of a pulls with softmax − target, each row of b likewise."""
    n = len(a)
    target = (ids[:, None] == ids).double()
    target /= target.sum(1, keepdim=True)
    logits = s * a @ b.T
    of_logits = (logits.softmax(1) - target) + (logits.T.softmax(1) - target).T
    return s * of_logits.T @ a / (2 * n)


def test_value_and_gradient_equal_a_loop() -> None:
    inputs, ids, extras = jobs.made(11, slice(0, 11), seed=3)
    a, b, s = (x.requires_grad_() for x in inputs)
    keep = ids >= 0
    x, y, kept = a[keep], b[keep], ids[keep]

    def moved(z: Tensor, g: Tensor) -> Tensor:
        g = g - (g * z).sum(1, keepdim=True) * z
        sigma = (z - z.mean(0)).square().sum(1).mean().sqrt()
        return normalize(z + 0.3 * (sigma * normalize(g, dim=1)).detach(), dim=1)

    x2 = moved(x, gradient(y.detach(), x.detach(), kept, 6.0))
    y2 = moved(y, gradient(x.detach(), y.detach(), kept, 6.0))
    plain, one, other = (naive_info_nce(p, q, kept.tolist(), s) for p, q in ((x, y), (x, y2), (x2, y)))
    want = 0.6 * plain + 0.4 * (one + other) / 2
    expected = torch.autograd.grad(want, inputs)
    for how in ({"impl": "plain"}, {"impl": "tiled", "tile_mb": 1e-6}):
        loss = build_loss(Component(name="adversarial", epsilon=0.3, share=0.4, **how))
        out = jobs.call(loss, a, b, ids, s, extras)
        torch.testing.assert_close(out.value, want, rtol=1e-9, atol=1e-12)
        for g, w in zip(torch.autograd.grad(out.value, inputs), expected, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-8, atol=1e-11)
        assert float(out.metrics["moved"]) > float(plain.detach())


@pytest.mark.parametrize("settings", [{"epsilon": 0.0}, {"share": 0.0}])
def test_without_a_step_or_a_share_it_is_info_nce(settings: dict[str, float]) -> None:
    torch.testing.assert_close(value({"name": "adversarial", **settings}), value({"name": "info_nce"}))


def test_training_leaves_a_narrow_cone_of_features() -> None:
    """As untrained towers make them: items 0.003 apart, of which a step of 0.1 on the sphere would lose sight."""
    g = torch.Generator().manual_seed(0)
    both = normalize(torch.randn(8, generator=g), dim=0) + 1e-3 * torch.randn(2, 32, 8, generator=g)
    features = torch.nn.Parameter(both.clone())
    ids, s, extras = torch.arange(32), torch.tensor([14.0]), Extras(("image", "text"), {}, {})
    loss = build_loss(Component(name="adversarial"))
    optimizer = torch.optim.SGD([features], lr=0.5)
    for _ in range(150):
        a, b = normalize(features, dim=2)
        out = jobs.call(loss, a, b, ids, s, extras)
        optimizer.zero_grad()
        out.value.backward()
        optimizer.step()
    assert float(spread(a.detach(), ids)) > 0.5
    assert float(out.metrics["top1_ab"]) > 0.9
