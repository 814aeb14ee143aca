"""What holds for every registered contrast: tiles, the ring, ranks and micro-batches change no number.

A new loss is picked up from the registry; one that needs another kind of label adds it to ``_every_jobs.labels``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
sys.path.insert(0, str(Path(__file__).parent))
import _every_jobs as jobs
from _ring_jobs import Live
from _spawn import spawn

from dualenc.config import Component
from dualenc.distributed.world import World
from dualenc.losses import build_loss, losses

torch.set_num_threads(1)
LIMIT = 1e-5


@pytest.fixture(scope="module")
def one_process() -> dict[str, Any]:
    return jobs.of_features(World())


def off(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    """Largest difference of each number, relative to its largest entry; a NaN is infinitely far off."""
    assert got.keys() == want.keys()
    out = {k: float((got[k].double() - x.double()).abs().max() / x.abs().max().clamp(min=1)) for k, x in want.items()}
    return {k: x if x == x else float("inf") for k, x in out.items()}


@pytest.mark.parametrize("name", jobs.NAMES)
def test_tiles_change_nothing_and_absent_slots_count_nothing(name: str, one_process: dict[str, Any]) -> None:
    """Absent slots hold NaN; several positives; in fp64."""
    found = one_process[name]
    for x in found["plain"].values():
        assert torch.isfinite(x).all()
    for how in found.keys() - {"plain"}:
        assert {k: x for k, x in off(found[how], found["plain"]).items() if not x <= 1e-9} == {}
    absent = jobs.made(24, slice(0, 24))[1] < 0
    for side in "ab":
        assert float(found["plain"][side][absent].abs().max()) == 0
        assert float(found["plain"][side].abs().max()) > 0


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_change_nothing(ranks: int, one_process: dict[str, Any]) -> None:
    """Value, metrics and gradients at the features of every loss and way; on 4 ranks each rank has 6 slots."""
    found = spawn(jobs.__file__, "of_features", ranks)
    wrong = {}
    for name, ways in one_process.items():
        for how, want in ways.items():
            got = [f[name][how] for f in found]
            joined = {k: torch.cat([g[k] for g in got]) if k in ("a", "b") else got[0][k] for k in want}
            wrong |= {f"{name}/{how}/{k}": x for k, x in off(joined, want).items() if not x <= 1e-9}
    assert wrong == {}


def differences(found: dict[str, Any], want: dict[str, Any]) -> dict[str, float]:
    """Case → largest relative difference of any parameter, above the limit."""
    out = {}
    for name, ways in found.items():
        for chunks, got in ways.items():
            x = max(float((got[k] - p).abs().max() / p.abs().max().clamp(min=1e-12)) for k, p in want[name].items())
            if not x <= LIMIT:
                out[f"{name}/{chunks}"] = x
    return out


@pytest.fixture(scope="module")
def trained_alone() -> dict[str, Any]:
    return {n: jobs.trained(World(), case, "single", 1) for n, case in zip(jobs.NAMES, jobs.CASES, strict=True)}


@pytest.mark.slow
def test_training_in_micro_batches_is_exact(trained_alone: dict[str, Any]) -> None:
    """Three steps of SGD with momentum and clipping, labels and a locked trunk: of one process, to 1e-5."""
    found = {n: {"4": jobs.trained(World(), c, "single", 4)} for n, c in zip(jobs.NAMES, jobs.CASES, strict=True)}
    assert differences(found, trained_alone) == {}


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.extra)])
def test_training_on_ranks_is_exact(ranks: int, trained_alone: dict[str, Any]) -> None:
    """Whole batches and micro-batches; the other ranks drew no audio."""
    found = spawn(jobs.__file__, "of_training", ranks, timeout_s=600)[0]
    assert differences(found, trained_alone) == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", jobs.NAMES)
def test_memory_grows_with_the_batch_not_with_its_square(name: str) -> None:
    """The most bytes alive in forward and backward, at 192 and 768 rows: a matrix of logits would be 16 times as large.

    Tiles, and the strips in which hardest negatives are searched, are of one size.
    """
    case = jobs.CASES[jobs.NAMES.index(name)]
    settings = {k: x for k, x in (jobs.settings_of(case, "tiled") or {}).items() if k != "tile_mb"}
    if "tile_mb" in losses[case["name"]].Config.model_fields:
        settings["tile_mb"] = 0.1
    peaks = []
    for n in (192, 768):
        inputs, ids, extras = jobs.made(n, slice(0, n))
        inputs = [x.nan_to_num().requires_grad_() for x in inputs]
        extras.b["frozen"] = extras.b["frozen"].nan_to_num()
        loss = build_loss(Component(**case, **settings))
        with Live() as live:
            jobs.call(loss, *inputs[:2], ids, inputs[2], extras).value.backward()
        peaks.append(live.peak)
    assert peaks[1] < 5 * peaks[0], peaks
