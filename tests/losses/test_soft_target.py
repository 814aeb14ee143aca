"""The soft-target core: what a builder and a function of the logits make, further columns, and its bounds."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
sys.path.insert(0, str(Path(__file__).parent))
import _column_jobs as jobs
import _every_jobs
from _spawn import spawn

from dualenc.distributed.world import World
from dualenc.losses.blockwise import tiled
from dualenc.losses.blockwise.row_loss import Tile
from dualenc.losses.blockwise.sweeps import How
from dualenc.losses.contrast import NO_PAIR, FurtherColumns, contrast
from dualenc.losses.info_nce import info_nce
from dualenc.losses.soft_target import soft_target_nce
from dualenc.losses.targets import SamePair, SoftTarget, Targets

torch.set_num_threads(1)
HOWS = [None, How(1e-6, False, tiled)]


@pytest.fixture(scope="module")
def one_process() -> dict[str, Any]:
    return jobs.sweep(World())


def worst(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max())


@pytest.mark.parametrize("targets", ["pair", "label"])
@pytest.mark.parametrize("kind", jobs.KINDS)
def test_further_columns_against_a_loop(kind: str, targets: str, one_process: dict[str, Any]) -> None:
    """Columns of their own ids enter the rows' softmax: as negatives, as positives, as a queue; some are not there."""
    inputs, ids, extras = _every_jobs.made(24, slice(0, 24))
    (more,) = jobs.further(24, slice(0, 24), kind)
    a, b, scale = (x.requires_grad_() for x in inputs)
    more.x.requires_grad_()
    label = extras.both["label"].tolist()
    terms = []
    for x, y, side in ((a, b, "b"), (b, a, "a")):
        columns = [(y[j], int(ids[j]), label[j]) for j in range(24) if ids[j] >= 0]
        if side == more.side:
            there = [k for k in range(48) if more.ids[k] != -1]
            columns += [(more.x[k], int(more.ids[k]), int(more.values["label"][k])) for k in there]
        for i in range(24):
            if ids[i] < 0:
                continue
            z = [scale.squeeze() * (x[i] @ c) for c, _, _ in columns]
            own = [k == int(ids[i]) for _, k, _ in columns]
            alike = [v == label[i] != -1 for _, _, v in columns]
            wanted = own if targets == "pair" else [o or s for o, s in zip(own, alike, strict=True)]
            kept = [k for k in range(len(z)) if targets == "label" or own[k] or not alike[k]]
            log_z = torch.logsumexp(torch.stack([z[k] for k in kept]), 0)
            pull = torch.stack([v for v, w in zip(z, wanted, strict=True) if w]).mean()
            terms.append(log_z - 0.9 * pull - 0.1 * torch.stack([z[k] for k in kept]).mean())
    want = torch.stack(terms).sum() / (2 * int((ids >= 0).sum()))
    want.backward()
    for way in jobs.WAYS:
        got = one_process[f"{kind}/{targets}/{way}"]
        assert worst(got["value"], want) < 1e-12
        for k, x in {"a": a, "b": b, "scale": scale, "x": more.x}.items():
            assert k not in got or worst(got[k], x.grad) < 1e-11, (way, k)


def test_a_table_of_scores_as_targets_against_a_loop(one_process: dict[str, Any]) -> None:
    """The values of rows alone; columns without a score are in no softmax."""
    (a, b, scale), ids, _ = _every_jobs.made(24, slice(0, 24))
    for x in (a, b, scale):
        x.requires_grad_()
    scores, terms, there = jobs.table(24), [], [j for j in range(24) if ids[j] >= 0]
    for i in there:
        columns = [j for j in there if scores[i, j] > -float("inf")]
        q = torch.stack([scores[i, j] / 2 for j in columns]).softmax(0)
        p = torch.stack([scale.squeeze() * (a[i] @ b[j]) for j in columns]).log_softmax(0)
        terms.append((q * (q.log() - p)).sum())
    want = torch.stack(terms).mean()
    want.backward()
    for way in jobs.WAYS:
        got = one_process[f"scores/{way}"]
        for k, x in {"value": want, "a": a.grad, "b": b.grad, "scale": scale.grad}.items():
            assert worst(got[k], x) < 1e-11, (way, k)
    with pytest.raises(ValueError, match="row_values need ba=None"):
        contrast(a, b, ids, scale, SoftTarget(SamePair()), SoftTarget(SamePair()), row_values={"scores": scores})


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_further_columns_on_ranks_have_the_right_labels(ranks: int, one_process: dict[str, Any]) -> None:
    """A peer gathers every rank's hard negatives behind its own positives and so shifts the labels of the others."""
    found = spawn(jobs.__file__, "sweep", ranks)
    for case, want in one_process.items():
        for k, x in want.items():
            got = torch.cat([f[case][k] for f in found]) if k in ("a", "b", "x") else found[0][case][k]
            assert worst(got, x) < 1e-11, (case, k)


@pytest.mark.parametrize("how", HOWS)
def test_a_hard_negative_is_a_negative_and_an_absent_one_is_nothing(how: How | None) -> None:
    eye, ids, scale = torch.eye(3)[:2], torch.tensor([0, 1]), torch.tensor([2.0])
    plain = soft_target_nce(eye, eye, ids, scale, how=how).value
    absent = FurtherColumns(torch.full((2, 3), float("nan")), torch.tensor([-1, -1]))
    assert float(soft_target_nce(eye, eye, ids, scale, columns=[absent], how=how).value) == pytest.approx(float(plain))
    same = FurtherColumns(eye, torch.full((2,), NO_PAIR))  # as near as the positive: one more e² below each row of a
    want = (torch.tensor([2.0, 2.0, 0, 0]).logsumexp(0) - 2 + float(plain)) / 2
    assert float(soft_target_nce(eye, eye, ids, scale, columns=[same], how=how).value) == pytest.approx(float(want))


class Uniform(Targets):
    """Every column alike, or (``log``) as far as a constant of the row goes."""

    def __init__(self, log: bool) -> None:
        self.log = log  # type: ignore[misc]

    def __call__(self, tile: Tile) -> Tensor:
        return torch.full_like(tile.logits, -7.0 if self.log else 3.0)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("log", [False, True])
def test_targets_are_normalised_and_the_bound_is_their_entropy(log: bool, how: How | None) -> None:
    """Uniform targets at equal logits: the loss is log N, its excess 0, and nothing has a gradient."""
    one = torch.nn.functional.normalize(torch.ones(6, 3, dtype=torch.float64), dim=1).requires_grad_()
    scale = torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
    out = soft_target_nce(one, one.detach(), torch.arange(6), scale, Uniform(log), excess=True, how=how)
    assert float(out.value) == pytest.approx(float(torch.tensor(6.0).log()))
    assert abs(float(out.metrics["excess_ab"])) < 1e-6
    assert all(float(g.abs().max()) < 1e-9 for g in torch.autograd.grad(out.value, (one, scale)))


@pytest.mark.parametrize("how", HOWS)
def test_the_plain_case_is_info_nce_itself_and_equals_the_core(how: How | None) -> None:
    """Own pairs go to the hand-written path: bit for bit InfoNCE's; the core gives the same to rounding."""
    inputs, ids, _ = _every_jobs.made(20, slice(0, 20))
    a, b, scale = (x.nan_to_num(0.1) for x in inputs)
    fast = info_nce(a, b, ids, scale, 0.1, how)
    assert torch.equal(soft_target_nce(a, b, ids, scale, smoothing=0.1, how=how).value, fast.value)
    core = soft_target_nce(a, b, ids, scale, SamePair(), lambda tile: tile.logits, smoothing=0.1, how=how)
    torch.testing.assert_close(core.value, fast.value, rtol=1e-12, atol=0)
    for name in ("top1_ab", "top1_ba"):
        assert torch.equal(core.metrics[name], fast.metrics[name])


def test_columns_without_a_value_that_is_read_are_refused() -> None:
    eye = torch.eye(2)
    with pytest.raises(ValueError, match="further columns have no 'label'"):
        soft_target_nce(
            eye,
            eye,
            torch.arange(2),
            torch.ones(1),
            values={"label": torch.arange(2)},
            columns=[FurtherColumns(eye, torch.full((2,), NO_PAIR))],
        )
