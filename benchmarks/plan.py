"""``dualenc plan`` against runs: what it plans for each engine, and what real ranks allocate.

    python -m benchmarks.plan [--ranks 1 2 4] [--engines DDP FSDP2 …] [--batch 8] [--steps 2] [--recipe RECIPE]

Every cell starts its ranks as processes on the CPU, joined by gloo, and takes real steps of a ViT and a text
transformer (39 M parameters), or of a recipe's model, on rows of the largest size. *measured* is the most that torch's
CPU allocator had given out at once since before the model was built, on the rank where that was most, as torch's
profiler reports it: the counterpart of ``torch.cuda.max_memory_allocated``. Resident memory would also count what
libraries take for themselves, and not count pages that were given out and never written.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from dualenc.config import Recipe, load_recipe
from dualenc.data.batch import Batch
from dualenc.distributed.launch import launch
from dualenc.distributed.world import World, close_world, init_world
from dualenc.errors import DualencError
from dualenc.shipped import find_recipe

RECIPE = """
name: plan
modalities:
  image: {input: {size: 128}, encoder: {name: own/vit, patch: 16, width: 384, layers: 12, heads: 6}}
  text:
    input: {tokenizer: "clip-bpe:8192", context_length: 32}
    encoder: {name: own/transformer, width: 384, layers: 8, heads: 6}
embed_dim: 256
data: {sources: [{name: none, shards: none.tar}]}
batch: {size: 16}
budget: {steps: 3}
"""
ENGINES = {
    "one process": [],
    "DDP": ["engine.parallel=ddp"],
    "FSDP2": ["engine.parallel=fsdp2"],
    **{f"ZeRO {s}": ["engine.kind=deepspeed", f"engine.zero_stage={s}"] for s in range(4)},
}
MIB = 2**20


def measure(recipe: Recipe, steps: int) -> float:
    """MiB that this rank had allocated at most in ``steps`` steps of a run that begins here."""
    world = init_world("cpu", 300, threads=1)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        _steps_of(recipe, world, steps)
    close_world(world)
    return _peak(profiler) / MIB


def _peak(profiler: Any) -> int:
    """The profiler sees this thread only: what one of gloo's threads frees is known to be free when its address is
    given out again."""
    events, found = list(profiler.profiler.kineto_results.experimental_event_tree()), []
    while events:
        event = events.pop()
        events += event.children
        if event.name == "[memory]":
            found.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    held: dict[int, int] = {}
    live = peak = 0
    for _, address, size in sorted(found, key=lambda e: e[0]):
        live -= held.pop(address, 0)
        if size > 0:
            held[address] = size
            live += size
        peak = max(peak, live)
    return peak


def _steps_of(recipe: Recipe, world: World, steps: int) -> None:
    from dualenc.engine import build_engine
    from dualenc.losses import build_loss
    from dualenc.memory import RunShape
    from dualenc.model import build_bundle
    from dualenc.plan.widest_rows import widest
    from dualenc.train.build import add_heads
    from dualenc.train.memory import Memory, slow_models
    from dualenc.train.step import train_step

    bundle = build_bundle(recipe)
    loss = build_loss(recipe.loss)
    add_heads(loss, bundle, recipe.seed)
    slow = slow_models(loss, bundle.model, world.device)
    engine = build_engine(recipe.engine, recipe.optim, bundle.model, world)
    run = RunShape(recipe.embed_dim, recipe.pairs, recipe.batch.size, world.rank, world.world_size)
    memory = Memory(loss, slow, run, recipe.batch.micro)
    size = recipe.batch.size // world.world_size
    inputs = {m: widest(x, size) for m, x in bundle.inputs.items()}
    rows = {m: torch.arange(size) for m in inputs}
    ids = torch.arange(size) + size * world.rank
    batch = Batch(size, inputs, rows, ids, [""] * size)
    for _ in range(steps):
        done = train_step(engine, memory.recall(batch, engine.module), recipe.pairs, loss, micro=recipe.batch.micro)
        if memory:
            memory.keep(engine.module, done.skipped)


def measured(path: Path, overrides: list[str], ranks: int, steps: int) -> float:
    """MiB that the rank that took most had allocated at most."""
    with tempfile.TemporaryDirectory() as folder:
        rank = ["--recipe", str(path), "--rank-of", folder, "--steps", str(steps)]
        command = [sys.executable, "-m", "benchmarks.plan", *rank, *overrides]
        # One rank is started without a launcher: accelerate would take it for DDP.
        code = launch(command, ranks) if ranks > 1 else subprocess.run(command, check=False).returncode
        if code:
            raise DualencError(f"a rank ended with exit code {code}")
        return max(float(p.read_text(encoding="ascii")) for p in Path(folder).glob("rank*"))


def planned(path: Path, overrides: list[str], name: str, ranks: int) -> float:
    """What ``dualenc plan`` says of the whole batch under an engine, in MiB."""
    from dualenc.plan.engine_memory import KINDS
    from dualenc.plan.planning import plan

    kind = next(k for k in KINDS if k.name == name)
    needs = plan(load_recipe(path, overrides), ranks, 80 * 2**30, kinds=[kind]).needs
    return needs[0].total / MIB  # of the largest micro-batch


def cell(
    name: str, ranks: int, batch: int, steps: int, more: list[str], recipe: str | None = None
) -> tuple[float, float]:
    """MiB of one rank: planned and measured."""
    overrides = [*ENGINES[name], f"batch.size={batch * ranks}", "engine.device=cpu", *more]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "recipe.yaml")
        if recipe is None:
            path.write_text(RECIPE, encoding="utf-8")
        else:
            path = find_recipe(recipe)
        return planned(path, overrides, name, ranks), measured(path, overrides, ranks, steps)


def table(
    names: list[str], worlds: list[int], batch: int, steps: int, more: list[str], recipe: str | None = None
) -> None:
    """Print a line for each engine and number of ranks; DDP of one rank is one process."""
    print(f"{'engine':<12}{'ranks':>6}{'planned MiB':>13}{'measured MiB':>14}{'ratio':>7}")
    for name in names:
        for ranks in worlds:
            if (name == "one process" and ranks > 1) or (name == "DDP" and ranks == 1):
                continue
            plan, allocated = cell(name, ranks, batch, steps, more, recipe)
            print(f"{name:<12}{ranks:>6}{plan:>13,.0f}{allocated:>14,.0f}{plan / allocated:>7.2f}", flush=True)


def main(arguments: list[str]) -> None:
    """Print the table, or run one of its ranks."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan")
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--engines", nargs="*", default=list(ENGINES), choices=list(ENGINES), metavar="ENGINE")
    parser.add_argument("--batch", type=int, default=8, help="samples of a rank")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--recipe", help="whose model to take; name or path")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args(arguments)
    if given.rank_of is not None:
        found = measure(load_recipe(given.recipe, given.overrides), given.steps)
        (given.rank_of / f"rank{os.environ.get('RANK', '0')}").write_text(str(found), encoding="ascii")
        return
    table(given.engines, given.ranks, given.batch, given.steps, given.overrides, given.recipe)


if __name__ == "__main__":
    main(sys.argv[1:])
