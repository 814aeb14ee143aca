"""From a folder of photos to held-out numbers through the command line; needs ../shared/data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from _shared import DATA as SHARED_DATA
from _shared import PYTHONPATH

ROOT = Path(__file__).parents[2]
DATA = SHARED_DATA
FLICKR = DATA / "image_text" / "flickr8k" / "captions.jsonl"

pytestmark = pytest.mark.skipif(not FLICKR.exists(), reason=f"the Flickr8k photos are not at {FLICKR}")

SMALL = ["batch.size=8", "budget.steps=3", "engine.threads=2", "tracking.log_every=1", "eval.tasks=[]", "out=run"]


def dualenc(*args: str, cwd: Path) -> str:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": PYTHONPATH, "DUALENC_DATA": str(DATA)}
    cmd = [sys.executable, "-m", "dualenc", *args]
    done = subprocess.run(cmd, cwd=cwd, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("recipe", [pytest.param("flickr8k", marks=pytest.mark.extra), "flickr8k_released"])
def test_folder_to_shards_to_training_to_retrieval(tmp_path: Path, recipe: str) -> None:
    build = ["shards", "build", "jsonl", f"path={FLICKR}", "split=train", "limit=40", "--out", "data/flickr8k"]
    assert "40 samples, 200 captions" in dualenc(*build, cwd=tmp_path)
    dualenc("train", str(ROOT / "recipes" / "image_text" / f"{recipe}.yaml"), *SMALL, cwd=tmp_path)
    rows = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len([r for r in rows if "loss" in r]) == 3
    assert not any(k.startswith("lost/") for r in rows for k in r)
    task = tmp_path / "few.yaml"  # the task of the repository on 16 of its photos: the numbers are not the point
    task.write_text(
        f"kind: retrieval\nsource:\n  kind: jsonl\n  path: {FLICKR}\n  split: dev\n"
        "  members: {image: ['file:image'], text: [captions]}\n  every: {step: 30, offset: 0}\n"
    )
    dualenc("eval", "run", "--task", "few.yaml", "--out", "results.json", cwd=tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    counts = results["tasks"]["few"]["n"]
    assert counts["text"] == pytest.approx(5 * counts["image"], rel=0.02)
    # three steps teach nothing worth a threshold: the numbers are those of the saved weights, whole and finite
    assert results["tasks"]["few"]["skipped"]["count"] == 0
