"""InfoNCE and sigmoid against naive fp64 loops from the papers: value and gradient, plain and tiled."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dualenc.config import Component
from dualenc.errors import ConfigError
from dualenc.losses import build_loss
from dualenc.losses.blockwise import tiled
from dualenc.losses.blockwise.sweeps import How
from dualenc.losses.blockwise.tiled import PositiveColumns, tile_shape
from dualenc.losses.info_nce import info_nce
from dualenc.losses.sigmoid import sigmoid_loss

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
from _tiny import naive_info_nce, naive_sigmoid

torch.set_num_threads(1)

TINY_STRIP = How(1e-6, False, tiled)  # tiles of the smallest size, 16 x 16


def features(n: int, dim: int = 5, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    out = [torch.nn.functional.normalize(torch.randn(n, dim, generator=g, dtype=torch.float64), dim=-1) for _ in "ab"]
    return [*out, torch.tensor([7.0], dtype=torch.float64), torch.tensor([-2.0], dtype=torch.float64)]


def gradients(value: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return [
        torch.zeros_like(x) if g is None else g
        for x, g in zip(inputs, torch.autograd.grad(value, inputs, allow_unused=True), strict=True)
    ]


def naive(kind: str, a: Tensor, b: Tensor, ids: list[int], scale: Tensor, bias: Tensor, smoothing: float) -> Tensor:
    keep = [i for i, x in enumerate(ids) if x >= 0]
    if not keep:
        return (a[:0].sum() + b[:0].sum() + scale[:0].sum() + bias[:0].sum()).double()
    kept = [ids[i] for i in keep]
    if kind == "info_nce":
        return naive_info_nce(a[keep], b[keep], kept, scale, smoothing)
    return naive_sigmoid(a[keep], b[keep], kept, scale, bias)


def ours(
    kind: str, a: Tensor, b: Tensor, ids: list[int], scale: Tensor, bias: Tensor, smoothing: float, strip: How | None
) -> Tensor:
    t = torch.tensor(ids)
    if kind == "info_nce":
        return info_nce(a, b, t, scale, smoothing, strip).value
    return sigmoid_loss(a, b, t, scale, bias, strip).value


@pytest.mark.parametrize("strip", [None, TINY_STRIP, How(64.0, False, tiled)])
@pytest.mark.parametrize(("kind", "smoothing"), [("info_nce", 0.0), ("info_nce", 0.2), ("sigmoid", 0.0)])
@settings(max_examples=15, deadline=None)
@given(ids=st.lists(st.integers(-1, 4), min_size=1, max_size=20), seed=st.integers(0, 1000))
def test_value_and_gradient_equal_the_papers(
    kind: str, smoothing: float, strip: How | None, ids: list[int], seed: int
) -> None:
    """Any pattern of shared ids (several positives) and absent rows, to fp64 precision."""
    inputs = [x.requires_grad_() for x in features(len(ids), seed=seed)]
    a, b, scale, bias = inputs
    want, got = naive(kind, a, b, ids, scale, bias, smoothing), ours(kind, a, b, ids, scale, bias, smoothing, strip)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    for g, w in zip(gradients(got, inputs), gradients(want, inputs), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("strip", [None, TINY_STRIP])
def test_info_nce_on_numbers_written_out(strip: How | None) -> None:
    """Orthogonal pairs, scale 2: each row is log(e² + 1) − 2 in both directions."""
    eye = torch.eye(2)
    out = info_nce(eye, eye, torch.tensor([0, 1]), torch.tensor([2.0]), how=strip)
    assert float(out.value) == pytest.approx(0.126928, abs=1e-6)
    assert float(out.metrics["top1_ab"]) == 1.0


@pytest.mark.parametrize("strip", [None, TINY_STRIP])
def test_sigmoid_on_numbers_written_out(strip: How | None) -> None:
    """Orthogonal pairs, scale 2, bias −1: positives at logit 1, negatives at −1, all four terms log(1 + e⁻¹)."""
    eye = torch.eye(2)
    out = sigmoid_loss(eye, eye, torch.tensor([0, 1]), torch.tensor([2.0]), torch.tensor([-1.0]), strip)
    assert float(out.value) == pytest.approx(2 * 0.313262, abs=1e-5)


@pytest.mark.parametrize("strip", [None, TINY_STRIP])
@pytest.mark.parametrize("kind", ["info_nce", "sigmoid"])
def test_absent_rows_change_nothing(kind: str, strip: How | None) -> None:
    """The value with absent slots, whatever stands in them, is the value without these slots."""
    a, b, scale, bias = features(6)
    ids = [4, -1, 2, 2, -1, 9]
    keep = [0, 2, 3, 5]
    without = ours(kind, a[keep], b[keep], [ids[i] for i in keep], scale, bias, 0.0, strip)
    a[1] = 1e6
    b[4] = float("nan")
    torch.testing.assert_close(ours(kind, a, b, ids, scale, bias, 0.0, strip), without)


@pytest.mark.parametrize("strip", [None, TINY_STRIP])
@pytest.mark.parametrize("kind", ["info_nce", "sigmoid"])
def test_no_valid_row_is_zero_with_zero_gradients(kind: str, strip: How | None) -> None:
    inputs = [x.requires_grad_() for x in features(3)]
    value = ours(kind, *inputs[:2], [-1, -1, -1], *inputs[2:], 0.0, strip)
    assert float(value) == 0.0
    assert all(float(g.abs().max()) == 0 for g in gradients(value, inputs))


def test_top1_counts_any_positive() -> None:
    a = torch.nn.functional.normalize(torch.tensor([[1.0, 0.1], [0.1, 1.0], [1.0, 0.0]]), dim=-1)
    for strip in (None, TINY_STRIP):
        both = info_nce(a, a.flip(0), torch.tensor([1, 2, 1]), torch.tensor([5.0]), how=strip).metrics
        assert float(both["top1_ab"]) == pytest.approx(1.0)
        one = info_nce(a, a.flip(0), torch.tensor([1, 2, 3]), torch.tensor([5.0]), how=strip).metrics
        assert float(one["top1_ab"]) == pytest.approx(1 / 3)


def test_extreme_scale_stays_finite_and_equal() -> None:
    """Scale 100 in fp32, collapsed and opposite features: no overflow, and tiles agree with the matrix."""
    a = torch.nn.functional.normalize(torch.randn(40, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    ids, scale, bias = torch.arange(40), torch.tensor([100.0]), torch.tensor([-10.0])
    for b in (a.clone(), -a, a[:1].expand(40, -1)):
        for plain, got in (
            (info_nce(a, b, ids, scale), info_nce(a, b, ids, scale, how=TINY_STRIP)),
            (sigmoid_loss(a, b, ids, scale, bias), sigmoid_loss(a, b, ids, scale, bias, TINY_STRIP)),
        ):
            assert torch.isfinite(plain.value)
            torch.testing.assert_close(got.value, plain.value, rtol=1e-5, atol=1e-5)


def test_positives_are_found_by_sorting() -> None:
    found, ids = PositiveColumns(torch.tensor([7, 3, 7, 1])), torch.tensor([7, 9, 1])
    row, column = found.of(ids)
    assert sorted(zip(row.tolist(), column.tolist(), strict=True)) == [(0, 0), (0, 2), (2, 3)]
    assert found.count(ids).tolist() == [2, 0, 1]


@pytest.mark.parametrize(("rows", "columns", "mb"), [(32768, 32768, 8.0), (5, 10**6, 1.0), (10**6, 3, 0.5)])
def test_a_tile_has_a_bounded_size(rows: int, columns: int, mb: float) -> None:
    height, width = tile_shape(rows, columns, 4, mb)
    assert height * width * 4 <= mb * 2**20
    assert 1 <= height <= rows
    assert 1 <= width <= columns
    assert tile_shape(100, 100, 4, 1e-9) == (16, 32)


def test_collapsed_features_hit_nothing() -> None:
    """All logits alike: argmax would give every row the first column, and one of n rows a hit by chance."""
    one = torch.nn.functional.normalize(torch.ones(4, 4), dim=-1)
    for how in (None, TINY_STRIP):
        for out in (
            info_nce(one, one, torch.arange(4), torch.tensor([5.0]), how=how),
            sigmoid_loss(one, one, torch.arange(4), torch.tensor([5.0]), how=how),
        ):
            assert [float(x) for x in out.metrics.values()] == [0.0, 0.0]


@pytest.mark.parametrize("how", [None, TINY_STRIP])
def test_sigmoid_counts_hits_in_both_directions(how: How | None) -> None:
    """b_0 lies nearest to a_0, and so does b_1: both rows of a find theirs, or not, by their own columns."""
    a = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    b = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    metrics = sigmoid_loss(a, b, torch.arange(2), torch.tensor([5.0]), torch.tensor([-1.0]), how).metrics
    assert {k: float(x) for k, x in metrics.items()} == {"top1_ab": 1.0, "top1_ba": 0.5}


def test_the_recipe_line_builds_the_loss_and_names_errors() -> None:
    loss = build_loss(Component(name="info_nce", label_smoothing=0.1, impl="tiled"))
    a, b, scale, _ = features(4)
    got = loss(a, b, torch.arange(4), scale, None)
    torch.testing.assert_close(got.value, naive_info_nce(a, b, [0, 1, 2, 3], scale, 0.1))
    with pytest.raises(ConfigError, match=r"There is no loss 'info_nec'\. Did you mean 'info_nce'\?"):
        build_loss(Component(name="info_nec"))
    with pytest.raises(ConfigError, match=r"loss\.smoothing: unknown key"):
        build_loss(Component(name="info_nce", smoothing=0.1))
    with pytest.raises(ConfigError, match=r"loss\.label_smoothing"):
        build_loss(Component(name="info_nce", label_smoothing=1.5))


def test_auto_goes_over_to_tiles_at_2048() -> None:
    config = build_loss(Component(name="sigmoid")).config  # type: ignore[attr-defined]
    assert config.choose(2047, torch.device("cpu")) is None
    assert config.choose(2048, torch.device("cpu")) == How(2.0, False, tiled)
