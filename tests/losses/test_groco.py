"""GroCo against a sorting network of matrices, its closed form for one pair, and its limits."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from _papers import Items, compare, total

from dualenc.losses.groco import order_loss


def network(negatives: list[Tensor], positives: list[Tensor], beta: float) -> Tensor:
    """ℓ by whole permutation matrices, one comparator after the other."""
    scores = sorted(negatives, key=float) + sorted(positives, key=float)
    n, first = len(scores), len(negatives)
    done = torch.eye(n, dtype=torch.float64)
    for layer in range(n):
        for k in range(layer % 2, n - 1, 2):
            x, y = scores[k], scores[k + 1]
            stay = 0.5 + torch.atan(beta * (y - x)) / math.pi
            scores[k], scores[k + 1] = stay * x + (1 - stay) * y, (1 - stay) * x + stay * y
            one = torch.eye(n, dtype=torch.float64)
            swap = torch.eye(n, dtype=torch.float64)
            swap[[k, k + 1]] = swap[[k + 1, k]]
            done = (stay * one + (1 - stay) * swap) @ done
    terms = []
    for r in range(n):
        p = done[r, first:].sum()
        q = done[r, :first].sum()
        terms.append(-(torch.log(p) if r >= first else torch.log(1 - p)) / 2)
        terms.append(-(torch.log(q) if r < first else torch.log(1 - q)) / 2)
    return total(terms) / n


@pytest.mark.parametrize(("k", "beta"), [(3, 1.0), (10, 5.0)])
def test_value_and_gradient_equal_the_papers(k: int, beta: float) -> None:
    """With several positives, and with fewer negatives than K; the columns' gradient is not stopped here."""

    def loop(i: int, c: list[Tensor], s: Tensor, items: Items) -> Tensor:
        hardest = sorted(items.negatives(i), key=lambda j: -float(c[j]))[:k]
        return network([c[j] for j in hardest], [c[j] for j in items.positives(i)], beta)

    compare({"name": "groco", "negatives": k, "beta": beta, "stop_gradient": False}, loop)


def test_the_columns_gradient_is_stopped_as_published() -> None:
    def loop(i: int, c: list[Tensor], s: Tensor, items: Items) -> Tensor:
        return network([c[j] for j in items.negatives(i)], [c[j] for j in items.positives(i)], 1.0)

    with pytest.raises(AssertionError):
        compare({"name": "groco"}, loop)


def test_one_pair_has_a_closed_form() -> None:
    for positive, negative, beta in ((0.9, 0.1, 1.0), (-0.3, 0.4, 7.0)):
        got = order_loss(*(torch.tensor([[x]], dtype=torch.float64) for x in (negative, positive)), beta)
        want = -math.log(0.5 + math.atan(beta * (positive - negative)) / math.pi)
        assert float(got) == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize(("beta", "want"), [(1.0, 0.288), (10.0, 0.0326), (100.0, 0.0032), (1000.0, 0.00032)])
def test_separated_pairs_keep_what_the_steepness_leaves(beta: float, want: float) -> None:
    """A positive at 1 and a negative at 0: the loss keeps pushing them apart, the more the smaller β is."""
    got = order_loss(torch.zeros(1, 1).double(), torch.ones(1, 1).double(), beta)
    assert float(got) == pytest.approx(want, rel=0.02)


def test_the_order_within_a_group_does_not_matter() -> None:
    g = torch.Generator().manual_seed(0)
    negatives, positives = torch.rand(4, 5, generator=g).double(), torch.rand(4, 3, generator=g).double()
    want = order_loss(negatives, positives, 3.0)
    torch.testing.assert_close(order_loss(negatives.flip(1), positives.roll(1, 1), 3.0), want)
