"""What may happen to one run: it diverges, its disk is full, another run wants its folder, its files are damaged."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from _runs import RECIPE, SMALL, build, environment, losses, newest, rows

from dualenc.checkpoint import save as ckpt
from dualenc.config import Recipe, load_recipe
from dualenc.distributed.world import World
from dualenc.errors import CheckpointError, ConfigError, DivergenceError, Interrupted
from dualenc.train import lock
from dualenc.train.lock import RunLock
from dualenc.train.loop import train
from dualenc.train.shared_memory import AMPLE, check_shared_memory
from dualenc.train.stop import StopFlag

QUICK = [*SMALL, "data.workers=0", "batch.size=16"]
HOT = ["optim.lr=1e30", "optim.clip_grad_norm=null", "schedule.warmup_samples=0"]
SAVING = ["checkpoint.every_steps=1", "checkpoint.keep=1"]


def here(*items: str) -> Path:
    """A run in this process."""
    return train(load_recipe(RECIPE, [*QUICK, *items]))


def saves(run: Path) -> list[str]:
    return [p.name for p in ckpt.list_saves(run)]


# --- divergence ----------------------------------------------------------------------------------------------------


def test_a_run_that_diverges_at_once_begins_anew_with_a_lower_rate(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(
        DivergenceError, match=r"no earlier checkpoint, so the run will start over .*Lower optim\.lr"
    ) as ended:
        here(*HOT, *SAVING, f"out={out}", "budget.steps=4")  # ends before max_nonfinite: 5 at the end of the budget too
    assert ended.value.exit_code == 5
    assert "The last" in str(ended.value)
    assert saves(out) == []
    here(*SAVING, f"out={out}", "budget.steps=4")  # the advice
    assert saves(out)[-1] == "step-0000000004"
    assert all(r["loss"] < 10 for r in rows(out / "metrics.jsonl"))


def test_the_last_good_save_stays_and_is_gone_on_from(tmp_path: Path) -> None:
    out = tmp_path / "run"
    here(*SAVING, f"out={out}", "budget.steps=3")
    assert saves(out) == ["step-0000000003"]
    with pytest.raises(DivergenceError, match=r"2 non-finite steps in a row .*will resume from .*step-0000000003"):
        here(*HOT, *SAVING, f"out={out}", "budget.steps=20", "engine.max_nonfinite=2")
    assert saves(out) == ["step-0000000003"]
    aside = sorted(p.name for p in (out / "checkpoints").iterdir())
    assert aside == ["diverged-0000000004", "step-0000000003"]
    here(*SAVING, f"out={out}", "budget.steps=5", "optim.lr=1e-4", "schedule.warmup_samples=0")
    assert saves(out) == ["step-0000000005"]
    assert all(r["loss"] < 10 for r in rows(out / "metrics.jsonl"))


# --- the run folder ------------------------------------------------------------------------------------------------


def test_a_folder_is_trained_into_by_one_run(tmp_path: Path) -> None:
    with RunLock(tmp_path), pytest.raises(ConfigError, match=rf"is in use: process {os.getpid()} on "):
        here(f"out={tmp_path}", "budget.steps=1")
    assert not (tmp_path / lock.NAME).exists()
    here(f"out={tmp_path}", "budget.steps=1")
    assert not (tmp_path / lock.NAME).exists()


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"host": "HERE", "pid": 999999999, "began": "1"}', '{"host": "HERE", "pid": "x"}']
)
def test_stale_locks_are_taken_over(tmp_path: Path, content: str) -> None:
    path = tmp_path / lock.NAME
    path.write_text(content.replace("HERE", __import__("socket").gethostname()))
    os.utime(path, (1, 1))
    with RunLock(tmp_path):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_a_lock_of_another_machine_is_stale_when_it_is_no_longer_touched(tmp_path: Path) -> None:
    path = tmp_path / lock.NAME
    path.write_text('{"host": "elsewhere", "pid": 1, "began": "1"}')
    with pytest.raises(ConfigError, match="process 1 on elsewhere"), RunLock(tmp_path):
        pass
    os.utime(path, (1, 1))
    with RunLock(tmp_path):
        pass


@pytest.mark.parametrize("kind", ["file", "long", "nul"])
def test_an_odd_out_is_one_sentence(tmp_path: Path, kind: str) -> None:
    (tmp_path / "file").write_text("")
    out = {"file": f"{tmp_path}/file/run", "long": f"{tmp_path}/{'x' * 300}", "nul": f"{tmp_path}/a\0b"}[kind]
    recipe = load_recipe(RECIPE, [*QUICK, "budget.steps=1"]).model_copy(update={"out": out})
    with pytest.raises(ConfigError, match=r"out: the run folder .* cannot be used"):
        train(recipe)


def test_a_checkpoint_written_in_the_background_is_the_same(tmp_path: Path) -> None:
    """Bit for bit, at the same steps, and the last one is complete when the run ends."""
    every = ["budget.steps=6", "checkpoint.every_steps=2", "checkpoint.keep=9", "optim.ema_samples=64"]
    for name in ("plain", "background"):
        here(*every, f"checkpoint.background={name == 'background'}", f"out={tmp_path}/{name}")
    want = ["step-0000000002", "step-0000000004", "step-0000000006"]
    for step in want:
        a, b = (tmp_path / name / "checkpoints" / step for name in ("plain", "background"))
        assert ckpt.damaged(b) is None
        for file in a.rglob("*.safetensors"):
            assert file.read_bytes() == (b / file.relative_to(a)).read_bytes(), file.name
        assert json.loads((a / "state.json").read_text()) == json.loads((b / "state.json").read_text())
    assert saves(tmp_path / "background") == saves(tmp_path / "plain") == want


def test_a_kill_while_the_background_writes_loses_only_that_checkpoint(tmp_path: Path) -> None:
    """The writing of step 4 hangs, the process is killed a step later, and the next start goes on from step 2."""
    args = [*QUICK, "checkpoint.every_steps=2", "checkpoint.background=true", f"out={tmp_path}/run"]
    code = f"""
import os, signal, sys, time
sys.argv = ["dualenc", "train", {str(RECIPE)!r}, *{args!r}, "budget.steps=40"]
from dualenc.checkpoint import save as ckpt
from dualenc.cli import main
write = ckpt.write_tensors
def stuck(path, *more):
    write(path, *more)
    if "step-0000000004" in str(path):
        time.sleep(600)
ckpt.write_tensors = stuck
from dualenc.train import loop
step = loop.Run._step
def until(self, batch):
    if batch.step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batch)
loop.Run._step = until
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, timeout=300, check=False
    )
    assert done.returncode == -9, done.stderr[-2000:]
    names = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert [n for n in names if n.startswith("step-")] == ["step-0000000002"], names
    assert any(n.startswith(".writing-step-0000000004") for n in names), names
    here("budget.steps=8", "checkpoint.every_steps=2", "checkpoint.background=true", f"out={tmp_path}/run")
    here("budget.steps=8", "checkpoint.every_steps=2", f"out={tmp_path}/unbroken")
    assert losses(tmp_path / "run") == losses(tmp_path / "unbroken")
    assert not any(n.name.startswith(".writing") for n in (tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_is_one_sentence_and_leaves_the_old_save(background: bool, tmp_path: Path) -> None:
    """RLIMIT_FSIZE in a process of its own: a file cannot grow past it, as on a disk without room."""
    more = ["checkpoint.every_steps=2", f"checkpoint.background={background}"]
    here("budget.steps=1", f"out={tmp_path}/run")
    code = f"""
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sys.argv = ["dualenc", "train", {str(RECIPE)!r}, *{QUICK!r}, *{more!r}, "budget.steps=3", "out={tmp_path}/run"]
import dualenc.train.loop
from dualenc.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=300, check=False
    )
    said = " ".join(done.stderr.split())
    assert done.returncode == 1, said
    assert "cannot be written to" in said
    assert "Traceback" not in said
    assert saves(tmp_path / "run") == ["step-0000000001"]
    assert ckpt.newest_good(tmp_path / "run") is not None


def test_leftovers_of_killed_saves_go_before_the_next_is_written(tmp_path: Path) -> None:
    left = tmp_path / "checkpoints" / ".writing-step-0000000007-1"
    left.mkdir(parents=True)
    with ckpt.Saver(tmp_path, 1):
        assert not left.exists()


def test_files_have_the_mode_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        here("budget.steps=1", f"out={tmp_path}/run")
    finally:
        os.umask(before)
    wrong = {str(p): oct(p.stat().st_mode) for p in (tmp_path / "run").rglob("*")
             if stat.S_IMODE(p.stat().st_mode) != (0o750 if p.is_dir() else 0o640)}  # fmt: skip
    assert wrong == {}


# --- damaged files -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return here("budget.steps=1", f"out={tmp_path_factory.mktemp('saved')}/run")


MANIFESTS = ["", "[]", "null", "{" * 100_000, '{"a": 1}', '{"state.json": ["x", 1]}', '{"../../x": [1, "a"]}']
MANIFESTS += ['{"/etc/passwd": [1, "a"]}', '{"": [0, ""]}', "\x00", '{"a": [1e400, "x"]}', '{"a\\u0000": [1, "x"]}']
STATES = ["", "[]", "{" * 100_000, '{"step": -1}', '{"step": "x"}', '{"step": 1, "what": 2}', '{"ledger": []}',
          '{"ledger": {"counts": {"a": 3}}}', '{"optimizer": {"scalars": {"a": {"b": "c"}}}}', '{"step": 1e400}',
          '{"data": {"plan": 3}}', '{"guard": {"before": {"a": "x"}}}', '{"fingerprint": 3}']  # fmt: skip


@pytest.mark.parametrize("content", MANIFESTS)
def test_hostile_manifests_are_passed_over(tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture) -> None:
    save = ckpt.folder_of(tmp_path, 1)
    save.mkdir(parents=True)
    (save / "manifest.json").write_text(content)
    assert ckpt.newest_good(tmp_path) is None
    assert "Skipping damaged checkpoint" in caplog.text
    with pytest.raises(CheckpointError):
        ckpt.refuse_damaged(save)


@pytest.mark.parametrize("content", STATES)
def test_hostile_states_are_refused_by_name(tmp_path: Path, content: str) -> None:
    (tmp_path / "state.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"state\.json cannot be"):
        ckpt.load_state(tmp_path)


def test_a_real_state_passes(saved: Path) -> None:
    state = ckpt.load_state(newest(saved))
    assert (state.step, state.samples_seen) == (1, 16)


def test_damaged_lines_of_metrics_are_left_out(saved: Path) -> None:
    metrics = saved / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text(whole + '{}\n[1]\n{"step": "x"}\nnot json\n{"step": 1, "los')
    here("budget.steps=1", f"out={saved}")
    assert metrics.read_text() == whole


# --- shared memory, signals ----------------------------------------------------------------------------------------


def test_too_little_shared_memory_is_said_before_the_first_step(tmp_path: Path) -> None:
    run = build(World(), ["data.workers=64", "data.prefetch=1000000", f"out={tmp_path}"])
    with pytest.raises(ConfigError, match=r"which has [\d,]+ MiB free; 64 workers x 1000000 batches .* --shm-size="):
        run.train()
    run.close()
    assert not (tmp_path / "checkpoints").exists()


def test_enough_shared_memory_is_found_without_reading(tmp_path: Path) -> None:
    recipe = load_recipe(RECIPE, [*SMALL, "data.workers=1", "data.prefetch=1", "batch.size=1"])

    def never() -> None:
        raise AssertionError("a sample was read")

    assert AMPLE < 2**30
    check_shared_memory(recipe, never, World(), tmp_path)  # type: ignore[arg-type]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_before_the_first_step_ends_the_run(tmp_path: Path, number: signal.Signals) -> None:
    stop = StopFlag()
    with stop.listening():
        os.kill(os.getpid(), number)
        run = build(World(), [*QUICK[len(SMALL) :], f"out={tmp_path}"])
        run.stop.raised, run.stop.name = stop.raised, stop.name
    with pytest.raises(Interrupted, match=rf"Stopped by {number.name} before the first step"):
        run.train()
    run.close()


def test_what_nohup_ignores_stays_ignored_and_threads_change_nothing() -> None:
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopFlag().listening():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, old)
    errors: list[BaseException] = []

    def listen() -> None:
        try:
            with StopFlag().listening():
                pass
        except ValueError as e:
            errors.append(e)

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert errors == []


def test_a_closed_stderr_ends_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dualenc", "train", str(RECIPE), *QUICK, "budget.steps=4", f"out={tmp_path}/run"]
    reading, writing = os.pipe()
    os.close(reading)  # as `dualenc … 2>&1 | head -1`
    done = subprocess.run(command, env=environment(), stderr=writing, stdout=writing, timeout=300, check=False)
    os.close(writing)
    assert done.returncode == 0
    assert saves(tmp_path / "run") == ["step-0000000004"]


def test_a_worker_that_cannot_hand_over_ends_the_run(tmp_path: Path) -> None:
    """A batch that fails on its way into shared memory, as without room there, in a process of its own."""
    code = f"""
import sys
sys.argv = ["dualenc", "train", {str(RECIPE)!r}, *{SMALL!r}, "data.workers=1", "budget.steps=3", "out={tmp_path}/run"]
from torch.multiprocessing import reductions
from multiprocessing.reduction import ForkingPickler
import torch
def fails(x):
    raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")
import dualenc.train.loop
from dualenc.cli import main
ForkingPickler.register(torch.Tensor, fails)
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=120, check=False
    )
    said = " ".join(done.stderr.split())
    assert done.returncode == 3, said
    assert "cannot hand over a batch (unable to allocate shared memory" in said
    assert "A data worker died" in said
    assert "Traceback" not in said


# --- evaluations that a kill cut off ------------------------------------------------------------------------------


class Killed(Exception):
    """Ends a run where a kill would."""


@pytest.mark.parametrize("calls", [0, 1, 2], ids=["before the first step", "after a save", "after the last save"])
def test_an_evaluation_that_was_cut_off_is_made_up_for(tmp_path: Path, calls: int) -> None:
    """The save of a step stands before its evaluation; a run that dies in between measures when it is started again."""

    def measures(die_at: int) -> Any:
        done = 0

        def evaluation(*_: Any) -> dict[str, float]:
            nonlocal done
            done += 1
            if done == die_at + 1:
                raise Killed
            return {"task/x": 0.5}

        return evaluation

    def recipe(name: str) -> Recipe:
        more = ["eval.every_steps=2", "eval.at_start=true", "budget.steps=4", "checkpoint.every_steps=2"]
        return load_recipe(RECIPE, [*QUICK, *more, f"out={tmp_path / name}"])

    def evaluated(name: str) -> list[int]:
        lines = [json.loads(x) for x in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return [x["step"] for x in lines if "eval/task/x" in x]

    train(recipe("whole"), measures(99))
    assert evaluated("whole") == [0, 2, 4]
    with pytest.raises(Killed):
        train(recipe("killed"), measures(calls))
    train(recipe("killed"), measures(99))
    train(recipe("killed"), measures(99))
    assert evaluated("killed") == [0, 2, 4]


def test_a_kill_while_checkpoints_are_pruned_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = [*SAVING, "budget.steps=3", f"out={tmp_path}"]
    with monkeypatch.context() as patch:

        def dies(path: Path, **_: Any) -> None:
            raise Killed

        patch.setattr(ckpt.shutil, "rmtree", dies)
        with pytest.raises(Killed):
            here(*more)
    here(*more)
    whole = saves(tmp_path)
    (tmp_path / "checkpoints" / "step-0000000001").mkdir()
    for path in (tmp_path / "checkpoints" / whole[-1]).iterdir():
        if path.is_file():  # a third one, as if the run had been killed between its last checkpoint and pruning
            (tmp_path / "checkpoints" / "step-0000000001" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "checkpoints" / ".writing-step-0000000009-1").mkdir()
    here(*more)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == whole
