"""The first hour with the installed package in an empty folder: photos to a report, a csv to zero-shot numbers, a
released CLIP to a LoRA-tuned export. The commands are README's; training is cut short by a few overrides."""

from __future__ import annotations

import csv
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from _shared import ROOT

sys.path.insert(0, str(ROOT / "tests" / "model"))
from test_released_models import write_hf

pytestmark = pytest.mark.slow
SHORT = ["budget.steps=4", "batch.size=16", "schedule.warmup_samples=0", "data.workers=0", "engine.threads=1"]
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 220),
    "yellow": (230, 210, 40),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "bar")


def photos(folder: Path, count: int, size: tuple[int, int] = (160, 120)) -> list[tuple[Path, str, str]]:
    """Drawings as JPEG with a caption beside each: (file, shape, caption)."""
    from PIL import Image, ImageDraw

    folder.mkdir()
    draw, made = random.Random(0), []
    for i in range(count):
        colour, ground = draw.sample(list(COLOURS), 2)
        shape, number = draw.choice(SHAPES), draw.randint(1, 3)
        image = Image.new("RGB", size, COLOURS[ground])
        for k in range(number):
            x, y = 15 + 48 * k + draw.randint(-5, 5), 40 + draw.randint(-15, 15)
            box = (x, y, x + 35, y + (10 if shape == "bar" else 35))
            paint = ImageDraw.Draw(image).ellipse if shape == "circle" else ImageDraw.Draw(image).rectangle
            paint(box, fill=COLOURS[colour])
        path = folder / f"{i:04}.jpg"
        image.save(path)
        caption = f"{number} {colour} {shape}{'s' * (number > 1)} on {ground}"
        path.with_suffix(".txt").write_text(caption)
        made.append((path, shape, caption))
    return made


@pytest.fixture
def dualenc(installed_python: Path, tmp_path: Path):
    command = installed_python.parent / "dualenc"

    def run(*arguments: str) -> str:
        env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        env |= {
            "COLUMNS": "100",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "DUALENC_CACHE": str(tmp_path / ".cache"),
        }
        env |= {"CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run([command, *arguments], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, (arguments, done.stdout[-2000:], done.stderr[-3000:])
        return done.stdout + done.stderr

    return run


@pytest.mark.timeout(600)
def test_from_400_photos_to_a_report_in_four_commands(dualenc, tmp_path: Path) -> None:
    photos(tmp_path / "photos", 400)
    dualenc("shards", "build", "folder", "path=photos", "val_every=10", "--out", "shards")
    said = dualenc("init", "shards", "--out", "mine.yaml")
    assert "next: dualenc train mine.yaml" in said
    dualenc("train", "mine.yaml", *SHORT)
    dualenc("report", "runs/mine")
    page = (tmp_path / "runs" / "mine" / "report.html").read_text(encoding="utf-8")
    assert "mine_held_out" in page
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith(".")) == [
        *("mine.task.yaml", "mine.yaml", "photos", "runs", "shards"),
    ]
    # The recipe of the package does the same without a file of one's own.
    dualenc("train", "photos", *SHORT)
    assert "photos_held_out" in (tmp_path / "runs" / "photos" / "metrics.jsonl").read_text()


@pytest.mark.timeout(600)
def test_from_a_csv_to_zero_shot_numbers_in_two_commands(dualenc, tmp_path: Path) -> None:
    made = photos(tmp_path / "photos", 40)
    write_hf(tmp_path / "clip", "clip")
    with (tmp_path / "my.csv").open("w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([("file", "shape"), *((f"photos/{p.name}", shape) for p, shape, _ in made)])
    dualenc("task", "new", "--data", "my.csv", "--out", "mine.yaml")
    said = dualenc("eval", "clip", "--tasks", "mine.yaml", "--out", "results.json")
    assert "top1" in said
    result = json.loads((tmp_path / "results.json").read_text())["tasks"]["mine"]
    assert 0 <= result["metrics"]["top1"] <= 1
    assert result["chance"]["top1"] == pytest.approx(1 / 3)


@pytest.mark.timeout(600)
def test_from_a_released_clip_to_a_lora_tuned_export_in_three_commands(dualenc, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    photos(tmp_path / "photos", 60)
    write_hf(tmp_path / "clip", "clip")
    dualenc("shards", "build", "folder", "path=photos", "--out", "shards")
    dualenc(
        "train", "finetune/clip_lora", "checkpoint.init_from=clip", "data.sources.0.shards=shards/train-*.tar", *SHORT
    )
    dualenc("export", "runs/finetune/clip_lora", "--format", "hf", "--out", "tuned")
    import transformers

    tuned, before = (transformers.CLIPModel.from_pretrained(tmp_path / n) for n in ("tuned", "clip"))
    changed = [
        k for k, v in before.state_dict().items() if not v.equal(tuned.state_dict()[k].reshape(v.shape).to(v.dtype))
    ]
    assert any("q_proj" in k for k in changed)
    assert not any("position_embedding" in k or "layer_norm" in k for k in changed)
