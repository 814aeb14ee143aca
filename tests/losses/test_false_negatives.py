"""Negatives that are too similar left out: by a locked tower and by words, against loops; t = 1 is InfoNCE."""

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
from dualenc.errors import ConfigError
from dualenc.losses import build_loss


def similar(items: Items, label: str | None, i: int, j: int) -> float:
    if label is None:
        return float(items.frozen[i] @ items.frozen[j])
    x, y = ({*items.labels[label][k]} - {-1} for k in (i, j))
    return len(x & y) / max(len(x | y), 1)


@pytest.mark.parametrize(("label", "threshold"), [(None, 0.5), (None, -0.2), ("words", 0.15)])
def test_value_and_gradient_equal_the_papers(label: str | None, threshold: float) -> None:
    left_out = []

    def loop(i: int, c: list[Tensor], s: Tensor, items: Items) -> Tensor:
        positives = items.positives(i)
        kept = [j for j in range(len(c)) if j in positives or similar(items, label, i, j) <= threshold]
        left_out.append(len(c) - len(kept))
        log_z = torch.log(total([torch.exp(s * c[j]) for j in kept]))
        return -total([s * c[j] - log_z for j in positives]) / len(positives)

    compare({"name": "false_negatives", "label": label, "threshold": threshold}, loop)
    assert sum(left_out) > 0


def test_a_threshold_of_one_is_info_nce() -> None:
    """Of frozen features and of words; a cosine of an item with itself may round to above 1."""
    one = {"name": "false_negatives", "threshold": 1.0}
    torch.testing.assert_close(value(one), value({"name": "info_nce"}))
    torch.testing.assert_close(value({**one, "label": "words"}), value({"name": "info_nce"}))


def test_a_masked_column_gets_no_gradient() -> None:
    """Items 0 and 1 are the same to the frozen tower; row 0 alone has a gradient at b."""
    inputs, _, extras = jobs.made(8, slice(0, 6), seed=2)
    a, b = (torch.nn.functional.normalize(x.nan_to_num(0.2), dim=1) for x in inputs[:2])
    frozen = torch.eye(6, dtype=torch.float64)
    frozen[1] = frozen[0]
    extras.b["frozen"] = frozen
    a[1:] = 0
    b.requires_grad_()
    out = jobs.call(build_loss(Component(name="false_negatives")), a, b, torch.arange(6), inputs[2], extras).value
    grad = torch.autograd.grad(out, b)[0].norm(dim=1)
    assert float(grad[1]) == 0
    assert (grad[[0, 2, 3, 4, 5]] > 0).all()


def test_errors_say_what_to_write() -> None:
    with pytest.raises(ConfigError, match="'label' is one value per sample, not a list"):
        value({"name": "false_negatives", "label": "label"})
