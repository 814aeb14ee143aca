"""README's blocks run as they stand, in a folder with photos and a model; training lines with a short budget."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from _shared import PYTHONPATH, ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
SHORT = "budget.steps=2 batch.size=8 schedule.warmup_samples=0"
"""Added to every line that trains: the README's own budgets are minutes to hours."""
NAMES = ("cat.jpg", "bike.jpg", "house.jpg")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``photos/``: drawings of the quickstart with their names beside them; a small CLIP in transformers' layout."""
    from PIL import Image

    from dualenc.data.shards.reader import SampleError, iter_samples

    sys.path.insert(0, str(ROOT / "tests" / "model"))
    from test_released_models import write_hf

    folder = tmp_path_factory.mktemp("readme")
    (folder / "photos").mkdir()
    shard = str(ROOT / "recipes" / "quickstart" / "data" / "train-000000.tar")
    for i, (_, found) in enumerate(iter_samples(shard, {"image": ["webp", "png"], "text": ["txt"]})):
        if i == 40:
            break
        assert not isinstance(found, SampleError)
        path = folder / "photos" / (NAMES[i] if i < len(NAMES) else f"{i}.jpg")
        Image.open(io.BytesIO(found.values["image"])).convert("RGB").save(path, quality=95)
        path.with_suffix(".txt").write_bytes(found.values["text"])
    write_hf(folder / "clip-vit-base-patch32", "clip")
    return folder


def run(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": PYTHONPATH, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=280, check=False)


@pytest.mark.slow
def test_the_python_blocks_run(workplace: Path) -> None:
    for code in blocks("python"):
        done = run([sys.executable, "-c", code], workplace)
        assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_command_line_block_runs_line_by_line(workplace: Path) -> None:
    shell = next(b for b in blocks("bash") if "shards build" in b)
    lines = [line for line in shell.splitlines() if line and not line.startswith("#")]
    assert len(lines) >= 12
    for line in lines:
        short = f" {SHORT}" if line.startswith("dualenc train") else ""
        script = f'dualenc() {{ {sys.executable} -m dualenc "$@"; }}; {line}{short}'
        done = run(["bash", "-c", script], workplace)
        assert done.returncode == 0, f"{line}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    for made in ("models.html", "tuned-hf/config.json", "runs/student/checkpoints"):
        assert (workplace / made).exists(), made


def test_readme_is_short_and_its_links_lead_somewhere() -> None:
    assert README.count("\n") <= 150
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
