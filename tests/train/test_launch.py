"""Every launcher starts the same entry; ``dualenc launch`` itself; the templates in recipes/launch/."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from _runs import ENGINES, RECIPE, ROOT, SMALL, environment, losses

from dualenc.config import load_recipe
from dualenc.distributed.launch import launch
from dualenc.engine.deepspeed_engine import deepspeed_json

TEMPLATES = ROOT / "recipes" / "launch"
BIN = Path(sys.executable).parent
TABLE = (ROOT / "docs" / "cluster" / "launch.md").read_text(encoding="utf-8").split("| where | command |")[1]
COMMANDS = [
    re.findall(r"`([^`]+)`", line)[-1] for line in TABLE.partition("\n\n")[0].splitlines() if line.startswith("| ")
]
"""Those of the table of docs/cluster/launch.md."""
ELSEWHERE = {
    "torchrun --nnodes 4": "needs four machines",
    "deepspeed --hostfile": "needs several machines and ssh between them",
    "sbatch": "needs SLURM",
    "kubectl": "needs Kubernetes",
}
"""Commands of the table that no test runs, and why."""


def launchers() -> dict[str, list[str]]:
    """Program → the table's command up to ``train``, with 2 processes for 8."""
    here = [c for c in COMMANDS if not c.startswith(tuple(ELSEWHERE))]
    made = {"8": "2", "recipes/launch/accelerate.yaml": str(TEMPLATES / "accelerate.yaml")}
    return {c.split()[0]: [made.get(w, w) for w in c.removesuffix(" train RECIPE").split()] for c in here}


LAUNCHERS = launchers()


def test_every_command_of_the_table_is_run_or_listed() -> None:
    assert list(LAUNCHERS) == ["dualenc", "torchrun", "accelerate", "deepspeed"]
    assert len(COMMANDS) == len(LAUNCHERS) + len(ELSEWHERE)
    assert all("8" not in words and "2" in words for words in LAUNCHERS.values())
    assert all(c.endswith("RECIPE") for c in COMMANDS if not c.startswith("kubectl"))


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    folder = tmp_path_factory.mktemp("one")
    cmd = [sys.executable, "-m", "dualenc", "train", str(RECIPE), *SMALL, "budget.steps=3", "out=run"]
    subprocess.run(cmd, cwd=folder, env=environment(), check=True, capture_output=True)
    return losses(folder / "run")


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "engine"),
    [
        ("dualenc", "FSDP2"),
        pytest.param("dualenc", "ZeRO 1", marks=pytest.mark.extra),
        ("torchrun", "DDP"),
        pytest.param("torchrun", "ZeRO 3", marks=pytest.mark.extra),
        pytest.param("accelerate", "DDP", marks=pytest.mark.extra),
        ("accelerate", "ZeRO 2"),
        pytest.param("deepspeed", "DDP", marks=pytest.mark.extra),
        ("deepspeed", "ZeRO 2"),
    ],
)
def test_the_quickstart_on_two_ranks(tmp_path: Path, launcher: str, engine: str, one_process: list[float]) -> None:
    program, *options = LAUNCHERS[launcher]
    cmd = [str(BIN / program), *options, "train", str(RECIPE), *SMALL, *ENGINES[engine], "budget.steps=3", "out=run"]
    env = environment(PATH=f"{BIN}:{os.environ['PATH']}")
    done = subprocess.run(cmd, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["world_size"] == 2
    assert losses(tmp_path / "run") == pytest.approx(one_process, abs=1e-5)


@pytest.mark.dist
@pytest.mark.slow
def test_accelerate_told_to_use_deepspeed_is_refused_in_one_line(tmp_path: Path) -> None:
    options = ["launch", "--use_deepspeed", "--num_processes", "2", "--num_machines", "1"]
    options += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "dualenc"]
    cmd = [str(BIN / "accelerate"), *options, "train", str(RECIPE), *SMALL, "budget.steps=1", "out=run"]
    done = subprocess.run(
        cmd, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode != 0
    assert "set engine.kind: deepspeed in the recipe instead" in " ".join(done.stderr.split())


# --- dualenc launch, with programs that need no torch --------------------------------------------------------------


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_ranks_are_told_who_they_are(tmp_path: Path) -> None:
    code = f"""
import os, pathlib
keys = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
pathlib.Path({str(tmp_path)!r}, os.environ["RANK"]).write_text(" ".join(os.environ[k] for k in keys))
"""
    assert launch(python(code), 3) == 0
    assert [(tmp_path / str(r)).read_text() for r in range(3)] == [f"{r} {r} 3 3 127.0.0.1" for r in range(3)]


def test_the_first_failure_is_named_and_its_exit_code_returned(capfd: pytest.CaptureFixture[str]) -> None:
    code = "import os, sys, time; r = int(os.environ['RANK']); time.sleep(0.5 * (1 - r)); sys.exit([1, 3][r])"
    assert launch(python(code), 2, max_restarts=2) == 3
    assert capfd.readouterr().err == "dualenc launch: rank 1 ended with exit code 3\n"  # 3 is not a crash


def test_a_crash_is_started_again_until_it_works(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = f"""
import os, pathlib, signal
mark = pathlib.Path({str(tmp_path)!r}, "starts" + os.environ["RANK"])
n = len(mark.read_text()) if mark.exists() else 0
mark.write_text("x" * (n + 1))
if n < 2 and os.environ["RANK"] == "1":
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert launch(python(code), 2, max_restarts=1) == 137
    assert launch(python(code), 2, max_restarts=1) == 0
    assert (tmp_path / "starts1").read_text() == "xxx"
    assert capfd.readouterr().err.count("rank 1 was ended by SIGKILL") == 2


def test_ranks_left_over_are_killed_after_the_grace(capfd: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    code = "import os, sys, time; r = int(os.environ['RANK']); r or sys.exit(1); time.sleep(60)"
    assert launch(python(code), 2, grace_s=0.5) == 1
    assert time.monotonic() - began < 10
    assert "rank 1 did not exit within 0 s" in capfd.readouterr().err


def test_ranks_end_with_a_killed_launcher(tmp_path: Path) -> None:
    """An orphan would go on writing saves into the folder of the run that replaces it."""
    code = "import os, pathlib, time; pathlib.Path(os.environ['RANK']).write_text(str(os.getpid())); time.sleep(60)"
    starter = f"from dualenc.distributed.launch import launch; launch({python(code)!r}, 2)"
    process = subprocess.Popen(python(starter), cwd=tmp_path, env=environment())
    deadline = time.monotonic() + 60
    while not all((tmp_path / r).exists() and (tmp_path / r).read_text() for r in "01"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    pids = [int((tmp_path / r).read_text()) for r in "01"]
    process.kill()
    process.wait()
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "a rank outlived its launcher"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# --- the templates -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", range(4))
def test_the_deepspeed_files_are_what_the_trainer_generates(stage: int) -> None:
    recipe = load_recipe(RECIPE, ["engine.kind=deepspeed", f"engine.zero_stage={stage}"])
    written = json.loads((TEMPLATES / "deepspeed" / f"zero{stage}.json").read_text())
    assert written == deepspeed_json(recipe.engine, recipe.optim, 8)


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (130, True), (5, False)])
def test_the_slurm_job_is_queued_again_only_after_a_save(tmp_path: Path, code: int, requeued: bool) -> None:
    """The script itself, with programs in place of SLURM's: there is no SLURM here."""
    programs = {
        "srun": f'echo "$@" > {tmp_path}/srun.txt; exit {code}',
        "scontrol": f'[ "$1" = show ] && echo node1 || echo "$@" > {tmp_path}/scontrol.txt',
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    env = environment(PATH=f"{tmp_path}:{os.environ['PATH']}", SLURM_JOB_NODELIST="node[1-2]", SLURM_JOB_ID="7")
    cmd = ["bash", str(TEMPLATES / "slurm.sh"), "recipes/x.yaml", "optim.lr=1"]
    done = subprocess.run(cmd, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == (0 if requeued else code)
    assert (tmp_path / "srun.txt").read_text().endswith("python -m dualenc train recipes/x.yaml optim.lr=1\n")
    assert (tmp_path / "scontrol.txt").exists() == requeued
    assert not requeued or (tmp_path / "scontrol.txt").read_text() == "requeue 7\n"


def test_signals_reach_every_rank(tmp_path: Path) -> None:
    code = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
pathlib.Path("ready" + os.environ["RANK"]).write_text("")
time.sleep(60)
"""
    starter = f"import sys; from dualenc.distributed.launch import launch; sys.exit(launch({python(code)!r}, 2, 3))"
    process = subprocess.Popen(python(starter), cwd=tmp_path, env=environment())
    deadline = time.monotonic() + 60
    while not all((tmp_path / f"ready{r}").exists() for r in range(2)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 130
