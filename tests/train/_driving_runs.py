"""The camera/LiDAR recipes made small, as spawned ranks run them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dualenc.config import load_recipe
from dualenc.distributed.world import World, barrier
from dualenc.train.loop import Run, run_folder

RECIPES = Path(__file__).parents[2] / "recipes" / "camera_lidar"

SMALL = [
    "modalities.camera.input.size=[32,64]",
    "modalities.camera.encoder.image.widths=[8,16]",
    "modalities.camera.encoder.cell=4.0",
    "modalities.camera.encoder.widths=[8,16]",
    "modalities.camera.encoder.channels=8",
    "modalities.camera.encoder.depth_bins=12",
    "modalities.lidar.input.max_points=2000",
    "modalities.lidar.encoder.cell=4.0",
    "modalities.lidar.encoder.pillar_width=8",
    "modalities.lidar.encoder.widths=[8,16]",
    "embed_dim=16",
    "batch.size=4",
    "budget.steps=2",
    "engine.threads=1",
    "data.workers=0",
    "tracking.log_every=1",
    "schedule.name=constant",
    "schedule.warmup_samples=0",
]


def train(world: World, shards: str, overrides: list[str]) -> dict[str, Any]:
    """Train; by how much each weight of this rank moved."""
    sources = f"data.sources=[{{name: driving, shards: '{shards}'}}]"
    loaded = load_recipe(RECIPES / "keyframes.yaml", [*SMALL, sources, *overrides])
    folder = run_folder(loaded)
    if world.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
    barrier(world)
    run = Run(loaded, folder, world)
    before = {k: v.clone() for k, v in run.parts.engine.model_state().items()}
    run.train()
    after = run.parts.engine.model_state()
    run.close()
    return {k: float((after[k] - v).abs().max()) for k, v in before.items()}
