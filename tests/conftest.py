"""Real pictures and captions; absent data skips, offline is enforced."""

from __future__ import annotations

import json
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

DATA = Path(__file__).parents[2] / "shared" / "data" / "image_text"

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def coco() -> list[tuple[bytes, list[str]]]:
    """Eight photos with their captions."""
    folder = DATA / "coco_cc"
    if not folder.is_dir():
        pytest.skip(f"needs the COCO photos under {folder}")
    rows = [json.loads(line) for line in (folder / "captions.jsonl").read_text(encoding="utf-8").splitlines()]
    return [((folder / r["image"]).read_bytes(), r["captions"]) for r in rows[:8]]
