"""Every term against a naive fp64 loop from its formula: value and gradient, absent rows, strips, head or none."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from _distill_naive import CASES, Sides, make_sides, naive

from dualenc.config import Component, Distill
from dualenc.distill.objective import build_terms
from dualenc.distill.terms.term import Columns, PairInputs, TeacherSide
from dualenc.errors import ConfigError
from dualenc.losses.blockwise.strips import strip_sum

torch.set_num_threads(1)


def ours(case: str, s: Sides, strip: float | None = 64.0) -> Tensor:
    return inputs_and_term(case, s, strip)


def inputs_and_term(case: str, s: Sides, strip: float | None) -> Tensor:
    name, options = CASES[case]
    config = Distill(look_ahead={}, terms=[Component(name=name, strip_mb=strip, **options)])
    [(_, term)] = build_terms(config)
    teacher = TeacherSide(s.ta, s.tb, s.t_scale, s.t_bias)
    x = PairInputs(s.a, s.b, s.ids, s.scale, s.bias, Columns(s.a, s.b), teacher, (s.pa, s.pb))
    return term(x).value


def gradients(value: Tensor, s: Sides) -> list[Tensor]:
    leaves = [s.a, s.b, s.pa, s.pb, s.scale, s.bias]
    if not value.requires_grad:
        return [torch.zeros_like(x) for x in leaves]
    grads = torch.autograd.grad(value, leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)]


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=6, deadline=None)
@given(ids=st.lists(st.integers(-1, 6), min_size=1, max_size=9), seed=st.integers(0, 1000))
def test_value_and_gradient_equal_the_formula(case: str, ids: list[int], seed: int) -> None:
    """Any pattern of shared ids (several positives) and absent rows, to fp64 precision."""
    s = make_sides(ids, seed)
    got, want = ours(case, s), naive(case, s)
    torch.testing.assert_close(got.reshape(()), want.reshape(()), rtol=1e-9, atol=1e-11)
    for g, w in zip(gradients(got, s), gradients(want, s), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("case", CASES)
def test_strips_change_nothing_and_absent_rows_change_nothing(case: str) -> None:
    ids = list(range(40))
    ids[3], ids[7], ids[20] = 2, -1, -1
    s = make_sides(ids, 1)
    whole, strips = ours(case, s, None), ours(case, s, 1e-6)
    torch.testing.assert_close(strips, whole, rtol=1e-12, atol=0)
    for g, w in zip(gradients(strips, s), gradients(whole, s), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-12)
    with torch.no_grad():
        s.a[7] = float("nan")
        s.tb[20] = float("inf")
    torch.testing.assert_close(ours(case, s, None), whole)


@pytest.mark.parametrize("case", CASES)
def test_no_valid_row_is_zero_with_zero_gradients(case: str) -> None:
    s = make_sides([-1, -1, -1], 0)
    value = ours(case, s)
    assert float(value.detach()) == 0.0
    assert all(float(g.abs().max()) == 0 for g in gradients(value, s))


def test_student_equal_to_teacher_has_nothing_to_learn() -> None:
    """Features, temperatures and projections alike: 0 for every term that compares with the teacher alone."""
    s = make_sides(list(range(8)), 3)
    s.a, s.b, s.t_scale, s.t_bias = s.ta.clone(), s.tb.clone(), float(s.scale.detach()), float(s.bias.detach())
    s.pa, s.pb = s.a, s.b
    for case in ("feature", "cosine", "soft_labels", "affinity", "within", "gradient", "soft_sigmoid"):
        assert abs(float(ours(case, s).detach())) < 1e-12, case
    for case in ("dcd_kl", "dcd_mse"):  # a = 1: distillation only
        CASES["same"] = (CASES[case][0], {**CASES[case][1], "a": 1.0})
        assert abs(float(ours("same", s).detach())) < 1e-12, case
    del CASES["same"]


def test_weights_by_sample_have_an_effect() -> None:
    """The released code multiplies the mean of a batch by weights that sum to 1: the plain term again."""
    s = make_sides(list(range(8)), 3)
    found = {}
    for dynamic in ("none", "teacher", "student"):
        CASES["weighted"] = ("dcd", {"a": 1.0, "candidates": "all", "dynamic": dynamic, "weight_temperature": 0.1})
        g = gradients(ours("weighted", s), s)[0]
        found[dynamic] = g / g.norm()
    del CASES["weighted"]
    for dynamic in ("teacher", "student"):
        assert float((found[dynamic] * found["none"]).sum()) < 0.999, dynamic


def test_a_strip_never_holds_the_matrix() -> None:
    seen = []

    def rows_sum(rows: Tensor, columns: Tensor) -> Tensor:
        seen.append(len(rows))
        return (rows @ columns.T).sum()

    x = torch.randn(100, 4, requires_grad=True)
    strip_sum(rows_sum, (x,), (torch.randn(50, 4),), 50, 1e-6).backward()
    assert max(seen) == 16
    assert len(seen) == 2 * 7  # once forward, once again in the backward


def test_the_recipe_names_errors() -> None:
    with pytest.raises(ConfigError, match=r"There is no distillation term 'featur'\. Did you mean 'feature'\?"):
        build_terms(Distill(look_ahead={}, terms=[Component(name="featur")]))
    with pytest.raises(ConfigError, match=r"distill\.terms\.0\.temprature: unknown key"):
        build_terms(Distill(look_ahead={}, terms=[Component(name="dcd", temprature=2)]))
    with pytest.raises(ConfigError, match="across and within are both false; set at least one"):
        build_terms(Distill(look_ahead={}, terms=[Component(name="affinity", across=False)]))
