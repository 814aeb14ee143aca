"""Further columns of the soft-target core, and what the spawned ranks compute with them."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import _every_jobs as jobs

from dualenc.distill.terms.soft_labels import TeacherScores
from dualenc.distributed.world import World
from dualenc.losses.blockwise import tiled
from dualenc.losses.blockwise.sweeps import How
from dualenc.losses.contrast import NO_PAIR, FurtherColumns, contrast
from dualenc.losses.soft_target import soft_target_nce
from dualenc.losses.supcon import EqualValues, same_value
from dualenc.losses.targets import SamePair, SoftTarget, without

WAYS = {"plain": None, "tiled": How(1e-6, False, tiled), "ring": How(1e-6, True, tiled)}
PER_SLOT = 2


def further(n: int, rows: slice, kind: str) -> tuple[FurtherColumns, ...]:
    """Two more columns of each slot: texts of its own that are wrong (``hard``), right captions, or a queue of all."""
    g = torch.Generator().manual_seed(9)
    x = torch.nn.functional.normalize(torch.randn(n * PER_SLOT, 6, generator=g, dtype=torch.float64), dim=1)
    ids = torch.full((n, PER_SLOT), NO_PAIR)
    if kind == "captions":
        ids = torch.arange(n)[:, None].expand(-1, PER_SLOT).clone()
        ids[[5, 6]] = 1
    ids[4], ids[2, 1] = -1, -1
    x.view(n, PER_SLOT, 6)[ids < 0] = math.nan
    values = {"label": torch.where(ids == NO_PAIR, -1, torch.arange(n)[:, None] % 4)}
    part = (lambda v: v.flatten(0, 1)) if kind == "queue" else (lambda v: v[rows].flatten(0, 1))
    of = {k: part(v) for k, v in values.items()}
    return (
        FurtherColumns(
            part(x.view(n, PER_SLOT, 6)).clone(), part(ids), "a" if kind == "hard a" else "b", of, kind == "queue"
        ),
    )


def outcome(world: World, kind: str, way: str, targets: str, n: int = 24) -> dict[str, Tensor]:
    """Value, metrics and gradients of this rank, as engines would average them."""
    size = n // world.world_size
    rows = slice(world.rank * size, (world.rank + 1) * size)
    inputs, ids, extras = jobs.made(n, rows)
    columns = further(n, rows, kind)
    for x in (*inputs, columns[0].x):
        x.requires_grad_()
    builder = {"pair": SamePair(), "label": EqualValues("label")}[targets]
    push = without(lambda tile: same_value(tile, "label")) if targets == "pair" else None
    values = {"label": extras.both["label"]}
    out = soft_target_nce(
        *inputs[:2], ids, inputs[2], builder, push, smoothing=0.1, values=values, columns=columns, how=WAYS[way]
    )
    out.value.backward()
    given = {"a": inputs[0], "b": inputs[1]} | ({} if kind == "queue" else {"x": columns[0].x})
    found = {"value": out.value.detach(), **out.metrics, "scale": inputs[2].grad}
    for x in found.values():
        if dist.is_initialized():
            dist.all_reduce(x)
            x /= world.world_size
    return {**found, **{k: x.grad / world.world_size for k, x in given.items()}}


def of_scores(world: World, way: str, n: int = 24) -> dict[str, Tensor]:
    """KL to a table of scores [rows of this rank, all columns], which stays here; some pairs are not scored."""
    size = n // world.world_size
    rows = slice(world.rank * size, (world.rank + 1) * size)
    inputs, ids, _ = jobs.made(n, rows)
    for x in inputs:
        x.requires_grad_()
    slots, scores, targets = torch.arange(n)[rows], table(n)[rows], TeacherScores(2.0)
    out = contrast(
        *inputs[:2], ids, inputs[2], SoftTarget(targets, push=targets.scored, divergence=True), None,
        values={"slot": slots}, row_values={"scores": scores}, how=WAYS[way],
    )  # fmt: skip
    out.value.backward()
    found = {"value": out.value.detach(), "scale": inputs[2].grad}
    for x in found.values():
        if dist.is_initialized():
            dist.all_reduce(x)
            x /= world.world_size
    return {**found, "a": inputs[0].grad / world.world_size, "b": inputs[1].grad / world.world_size}


def table(n: int) -> Tensor:
    """Scores [n, n]; two of three pairs have none."""
    g = torch.Generator().manual_seed(3)
    unscored = (torch.rand(n, n, generator=g) < 0.66) & ~torch.eye(n, dtype=torch.bool)
    return torch.randn(n, n, generator=g, dtype=torch.float64).mul(4).masked_fill(unscored, -math.inf)


KINDS = ("hard", "hard a", "captions", "queue")


def sweep(world: World) -> dict[str, Any]:
    """Kind, targets and way → :func:`outcome`."""
    return {
        f"{kind}/{targets}/{way}": outcome(world, kind, way, targets)
        for kind in KINDS
        for targets in ("pair", "label")
        for way in WAYS
    } | {f"scores/{way}": of_scores(world, way) for way in WAYS}
