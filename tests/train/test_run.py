"""Whole runs through the command line: what issue and README promise, each as a process of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
from _runs import RECIPE, SHARD, SMALL, environment, losses, newest, rows

SHARDS = sorted(SHARD.parent.glob("train-*.tar"))


def dualenc(*args: str, cwd: Path, ranks: int = 1, timeout: float = 200) -> subprocess.CompletedProcess[str]:
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"] if ranks > 1 else []
    cmd = [sys.executable, "-m", *launcher, "dualenc", *args]
    return subprocess.run(cmd, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=timeout, check=False)


def metrics(run: Path) -> list[dict[str, float]]:
    return rows(run / "metrics.jsonl")


def seen(run: Path, rank: int = 0) -> list[tuple[int, list[str]]]:
    return [(r["step"], r["samples"]) for r in rows(run / f"samples-rank{rank}.jsonl")]


@pytest.mark.dist
def test_two_ranks_give_the_loss_curve_of_one(tmp_path: Path) -> None:
    # At lr 1e-3 the rounding between one and two ranks grows beyond the bound on some processors.
    args = ["train", str(RECIPE), *SMALL, "budget.steps=20", "optim.lr=2e-4"]
    one = dualenc(*args, "out=one", cwd=tmp_path)
    assert one.returncode == 0, one.stderr
    two = dualenc(*args, "out=two", cwd=tmp_path, ranks=2)
    assert two.returncode == 0, two.stderr
    a, b = np.array(losses(tmp_path / "one")), np.array(losses(tmp_path / "two"))
    assert len(a) == 20
    assert np.abs(a - b).max() < 1e-5
    # and the ranks together saw the samples one rank saw, step by step
    both = [{*x, *y} for (_, x), (_, y) in zip(seen(tmp_path / "two"), seen(tmp_path / "two", 1), strict=True)]
    assert both == [set(x) for _, x in seen(tmp_path / "one")]


@pytest.mark.dist
def test_ten_steps_equal_five_then_kill_then_five_bit_for_bit(tmp_path: Path) -> None:
    args = [
        "train",
        str(RECIPE),
        *SMALL,
        "budget.steps=10",
        "checkpoint.every_steps=5",
        "modalities.text.encoder.dropout=0.1",
    ]
    whole = dualenc(*args, "out=whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    cmd = [sys.executable, "-m", "dualenc", *args, "out=killed"]
    process = subprocess.Popen(cmd, cwd=tmp_path, env=environment(), stderr=subprocess.DEVNULL)
    run = tmp_path / "killed"
    deadline = time.monotonic() + 120
    while not (run / "checkpoints" / "step-0000000005" / "manifest.json").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "no save at step 5"
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    if (run / "checkpoints" / "step-0000000010").exists():
        shutil.rmtree(run / "checkpoints" / "step-0000000010")  # it was faster than the kill
    again = dualenc(*args, "out=killed", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "step 5" in again.stderr
    for name in ("model/model.safetensors", "optimizer.safetensors"):
        a, b = load_file(newest(tmp_path / "whole") / name), load_file(newest(run) / name)
        assert a.keys() == b.keys()
        assert all(np.array_equal(a[k].numpy(), b[k].numpy()) for k in a), name
    assert seen(run) == seen(tmp_path / "whole")
    assert losses(run) == losses(tmp_path / "whole")


@pytest.mark.dist
def test_sigterm_saves_and_says_how_to_go_on(tmp_path: Path) -> None:
    cmd = [sys.executable, "-m", "dualenc", "train", str(RECIPE), *SMALL, "budget.steps=5000", "out=run"]
    process = subprocess.Popen(
        cmd,
        cwd=tmp_path,
        env=environment(OMP_NUM_THREADS="2"),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    log = tmp_path / "run" / "metrics.jsonl"
    while not (log.exists() and log.read_text().count("\n") >= 2):
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.02)
    # As a scheduler does it: to every process of the job, the data workers too.
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Stopped by SIGTERM; wrote checkpoint" in " ".join(err.split())
    assert "Traceback" not in err
    step = int(re.search(r"\(step (\d+) of", " ".join(err.split())).group(1))  # type: ignore[union-attr]
    assert newest(tmp_path / "run").name == f"step-{step:010d}"


@pytest.mark.dist
def test_resume_refuses_another_order(tmp_path: Path) -> None:
    args = ["train", str(RECIPE), *SMALL, "out=run", "budget.steps=1"]
    assert dualenc(*args, cwd=tmp_path).returncode == 0
    changed = dualenc(*args, "data.window=100", "budget.steps=2", cwd=tmp_path)
    assert changed.returncode == 4
    assert "data.window = 1000000, but the recipe now has 100" in " ".join(changed.stderr.split())


def spoil(shards: list[Path], out: Path, share: float) -> set[str]:
    """Copy shards with this share of pictures cut in half or overwritten; return the spoilt keys."""
    rng = np.random.default_rng(0)
    bad = set()
    out.mkdir()
    for shard in shards:
        with tarfile.open(shard) as src, tarfile.open(out / shard.name, "w") as dst:
            for member in src:
                raw = src.extractfile(member).read()  # type: ignore[union-attr]
                if member.name.endswith(".webp") and rng.random() < share:
                    bad.add(member.name.removesuffix(".webp"))
                    raw = raw[: len(raw) // 2] if rng.random() < 0.5 else rng.bytes(len(raw))
                    member.size = len(raw)
                dst.addfile(member, __import__("io").BytesIO(raw))
    return bad


@pytest.mark.dist
def test_one_per_cent_corrupt_members_are_counted_and_named(tmp_path: Path) -> None:
    bad = spoil(SHARDS[:2], tmp_path / "a", 0.01) | spoil(SHARDS[2:], tmp_path / "b", 0.01)
    assert len(bad) > 10
    first = {p.removesuffix(".webp") for s in SHARDS[:2] for p in tarfile.open(s).getnames()}
    total = sum(1 for s in SHARDS for n in tarfile.open(s).getnames() if n.endswith(".webp"))
    sources = f"[{{name: a, shards: '{tmp_path}/a/*.tar'}}, {{name: b, shards: '{tmp_path}/b/*.tar'}}]"
    args = [a for a in SMALL if not a.startswith("batch.size")]
    # sources of equal weight and near-equal size: a few more steps than one pass, then count what was lost
    result = dualenc(
        "train", str(RECIPE), *args, "batch.size=128", f"data.sources={sources}", f"budget.steps={total // 128 + 2}",
        "data.max_bad_share=0.05", "out=run", cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    named = [
        json.loads(line) for p in (tmp_path / "run").glob("quarantine*.jsonl") for line in p.read_text().splitlines()
    ]
    ids = [i for _, step in seen(tmp_path / "run") for i in step]
    for source, keys in (("a", bad & first), ("b", bad - first)):
        expected = sum(1 for i in ids if i.startswith(source + "/") and i.rsplit("/", 1)[1] in keys)
        assert {row["key"] for row in named if row["source"] == source} == keys  # each named once, over all passes
        assert metrics(tmp_path / "run")[-1].get(f"lost/{source}", 0) == expected
    assert len(named) == len(bad)


@pytest.mark.dist
def test_past_the_share_the_run_stops_with_the_source_named(tmp_path: Path) -> None:
    spoil(SHARDS, tmp_path / "a", 0.3)
    sources = f"[{{name: broken, shards: '{tmp_path}/a/*.tar'}}]"
    args = ["train", str(RECIPE), *SMALL, f"data.sources={sources}", "budget.steps=100", "out=run"]
    result = dualenc(*args, cwd=tmp_path)
    assert result.returncode == 3
    assert "broken" in result.stderr
    assert "Traceback" not in result.stderr
