"""PRC, PointContrast and RAD against loops: value, gradient, weights, micro-batches, ranks, engines."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dualenc.config import Component
from dualenc.data.batch import ABSENT
from dualenc.data.driving.places import POOR
from dualenc.distributed.world import World
from dualenc.errors import ConfigError
from dualenc.losses import Extras, build_loss
from dualenc.losses.regions import Sides, region_weights

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
sys.path.insert(0, str(Path(__file__).parent))
import _region_jobs as jobs
from _spawn import spawn

HERE = Path(__file__).parent
torch.set_num_threads(1)
LIMIT = 1e-5
KINDS = ["prc", "point_contrast", "rad"]
REGION = st.sampled_from([ABSENT, POOR, 0, 1, 2])


def made(region: list[list[int]], seed: int = 0) -> tuple[Extras, Tensor, Tensor, Tensor]:
    """Extras, and the leaves: local features of both sides and the scale, fp32 as towers give them."""
    g = torch.Generator().manual_seed(seed)
    B, K = len(region), len(region[0])
    a, b = (torch.nn.functional.normalize(torch.randn(B, K, 5, generator=g), dim=-1).requires_grad_() for _ in "ab")
    r = torch.tensor(region)
    scale = torch.tensor([7.0], requires_grad=True)
    return Extras(("view_a", "view_b"), {"local": a, "region": r}, {"local": b, "region": r}), a, b, scale


def value(kind: str, extras: Extras, scale: Tensor, ids: Tensor, **settings: object) -> Tensor:
    rows = torch.zeros(len(ids), 2)
    loss = build_loss(Component.model_validate({"name": kind, **settings}))
    return loss(rows, rows, ids, scale, None, extras=extras).value  # type: ignore[call-arg]


@pytest.mark.parametrize("strip", [64.0, 1e-6])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=10, deadline=None)
@given(region=st.lists(st.lists(REGION, min_size=6, max_size=6), min_size=1, max_size=3), seed=st.integers(0, 999))
def test_value_and_gradient_equal_the_loops(kind: str, strip: float, region: list[list[int]], seed: int) -> None:
    extras, a, b, scale = made(region, seed)
    ids = torch.arange(len(region)) + 5
    got = value(kind, extras, scale, ids, strip_mb=strip)
    there = [(s, k) for s, row in enumerate(region) for k, r in enumerate(row) if r != ABSENT]
    leaves = [a, b, scale]
    if not any(region[s][k] >= 0 or kind == "point_contrast" for s, k in there):
        assert float(got.detach()) == 0.0
        return
    x, y = (torch.stack([side[s, k] for s, k in there]).double() for side in (a, b))
    want = jobs.naive(x, y, [(s, region[s][k]) for s, k in there], scale.double(), kind)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    wanted = torch.autograd.grad(want, leaves, allow_unused=True)
    for g, w in zip(torch.autograd.grad(got, leaves, allow_unused=True), wanted, strict=True):
        torch.testing.assert_close(
            torch.zeros(1) if g is None else g, torch.zeros(1) if w is None else w, rtol=1e-4, atol=1e-6
        )


def sides(region: list[list[int]]) -> Sides:
    extras, *_ = made(region)
    return Sides.of(extras, torch.arange(len(region)), "rad")


def test_rad_gives_every_region_the_same_share_however_many_places_it_has() -> None:
    s = sides([[0, 0, 0, 1, POOR, ABSENT], [0, 1, 1, 2, 2, POOR]])
    weights = region_weights(s)
    assert float(weights.sum()) == pytest.approx(1.0)
    share = {int(r): float(weights[s.region[s.rows()] == r].sum()) for r in s.region[s.rows()].unique()}
    assert len(share) == 5
    assert list(share.values()) == pytest.approx([0.2] * 5)


def test_rad_is_the_same_when_the_places_of_a_region_come_twice() -> None:
    """Both its rows and its columns: the share of the region stays, and so does what every other row sees of it."""
    extras, a, b, _ = made([[0, 0, 1, 2, POOR, POOR]])
    twice = torch.tensor([[0, 0, 1, 2, POOR, POOR, 0, 0]])
    again = Extras(
        extras.pair,
        {"local": torch.cat([a, a[:, :2]], 1), "region": twice},
        {"local": torch.cat([b, b[:, :2]], 1), "region": twice},
    )
    for x, e in ((extras, extras.a["region"]), (again, twice)):
        s = Sides.of(x, torch.zeros(1, dtype=torch.long), "rad")
        rows = s.rows()
        weights = region_weights(s)
        per = {int(r): float(weights[s.region[rows] == r].sum()) for r in s.region[rows].unique()}
        assert list(per.values()) == pytest.approx([1 / 3] * 3), e


def test_rad_sends_no_gradient_to_the_teacher() -> None:
    extras, a, b, scale = made([[0, 0, 1, 1, POOR, POOR]])
    value("rad", extras, scale, torch.zeros(1, dtype=torch.long)).backward()  # type: ignore[no-untyped-call]
    assert b.grad is None
    assert a.grad is not None
    assert float(a.grad.abs().max()) > 0


def test_alpha_mixes_two_losses() -> None:
    extras, _, _, scale = made([[0, 0, 1, 2, POOR, POOR], [0, 1, 1, 1, POOR, ABSENT]])
    ids = torch.arange(2)
    ends = [value("prc", extras, scale, ids, alpha=x) for x in (0.0, 1.0)]
    torch.testing.assert_close(value("prc", extras, scale, ids, alpha=0.25), 0.75 * ends[0] + 0.25 * ends[1])


def test_a_sample_that_is_in_the_batch_twice_is_one_sample() -> None:
    """Its regions are the same regions: no negatives of themselves."""
    extras, *_ = made([[0, 0, 1, POOR], [0, 0, 1, POOR]])
    one = Sides.of(extras, torch.tensor([3, 3]), "prc").region.view(2, 4)
    two = Sides.of(extras, torch.tensor([3, 4]), "prc").region.view(2, 4)
    assert torch.equal(one[0], one[1])
    assert not torch.isin(two[0][:3], two[1][:3]).any()


def test_without_places_it_says_what_to_write() -> None:
    nothing = Extras(("camera", "lidar"), {}, {})
    with pytest.raises(ConfigError, match=r"'camera' has none: set modalities.camera.input.places"):
        value("rad", nothing, torch.ones(1), torch.zeros(1, dtype=torch.long))


def check(cells: dict[str, tuple[float, str]]) -> None:
    wrong = {k: v for k, v in cells.items() if not v[0] < LIMIT}
    assert not wrong, wrong


def test_micro_batches_give_the_same_gradient() -> None:
    cells = jobs.sweep(World(), ["single"])
    assert len(cells) == 6
    check(cells)


@pytest.mark.dist
def test_two_ranks_give_the_same_gradient_with_no_region_on_one_slot() -> None:
    check(spawn(HERE / "_region_jobs.py", "sweep", 2, {"engines": ["DDP"]})[0])


@pytest.mark.dist
@pytest.mark.slow
def test_engines_that_cut_parameters_give_the_same_gradient() -> None:
    check(spawn(HERE / "_region_jobs.py", "sweep", 2, {"engines": ["FSDP2", "ZeRO 3"]})[0])


@pytest.mark.dist
def test_no_region_on_any_rank_is_a_loss_of_zero() -> None:
    assert spawn(HERE / "_region_jobs.py", "nothing_anywhere", 2, {}) == [0.0, 0.0]
