"""MoCHi with mixtures made one by one, what a mixture is, and that no gradient reaches what it is made of."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

sys.path.insert(0, str(Path(__file__).parent))
import _every_jobs as jobs
from _papers import value

from dualenc.config import Component
from dualenc.losses import Extras, build_loss
from dualenc.losses.hardest import hardest, uniform
from dualenc.losses.mochi import mixtures


def one_by_one(q: Tensor, ids: Tensor, keys: Tensor, salt: int, sizes: tuple[int, int, int]) -> Tensor:
    """Cosines with mixtures that are made, normalised, and without gradient."""
    hard, between, towards = sizes
    out = []
    draws = uniform(ids, torch.tensor(salt), 3 * between + 2 * towards).tolist()
    for i in range(len(q)):
        negatives = sorted((j for j in range(len(keys)) if ids[j] != ids[i]), key=lambda j: -float(q[i] @ keys[j]))[
            :hard
        ]
        n, row = len(negatives), []
        u, j1, j2, v, j3 = (draws[i][s:e] for s, e in _places(between, towards))
        for k in range(between):
            x, y = (keys[negatives[int(w[k] * n)]] for w in (j1, j2))
            row.append(q[i] @ normalize(u[k] * x + (1 - u[k]) * y, dim=0).detach())
        for k in range(towards):
            b = v[k] / 2
            x = keys[negatives[int(j3[k] * n)]]
            row.append(q[i] @ normalize(b * q[i] + (1 - b) * x, dim=0).detach())
        out.append(torch.stack(row))
    return torch.stack(out)


def _places(between: int, towards: int) -> list[tuple[int, int]]:
    sizes = [between, between, between, towards, towards]
    return [(sum(sizes[:k]), sum(sizes[: k + 1])) for k in range(5)]


def test_value_and_gradient_equal_mixtures_made_one_by_one() -> None:
    """Slots 2 and 10 are absent, three share an id: none of them is mixed in."""
    settings = {"name": "mochi", "hardest": 4, "between": 5, "towards": 3}
    inputs, ids, extras = jobs.made(11, slice(0, 11), seed=3)
    a, b, s = (x.requires_grad_() for x in inputs)
    keep, kept = ids >= 0, ids[ids >= 0]
    total = torch.zeros((), dtype=torch.float64)
    for k, (x, y) in enumerate(((a[keep], b[keep]), (b[keep], a[keep]))):
        own = s * one_by_one(x, kept, y.detach(), int(ids.sum()) + k, (4, 5, 3))
        for i in range(len(x)):
            logits = s * (y @ x[i])
            positive = kept == kept[i]
            total = total + torch.logsumexp(torch.cat([logits, own[i]]), 0) - logits[positive].mean()
    want = total / (2 * len(kept))
    expected = torch.autograd.grad(want, inputs)
    for how in ("plain", "tiled"):
        loss = build_loss(Component(**settings, **(jobs.settings_of(settings, how) or {})))
        got = jobs.call(loss, a, b, ids, s, extras).value
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
        for g, w in zip(torch.autograd.grad(got, inputs), expected, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-11)


def test_no_mixtures_are_info_nce() -> None:
    none = {"name": "mochi", "between": 0, "towards": 0}
    torch.testing.assert_close(value(none), value({"name": "info_nce"}))


def test_a_mixture_with_the_row_is_never_easier_than_its_source() -> None:
    g = torch.Generator().manual_seed(0)
    q, keys = (normalize(torch.randn(40, 8, generator=g, dtype=torch.float64), dim=1) for _ in "qk")
    ids = torch.arange(40)
    nearest, _ = hardest(q, ids, keys, ids, 1)
    got = mixtures(q, ids, keys, ids, torch.tensor(3), (1, 0, 12))
    assert (got >= nearest - 1e-12).all()
    assert float((got - nearest).min()) < 0.2 < float((got - nearest).max())


def test_draws_depend_on_the_id_and_the_batch_alone_and_look_uniform() -> None:
    ids = torch.arange(2000)
    x = uniform(ids, torch.tensor(5), 8)
    torch.testing.assert_close(uniform(ids[7:9], torch.tensor(5), 8), x[7:9])
    assert float(x.min()) >= 0
    assert float(x.max()) < 1
    assert float(x.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(x.std()) == pytest.approx(12**-0.5, abs=0.01)
    assert abs(float(torch.corrcoef(x.T).fill_diagonal_(0).abs().max())) < 0.08
    assert float((uniform(ids, torch.tensor(6), 8) == x).double().mean()) < 0.01


def test_by_default_mixtures_do_not_take_over_where_the_sides_lie_apart() -> None:
    """Each side in a narrow cone of its own, as of untrained towers: mixtures with the row fill its denominator."""
    g = torch.Generator().manual_seed(0)
    cones = normalize(torch.randn(2, 1, 16, generator=g), dim=2)
    a, b = normalize(cones + 0.1 * normalize(torch.randn(2, 64, 16, generator=g), dim=2), dim=2)
    given = (torch.arange(64), torch.tensor([14.0]), Extras(("image", "text"), {}, {}))
    plain, default, towards = (
        float(jobs.call(build_loss(Component(**settings)), a, b, *given).value)
        for settings in ({"name": "info_nce"}, {"name": "mochi"}, {"name": "mochi", "towards": 16})
    )
    assert plain < default < plain + 0.5
    assert towards > plain + 3
