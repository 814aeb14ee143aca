"""The quickstart recipe made small, whole runs of it in spawned ranks, and readers of what a run wrote."""

from __future__ import annotations

import itertools
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import torch
from _shared import PYTHONPATH
from torch import nn

from dualenc.config import load_recipe
from dualenc.distributed.world import World, barrier
from dualenc.errors import DivergenceError
from dualenc.train.loop import Run, run_folder

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "quickstart" / "quickstart.yaml"
SHARD = ROOT / "recipes" / "quickstart" / "data" / "train-000000.tar"

SMALL = [
    "modalities.image.encoder.widths=[8,16,32]",
    "modalities.text.encoder.width=32",
    "modalities.text.encoder.layers=2",
    "modalities.text.encoder.heads=2",
    "embed_dim=32",
    "batch.size=32",
    "eval.tasks=[]",
    "engine.threads=1",
    "tracking.log_every=1",
    "tracking.sample_ids=true",
    "schedule.name=constant",
    "schedule.warmup_samples=64",
]

ENGINES = {
    "DDP": ["engine.parallel=ddp"],
    "FSDP2": ["engine.parallel=fsdp2"],
    **{f"ZeRO {z}": ["engine.kind=deepspeed", f"engine.zero_stage={z}"] for z in range(4)},
}


def environment(**more: str) -> dict[str, str]:
    """Of a process started by a test."""
    fixed = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return {**os.environ, **fixed, "CUDA_VISIBLE_DEVICES": "", **more}


def few_samples(out: Path, counts: tuple[int, ...]) -> str:
    """Shards with the first samples of the quickstart's; returns the override that trains on them."""
    out.mkdir()
    with tarfile.open(SHARD) as src:
        samples = itertools.groupby(src, key=lambda m: m.name.split(".")[0])
        for i, count in enumerate(counts):
            with tarfile.open(out / f"few-{i:06d}.tar", "w") as dst:
                for _, members in itertools.islice(samples, count):
                    for m in members:
                        dst.addfile(m, src.extractfile(m))
    return f"data.sources=[{{name: few, shards: '{out}/few-*.tar'}}]"


# --- what the spawned ranks run ------------------------------------------------------------------------------------


def segments(world: World, parts: list[list[str]], recipe: str = str(RECIPE)) -> list[dict[str, Any]]:
    """Runs one after another, each a whole ``Run`` that finds the newest save by itself."""
    out = []
    for overrides in parts:
        run = build(world, overrides, recipe)
        began = run.parts.state.step
        run.train()
        run.close()
        out.append({"began": began, "ended": run.parts.state.step, "lr": run.parts.engine.lr})
    return out


def build(world: World, overrides: list[str], path: str = str(RECIPE)) -> Run:
    towers = SMALL if path == str(RECIPE) else [x for x in SMALL if not x.startswith("modalities")]
    recipe = load_recipe(path, [*towers, *overrides])
    folder = run_folder(recipe)
    if world.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
    barrier(world)
    return Run(recipe, folder, world)


def spoilt(world: World, parts: list[list[str]], steps: list[int]) -> list[dict[str, Any]]:
    """Runs in which the features of the last rank's first picture are NaN at ``steps``."""
    out = []
    for overrides in parts:
        run = build(world, overrides)

        def poison(_: nn.Module, __: Any, said: dict[str, torch.Tensor], run: Run = run) -> dict[str, torch.Tensor]:
            if run.parts.state.step not in steps or world.rank != world.world_size - 1:
                return said
            row = torch.arange(len(said["features"]), device=said["features"].device)[:, None] == 0
            return {**said, "features": torch.where(row, float("nan"), said["features"])}

        run.parts.bundle.model.towers["image"].register_forward_hook(poison)
        message, code = "", 0
        try:
            run.train()
        except DivergenceError as e:
            message, code = str(e), e.exit_code
        run.close()
        skipped = run.parts.state.nonfinite_steps
        out.append({"message": message, "code": code, "skipped": skipped, "step": run.parts.state.step})
    return out


# --- what a run wrote ----------------------------------------------------------------------------------------------


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(run: Path) -> list[float]:
    """By step; every step stands once."""
    found = [(r["step"], r["loss"]) for r in rows(run / "metrics.jsonl") if "loss" in r]
    assert [s for s, _ in found] == list(range(1, len(found) + 1))
    return [x for _, x in found]


def order(run: Path) -> list[list[str]]:
    """Sample ids by step in the order of the global batch, whatever number of ranks read them."""
    steps: dict[int, dict[int, list[str]]] = {}
    for path in run.glob("samples-rank*.jsonl"):
        rank = int(path.stem.removeprefix("samples-rank"))
        for row in rows(path):
            ranks = steps.setdefault(row["step"], {})
            assert rank not in ranks, f"step {row['step']} stands twice in {path.name}"
            ranks[rank] = row["samples"]
    out = []
    for step in sorted(steps):
        world = len(steps[step])
        assert sorted(steps[step]) == list(range(world))
        size = sum(map(len, steps[step].values()))
        out.append([steps[step][slot % world][slot // world] for slot in range(size)])
    assert sorted(steps) == list(range(1, len(steps) + 1))
    return out


def newest(run: Path) -> Path:
    return max(p for p in (run / "checkpoints").iterdir() if p.name.startswith("step-"))
