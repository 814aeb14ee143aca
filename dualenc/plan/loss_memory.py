"""What the loss over the global batch takes on a rank."""

from __future__ import annotations

import torch
from torch.nn.functional import normalize

from dualenc.config import Recipe
from dualenc.losses import Loss, build_loss
from dualenc.losses.loss import TiledConfig
from dualenc.plan.live import LiveBytes

FP32 = 4
PLAIN = 40
"""Bytes per logit of a loss that cannot be tried alone."""
SIZES = (128, 256)


def loss_bytes(recipe: Recipe, local: int, ranks: int, device: torch.device) -> float:
    """Bytes of gathered features and of logits, whole or in tiles, at the loss's peak.

    Args:
        local: B, slots on a rank; the columns are those of ``ranks`` · B slots.
    """
    loss = build_loss(recipe.loss)
    columns, dim = local * ranks, recipe.embed_dim
    # Pairs come one after another, and each keeps what its backward needs.
    pairs = len(recipe.pairs)
    config = loss.config if isinstance(loss.config, TiledConfig) else None  # type: ignore[union-attr]
    how = None if config is None else _how(config, columns, device)
    if how is None:
        gathered = 2 * 2 * columns * dim if ranks > 1 else 0
        return pairs * (bytes_per_logit(loss) * local * columns + FP32 * gathered)
    tile_mb, ring = how
    held = 6 * local if ring else 2 * columns + 2 * local
    return pairs * (FP32 * held * dim + FP32 * 8 * columns) + 3 * tile_mb * 2**20


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
