"""What the spawned ranks of test_engine_options.py run."""

from __future__ import annotations

from typing import Any

import gradcheck
import torch
from _tiny import PAIRS, make_batch, share_of, tiny
from torch import Tensor

from dualenc.checkpoint.ranges import InMemory, Piece
from dualenc.config import Component, EngineConfig, Optim
from dualenc.distributed.world import World, all_gather_object
from dualenc.engine import Engine, build_engine
from dualenc.losses import build_loss
from dualenc.train.step import train_step

ADAMW = Optim(lr=1e-2, weight_decay=0.1)


def trained(world: World, steps: int = 3, **config: Any) -> tuple[Engine, list[float]]:
    engine = build_engine(EngineConfig(**config), ADAMW, tiny(), world)
    return engine, go_on(engine, 0, steps)


def go_on(engine: Engine, first: int, last: int) -> list[float]:
    loss = build_loss(Component(name="info_nce"))
    batches = [share_of(make_batch(k), engine.world.rank, engine.world.world_size) for k in range(first, last)]
    return [float(train_step(engine, b, PAIRS, loss).loss) for b in batches]


def laid_together(pieces: list[Piece], world: World) -> dict[str, Tensor]:
    """The tensors of all ranks' pieces, and how often each element was written as NAME#."""
    out: dict[str, Tensor] = {}
    rows = [(p.name, list(p.shape), p.start, p.data.flatten().tolist()) for p in pieces]
    for name, shape, start, values in (row for own in all_gather_object(rows, world) for row in own):
        size = int(torch.tensor(shape).prod())
        whole, times = (out.setdefault(k, torch.zeros(size)) for k in (name, f"{name}#"))
        whole[start : start + len(values)] = torch.tensor(values)
        times[start : start + len(values)] += 1
    return out


def hybrid(world: World) -> dict[str, Any]:
    """HSDP: gradient, what ranks write, and going on from it under another engine; then FSDP2's reduced precision."""
    want = gradcheck.reference("info_nce", 4, 0.3, world.world_size)
    got = gradcheck.run(world, "HSDP", "info_nce", 4, 0.3)
    out: dict[str, Any] = {"difference": gradcheck.difference(got, want)[0] if world.rank == 0 else 0.0}
    engine, _ = trained(world, parallel="fsdp2", shard_size=2)
    weights = laid_together(engine.model_pieces(), world)
    pieces, info = engine.optimizer_pieces()
    states = laid_together(pieces, world)
    out["written"] = sorted({float(x) for k, t in (*weights.items(), *states.items()) if k.endswith("#") for x in t})
    whole = engine.model_state()
    out["equal"] = world.rank != 0 or all(torch.equal(weights[k], x.flatten()) for k, x in whole.items())
    shapes = {
        p.name: p.shape
        for own in all_gather_object([Piece(p.name, p.shape, 0, torch.empty(0)) for p in pieces], world)
        for p in own
    }
    other = build_engine(EngineConfig(parallel="ddp"), ADAMW, tiny(seed=1), world)
    model_shapes = {k: x.shape for k, x in tiny().state_dict().items()}
    other.load_model_state(InMemory({k: weights[k].view(s) for k, s in model_shapes.items()}))
    other.load_optimizer_state(InMemory({k: states[k].view(s) for k, s in shapes.items()}), info)
    out["losses"] = go_on(engine, 3, 6), go_on(other, 3, 6)
    reduced, low = trained(world, 6, parallel="fsdp2", precision="bf16", gather_dtype="bf16", reduce_dtype="bf16")
    _, plain = trained(world, 6, parallel="fsdp2")
    out["bf16"] = low, plain
    out["dtypes"] = sorted({str(p.dtype) for p in reduced.module.parameters()})
    return out
