"""SupCon across a pair against a loop from the paper, and where it is InfoNCE."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from _papers import Items, compare, nce, value

from dualenc.config import Component
from dualenc.errors import ConfigError
from dualenc.losses import build_loss


def same(items: Items, name: str, i: int, j: int) -> bool:
    """Equal ids or labels; lists: an entry in common. −1 is no label."""
    x, y = items.labels[name][i], items.labels[name][j]
    if isinstance(x, list):
        return items.ids[i] == items.ids[j] or bool(({*x} & {*y}) - {-1})
    return items.ids[i] == items.ids[j] or (x == y and x != -1)


@pytest.mark.parametrize("label", ["label", "words"])
def test_value_and_gradient_equal_the_papers(label: str) -> None:
    def loop(i: int, c: list[Tensor], s: Tensor, items: Items) -> Tensor:
        return nce(i, c, s, [j for j in range(len(c)) if same(items, label, i, j)])

    compare({"name": "supcon", "label": label}, loop)


def test_unique_labels_are_info_nce_and_equal_labels_are_equal_ids() -> None:
    plain, supcon = {"name": "info_nce"}, {"name": "supcon"}
    for label in (torch.arange(12), torch.full((12,), -1)):  # all different; none
        torch.testing.assert_close(value(supcon, label=label), value(plain))
    groups = torch.arange(12) // 3
    torch.testing.assert_close(value(supcon, label=groups), value(plain, ids=groups))
    torch.testing.assert_close(
        value({**supcon, "label_smoothing": 0.2}, label=groups), value({**plain, "label_smoothing": 0.2}, ids=groups)
    )


def test_without_the_label_it_says_what_to_write() -> None:
    loss = build_loss(Component(name="supcon", label="speaker"))
    assert loss.needs == ["speaker"]
    with pytest.raises(
        ConfigError, match=r"no label 'speaker'. Name one: data.sources.N.values: \{speaker: json:speaker\}"
    ):
        loss(torch.eye(3), torch.eye(3), torch.arange(3), torch.ones(1))
