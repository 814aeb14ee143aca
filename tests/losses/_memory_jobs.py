"""Losses that remember: a small model trained with each, saved in the middle, and resumed; what one process and the
spawned ranks run. A loss with a memory of its own is added to ``CASES``."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
sys.path.insert(0, str(Path(__file__).parent))
import _term_jobs
from gradcheck import ENGINES, OPTIM

from dualenc.checkpoint.ranges import InMemory, file_name, stored, write
from dualenc.config import Component, EngineConfig
from dualenc.data.batch import Batch
from dualenc.distributed.gather import gather_ids
from dualenc.distributed.world import World, barrier, broadcast_object
from dualenc.engine import build_engine
from dualenc.losses import Loss, build_loss
from dualenc.memory import RunShape, state
from dualenc.train.memory import Memory, slow_models
from dualenc.train.step import train_step

STEPS, MIDDLE, NOT_FINITE, SAMPLES = 5, 3, 1, 37
PAIR, SIZE, DIM = _term_jobs.PAIR, _term_jobs.SIZE, _term_jobs.DIM
MILD: dict[str, Any] = {"tau": 0.2, "tau_min": 0.1, "rho": 1.5}
"""Temperatures at which fp32 keeps more digits than the limit asks for."""
MOCO: dict[str, Any] = {"name": "moco", "decay": 0.8, "queue": 20}
CASES: dict[str, dict[str, Any]] = {
    "sogclr": {"name": "sogclr", "gamma": 0.6},
    "isogclr": {"name": "isogclr", **MILD},
    "v0": {"name": "fastclip", "version": "v0", "gamma": 0.4, "gamma_decay_samples": 48},
    "v1": {"name": "fastclip", "version": "v1"},
    "v2": {"name": "fastclip", "version": "v2", **MILD},
    "v3": {"name": "fastclip", "epsilon": 0.01, "rho": 1.5},
    "moco": MOCO,
    "queue alone": {**MOCO, "in_batch": False, "label_smoothing": 0.1},
    "domains": {**MOCO, "domains": [0, 2, 3], "label": "label", "queue": 5},
    "mixtures": {**MOCO, "mix": {"hardest": 4, "between": 3, "towards": 2}},
    "no queue": {**MOCO, "queue": 0},
    "cocosoda": {"name": "cocosoda", "decay": 0.8, "queue": 20, "within": True},
    "byolip": {"name": "byolip", "project": 6, "hidden": 8, "decay": 0.8},
    "beclr": {"name": "beclr", "project": 6, "hidden": 8, "decay": 0.8, "memory": 20, "clusters": 3, "neighbours": 2},
    "entities": {"name": "entity_classifier", "classes": 5, "scale": 4.0, "side": "both", "strip_mb": 1e-6},
    "entities sampled": {"name": "entity_classifier", "classes": 11, "sampled": 6, "scale": 4.0, "lr": 0.5},
    "list": {
        "name": "sum",
        "terms": [
            {"name": "fastclip", "version": "v2", **MILD},
            {**MOCO, "pairs": [["audio", "image"]], "weight": 0.5},
            {"name": "byolip", "project": 6, "hidden": 8, "decay": 0.6},
        ],
    },
}


def loss_of(case: str) -> Loss:
    return build_loss(Component.model_validate(CASES[case]))


def batch_of(step: int, rank: int, world_size: int) -> Batch:
    """As ``_term_jobs.make_batch``, of 37 samples that come again; an image of step 1 is not finite."""
    batch = _term_jobs.make_batch(step, rank, world_size)
    numbers = (torch.arange(SIZE) * 5 + step * 9) % SAMPLES
    ids = numbers.clone()
    ids[[2, 9]] = ids[1].item()
    ids[3] = -1
    batch.numbers, batch.ids = numbers[rank::world_size], ids[rank::world_size]
    if step == NOT_FINITE and rank == 0:
        batch.inputs["image"]["x"][0] = torch.nan
    return batch


def trained(
    world: World,
    case: str,
    engine: str = "single",
    chunks: int = 1,
    begin: str | None = None,
    save: str | None = None,
) -> dict[str, Tensor]:
    """Parameters and memory after STEPS steps, whole on rank 0.

    Args:
        begin: a folder that ``save`` wrote, after MIDDLE steps.
    """
    loss = loss_of(case)
    net = _term_jobs.model(loss)
    saved = None if begin is None else torch.load(Path(begin) / "rest.pt", weights_only=True)
    if saved is not None:
        net.load_state_dict(saved["model"])
    slow = slow_models(loss, net, world.device)
    built = build_engine(EngineConfig(**ENGINES[engine]), OPTIM, net, world)
    run = RunShape(DIM, [PAIR], SAMPLES, world.rank, world.world_size)
    micro = None if chunks == 1 else -(-SIZE // world.world_size // chunks)
    memory = Memory(loss, slow, run, micro)
    if saved is not None and begin is not None:
        built.load_optimizer_state(InMemory(saved["optimizer"]), saved["info"])
        memory.load(stored(Path(begin), "memory"))
    for step in range(0 if saved is None else MIDDLE, STEPS):
        batch = memory.recall(batch_of(step, world.rank, world.world_size), built.module)
        done = train_step(built, batch, [PAIR], loss, micro=micro)
        memory.keep(built.module, done.skipped)
        assert bool(done.skipped) == (step == NOT_FINITE)
        if save is not None and step + 1 == MIDDLE:
            write_down(world, Path(save), memory)
            tensors, info = built.optimizer_state()
            rest = {"model": built.model_state(), "optimizer": tensors, "info": info}
            if world.rank == 0:
                torch.save(rest, Path(save) / "rest.pt")
            barrier(world)
    with tempfile.TemporaryDirectory() as folder:
        shared = Path(broadcast_object(folder, world))
        write_down(world, shared, memory)
        kept = {k: x.clone() for k, x in stored(shared, "memory").all().items()} if world.rank == 0 else {}
        barrier(world)
    return {**built.model_state(), **{f"memory/{k}": x for k, x in kept.items()}}


def write_down(world: World, folder: Path, memory: Memory) -> None:
    """As ``Saver.pieces``."""
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / file_name("memory", world.rank, world.world_size), memory.pieces(world.rank, world.world_size))
    barrier(world)


def on_ranks(world: World, folder: str, alone: str, engines: list[str], cases: list[str]) -> dict[str, Any]:
    """Rank 0: of every case a run in micro-batches saved in the middle, and one resumed from the save; and of some one
    in whole batches, and the one-process save under ``alone`` resumed by other engines, whose saves DDP resumes."""
    out: dict[str, Any] = {"moco/in the order of ranks": in_order_of_ranks(world)}
    for case in CASES:
        own = f"{folder}/{case}"
        out[f"{case}/unbroken"] = trained(world, case, "DDP", chunks=2, save=own)
        out[f"{case}/resumed"] = trained(world, case, "DDP", chunks=2, begin=own)
    for case in cases:
        out[f"{case}/whole batches"] = trained(world, case, "DDP")
        for engine in engines:
            out[f"{case}/{engine} from one process"] = trained(world, case, engine, begin=f"{alone}/{case}")
            out[f"{case}/{engine}"] = trained(world, case, engine, save=f"{folder}/{case} {engine}")
            out[f"{case}/DDP from {engine}"] = trained(world, case, "DDP", begin=f"{folder}/{case} {engine}")
    return out


def in_order_of_ranks(world: World) -> dict[str, Tensor]:
    """The usual mistake: keys are queued as they are gathered, rank after rank."""
    original, state.in_slot_order = state.in_slot_order, gather_ids
    try:
        return trained(world, "moco", "DDP")
    finally:
        state.in_slot_order = original
