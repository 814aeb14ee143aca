"""Every engine, world size, loss, micro-batch and dropout against one process on the whole batch.

    python tests/distributed/gradcheck.py [--ranks 1,2,4]

prints a table; each cell is the largest relative difference of any parameter (temperature and bias included) after
3 SGD steps with momentum and clipping. SGD, because Adam hides a wrong scale of the gradient.

The reference knows nothing of engines, gathers or caches: it encodes every rank's every chunk with that rank's random
numbers in one graph, takes the naive fp64 loss of the whole batch, and steps torch's SGD.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import torch
from _tiny import PAIRS, make_batch, naive_loss, share_of, tiny
from torch import Tensor, nn

from dualenc.config import Component, Optim
from dualenc.config import Engine as EngineConfig
from dualenc.distributed.world import World
from dualenc.engine import build_engine
from dualenc.losses import build_loss
from dualenc.train.step import train_step

STEPS, SIZE, CLIP, LR, MOMENTUM = 3, 16, 0.5, 0.2, 0.9
OPTIM = Optim(name="sgd", lr=LR, momentum=MOMENTUM, weight_decay=0.0, clip_grad_norm=CLIP)
ENGINES: dict[str, dict[str, Any]] = {
    "single": {},
    "DDP": {"parallel": "ddp"},
    "FSDP2": {"parallel": "fsdp2"},
    **{f"ZeRO {z}": {"kind": "deepspeed", "zero_stage": z} for z in range(4)},
}


def cases(world_size: int, engines: list[str]) -> list[dict[str, Any]]:
    """All combinations for a world size; ``single`` is a world of one only."""
    return [
        {"engine": e, "loss": loss, "chunks": chunks, "dropout": dropout}
        for e, loss, chunks, dropout in itertools.product(engines, ["info_nce", "sigmoid"], [1, 4], [0.0, 0.3])
        if e != "single" or world_size == 1
    ]


def key(case: dict[str, Any]) -> str:
    return "/".join(str(case[k]) for k in ("engine", "loss", "chunks", "dropout"))


def seed_of(step: int, rank: int) -> int:
    return 1000 * step + rank


def reference(loss: str, chunks: int, dropout: float, world_size: int) -> dict[str, Tensor]:
    """Parameters after STEPS steps of one process on the whole batch."""
    model = tiny(dropout)
    parameters = [p for p in model.parameters() if p.requires_grad]
    sgd = torch.optim.SGD(parameters, lr=LR, momentum=MOMENTUM)
    for step in range(STEPS):
        batch = make_batch(step, SIZE)
        features: dict[str, dict[int, Tensor]] = {m: {} for m in batch.rows}
        outputs: Any = None
        for rank in range(world_size):
            torch.manual_seed(seed_of(step, rank))
            local = share_of(batch, rank, world_size)
            for k, chunk in enumerate(local.chunks(local.size // chunks)):
                outputs = model(chunk.inputs)
                for m, rows in chunk.rows.items():
                    for i, row in enumerate(rows.tolist()):
                        slot = (row + k * (local.size // chunks)) * world_size + rank
                        features[m][slot] = outputs["features"][m][i]
        ordered = {m: torch.stack([features[m][int(s)] for s in batch.rows[m]]) for m in features}
        sgd.zero_grad()
        naive_loss(loss, ordered, outputs, batch).backward()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        sgd.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def run(world: World, engine: str, loss: str, chunks: int, dropout: float) -> dict[str, Tensor]:
    """Parameters after STEPS steps of the real thing; whole on rank 0."""
    built = build_engine(EngineConfig(**ENGINES[engine]), OPTIM, tiny(dropout), world)
    objective = build_loss(Component(name=loss))
    for step in range(STEPS):
        batch = share_of(make_batch(step, SIZE), world.rank, world.world_size)
        torch.manual_seed(seed_of(step, world.rank))
        train_step(built, batch, PAIRS, objective, micro=None if chunks == 1 else batch.size // chunks)
    return built.model_state()


def difference(got: dict[str, Tensor], want: dict[str, Tensor]) -> tuple[float, str]:
    """Largest relative difference of any parameter, and its name."""
    worst = {name: float((got[name] - p).abs().max() / p.abs().max().clamp(min=1e-12)) for name, p in want.items()}
    name = max(worst, key=lambda k: worst[k])
    return worst[name], name


def sweep(world: World, engines: list[str]) -> dict[str, Any]:
    """Rank 0: case → [difference, parameter]."""
    out: dict[str, Any] = {}
    references: dict[tuple[str, int, float], dict[str, Tensor]] = {}
    for case in cases(world.world_size, engines):
        got = run(world, **case)
        if world.rank == 0:
            what = (case["loss"], case["chunks"], case["dropout"])
            if what not in references:
                references[what] = reference(*what, world_size=world.world_size)
            out[key(case)] = list(difference(got, references[what]))
    return out


def main() -> int:
    from _spawn import spawn

    ranks = [int(r) for r in (sys.argv[2] if sys.argv[1:2] == ["--ranks"] else "1,2,4").split(",")]
    columns = [
        (loss, chunks, dropout) for loss in ("info_nce", "sigmoid") for chunks in (1, 4) for dropout in (0.0, 0.3)
    ]
    heads = [f"{loss}{'' if c == 1 else ' micro'}{' drop' if d else ''}" for loss, c, d in columns]
    print("engine   ranks  " + "  ".join(f"{h:>19}" for h in heads))
    worst = 0.0
    for world_size in ranks:
        found = spawn(Path(__file__), "sweep", world_size, {"engines": list(ENGINES)}, timeout_s=900)[0]
        for engine in ENGINES if world_size == 1 else list(ENGINES)[1:]:
            cells = [found[f"{engine}/{loss}/{c}/{d}"][0] for loss, c, d in columns]
            worst = max(worst, *cells)
            print(f"{engine:8} {world_size:5}  " + "  ".join(f"{x:19.1e}" for x in cells), flush=True)
    print(f"largest: {worst:.1e} ({'exact' if worst <= 1e-5 else 'WRONG'}, limit 1e-5)")
    return 0 if worst <= 1e-5 else 1


if __name__ == "__main__":
    raise SystemExit(main())
