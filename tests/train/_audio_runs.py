"""The recipe of three modalities made small, as spawned ranks run it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from _runs import SHARD

from dualenc.config import load_recipe
from dualenc.distributed.world import World, barrier
from dualenc.train.loop import Run, run_folder

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes" / "audio_text"

SMALL = [
    "modalities.image.encoder.widths=[8,16,32]",
    "modalities.audio.encoder={name: own/audio_cnn, widths: [4, 8, 8]}",
    "modalities.audio.input.max_s=0.5",
    "modalities.text.encoder={name: own/transformer, width: 32, layers: 1, heads: 2}",
    "modalities.text.input={tokenizer: 'clip-bpe:1024', context_length: 16}",
    "embed_dim=32",
    "batch.size=16",
    "budget.steps=4",
    "eval.tasks=[]",
    "engine.threads=1",
    "data.workers=0",
    "tracking.log_every=1",
    "tracking.sample_ids=true",
    "schedule.name=constant",
    "schedule.warmup_samples=0",
]


def train(world: World, recipe: str, sounds: str, overrides: list[str]) -> dict[str, Any]:
    """Train on the quickstart's first shard and on ``sounds``, 7 : 1; what was changed, by this rank's weights."""
    sources = (
        f"data.sources=[{{name: pictures, shards: '{SHARD}', members: {{image: [webp], text: [txt]}}, weight: 7}}, "
        f"{{name: sounds, shards: '{sounds}', members: {{audio: [wav], text: ['json:captions']}}, weight: 1}}]"
    )
    loaded = load_recipe(RECIPES / f"{recipe}.yaml", [*SMALL, sources, *overrides])
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
