"""Real processes: what one engine saves on W ranks another goes on with on W′; skipped steps; bf16; evaluation."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
import _jobs
from _spawn import spawn
from gradcheck import ENGINES

from dualenc.distributed.world import World

torch.set_num_threads(1)
JOBS = Path(_jobs.__file__)
SHARED = {name: e for name, e in ENGINES.items() if name != "single"}
pytestmark = [pytest.mark.dist, pytest.mark.slow]


def close(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], atol: float = 2e-6) -> None:
    assert set(got) == set(want)
    for name, w in want.items():
        torch.testing.assert_close(
            got[name].double(), w.double(), rtol=1e-4, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.fixture(scope="module")
def unbroken() -> dict[str, Any]:
    """One process, four AdamW steps."""
    return _jobs.train(World(), {}, 0, 4, ema=40)


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two steps on two ranks under every engine, each saved."""
    folder = tmp_path_factory.mktemp("halves")
    found = spawn(JOBS, "states", 2, {"engines": list(SHARED.values()), "first": 0, "last": 2, "ema": 40})
    assert all(not out["tensors"] and not out["model"] for out in found[1])  # rank 0 alone keeps what is collected
    out = {}
    for name, saved in zip(SHARED, found[0], strict=True):
        out[name] = folder / f"{name}.pt"
        torch.save(saved, out[name])
    return out


def test_every_engine_saves_the_same_state(halves: dict[str, Path]) -> None:
    """Weights, both Adam moments, step counts and the moving average equal those of one process."""
    want = _jobs.train(World(), {}, 0, 2, ema=40)
    for path in halves.values():
        got = torch.load(path, weights_only=True)
        close(got["model"], want["model"])
        close(got["ema"], want["ema"])
        # 2.8e-8 of moments up to 2e-3: Adam's first step makes ± lr of gradients at the level of rounding, so those
        # of the second step differ, between 2 ranks and 1 process, by a little more. All engines on 2 ranks agree.
        close(got["tensors"], want["tensors"], atol=5e-8)
        assert got["info"] == want["info"]
        assert got["lr"] == want["lr"]


@pytest.mark.parametrize("engine", SHARED)
def test_two_ranks_to_one_process(halves: dict[str, Path], unbroken: dict[str, Any], engine: str) -> None:
    rest = _jobs.train(World(), {}, 2, 4, state=str(halves[engine]))
    close(rest["model"], unbroken["model"], atol=5e-6)
    for got, want in zip(rest["results"], unbroken["results"][2:], strict=True):
        assert got == pytest.approx(want, rel=1e-4)


@pytest.mark.extra
def test_one_process_to_two_ranks_and_from_engine_to_engine(
    halves: dict[str, Path], unbroken: dict[str, Any], tmp_path: Path
) -> None:
    torch.save(_jobs.train(World(), {}, 0, 2), tmp_path / "single.pt")
    for source in (tmp_path / "single.pt", halves["ZeRO 3"]):
        arguments = {"engines": list(SHARED.values()), "first": 2, "last": 4, "state": str(source)}
        for name, rest in zip(SHARED, spawn(JOBS, "states", 2, arguments)[0], strict=True):
            close(rest["model"], unbroken["model"], atol=5e-6)
            assert set(rest["tensors"]) == set(unbroken["tensors"]), name
            for result, expected in zip(rest["results"], unbroken["results"][2:], strict=True):
                assert result == pytest.approx(expected, rel=1e-4), name


def test_a_nan_on_one_rank_is_one_decision_of_all() -> None:
    """The step is left out everywhere, momenta untouched, under every engine; the run goes on as if it were not."""
    want = _jobs.train(World(), {}, 0, 3, nan_at=1)
    for rank in spawn(JOBS, "states", 2, {"engines": list(SHARED.values()), "first": 0, "last": 3, "nan_at": 1}):
        for out in rank:
            assert [r[2] for r in out["results"]] == [0.0, 1.0, 0.0]
            assert out["results"][2][0] == pytest.approx(want["results"][2][0], rel=1e-5)
            if out["model"]:
                close(out["model"], want["model"], atol=5e-6)
                close(out["tensors"], want["tensors"], atol=1e-7)


@pytest.mark.extra
def test_bf16_keeps_the_temperature_within_its_bound() -> None:
    """50 steps at a high rate; the scale starts at 7.39 and its bound is 8."""
    engines = [e | {"precision": "bf16"} for e in SHARED.values()]
    optim = _jobs.ADAMW.model_dump() | {"lr": 0.05}
    arguments = {"engines": engines, "first": 0, "last": 50, "optim": optim, "max_scale": 8.0}
    for out in spawn(JOBS, "states", 2, arguments, timeout_s=280)[0]:
        scales = [r[3] for r in out["results"]]
        assert max(scales) <= 8.0
        assert scales[0] == pytest.approx(7.389, abs=1e-2)
        assert all(x.dtype == torch.float32 for k, x in out["model"].items() if x.is_floating_point()), "fp32 weights"


def test_evaluation_between_steps_changes_nothing_and_weights_can_be_set() -> None:
    outs = spawn(JOBS, "eval_between", 2, {"engines": list(SHARED.values())})
    want = _jobs.eval_between(World(), [{}])[0]
    for name, got in zip(SHARED, outs[0], strict=True):
        close(got["mid"], want["mid"])
        close(got["after"], want["after"], atol=5e-6)
        torch.testing.assert_close(got["features"], want["features"], rtol=1e-4, atol=1e-5)
        assert all(torch.equal(got["set"][k], v) for k, v in _jobs.tiny(seed=7).state_dict().items()), name


def test_offload_gives_the_same_numbers() -> None:
    want = _jobs.train(World(), {}, 0, 3)
    engines = [
        {"kind": "deepspeed", "zero_stage": 2, "offload_optimizer": True},
        {"kind": "deepspeed", "zero_stage": 3, "offload_optimizer": True, "offload_params": True},
    ]
    for out in spawn(JOBS, "states", 2, {"engines": engines, "first": 0, "last": 3})[0]:
        close(out["model"], want["model"], atol=5e-6)
        close(out["tensors"], want["tensors"], atol=1e-7)
