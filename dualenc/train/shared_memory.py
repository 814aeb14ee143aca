"""Whether the batches that data workers hand over fit into shared memory (64 MiB in many containers)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from dualenc.config import Recipe
from dualenc.data.batch import Batch
from dualenc.data.loader import Loader
from dualenc.distributed.world import World
from dualenc.errors import ConfigError

SHARED = Path("/dev/shm")
AMPLE = 16 * 2**20
"""More bytes than any sample needs: if even these fit, no sample is read to find out."""


def check_shared_memory(recipe: Recipe, probe: Callable[[], Loader], world: World, folder: Path = SHARED) -> None:
    """Compare the free space with what ``data.workers`` and ``data.prefetch`` may fill, by the size of one sample.

    Args:
        probe: makes a loader of batches of one slot for this rank, without workers.

    Raises:
        ConfigError: it does not fit; gives both numbers and what to change.
    """
    if not recipe.data.workers or not folder.is_dir():
        return
    slots = recipe.batch.size // world.world_size
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", world.world_size))
    batches = recipe.data.workers * recipe.data.prefetch * ranks
    free = shutil.disk_usage(folder).free
    if batches * slots * AMPLE <= free:
        return
    for batch in probe():
        needed = batches * slots * size_of(batch)
        if needed > free:
            raise ConfigError(
                f"Data workers pass batches through {folder}, which has {_mib(free)} free; {recipe.data.workers} "
                f"workers x {recipe.data.prefetch} batches ahead x {ranks} rank(s) on this machine may need "
                f"{_mib(needed)}. Lower data.workers or data.prefetch (data.workers=0 uses none), or give the "
                f"container more shared memory (docker run --shm-size={-(-needed // 2**30) + 1}g)."
            )
        return


def size_of(batch: Batch) -> int:
    """Bytes of a batch's tensors."""
    return sum(_bytes(x) for x in (batch.inputs, batch.rows, batch.ids, batch.views, batch.extras))


def _bytes(x: Any) -> int:
    if isinstance(x, Tensor):
        return x.numel() * x.element_size()
    return sum(map(_bytes, x.values())) if isinstance(x, dict) else 0


def _mib(n: int) -> str:
    return f"{n / 2**20:,.0f} MiB"
