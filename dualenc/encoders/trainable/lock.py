"""Which parts of a tower are trained: none (LiT, Zhai et al. 2022), its head, or its last blocks and what follows."""

from __future__ import annotations

from dualenc.encoders.tower import Tower
from dualenc.errors import ConfigError


def lock(tower: Tower) -> None:
    """Freeze a tower: no gradient, eval mode."""
    tower.requires_grad_(False).eval()


def unlock_last(tower: Tower, groups: int, where: str) -> None:
    """Train a tower's last ``groups`` blocks and what comes after them; what comes before is locked.

    Raises:
        ConfigError: naming ``where`` if the tower has fewer blocks.
    """
    n = len(tower.blocks())
    if groups > n:
        raise ConfigError(f"{where}.unlocked_groups: {groups} is more than the tower's {n} blocks")
    levels = tower.levels()
    for name, p in tower.named_parameters():
        p.requires_grad_(levels[name] > n - groups)


def train_last(tower: Tower, groups: int, mode: bool) -> None:
    """Training mode for the part that :func:`unlock_last` left trained, eval mode for the rest; frozen batch norms stay
    frozen."""
    tower.eval()
    for part in [*tower.blocks()[-groups:], tower.head]:
        part.train(mode)
    tower.settle_batch_norms()
