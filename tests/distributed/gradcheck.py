"""Every engine, world size, loss, micro-batch and dropout against one process on the whole batch.

    PYTHONPATH=tests python tests/distributed/gradcheck.py [--ranks 1,2,4] [--columns ring] [--all]

prints tables and ends with 1 if a cell is above the limit. Each cell is the largest relative difference of any
parameter (temperature and bias included) after some SGD steps with momentum and clipping. SGD, because Adam hides a
wrong scale of the gradient.

The first table is of a toy with dropout. Its reference knows nothing of engines, gathers or caches: it encodes every
rank's every chunk with that rank's random numbers in one graph, takes the naive fp64 loss of the whole batch, and steps
torch's SGD. The others are of the losses on regions, of every registered contrast, of every other registered loss, of
heads on both towers, and of small real towers (``_real_towers.py``) against one process that encodes the whole batch at
once. By default every tower meets every engine, and the losses take turns; ``--all`` takes every combination, on 1, 2
and 4 ranks.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from _spawn import spawn
from _tiny import PAIRS, make_batch, naive_loss, share_of, tiny
from rich.console import Console
from rich.table import Table
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
    "HSDP": {"parallel": "fsdp2", "shard_size": 2},
    **{f"ZeRO {z}": {"kind": "deepspeed", "zero_stage": z} for z in range(4)},
}


def engines_on(world_size: int, engines: Iterable[str]) -> list[str]:
    """Those that a world size can have: ``single`` is a world of one, HSDP shards over two."""
    return [e for e in engines if (e != "single" or world_size == 1) and (e != "HSDP" or world_size % 2 == 0)]


def cases(world_size: int, engines: list[str]) -> list[dict[str, Any]]:
    """All combinations for a world size."""
    kinds = itertools.product(engines_on(world_size, engines), ["info_nce", "sigmoid"], [1, 4], [0.0, 0.3])
    return [{"engine": e, "loss": loss, "chunks": chunks, "dropout": dropout} for e, loss, chunks, dropout in kinds]


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


def toy_table(arguments: argparse.Namespace, console: Console) -> list[float]:
    """The toy on all world sizes, printed; returns its cells."""
    kinds = [(x, c, d) for x in ("info_nce", "sigmoid") for c in (1, 4) for d in (0.0, 0.3)]
    table = Table(title=f"Largest relative difference of any parameter from one process ({arguments.columns} columns)")
    for head in ("engine", "ranks"):
        table.add_column(head)
    for loss, chunks, dropout in kinds:
        table.add_column(f"{loss}\n{'whole' if chunks == 1 else 'batch/4'}{', dropout' if dropout else ''}")
    cells = []
    for world_size in ranks_of(arguments):
        given = {"engines": list(ENGINES), "columns": arguments.columns}
        found = spawn(Path(__file__), "sweep", world_size, given, timeout_s=900)[0]
        for engine in engines_on(world_size, ENGINES):
            row = [found[f"{engine}/{loss}/{chunks}/{dropout}"][0] for loss, chunks, dropout in kinds]
            cells += row
            table.add_row(engine, str(world_size), *map(shown, row))
    console.print(table)
    return cells


def real_table(arguments: argparse.Namespace, console: Console) -> list[float]:
    """Small real towers, printed; returns their cells."""
    import _real_towers

    engines = {name: config for name, config in ENGINES.items() if name != "single"}
    table = Table(title="Real towers: largest relative difference of any parameter from one process")
    for head in ("towers", "ranks", *engines):
        table.add_column(head)
    cells = []
    for world_size in ranks_of(arguments) if arguments.all else [2]:
        given = {"engines": engines, "every": arguments.all}
        found = spawn(Path(_real_towers.__file__), "sweep", world_size, given, timeout_s=7200)[0]
        by_row: dict[str, dict[str, list[str]]] = {}
        for case, (x, _) in _real_towers.differences(found).items():
            name, engine, loss, chunks = case.split("/")
            cells.append(x)
            text = f"{shown(x)} [dim]{'' if arguments.all else loss}{'/2' if chunks == '2' else ''}[/]"
            by_row.setdefault(f"{name} {loss}" if arguments.all else name, {}).setdefault(engine, []).append(text)
        for name, row in by_row.items():
            table.add_row(name, str(world_size), *(" ".join(row[e]) for e in engines))
    console.print(table)
    return cells


def region_table(arguments: argparse.Namespace, console: Console) -> list[float]:
    """The losses on regions of two views, on a toy whose towers speak of places; printed; returns their cells."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "losses"))
    import _region_jobs

    engines = list(ENGINES)[1:] if arguments.all else ["DDP", "FSDP2", "ZeRO 3"]
    table = Table(title="Losses on regions, 2 ranks: whole batch, micro-batches of 1")
    found = spawn(Path(_region_jobs.__file__), "sweep", 2, {"engines": engines}, timeout_s=900)[0]
    kinds = list(dict.fromkeys(case.split("/")[1] for case in found))
    for head in ("engine", *kinds):
        table.add_column(head)
    for engine in engines:
        table.add_row(
            engine, *(" ".join(shown(found[f"{engine}/{k}/{micro}"][0]) for micro in (None, 1)) for k in kinds)
        )
    console.print(table)
    return [x for x, _ in found.values()]


def term_table(arguments: argparse.Namespace, console: Console) -> list[float]:
    """Every other registered loss, on a toy with its heads, labels and absent rows, on DDP, and on 2 ranks where
    engines cut parameters or optimizer state, the heads' too; printed; returns the cells."""
    import _term_jobs

    table = Table(title="All other losses: whole batch, micro-batches")
    columns: dict[str, dict[str, Any]] = {}
    worlds = {n: ["DDP"] for n in ranks_of(arguments)}
    worlds.setdefault(2, []).extend(["FSDP2", "ZeRO 1", "ZeRO 2", *(["ZeRO 0", "ZeRO 3"] if arguments.all else [])])
    for world_size, engines in worlds.items():
        found = spawn(Path(_term_jobs.__file__), "sweep", world_size, {"engines": engines}, timeout_s=3600)[0]
        off = _term_jobs.differences(found)
        for engine in engines:
            chosen = {case: cell for case, cell in off.items() if case.startswith(f"{engine}/")}
            columns[f"{engine}, {world_size} ranks"] = {case.partition("/")[2]: x for case, (x, _) in chosen.items()}
    for head in ("loss", *columns):
        table.add_column(head)
    for name in _term_jobs.names():
        table.add_row(name, *(" ".join(shown(c[f"{name}/{k}"]) for k in (1, 2)) for c in columns.values()))
    console.print(table)
    return [x for cells in columns.values() for x in cells.values()]


def contrast_table(arguments: argparse.Namespace, console: Console) -> list[float]:
    """Every registered contrast, on a toy with a locked trunk, labels and absent rows; printed; returns the cells."""
    import _every_jobs

    table = Table(title="Contrasts, DDP: whole batch, batch/4")
    columns: dict[int, dict[str, list[float]]] = {}
    alone = {
        n: _every_jobs.trained(World(), c, "single", 1)
        for n, c in zip(_every_jobs.NAMES, _every_jobs.CASES, strict=True)
    }
    for world_size in ranks_of(arguments):
        found = spawn(Path(_every_jobs.__file__), "of_training", world_size, timeout_s=1200)[0]
        columns[world_size] = {n: [difference(p, alone[n])[0] for p in ways.values()] for n, ways in found.items()}
    for head in ("loss", *(f"{n} ranks" for n in columns)):
        table.add_column(head)
    for name in _every_jobs.NAMES:
        table.add_row(name, *(" ".join(map(shown, c[name])) for c in columns.values()))
    console.print(table)
    return [x for cells in columns.values() for row in cells.values() for x in row]


def caption_table(arguments: argparse.Namespace, console: Console) -> list[float]:
    """Heads on both towers (captions beside InfoNCE, texts in the context of images) on small real towers, on 2 ranks,
    against each sample encoded by itself; printed; returns the cells."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "losses"))
    import _caption_jobs
    import _dense_jobs

    engines, out = list(ENGINES)[1:] if arguments.all else ["DDP", "FSDP2", "ZeRO 3"], list[float]()
    for title, jobs in (("Caption head", _caption_jobs), ("Dense texts", _dense_jobs)):
        table = Table(title=f"{title}, 2 ranks: whole batch, micro-batches of 1")
        given = {"engines": engines, "names": list(jobs.TOWERS)}
        found = jobs.differences(spawn(Path(jobs.__file__), "sweep", 2, given, timeout_s=1800)[0])
        for head in ("engine", *jobs.TOWERS):
            table.add_column(head)
        for engine in engines:
            cells = [" ".join(shown(found[f"{engine}/{n}/{k}"][0]) for k in (None, 1)) for n in jobs.TOWERS]
            table.add_row(engine, *cells)
        console.print(table)
        out += [x for x, _ in found.values()]
    return out


def shown(x: float) -> str:
    """A cell; red above the limit."""
    return f"{x:.1e}" if x <= LIMIT else f"[red]{x:.1e}[/]"


def ranks_of(arguments: argparse.Namespace) -> list[int]:
    """World sizes that the command line names."""
    return [int(n) for n in arguments.ranks.split(",")]


def main() -> int:
    parser = argparse.ArgumentParser(description="N ranks against one process: parameters after some SGD steps.")
    parser.add_argument("--ranks", default="1,2,4")
    parser.add_argument("--columns", default="gathered", choices=["gathered", "ring"])
    parser.add_argument("--all", action="store_true", help="every tower, loss, engine, micro-batch and world size")
    arguments = parser.parse_args()
    console, began, cells = Console(width=140), time.monotonic(), []
    for part in (toy_table, region_table, contrast_table, term_table, caption_table, real_table):
        cells += part(arguments, console)
        print(f"{part.__name__}: {len(cells)} cells after {time.monotonic() - began:.0f} s", file=sys.stderr)
    wrong = sum(not x <= LIMIT for x in cells)
    verdict = f"{wrong} WRONG" if wrong else "exact"
    print(
        f"{len(cells)} cells, largest {max(cells):.1e} (limit {LIMIT:.0e}): {verdict}; {time.monotonic() - began:.0f} s"
    )
    return 1 if wrong or not cells else 0


if __name__ == "__main__":
    raise SystemExit(main())
