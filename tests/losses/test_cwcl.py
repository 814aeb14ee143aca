"""CWCL against the paper's formula written as a loop: value, gradient, absent rows, micro-batches, ranks, engines."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dualenc.config import Component
from dualenc.distributed.world import World
from dualenc.errors import ConfigError
from dualenc.losses import build_loss
from dualenc.losses.blockwise import tiled
from dualenc.losses.blockwise.sweeps import How
from dualenc.losses.cwcl import cwcl
from dualenc.losses.info_nce import info_nce

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
sys.path.insert(0, str(Path(__file__).parent))
import _cwcl_jobs as jobs
from _spawn import spawn

HERE = Path(__file__).parent
torch.set_num_threads(1)

TINY_TILES = How(1e-6, False, tiled)  # of the smallest size, 16 x 16
LIMIT = 1e-5


def made(n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """a, b, scale and frozen embeddings of another width than the features."""
    g = torch.Generator().manual_seed(seed)
    a, b, f = (
        torch.nn.functional.normalize(torch.randn(n, d, generator=g, dtype=torch.float64), dim=-1) for d in (5, 5, 9)
    )
    return a, b, torch.tensor([7.0], dtype=torch.float64), f


@pytest.mark.parametrize("how", [None, TINY_TILES])
@pytest.mark.parametrize("sharpen", [1.0, 3.0])
@settings(max_examples=8, deadline=None)
@given(ids=st.lists(st.integers(-1, 4), min_size=1, max_size=18), seed=st.integers(0, 1000))
def test_value_and_gradient_equal_the_papers(sharpen: float, how: How | None, ids: list[int], seed: int) -> None:
    """Any pattern of shared ids and absent rows; the absent slots hold what must not matter."""
    a, b, scale, f = made(len(ids), seed)
    keep = [i for i, x in enumerate(ids) if x >= 0]
    lost = [i for i, x in enumerate(ids) if x < 0]
    f[lost] = float("nan")
    inputs = [a.requires_grad_(), b.requires_grad_(), scale.requires_grad_()]
    got = cwcl(a, b, torch.tensor(ids), scale, (None, f), sharpen, how).value
    mirrored = cwcl(b, a, torch.tensor(ids), scale, (f, None), sharpen, how).value
    if not keep:
        assert float(got.detach()) == 0.0
        assert all(float(g.abs().max()) == 0 for g in torch.autograd.grad(got, inputs))
        return
    want = jobs.naive_cwcl(a[keep], b[keep], [ids[i] for i in keep], scale, f[keep], sharpen)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(mirrored, want, rtol=1e-10, atol=1e-12)
    for g, w in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-11)


def test_orthogonal_items_sharpened_without_end_are_info_nce() -> None:
    """w is 1 on the diagonal and ½ beside it; ½ to the 200th power is nothing."""
    a, b, scale, _ = made(6)
    eye, ids = torch.eye(6, dtype=torch.float64), torch.arange(6)
    torch.testing.assert_close(cwcl(a, b, ids, scale, (None, eye), 200.0).value, info_nce(a, b, ids, scale).value)


def test_equal_items_are_matched_to_all_alike() -> None:
    """w constant: the target is uniform, so features that coincide lose log N and have no excess."""
    same = torch.nn.functional.normalize(torch.ones(4, 5), dim=-1)
    out = cwcl(same, same, torch.arange(4), torch.tensor([9.0]), (None, same))
    assert float(out.value) == pytest.approx(math.log(4), abs=1e-5)
    assert float(out.metrics["excess_ba"]) == pytest.approx(0.0, abs=1e-5)
    assert "excess_ab" not in out.metrics


def test_its_value_says_little_and_its_excess_does() -> None:
    """At 1,024 unrelated items the pair's own share of the target is 0.2 %, and a perfect model still loses log N."""
    n = 1024
    eye, ids, scale = torch.eye(n), torch.arange(n), torch.tensor([100.0])
    out = cwcl(eye, eye, ids, scale, (None, eye), how=How(2.0, False, tiled))
    own = 1 / (1 + (n - 1) / 2)
    assert own == pytest.approx(0.00195, abs=1e-5)
    weighted, plain = 2 * float(out.value), 0.0  # the plain direction is solved
    assert weighted - plain == pytest.approx((1 - own) * 100, rel=1e-3)
    flat = cwcl(
        eye, eye, ids, torch.tensor([0.69]), (None, eye), how=How(2.0, False, tiled)
    )  # e^0.69 ≈ 2: softmax is w̄
    assert float(flat.metrics["excess_ba"]) == pytest.approx(0.0, abs=1e-5)
    weighted_flat = float(flat.metrics["excess_ba"]) + math.log(n)
    assert weighted_flat == pytest.approx(math.log(n), abs=0.01)


def test_both_sides_locked_weighs_both_directions() -> None:
    a, b, scale, f = made(7)
    ids = torch.arange(7)
    both = cwcl(a, b, ids, scale, (f, f)).value
    one, other = cwcl(a, b, ids, scale, (f, None)).value, cwcl(a, b, ids, scale, (None, f)).value
    torch.testing.assert_close(both, one + other - info_nce(a, b, ids, scale).value)


def test_without_a_locked_tower_it_says_what_to_write() -> None:
    loss = build_loss(Component(name="cwcl"))
    a, b, scale, _ = made(3)
    with pytest.raises(ConfigError, match=r"modalities\.NAME\.lock: true"):
        loss(a, b, torch.arange(3), scale, None)
    with pytest.raises(ConfigError, match=r"loss\.sharpen"):
        build_loss(Component(name="cwcl", sharpen=0))


def test_one_process_whole_and_in_micro_batches() -> None:
    """Targets come from the whole batch, whatever the micro-batch; with lock: trunk the projection is trained."""
    found = jobs.sweep(World(), ["single"])
    assert len(found) == 6
    assert not {k: v for k, v in found.items() if not v[0] <= LIMIT}


def test_the_check_sees_targets_of_the_projected_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """Had the targets been made of the features (after the projection), the parameters would be others."""
    original = jobs.DualEncoder.forward

    def projected(self: jobs.DualEncoder, inputs: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        out = original(self, inputs)
        return {**out, "frozen": {m: out["features"][m].detach() for m in out["frozen"]}}

    want = jobs.reference("cwcl", "trunk")
    monkeypatch.setattr(jobs.DualEncoder, "forward", projected)
    got = jobs.run(World(), "single", "cwcl", 1, "trunk")
    assert max(float((got[k] - p).abs().max() / p.abs().max()) for k, p in want.items()) > 1e-3


@pytest.mark.dist
@pytest.mark.slow
def test_two_ranks_of_which_one_drew_no_audio() -> None:
    engines = ["DDP", "FSDP2", "ZeRO 2", "ZeRO 3"]
    found = spawn(HERE / "_cwcl_jobs.py", "sweep", 2, {"engines": engines})[0]
    assert len(found) == 24
    assert not {k: v for k, v in found.items() if not v[0] <= LIMIT}
