"""Recipes of a small student and its teacher, and readers of what a run wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dualenc.config import Recipe


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
