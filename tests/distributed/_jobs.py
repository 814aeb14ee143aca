"""What the spawned ranks of the tests run."""

from __future__ import annotations

import time
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from _tiny import PAIRS, make_batch, naive_loss, share_of, tiny
from gradcheck import run, sweep
from torch import Tensor

from dualenc.checkpoint.ranges import InMemory
from dualenc.config import Component, EngineConfig, Optim
from dualenc.distributed.failure import LostRankError, naming_missing_ranks
from dualenc.distributed.gather import gather
from dualenc.distributed.world import (
    World,
    all_gather_object,
    all_reduce_sum,
    any_true,
    barrier,
    broadcast_object,
    close_world,
    sum_dict,
)
from dualenc.engine import build_engine
from dualenc.engine.ema import EMA
from dualenc.errors import DualencError
from dualenc.losses import Loss, build_loss
from dualenc.train.step import train_step

__all__ = ["run", "sweep"]

ADAMW = Optim(name="adamw", lr=1e-2, weight_decay=0.1, clip_grad_norm=1.0)


def collectives(world: World) -> dict[str, Any]:
    x = torch.tensor([1.0, 2.0]) + world.rank
    return {
        "sum": all_reduce_sum(x, world),
        "untouched": x,
        "dict": sum_dict({"a": 1.0, "b": float(world.rank)}, world),
        "any": any_true(world.rank == world.world_size - 1, world),
        "none": any_true(False, world),
        "objects": all_gather_object({"rank": world.rank}, world),
        "broadcast": broadcast_object(f"from {world.rank}", world),
        "world": [world.rank, world.world_size, world.local_rank],
        "backend": world.backend,
    }


def gather_gradient(world: World) -> dict[str, Any]:
    """Rank r's loss weighs rank q's features with (r + 1)(q + 2): the gradient at q sums over r."""
    x = torch.full((2, 3), float(world.rank), requires_grad=True)
    y = gather(x)
    weights = torch.tensor([(world.rank + 1.0) * (q + 2) for q in range(world.world_size)]).repeat_interleave(2)
    (y * weights[:, None]).sum().backward()
    return {"gathered": y.detach(), "grad": x.grad}


def unequal_shapes(world: World) -> str:
    try:
        gather(torch.zeros(3 + world.rank, 2))
    except DualencError as e:
        return str(e)
    return "no error"


def late_rank(world: World) -> str:
    """Rank 1 comes to no barrier in time."""
    impatient = World(world.rank, world.world_size, world.local_rank, world.device, world.backend, timeout_s=2)
    try:
        if world.rank == 1:
            time.sleep(6)
            return "was late"
        barrier(impatient)
    except DualencError as e:
        return str(e)
    finally:
        close_world(world, clean=False)
    return "no error"


def die(world: World, how: str) -> str:
    """The last rank dies or hangs in the middle of steps; the others say who is missing."""
    started = time.monotonic()
    try:
        with naming_missing_ranks(world, grace_s=2):
            for step in range(3):
                if step == 2 and world.rank == world.world_size - 1:
                    if how == "kill":
                        import os
                        import signal

                        os.kill(os.getpid(), signal.SIGKILL)
                    time.sleep(120)
                dist.all_reduce(torch.ones(3))
    except LostRankError as e:
        dist.destroy_process_group()
        return f"{time.monotonic() - started:.1f} {e}"
    return "no error"


class Detached(Loss):
    """The usual mistake, as a loss: gathered columns without the gradient that flows back to other ranks."""

    def forward(self, a: Tensor, b: Tensor, ids: Tensor, scale: Tensor, bias: Tensor | None = None) -> Any:
        module: Any = import_module("dualenc.losses.info_nce")
        original = module.gather
        module.gather = lambda x: original(x).detach()
        try:
            return module.info_nce(a, b, ids, scale)
        finally:
            module.gather = original


def averaged_gradients(world: World, detached: bool) -> dict[str, Tensor]:
    """DDP's gradients of one step, without clipping, read from how far SGD moved the weights."""
    before = {name: p.detach().clone() for name, p in tiny().named_parameters()}
    optim = Optim(name="sgd", lr=1.0, momentum=0.0, weight_decay=0.0, clip_grad_norm=None)
    engine = build_engine(EngineConfig(parallel="ddp"), optim, tiny(), world)
    loss = Detached() if detached else build_loss(Component(name="info_nce"))
    train_step(engine, share_of(make_batch(0), world.rank, world.world_size), PAIRS, loss)
    return {name: before[name] - p for name, p in engine.model_state().items()}


def whole_batch_gradients() -> dict[str, Tensor]:
    """Of one process, from the naive loss."""
    model, batch = tiny(), make_batch(0)
    outputs = model(batch.inputs)
    naive_loss("info_nce", outputs["features"], outputs, batch).backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}


def train(
    world: World,
    engine: dict[str, Any],
    first: int,
    last: int,
    optim: dict[str, Any] | None = None,
    state: str | None = None,
    nan_at: int | None = None,
    ema: int | None = None,
    max_scale: float = 100.0,
) -> dict[str, Any]:
    """Steps ``first`` … ``last`` − 1; ``state`` is a file with what an earlier call returned."""
    saved = torch.load(state, weights_only=True) if state else None
    model = tiny(max_scale=max_scale)
    if saved:
        model.load_state_dict(saved["model"])
    built = build_engine(EngineConfig(**engine), Optim(**(optim or ADAMW.model_dump())), model, world)
    average = EMA(built.module, ema) if ema else None
    if saved:
        built.load_optimizer_state(InMemory(saved["tensors"]), saved["info"])
    loss = build_loss(Component(name="info_nce"))
    results = []
    for step in range(first, last):
        built.set_lr_factor(1.0 - 0.05 * step)
        batch = share_of(make_batch(step), world.rank, world.world_size)
        if step == nan_at and world.rank == world.world_size - 1:
            batch.inputs["image"][0] = float("nan")
        r = train_step(built, batch, PAIRS, loss)
        if average:
            average.update(built.module, batch.size * world.world_size)
        results.append([float(x) for x in (r.loss, r.grad_norm, r.skipped, r.metrics["logit_scale/image-text"])])
    tensors, info = built.optimizer_state()
    return {
        "model": built.model_state(),
        "tensors": tensors,
        "info": info,
        "results": results,
        "ema": average.state_dict() if average else {},
        "lr": built.lr,
    }


def states(world: World, engines: list[dict[str, Any]], **kw: Any) -> list[dict[str, Any]]:
    """:func:`train` under several engines in one launch."""
    return [train(world, e, **kw) for e in engines]


def eval_between(world: World, engines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A step, an evaluation with one modality and another number of rows per rank, a step; and weights set anew."""
    out = []
    for engine in engines:
        built = build_engine(EngineConfig(**engine), ADAMW, tiny(), world)
        loss = build_loss(Component(name="info_nce"))
        batches = [share_of(make_batch(s), world.rank, world.world_size) for s in range(2)]
        train_step(built, batches[0], PAIRS, loss)
        built.eval()
        with torch.no_grad():
            features = built.forward({"image": torch.ones(2 + world.rank, 12)})["features"]["image"]
        built.train()
        mid = built.model_state()
        train_step(built, batches[1], PAIRS, loss)
        start = tiny(seed=7).state_dict()
        after = built.model_state()
        built.load_model_state(InMemory(start))
        out.append({"features": features[:1].clone(), "mid": mid, "after": after, "set": built.model_state()})
    return out
