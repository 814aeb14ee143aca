"""N ranks, any engine, any micro-batch: the parameters after three SGD steps are those of one process, to 1e-5.

The tolerance is relative to each parameter's largest entry; measured: below 1e-6. ``gradcheck.py`` prints the table.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import _real_towers
import gradcheck
from _jobs import whole_batch_gradients
from _spawn import spawn

from dualenc.distributed.world import World
from dualenc.losses import losses

torch.set_num_threads(1)
HERE = Path(__file__).parent
LIMIT = 1e-5


def check(found: dict[str, Any], expected_cells: int) -> None:
    assert len(found) == expected_cells
    wrong = {case: cell for case, cell in found.items() if not cell[0] <= LIMIT}
    assert not wrong


def test_one_process() -> None:
    check(gradcheck.sweep(World(), ["single"]), 8)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.extra)])
def test_ddp_and_fsdp2(ranks: int) -> None:
    """With 4 ranks three of them have no audio at all."""
    check(spawn(HERE / "gradcheck.py", "sweep", ranks, {"engines": ["DDP", "FSDP2"]})[0], 16)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(
    "ranks", [pytest.param(1, marks=pytest.mark.extra), 2, pytest.param(4, marks=pytest.mark.extra)]
)
def test_zero_0_to_3(ranks: int) -> None:
    engines = [f"ZeRO {z}" for z in range(4)]
    check(spawn(HERE / "gradcheck.py", "sweep", ranks, {"engines": engines}, timeout_s=280)[0], 32)


REAL = ["own vit", "open_clip RN50", "timm ViT", "HF SigLIP"]
"""Of the real towers. ViT's and SigLIP's have parameters [1, 1, D], of which FSDP2 gives one rank nothing; the ResNet
has batch norms."""


@pytest.mark.dist
@pytest.mark.slow
def test_real_towers_on_two_ranks() -> None:
    """FSDP2 and ZeRO 3 on some; `make gradcheck` has every family, loss and engine."""
    engines = {e: gradcheck.ENGINES[e] for e in ("FSDP2", "ZeRO 3")}
    found = spawn(_real_towers.__file__, "sweep", 2, {"engines": engines, "models": REAL}, timeout_s=280)[0]
    check(_real_towers.differences(found), len(REAL) * len(engines))


@pytest.mark.dist
@pytest.mark.extra
@pytest.mark.slow
def test_every_real_tower_and_engine() -> None:
    engines = {e: config for e, config in gradcheck.ENGINES.items() if e != "single"}
    found = spawn(_real_towers.__file__, "sweep", 2, {"engines": engines}, timeout_s=900)[0]
    check(_real_towers.differences(found), len(_real_towers.MODELS) * len(engines))


def test_statistics_of_the_batch_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check has teeth: batch norms that take each micro-batch's own statistics are far off."""
    free = {**_real_towers.MODELS["open_clip RN50"]}
    free["image"] = ({**free["image"][0], "freeze_bn": False}, free["image"][1])
    monkeypatch.setitem(_real_towers.MODELS, "free", free)
    got = _real_towers.run(World(), {}, "free", "info_nce", 2)
    assert _real_towers.differences({"free/single/info_nce/2": got})["free/single/info_nce/2"][0] > 1e-2


def test_every_loss_is_in_a_table() -> None:
    """The others are found in the registry: tests/losses/test_every_loss.py and test_terms_on_ranks.py."""
    assert {*_real_towers.LOSSES, "prc", "point_contrast", "rad"} <= set(losses)


@pytest.mark.dist
def test_a_detached_gather_would_be_seen() -> None:
    """The check has teeth: without the gradient across ranks it is off by far more than the limit."""
    want = whole_batch_gradients()
    for detached in (False, True):
        got = spawn(HERE / "_jobs.py", "averaged_gradients", 2, {"detached": detached})[0]
        worst, name = gradcheck.difference(got, {k: g for k, g in want.items() if float(g.abs().max()) > 1e-6})
        assert (worst > 1e-2) if detached else (worst <= LIMIT), (detached, worst, name)


def test_without_replayed_random_numbers_the_cache_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import nullcontext

    from dualenc.losses import grad_cache

    monkeypatch.setattr(grad_cache.RandomState, "replayed", lambda self: nullcontext())
    got = gradcheck.run(World(), "single", "info_nce", 4, 0.3)
    assert gradcheck.difference(got, gradcheck.reference("info_nce", 4, 0.3, 1))[0] > 1e-3


def test_clipping_takes_part_in_the_check() -> None:
    """The table would not see a wrong norm if the clip never bit."""
    unclipped = gradcheck.OPTIM.model_copy(update={"clip_grad_norm": None})
    want = gradcheck.run(World(), "single", "sigmoid", 1, 0.0)
    old, gradcheck.OPTIM = gradcheck.OPTIM, unclipped
    try:
        assert gradcheck.difference(gradcheck.run(World(), "single", "sigmoid", 1, 0.0), want)[0] > 1e-2
    finally:
        gradcheck.OPTIM = old
