"""What is planned against what real ranks allocate, and the page that shows it."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from _shared import PYTHONPATH, ROOT

from benchmarks.plan import ENGINES, RECIPE, cell, planned
from dualenc.plan.engine_memory import FP32, REDUCE_BUCKET

PAGE = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
ROW = re.compile(r"^(one process|DDP|FSDP2|ZeRO \d) +(\d) +([\d,]+) +([\d,]+) +([\d.]+)$", re.MULTILINE)
BUCKET = FP32 * REDUCE_BUCKET / 2**20
OTHER_MODELS = re.compile(r"^(?:quickstart|vit_s32) +\S.*? (\d) +([\d,]+) +([\d,]+) +([\d.]+)$", re.MULTILINE)
CHECKED = [("DDP", 2), ("FSDP2", 2)]
OTHERS = [
    *(("one process", 1), ("DDP", 4), ("FSDP2", 1), ("FSDP2", 4)),
    *((f"ZeRO {stage}", ranks) for stage in range(4) for ranks in (1, 2, 4)),
]
VARIANTS = {
    "bf16": ["engine.precision=bf16"],
    "checkpointing": ["engine.grad_checkpointing=true"],
    "micro-batches": ["batch.micro=4"],
    "average": ["optim.ema_samples=1000"],
    "a loss with a memory": ["loss={name: moco, queue: 65536}"],
    "two losses": ["loss=[info_nce, {name: koleo, weight: 0.1}]"],
}


def check(name: str, ranks: int, more: list[str]) -> None:
    """Within 15 %, of everything and of what is there besides the bucket that ZeRO always allocates."""
    plan, allocated = cell(name, ranks, batch=8, steps=2, more=more)
    assert plan == pytest.approx(allocated, rel=0.15)
    always = BUCKET if name in ("ZeRO 1", "ZeRO 2", "ZeRO 3") else 0.0
    assert plan - always == pytest.approx(allocated - always, rel=0.15)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("name", "ranks"), [*CHECKED, *(pytest.param(*c, marks=pytest.mark.extra) for c in OTHERS)])
def test_a_rank_allocates_what_is_planned(name: str, ranks: int) -> None:
    check(name, ranks, [])


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.extra
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["DDP", "FSDP2", "ZeRO 2"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_settings_that_change_memory(name: str, variant: str) -> None:
    check(name, 2, VARIANTS[variant])


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.extra
@pytest.mark.timeout(600)
def test_groups_of_ranks_that_share_the_state() -> None:
    check("FSDP2", 4, ["engine.shard_size=2"])


# --- the page ------------------------------------------------------------------------------------------------------


def test_the_page_shows_what_is_planned_today(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    rows = ROW.findall(PAGE)
    assert {name for name, *_ in rows} == set(ENGINES)
    others = [("", "", *row[1:]) for row in OTHER_MODELS.findall(PAGE)]
    assert others
    for name, ranks, plan, allocated, ratio in [*rows, *others]:
        assert 0.85 <= float(ratio) <= 1.15
        shown = int(plan.replace(",", ""))
        assert shown / int(allocated.replace(",", "")) == pytest.approx(float(ratio), abs=0.01)
        if ranks == "2":
            overrides = [*ENGINES[name], "batch.size=16", "engine.device=cpu"]
            assert planned(path, overrides, name, int(ranks)) == pytest.approx(shown, rel=0.02)


def blocks() -> list[str]:
    texts = re.findall(r"^```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return [line for text in texts for line in text.splitlines()]


def run(line: str, folder: Path) -> str:
    program, *arguments = shlex.split(line)
    command = {"dualenc": [sys.executable, "-m", "dualenc"], "python": [sys.executable]}[program]
    env = {"PYTHONPATH": PYTHONPATH, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([*command, *arguments], cwd=folder, env=env, text=True, capture_output=True, check=False)
    assert done.returncode == 0, (line, done.stderr[-3000:])
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("line", [x for x in blocks() if x.startswith("dualenc ")])
def test_the_page_runs(line: str, tmp_path: Path) -> None:
    said = run(line, tmp_path)
    assert '"recommended"' in said if "--json" in line else "write: engine.kind=" in said


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.extra
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("line", [x for x in blocks() if x.startswith("python ")])
def test_the_page_runs_its_benchmark(line: str) -> None:
    engines = shlex.split(line.partition("--engines")[2]) or ENGINES
    assert {name for name, *_ in ROW.findall(run(line, ROOT))} == set(engines)
