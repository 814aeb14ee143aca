"""What the loss over the global batch takes on a rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import normalize

from dualenc.config import Recipe
from dualenc.losses import Loss, build_loss
from dualenc.losses.loss import TiledConfig
from dualenc.losses.rowwise import StripConfig
from dualenc.losses.weighted_sum import WeightedSum, pairs_of
from dualenc.losses.wrapper import Wrapper
from dualenc.memory import KeyQueue, LossState, RunShape
from dualenc.memory.slow import SlowModel
from dualenc.plan.live import LiveBytes
from dualenc.plan.weights import build_on

FP32 = 4
PLAIN = 40
"""Bytes per logit of a loss that cannot be tried alone."""
SIZES = (128, 256)


def loss_bytes(recipe: Recipe, local: int, ranks: int, device: torch.device) -> float:
    """Bytes of gathered features and of logits, whole, in strips or in tiles, at the loss's peak.

    Args:
        local: B, slots on a rank; the columns are those of ``ranks`` · B slots.
    """
    loss = build_loss(recipe.loss)
    # Queued keys are columns: joined to the batch's, kept for the backward, and a gradient of that size flows to them.
    queued = sum(x.bytes() for x in _states(loss, recipe, 0, ranks) if isinstance(x, KeyQueue))
    return _of(loss, recipe.pairs, recipe.embed_dim, local, ranks, device) + 2 * queued


def _of(loss: Loss, pairs: Sequence[tuple[str, str]], dim: int, local: int, ranks: int, device: torch.device) -> float:
    if isinstance(loss, WeightedSum):  # one after the other, and each keeps what its backward needs
        terms = zip(loss.config.terms, loss.children_losses(), strict=True)
        return sum(_of(part, pairs_of(t.pairs, pairs), dim, local, ranks, device) for t, part in terms)
    if isinstance(loss, Wrapper):
        return _of(loss.loss, pairs, dim, local, ranks, device)
    columns, config = local * ranks, vars(loss).get("config")
    gathered = 2 * 2 * columns * dim if ranks > 1 else 0
    how = _how(config, columns, device) if isinstance(config, TiledConfig) else None
    if how is None and isinstance(config, StripConfig):
        logits = min(config.strip_mb * 2**20, FP32 * local * columns)  # of a strip, its exponentials and their gradient
        return len(pairs) * FP32 * gathered + 3 * logits
    if how is None:
        return len(pairs) * (bytes_per_logit(loss) * local * columns + FP32 * gathered)
    tile_mb, ring = how
    held = 6 * local if ring else 2 * columns + 2 * local
    return len(pairs) * (FP32 * held * dim + FP32 * 8 * columns) + 3 * tile_mb * 2**20


def remembered(recipe: Recipe, ranks: int) -> float:
    """Bytes that the loss keeps on a rank whatever the data: queues, centroids, slow copies of towers."""
    loss = build_loss(recipe.loss)
    kept = float(sum(x.bytes() for x in _states(loss, recipe, 0, ranks)))
    if asked := loss.slow(recipe.pairs):
        model, _ = build_on("meta", recipe)
        kept += sum(SlowModel(model, each, "meta").bytes() for each in asked.values())
    return kept


def bytes_per_sample(recipe: Recipe) -> float:
    """Bytes that the loss keeps for every sample of the data, on all ranks together."""
    loss = build_loss(recipe.loss)
    none, many = (sum(x.bytes() for x in _states(loss, recipe, n, 1)) for n in (0, 1000))
    return (many - none) / 1000


def _states(loss: Loss, recipe: Recipe, samples: int, ranks: int) -> list[LossState]:
    run = RunShape(recipe.embed_dim, recipe.pairs, samples, 0, ranks, "meta")
    return list(loss.memory(run).values())


def _how(config: TiledConfig, global_batch: int, device: torch.device) -> tuple[float, bool] | None:
    """MiB of a tile, and whether columns go around the ring; None for the plain matrix."""
    plain = config.impl == "auto" and config.columns == "gathered" and global_batch < 2048
    if config.impl == "plain" or plain:
        return None
    return config.tile_mb or (128.0 if device.type == "cuda" else 2.0), config.columns == "ring"


def bytes_per_logit(loss: Loss) -> float:
    """Of the plain loss, forward and backward, measured on two small batches."""
    if loss.takes_extras:
        return PLAIN
    small, large = (_peak(loss, n) for n in SIZES)
    low, high = SIZES
    # peak = a n² + b n
    return max((large / high - small / low) / (high - low), FP32)


def _peak(loss: Loss, n: int) -> int:
    generator = torch.Generator().manual_seed(0)
    a, b = (normalize(torch.randn(n, 16, generator=generator), dim=-1).requires_grad_() for _ in "ab")
    scale, bias = (torch.full((1,), x, requires_grad=True) for x in (10.0, -10.0))
    most = 0

    def grew(live: int) -> None:
        nonlocal most
        most = max(most, live)

    with LiveBytes(grew):
        loss(a, b, torch.arange(n), scale, bias).value.backward()  # type: ignore[no-untyped-call]
    return most
