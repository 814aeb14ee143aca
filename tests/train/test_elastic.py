"""Runs that are killed: resumed by themselves on other numbers of ranks, and what a lost rank leaves behind."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
import _runs
from _runs import ENGINES, RECIPE, SMALL, environment, few_samples, losses, order, segments
from _spawn import spawn

from dualenc.distributed.world import World

EXTRA = pytest.mark.extra
pytestmark = [pytest.mark.dist, pytest.mark.slow]


def start(args: list[str], cwd: Path, ranks: int = 1, restarts: int = 0) -> subprocess.Popen[str]:
    launcher = ["launch", "--nproc", str(ranks), "--max-restarts", str(restarts)] if ranks > 1 else []
    cmd = [sys.executable, "-m", "dualenc", *launcher, "train", str(RECIPE), *SMALL, *args]
    err = (cwd / "stderr.txt").open("a")
    return subprocess.Popen(cmd, cwd=cwd, env=environment(), stderr=err, stdout=err, text=True, process_group=0)


def said(cwd: Path) -> str:
    return " ".join((cwd / "stderr.txt").read_text().split())


def wait_for_step(process: subprocess.Popen[str], run: Path, step: int, timeout: float = 200) -> None:
    """Until ``metrics.jsonl`` has the step."""
    deadline = time.monotonic() + timeout
    while True:
        lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
        if lines and lines[-1].endswith("}") and json.loads(lines[-1])["step"] >= step:
            return
        assert process.poll() is None, f"ended before step {step}: {said(run.parent)[-2000:]}"
        assert time.monotonic() < deadline, f"no step {step} in {timeout} s"
        time.sleep(0.002)


def ranks_of(process: subprocess.Popen[str]) -> dict[int, int]:
    """Rank → process id of what ``dualenc launch`` started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    out = {}
    for pid in children:
        env = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        out |= {int(e.split(b"=")[1]): int(pid) for e in env if e.startswith(b"RANK=")}
    return out


def test_killed_three_times_on_two_one_two_ranks(tmp_path: Path) -> None:
    """kill -9 at random points, the same command again on another number of ranks: the unbroken run's loss curve, and
    every sample once per epoch (of 480; the 45 steps are three epochs).

    At lr 2e-4, because one and two ranks round differently and AdamW makes that grow with the rate.
    """
    args = [few_samples(tmp_path / "data", (300, 180)), "budget.steps=45", "checkpoint.every_steps=4", "optim.lr=2e-4"]
    segments(World(), [[*args, f"out={tmp_path}/whole"]])
    rng = random.Random(7)
    kills = sorted(rng.sample(range(5, 42), 3))
    for ranks, step in zip([2, 1, 2], kills, strict=True):
        process = start([*args, "out=run"], tmp_path, ranks)
        wait_for_step(process, tmp_path / "run", step)
        time.sleep(rng.random() * 0.05)
        process.kill()  # of two ranks it is the launcher that dies; its ranks go with it
        assert process.wait() == -signal.SIGKILL
        time.sleep(0.5)
    last = start([*args, "out=run"], tmp_path)
    assert last.wait(200) == 0, said(tmp_path)
    assert said(tmp_path).count("Resuming from") == 3
    a, b = np.array(losses(tmp_path / "whole")), np.array(losses(tmp_path / "run"))
    print(f"killed after steps {kills}; largest difference of a loss: {np.abs(a - b).max():.1e}")
    assert len(b) == 45
    assert np.abs(a - b).max() < 1e-5
    ids = [i for step in order(tmp_path / "run") for i in step]
    assert ids == [i for step in order(tmp_path / "whole") for i in step]
    passes = [ids[i : i + 480] for i in range(0, len(ids), 480)]
    assert [len(set(p)) for p in passes] == [480] * 3


@pytest.mark.parametrize(
    ("engine", "rank"),
    [("ZeRO 2", 0), *(pytest.param(*x, marks=EXTRA) for x in (("DDP", 1), ("DDP", 0), ("FSDP2", 1), ("ZeRO 3", 1)))],
)
def test_a_killed_rank_ends_the_job_in_bounded_time(tmp_path: Path, engine: str, rank: int) -> None:
    args = ["budget.steps=5000", "engine.timeout_s=20", *ENGINES[engine], "out=run"]
    process = start(args, tmp_path, ranks=2)
    wait_for_step(process, tmp_path / "run", 3)
    os.kill(ranks_of(process)[rank], signal.SIGKILL)
    began = time.monotonic()
    assert process.wait(60) == 128 + signal.SIGKILL
    took = time.monotonic() - began
    print(f"{engine}, rank {rank} killed: ended after {took:.1f} s")
    assert took < 20
    text = said(tmp_path)
    assert f"Rank {rank} stopped or hangs: no answer to rank {1 - rank}" in text
    assert f"dualenc launch: rank {rank} was ended by SIGKILL" in text
    assert "Traceback" not in text, text[-3000:]


@EXTRA
def test_a_rank_that_hangs_ends_the_job_after_the_timeout(tmp_path: Path) -> None:
    args = ["budget.steps=5000", "engine.timeout_s=5", "out=run"]
    process = start(args, tmp_path, ranks=2)
    wait_for_step(process, tmp_path / "run", 3)
    stopped = ranks_of(process)[1]
    os.kill(stopped, signal.SIGSTOP)
    began = time.monotonic()
    assert process.wait(90) == 1
    print(f"ended after {time.monotonic() - began:.1f} s")
    assert time.monotonic() - began < 45
    assert "Rank 1 stopped or hangs: no answer to rank 0 (engine.timeout_s 5)" in said(tmp_path)
    assert "rank 1 did not exit within 20 s; killing it" in said(tmp_path)
    assert "Traceback" not in said(tmp_path)


@pytest.mark.parametrize("engine", ["DDP", pytest.param("ZeRO 2", marks=EXTRA)])
def test_max_restarts_goes_on_from_the_newest_save(tmp_path: Path, engine: str) -> None:
    args = [*ENGINES[engine], "budget.steps=24", "checkpoint.every_steps=4"]
    spawn(_runs.__file__, "segments", 2, {"parts": [[*args, f"out={tmp_path}/whole"]]})
    process = start([*args, "out=run"], tmp_path, ranks=2, restarts=1)
    wait_for_step(process, tmp_path / "run", 10)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    assert process.wait(200) == 0, said(tmp_path)
    assert "restarting all ranks (1 of 1) from the newest checkpoint" in said(tmp_path)
    assert "Resuming from run/checkpoints/step-0000000008" in said(tmp_path)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")  # bit for bit: the same number of ranks
    assert order(tmp_path / "run") == order(tmp_path / "whole")


def test_sigterm_to_the_launcher_saves_and_is_not_restarted(tmp_path: Path) -> None:
    process = start(["budget.steps=5000", "out=run"], tmp_path, ranks=2, restarts=3)
    wait_for_step(process, tmp_path / "run", 3)
    process.terminate()
    assert process.wait(60) == 130
    assert "Stopped by SIGTERM; wrote checkpoint" in said(tmp_path)
    assert "restarting all ranks" not in said(tmp_path)
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1


@EXTRA
def test_a_run_that_diverges_ends_with_5_and_is_not_restarted(tmp_path: Path) -> None:
    args = ["optim.lr=1e30", "optim.clip_grad_norm=null", "engine.max_nonfinite=3", "budget.steps=50", "out=run"]
    process = start([*args, "schedule.warmup_samples=0"], tmp_path, ranks=2, restarts=3)
    assert process.wait(200) == 5, said(tmp_path)
    assert "3 non-finite steps in a row" in said(tmp_path)
    assert "restarting all ranks" not in said(tmp_path)
    assert "Traceback" not in said(tmp_path)
