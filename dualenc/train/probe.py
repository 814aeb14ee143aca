"""What a run takes: its standing memory from the model alone, or memory and time measured on two real steps."""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from dualenc.config import EngineConfig, Recipe
from dualenc.distributed.world import World, all_gather_object, close_world, init_world
from dualenc.engine.optim import moments, parameters_by_role
from dualenc.flop_counter import counting
from dualenc.train.loop import Run

STEPS = 2


def standing_memory(model: nn.Module, recipe: Recipe, ranks: int) -> str:
    """One line for a person: :func:`standing_bytes`, labelled an estimate."""
    parts = standing_bytes(model, recipe, ranks)
    said = " + ".join(f"{k} {_size(n)}" for k, n in parts.items())
    return (
        f"memory per rank, estimate for {ranks} rank(s): {said} = {_size(sum(parts.values()))}; activations come on "
        "top, --dry-run --probe measures all of it"
    )


def standing_bytes(model: nn.Module, recipe: Recipe, ranks: int) -> dict[str, int]:
    """What weights, gradients and optimizer states take on each of ``ranks`` ranks all the time, from their shapes."""
    roles = parameters_by_role(model)
    trained = {role: sum(p.numel() * p.element_size() for p in found) for role, found in roles.items()}
    weights = sum(x.numel() * x.element_size() for x in (*model.parameters(), *model.buffers()))
    gradients = sum(trained.values())
    states = moments(recipe.optim, gradients, trained.get("matrix", 0))
    if recipe.engine.kind == "deepspeed" and recipe.engine.zero_stage > 0:
        states += gradients  # ZeRO steps on a copy of the weights
    sharded = _sharded(recipe.engine, ranks)
    parts = {"weights": weights, "gradients": gradients, "optimizer states": states}
    share = ranks if recipe.engine.shard_size is None else min(recipe.engine.shard_size, ranks)
    return {k: n // share if k in sharded else n for k, n in parts.items()}


def _sharded(engine: EngineConfig, ranks: int) -> tuple[str, ...]:
    """What the ranks share instead of holding it whole."""
    parts = ("optimizer states", "gradients", "weights")
    if engine.kind == "deepspeed":
        return parts[: engine.zero_stage]
    return parts if engine.parallel == "fsdp2" and ranks > 1 else ()


@dataclass(frozen=True, slots=True)
class TwoSteps:
    """What two steps took.

    Attributes:
        resident: bytes of main memory, the most a rank had at once since it began.
        worker: bytes, the most one of its data workers had; 0 without workers.
        cuda: bytes that torch held on the device; None on a CPU.
        seconds: of the last step, with waiting for its batch. The first also starts workers and compiles.
        flops: of the first step, on one rank, as torch counts them: matrix products, convolutions and attention.
        ranks: how many there are; the numbers above are of the one that took most.
    """

    resident: int
    worker: int
    cuda: int | None
    seconds: float
    flops: int
    ranks: int

    def said(self) -> str:
        """One line for a person."""
        parts = [f"{_size(self.resident)} of main memory"]
        if self.worker:
            parts.append(f"{_size(self.worker)} for each data worker")
        if self.cuda is not None:
            parts.append(f"{_size(self.cuda)} on the device")
        return (
            f"measured on {STEPS} steps, {self.ranks} rank(s): at most {', '.join(parts)} a rank; {self.seconds:.3g} s "
            f"a step, so {_duration(1000 * self.seconds)} for 1,000 steps"
        )


def probe(recipe: Recipe) -> TwoSteps:
    """Begin ``recipe`` anew in a temporary folder, take two steps, and measure; all ranks of a launcher call it alike.

    Nothing is evaluated, saved or sent to a tracker.

    Raises:
        ConfigError, DataError, CheckpointError: as a run does before and in its first steps.
    """
    engine = recipe.engine
    world = init_world(engine.device, engine.timeout_s, engine.threads)
    clean = False
    try:
        with tempfile.TemporaryDirectory(prefix="dualenc-probe-") as folder:
            measured = _measure(recipe, Path(folder), world)
        clean = True
    finally:
        close_world(world, clean=clean)
    return measured


def _measure(recipe: Recipe, folder: Path, world: World) -> TwoSteps:
    changed = {
        "checkpoint": recipe.checkpoint.model_copy(update={"resume": "none"}),
        "tracking": recipe.tracking.model_copy(update={"tensorboard": False, "wandb": False, "sample_ids": False}),
    }
    run = Run(recipe.model_copy(update=changed), folder, world)
    seconds = 0.0
    try:
        steps = run.steps(STEPS)
        with counting() as counter:
            next(steps)
        began = time.perf_counter()
        for _ in steps:
            seconds, began = time.perf_counter() - began, time.perf_counter()
        cuda = torch.cuda.max_memory_reserved() if world.device.type == "cuda" else None
    finally:
        run.close()
    own, child = (
        resource.getrusage(who).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    worker = child if recipe.data.workers else 0
    rows = all_gather_object((own, worker, cuda or 0, seconds, counter.get_total_flops()), world)
    most = [max(x) for x in zip(*rows, strict=True)]
    device = None if cuda is None else int(most[2])
    return TwoSteps(int(most[0]), int(most[1]), device, most[3], int(most[4]), world.world_size)


def _size(n: int) -> str:
    return f"{n / 2**30:.1f} GiB" if n >= 10 * 2**30 else f"{n / 2**20:,.0f} MiB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
