"""From outputs to one number: which slots take part, and that unused outputs keep a path."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from dualenc.config import Component
from dualenc.losses import build_loss, objective
from dualenc.losses.objective import to_slots, zero_path

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
from _tiny import PAIRS, make_batch, naive_loss, share_of, tiny

torch.set_num_threads(1)


@pytest.mark.parametrize("kind", ["info_nce", "sigmoid"])
def test_value_and_parameter_gradients_equal_the_naive_loop(kind: str) -> None:
    batch, model, twin = make_batch(1), tiny(), tiny()
    objective(model(batch.inputs), batch, PAIRS, build_loss(Component(name=kind))).value.backward()
    outputs = twin(batch.inputs)
    naive_loss(kind, outputs["features"], outputs, batch).backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        if "never_used" in name:
            assert p.grad is None
            continue
        want = torch.zeros_like(q) if q.grad is None else q.grad
        torch.testing.assert_close(p.grad, want, rtol=2e-5, atol=1e-7, msg=name)


def test_a_dummy_row_and_an_unused_modality_get_zero_gradients() -> None:
    """Rank 1 of 4 has no audio: its dummy row leaves zeros, not nothing."""
    batch = share_of(make_batch(0), 1, 4)
    assert len(batch.rows["audio"]) == 0
    model = tiny()
    outputs = model(batch.inputs)
    out = objective(outputs, batch, PAIRS[:1], build_loss(Component(name="info_nce")))
    out.value.backward()
    assert torch.isfinite(out.value)
    for name in ("towers.audio.head.weight", "logit_scale.audio-text", "logit_bias.image-text"):
        grad = dict(model.named_parameters())[name].grad
        assert grad is not None
        assert float(grad.abs().max()) == 0.0


def test_metrics_name_the_pair_and_the_direction() -> None:
    batch = make_batch(0)
    metrics = objective(tiny()(batch.inputs), batch, PAIRS, build_loss(Component(name="info_nce"))).metrics
    assert {"loss/image-text", "top1/image-to-text", "top1/text-to-image", "logit_scale/audio-text"} <= set(metrics)
    assert all(x.ndim == 0 and not x.requires_grad for x in metrics.values())


def test_slots() -> None:
    x = torch.tensor([[1.0], [2.0], [3.0]])
    assert to_slots(x, torch.tensor([3, 0]), 4).flatten().tolist() == [2.0, 0.0, 0.0, 1.0]
    assert to_slots(x, torch.tensor([], dtype=torch.long), 2).flatten().tolist() == [0.0, 0.0]


def test_zero_path_is_zero_for_nan() -> None:
    x = torch.tensor([[float("nan")], [float("inf")]], requires_grad=True)
    y = zero_path([x])
    y.backward()
    assert float(y) == 0.0
    assert x.grad is not None
    assert x.grad.flatten().tolist() == [0.0, 0.0]
