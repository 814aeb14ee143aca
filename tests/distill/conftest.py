"""A teacher and a student on real photos of Flickr8k, small enough for a unit test; absent data skips."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from _distill_runs import modalities

from data_tools.build import build
from dualenc.bundle import build_bundle
from dualenc.config import Recipe

DATA = Path(__file__).parents[3] / "shared" / "data" / "image_text" / "flickr8k"

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """200 photos in two shards."""
    captions = DATA / "captions.jsonl"
    if not captions.is_file():
        pytest.skip(f"needs the Flickr8k photos under {DATA}")
    out = tmp_path_factory.mktemp("shards")
    build("jsonl", out, {"path": str(captions), "split": "train", "limit": 200, "shard_samples": 100})
    return str(out / "*.tar")


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with another picture size, tokenizer and dimension than the student's."""
    raw = {
        "name": "teacher",
        "modalities": modalities(64, "clip-bpe:2048", 32),
        "embed_dim": 24,
        "logit_scale": {"init": 20.0},
        "data": {"sources": [{"name": "x", "shards": "x.tar"}]},
        "batch": {"size": 8},
        "budget": {"steps": 1},
        "seed": 5,
    }
    return build_bundle(Recipe.model_validate(raw)).save(tmp_path_factory.mktemp("teacher") / "bundle")
