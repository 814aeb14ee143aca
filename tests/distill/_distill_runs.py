"""A small student and its teacher on real photos of Flickr8k, and readers of what a run wrote; absent data skips.

Fixtures that test modules import by name: a conftest.py here would shadow those of other folders.
"""

from __future__ import annotations

import json
import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from _shared import DATA as SHARED_DATA

from dualenc.config import Recipe
from dualenc.model import build_bundle
from dualenc_data_tools.build import build

DATA = SHARED_DATA / "image_text" / "flickr8k"

torch.set_num_threads(1)


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """One for all modules; removed when Python ends."""
    return tempfile.TemporaryDirectory(prefix="dualenc-distill-")


@cache
def photo_shards() -> str:
    """200 photos in two shards."""
    out = Path(_folder().name) / "shards"
    captions = str(DATA / "captions.jsonl")
    build("jsonl", out, {"path": captions, "split": "train", "limit": 200, "shard_samples": 100})
    return str(out / "*.tar")


@cache
def teacher_bundle() -> Path:
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
    return build_bundle(Recipe.model_validate(raw)).save(Path(_folder().name) / "teacher")


@pytest.fixture(scope="module", name="shards")
def shards_fixture() -> str:
    if not (DATA / "captions.jsonl").is_file():
        pytest.skip(f"needs the Flickr8k photos under {DATA}")
    return photo_shards()


@pytest.fixture(scope="module", name="teacher")
def teacher_fixture() -> Path:
    return teacher_bundle()


def modalities(size: int, tokenizer: str, width: int) -> dict[str, Any]:
    return {
        "image": {
            "input": {"size": size, "augment": {"scale": [0.6, 1.0], "flip": True}},
            "encoder": {"name": "own/convnet", "widths": [8, 16, width]},
        },
        "text": {
            "input": {"tokenizer": tokenizer, "context_length": 24},
            "encoder": {"name": "own/transformer", "width": width, "layers": 1, "heads": 2},
        },
    }


def student_recipe(shards: str, out: Path, **changes: Any) -> Recipe:
    raw: dict[str, Any] = {
        "name": "student",
        "out": str(out),
        "modalities": modalities(32, "clip-bpe:1024", 16),
        "embed_dim": 16,
        "data": {
            "sources": [
                {"name": "flickr8k", "shards": shards, "members": {"image": ["jpg"], "text": ["json:captions"]}}
            ],
            "workers": 0,
        },
        "batch": {"size": 20},
        "budget": {"steps": 4},
        "optim": {"name": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 0.0},
        "schedule": {"name": "constant"},
        "engine": {"threads": 1},
        "tracking": {"log_every": 1},
    }
    return Recipe.model_validate({**raw, **changes})


def loss_rows(out: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [r for r in rows if "loss" in r]
