"""Every registered contrast, with labels and a locked tower: what one process and the spawned ranks run.

A subclass of ``Contrastive`` is found in the registry; every other loss that is not named here is in ``_term_jobs``.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
sys.path.insert(0, str(Path(__file__).parent))
from _cwcl_jobs import model
from _tiny import PAIRS, make_batch, share_of
from gradcheck import ENGINES, OPTIM, SIZE, STEPS

from dualenc.config import Component, EngineConfig
from dualenc.data.batch import WHOLE, Batch
from dualenc.distributed.world import World
from dualenc.engine import build_engine
from dualenc.losses import Extras, Loss, build_loss, losses
from dualenc.losses.contrast import Contrastive
from dualenc.train.step import train_step

OTHERS = {"info_nce", "sigmoid", "mse", "cwcl", "groco", "adversarial"}
"""Contrasts that are computed in ways of their own."""
VARIANTS: list[dict[str, Any]] = [
    {"name": "info_nce", "label_smoothing": 0.1},
    {"name": "supcon", "label": "words", "label_smoothing": 0.1},
    {"name": "graded", "level_weights": [0.5, 1.0, 2.0], "power": 2.0},
    {"name": "dcl", "weighted": True},
    {"name": "dcl", "scale_by": "loss"},
    {"name": "hcl", "beta": 1.0, "alpha": 0.9, "tau_plus": 0.05},
    {"name": "cacr", "form": "nce"},
    {"name": "cacr", "detach": True},
    {"name": "false_negatives", "label": "words", "threshold": 0.3},
    {"name": "false_negatives", "threshold": 0.1},
    {"name": "propensity", "semantic": 0.5},
    {"name": "groco", "stop_gradient": False, "negatives": 3},
    {"name": "mochi", "hardest": 3, "towards": 5},
]
CASES: list[dict[str, Any]] = [
    *({"name": n} for n in losses if n in OTHERS or issubclass(losses[n], Contrastive)),
    *VARIANTS,
]
NAMES = [" ".join(f"{v}" if k == "name" else f"{k}={v}" for k, v in case.items()) for case in CASES]


def labels(n: int) -> dict[str, Tensor]:
    """Labels of every kind by the name that losses look for; slot 3 has none of them."""
    slots = torch.arange(n)
    out = {
        "label": slots % 4,
        "group": slots % 5,
        "tree": torch.stack([slots % 2, slots % 4, slots % 8], 1),
        "clusters": torch.stack([slots % 3, slots % 7], 1),
        "length": (slots % 6).double(),
        "words": torch.stack([slots % 5, 10 + slots % 7, torch.where(slots % 2 == 0, -1, 20 + slots % 3)], 1),
    }
    for x in out.values():
        x[3] = math.nan if x.is_floating_point() else -1
    return out


def settings_of(case: dict[str, Any], how: str) -> dict[str, Any] | None:
    """The settings that compute it plainly, in the smallest tiles, or around the ring; None: it has no such way."""
    tiled = "impl" in losses[case["name"]].Config.model_fields
    if how == "plain":
        return {"impl": "plain"} if tiled else {}
    if not tiled:
        return None
    return {"impl": "tiled", "tile_mb": 1e-6, "columns": "ring" if how == "ring" else "gathered"}


def call(
    loss: Loss, a: Tensor, b: Tensor, ids: Tensor, scale: Tensor, extras: Extras, bias: Tensor | None = None
) -> Any:
    """The loss of a batch."""
    return loss(a, b, ids, scale, bias, extras) if loss.takes_extras else loss(a, b, ids, scale, bias)


def made(n: int, rows: slice, seed: int = 0) -> tuple[list[Tensor], Tensor, Extras]:
    """Features with noise around their pairs, frozen ones and labels: the slots ``rows`` of a batch of n.

    Slots 1, 5 and 6 are one pair id, slots 2 and n − 1 are absent and hold NaN.
    """
    g = torch.Generator().manual_seed(seed)

    def unit(x: Tensor) -> Tensor:
        return torch.nn.functional.normalize(x, dim=-1)

    a = unit(torch.randn(n, 6, generator=g, dtype=torch.float64))
    b = unit(a + 0.5 * torch.randn(n, 6, generator=g, dtype=torch.float64))
    frozen = unit(b[:, :4] + 0.3)
    ids = torch.arange(n)
    ids[[5, 6]] = 1
    ids[[2, n - 1]] = -1
    gone = ids < 0
    a, b, frozen = (x.masked_fill(gone[:, None], math.nan)[rows].clone() for x in (a, b, frozen))
    extras = Extras(("image", "text"), {}, {"frozen": frozen}, {k: x[rows] for k, x in labels(n).items()})
    return [a, b, torch.tensor([6.0], dtype=torch.float64)], ids[rows], extras


def whole(world: World, case: dict[str, Any], how: str, n: int = 24) -> dict[str, Tensor] | None:
    """Value, metrics and gradients of this rank's slots as the engine would average them; the scale's is the mean."""
    settings = settings_of(case, how)
    if settings is None:
        return None
    size = n // world.world_size
    inputs, ids, extras = made(n, slice(world.rank * size, (world.rank + 1) * size))
    for x in inputs:
        x.requires_grad_()
    out = call(build_loss(Component(**case, **settings)), *inputs[:2], ids, inputs[2], extras)
    out.value.backward()
    grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in inputs]
    found = {"value": out.value.detach(), **out.metrics, "scale": grads[2]}
    for x in found.values():
        if dist.is_initialized():
            dist.all_reduce(x)
            x /= world.world_size
    return {**found, "a": grads[0] / world.world_size, "b": grads[1] / world.world_size}


def of_features(world: World) -> dict[str, Any]:
    """Case → way → :func:`whole`."""
    return {
        name: {how: found for how in ("plain", "tiled", "ring") if (found := whole(world, case, how)) is not None}
        for name, case in zip(NAMES, CASES, strict=True)
    }


def batch_of(step: int, rank: int, world_size: int) -> Batch:
    """``make_batch`` with labels, its slots j with j % world_size == rank."""
    batch = share_of(make_batch(step, SIZE), rank, world_size)
    batch.extras = {name: {WHOLE: x[rank::world_size]} for name, x in labels(SIZE).items()}
    return batch


def trained(world: World, case: dict[str, Any], engine: str, chunks: int) -> dict[str, Tensor]:
    """Parameters of a small dual encoder with a locked text trunk after STEPS steps; whole on rank 0."""
    built = build_engine(EngineConfig(**ENGINES[engine]), OPTIM, model("trunk"), world)
    loss = build_loss(Component(**case))
    for step in range(STEPS):
        batch = batch_of(step, world.rank, world.world_size)
        train_step(built, batch, PAIRS, loss, micro=None if chunks == 1 else batch.size // chunks)
    return built.model_state()


def of_training(world: World, engine: str = "DDP") -> dict[str, Any]:
    """Rank 0: case → chunks → :func:`trained`."""
    out: dict[str, Any] = {}
    for name, case in zip(NAMES, CASES, strict=True):
        for chunks in (1, 4):
            got = trained(world, case, engine, chunks)
            out.setdefault(name, {})[str(chunks)] = got if world.rank == 0 else {}
    return out
