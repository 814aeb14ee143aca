"""Learned prompts on one rank and on two, under every kind of engine and across a resume: the same weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
from _runs import ENGINES, RECIPE, build, few_samples, newest, segments
from _spawn import spawn

from dualenc.distributed.world import World

torch.set_num_threads(1)
pytestmark = [pytest.mark.dist, pytest.mark.slow]
RUNS = Path(__file__).with_name("_runs.py")
CLIP: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 64, "layers": 3, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 1024, "width": 32, "heads": 2, "layers": 3},
}
WORDS = {"tokenizer": "clip-bpe:1024", "context_length": 16, "prefix": "a"}
ENCODER = {"name": "open_clip/t", "config": CLIP}


PARTS = {
    "image": {"input": {"size": 64}, "encoder": ENCODER, "prompts": {"tokens": 2}},
    "text": {"input": WORDS, "encoder": ENCODER, "prompts": {"tokens": 1, "layers": 2}},
}


def test_prompts_are_those_of_one_process_under_every_engine(tmp_path: Path) -> None:
    """SGD, because Adam hides a wrong scale of the gradient; the last case resumes a run of FSDP2 under ZeRO 3."""
    recipe = {
        "base": str(RECIPE),
        "modalities": PARTS,
        "optim": {"name": "sgd", "lr": 1.0, "momentum": 0.9, "weight_decay": 0.0},
    }
    path = tmp_path / "prompted.yaml"
    path.write_text(json.dumps(recipe))
    given = [few_samples(tmp_path / "data", (160,)), "data.workers=0"]

    def said(name: str, engine: list[str], steps: int = 4) -> list[str]:
        return [*given, *engine, f"budget.steps={steps}", f"out={tmp_path}/{name}"]

    cases = {name: ENGINES[name] for name in ("DDP", "FSDP2", "ZeRO 2", "ZeRO 3")}
    cases["FSDP2 micro"] = [*ENGINES["FSDP2"], "batch.micro=4"]
    parts = [said(name, engine) for name, engine in cases.items()]
    parts += [said("resumed", ENGINES["FSDP2"], 2), said("resumed", ENGINES["ZeRO 3"])]
    segments(World(), [said("one", [])], str(path))
    spawn(RUNS, "segments", 2, {"parts": parts, "recipe": str(path)})
    run = build(World(), said("start", [], 1), str(path))
    run.close()
    start, want = run.parts.bundle.model.state_dict(), weights(tmp_path / "one")
    moved = {k for k, w in want.items() if not torch.equal(start[k], w)}
    assert moved == {"logit_scale.image-text", *(f"towers.{m}.prompts.prompt_tokens" for m in PARTS)}
    for name in [*cases, "resumed"]:
        for k, got in weights(tmp_path / name).items():
            scale = (want[k] - start[k]).abs().max().clamp(min=1e-12) if k in moved else 1e-12
            assert (got - want[k]).abs().max() / scale < 1e-4, (name, k)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(newest(run) / "model" / "model.safetensors")
