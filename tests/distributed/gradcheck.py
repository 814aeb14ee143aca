"""Every engine, world size, loss, micro-batch and dropout against one process on the whole batch.

    PYTHONPATH=tests python tests/distributed/gradcheck.py [--ranks 1,2,4] [--columns ring]

prints a table and ends with 1 if a cell is above the limit. Each cell is the largest relative difference of any
parameter (temperature and bias included) after 3 SGD steps with momentum and clipping. SGD, because Adam hides a wrong
scale of the gradient.

The reference knows nothing of engines, gathers or caches: it encodes every rank's every chunk with that rank's random
numbers in one graph, takes the naive fp64 loss of the whole batch, and steps torch's SGD.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from pathlib import Path
from typing import Any

import torch
from _tiny import PAIRS, make_batch, naive_loss, share_of, tiny
from torch import Tensor, nn

from dualenc.config import Component, EngineConfig, Optim
from dualenc.distributed.world import World
from dualenc.engine import build_engine
from dualenc.losses import build_loss
from dualenc.train.step import train_step

STEPS, SIZE, CLIP, LR, MOMENTUM = 3, 16, 0.5, 0.2, 0.9
LIMIT = 1e-5
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


def run(
    world: World, engine: str, loss: str, chunks: int, dropout: float, columns: str = "gathered"
) -> dict[str, Tensor]:
    """Parameters after STEPS steps of the real thing; whole on rank 0."""
    built = build_engine(EngineConfig(**ENGINES[engine]), OPTIM, tiny(dropout), world)
    objective = build_loss(Component(name=loss, columns=columns))
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


def sweep(world: World, engines: list[str], columns: str = "gathered") -> dict[str, Any]:
    """Rank 0: case → [difference, parameter]."""
    out: dict[str, Any] = {}
    references: dict[tuple[str, int, float], dict[str, Tensor]] = {}
    for case in cases(world.world_size, engines):
        got = run(world, **case, columns=columns)
        if world.rank == 0:
            what = (case["loss"], case["chunks"], case["dropout"])
            if what not in references:
                references[what] = reference(*what, world_size=world.world_size)
            out[key(case)] = list(difference(got, references[what]))
    return out


def main() -> int:
    from _spawn import spawn
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description="N ranks against one process: parameters after 3 SGD steps.")
    parser.add_argument("--ranks", default="1,2,4")
    parser.add_argument("--columns", default="gathered", choices=["gathered", "ring"])
    arguments = parser.parse_args()
    kinds = [(x, c, d) for x in ("info_nce", "sigmoid") for c in (1, 4) for d in (0.0, 0.3)]
    table = Table(title=f"Largest relative difference of any parameter from one process ({arguments.columns} columns)")
    for head in ("engine", "ranks"):
        table.add_column(head)
    for loss, chunks, dropout in kinds:
        table.add_column(f"{loss}\n{'whole' if chunks == 1 else 'batch/4'}{', dropout' if dropout else ''}")
    began, cells = time.monotonic(), []
    for world_size in map(int, arguments.ranks.split(",")):
        given = {"engines": list(ENGINES), "columns": arguments.columns}
        found = spawn(Path(__file__), "sweep", world_size, given, timeout_s=900)[0]
        print(f"{world_size} rank(s): {len(found)} cells after {time.monotonic() - began:.0f} s", file=sys.stderr)
        for engine in ENGINES if world_size == 1 else list(ENGINES)[1:]:
            row = [found[f"{engine}/{loss}/{chunks}/{dropout}"][0] for loss, chunks, dropout in kinds]
            cells += row
            table.add_row(engine, str(world_size), *(f"{'' if x <= LIMIT else '[red]'}{x:.1e}" for x in row))
    Console(width=120).print(table)
    wrong = sum(not x <= LIMIT for x in cells)
    verdict = f"{wrong} WRONG" if wrong else "exact"
    print(
        f"{len(cells)} cells, largest {max(cells):.1e} (limit {LIMIT:.0e}): {verdict}; {time.monotonic() - began:.0f} s"
    )
    return 1 if wrong or not cells else 0


if __name__ == "__main__":
    raise SystemExit(main())
