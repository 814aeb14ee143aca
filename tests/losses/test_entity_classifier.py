"""The entity classifier against plain softmax; ranks, engines and resuming are in ``_memory_jobs``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from dualenc.config import Component, settings_as
from dualenc.errors import ConfigError
from dualenc.losses import Extras, build_loss
from dualenc.losses.entity_classifier import EntityClassifier, sampled_rows
from dualenc.losses.info_nce import info_nce_rows
from dualenc.memory import ClassMatrix, RunShape

torch.set_num_threads(1)
PAIR = ("image", "text")


def built(dim: int = 6, **said: Any) -> tuple[EntityClassifier, ClassMatrix]:
    loss = build_loss(Component.model_validate({"name": "entity_classifier", **said}))
    assert isinstance(loss, EntityClassifier)
    (state,) = loss.memory(RunShape(dim, [PAIR], 100)).values()
    assert isinstance(state, ClassMatrix)
    return loss, state


def rows(n: int, dim: int = 6) -> Tensor:
    torch.manual_seed(0)
    return normalize(torch.randn(n, dim), dim=1).requires_grad_()


def call(loss: EntityClassifier, x: Tensor, label: Tensor, step: int = 0, ids: Tensor | None = None) -> Any:
    extras = Extras(PAIR, {}, {}, both={"label": label}, step=step)
    return loss(x, x, torch.arange(len(x)) if ids is None else ids, torch.ones(1), None, extras)


@pytest.mark.parametrize("strip_mb", [64.0, 1e-6])
def test_all_classes_with_a_margin_are_a_cross_entropy(strip_mb: float) -> None:
    """Value and gradient, with a class that no row has, a row without a label and an absent one (NaN)."""
    loss, state = built(classes=7, scale=9.0, margin=0.3, strip_mb=strip_mb)
    x, label = rows(40), torch.arange(40) % 6
    label[3], ids = -1, torch.arange(40)
    ids[5] = -1
    given = torch.where(ids[:, None] < 0, torch.nan, x)
    v = state.rows[:-1].clone().requires_grad_()
    out = call(loss, given, label, ids=ids)
    (got,) = torch.autograd.grad(out.value, x)
    kept = [i for i in range(40) if i not in (3, 5)]
    logits = 9.0 * (x @ v.T - 0.3 * torch.nn.functional.one_hot(label.clamp(min=0), 7))
    want = cross_entropy(logits[kept], label[kept])
    torch.testing.assert_close(out.value, want)
    grad_x, grad_v = torch.autograd.grad(want, (x, v))
    torch.testing.assert_close(got, grad_x)
    top1 = (x @ v.T)[kept].argmax(1) == label[kept]
    assert float(out.metrics["entity_top1_a"]) == pytest.approx(float(top1.float().mean()))
    state.commit(torch.tensor(True))
    assert torch.equal(state.rows[:-1], v.detach())
    call(loss, given, label, ids=ids)
    state.commit(torch.tensor(False))
    # of the sum of rows, in units of the scale
    torch.testing.assert_close(state.rows[:-1], normalize(v - 0.1 * grad_v * len(kept) / 9.0, dim=1))
    assert torch.equal(state.rows[-1], torch.zeros(6))


def test_partners_as_class_vectors_are_info_nce() -> None:
    """E = N, v_e the other side's features, no margin, all classes: one direction of CLIP's loss."""
    loss, state = built(classes=12, scale=5.0, margin=0.0)
    x, y = rows(12), normalize(torch.randn(12, 6), dim=1)
    state.rows[:-1] = y
    ids = torch.arange(12)
    want, hits = info_nce_rows(x, y, ids, ids, torch.tensor([5.0]), 0.0)
    out = call(loss, x, ids)
    torch.testing.assert_close(out.value, want / 12)
    assert float(out.metrics["entity_top1_a"]) == pytest.approx(float(hits / 12))


def test_sampled_classes_are_a_softmax_over_them_and_the_own() -> None:
    loss, state = built(classes=50, sampled=8, scale=6.0, margin=0.1)
    x, label = rows(10), torch.arange(10) * 3
    seen = []
    for step in (0, 1):
        drawn = sampled_rows(loss.config, step, state)
        assert len(drawn.unique()) == 8
        seen.append(tuple(drawn.tolist()))
        cos = x @ state.rows[:-1].T
        want = torch.zeros(())
        for i, y in enumerate(label.tolist()):
            own = 6.0 * (cos[i, y] - 0.1)
            others = torch.stack([6.0 * cos[i, e] for e in drawn.tolist() if e != y])
            want = want + (torch.logsumexp(torch.cat([own[None], others]), 0) - own) / 10
        torch.testing.assert_close(call(loss, x, label, step).value, want)
    assert seen[0] != seen[1]
    before = state.rows.clone()
    state.commit(torch.tensor(False))
    moved = (state.rows[:-1] - before[:-1]).abs().amax(1) > 1e-5
    assert set(torch.nonzero(moved).flatten().tolist()) <= {*seen[1], *label.tolist()}
    whole, same = built(classes=50, scale=6.0, margin=0.1), built(classes=50, sampled=50, scale=6.0, margin=0.1)
    torch.testing.assert_close(call(whole[0], x, label).value, call(same[0], x, label).value)


def test_shards_begin_as_parts_of_the_whole_and_draw_its_classes() -> None:
    config = settings_as(EntityClassifier.Config, {"classes": 9001, "sampled": 100}, "loss")
    whole = ClassMatrix(9001, 0.1, "p", RunShape(4, [PAIR], 1))
    parts = [ClassMatrix(9001, 0.1, "p", RunShape(4, [PAIR], 1, r, 4)) for r in range(4)]
    assert torch.equal(torch.cat([p.rows[:-1] for p in parts]), whole.rows[:-1])
    torch.testing.assert_close(whole.rows[:-1].norm(dim=1), torch.ones(9001))
    drawn = torch.cat([sampled_rows(config, 3, p) + p.start for p in parts])
    assert torch.equal(drawn, sampled_rows(config, 3, whole))
    assert ClassMatrix(2_000_000, 0.1, "p", RunShape(512, [PAIR], 1, 0, 64, "meta")).bytes() == 31250 * 512 * 4


def test_it_learns_and_what_is_refused() -> None:
    loss, state = built(classes=5, scale=16.0)
    x, label = rows(30), torch.arange(30) % 5
    centres = normalize(torch.randn(5, 6), dim=1)
    x = normalize(centres[label] + 0.1 * torch.randn(30, 6), dim=1)
    first = float(call(loss, x, label).value)
    for _ in range(30):
        call(loss, x, label)
        state.commit(torch.tensor(False))
    last = call(loss, x, label)
    assert float(last.value) < 0.1 * first
    assert float(last.metrics["entity_top1_a"]) == 1
    with pytest.raises(ConfigError, match="one whole number or id a sample"):
        call(loss, x, label[:, None].repeat(1, 2))
    with pytest.raises(ConfigError, match="sampled: 9 of 5 classes"):
        built(classes=5, sampled=9)
