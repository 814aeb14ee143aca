"""Name the ranks that are missing when a collective fails, instead of a backend's address and port."""

from __future__ import annotations

import datetime
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from dualenc.distributed.world import World
from dualenc.errors import DualencError

_SIGNS = re.compile(
    r"timed? ?out|connection (reset|closed|refused)|broken pipe|connectFullMesh|socket|NCCL|gloo|remote process|\bstore"
    r"|TCPStore",
    re.IGNORECASE,
)


class LostRankError(DualencError):
    """A collective failed because a rank stopped, hangs, or cannot be reached."""


@contextmanager
def naming_missing_ranks(world: World, grace_s: float = 5.0) -> Iterator[None]:
    """Turn a failed collective inside the context into one line that says which ranks are missing.

    Every rank that sees the failure reports to the store of the process group and waits ``grace_s`` seconds for the
    others to do so; ranks that have not reported are missing.

    Raises:
        LostRankError: in place of the backend's error.
    """
    try:
        yield
    except (dist.DistError, RuntimeError) as e:
        if world.world_size == 1 or not dist.is_initialized() or not _SIGNS.search(str(e)):
            raise
        raise LostRankError(f"{_who(world, grace_s)} ({str(e).strip().splitlines()[0][:160]})") from e


def _who(world: World, grace_s: float) -> str:
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set_timeout(datetime.timedelta(seconds=grace_s))
        store.set(f"failed/{world.rank}", "1")
        deadline = time.monotonic() + grace_s
        missing = set(range(world.world_size)) - {world.rank}
        while missing and time.monotonic() < deadline:
            missing -= {r for r in missing if store.check([f"failed/{r}"])}
            time.sleep(0.1)
    except (dist.DistError, RuntimeError) as e:
        return f"Rank {world.rank} lost the other ranks, and rank 0, which keeps the store, does not answer: {e!s:.80}"
    if not missing:
        return f"A collective failed on all {world.world_size} ranks; see each rank's first error"
    names = ", ".join(map(str, sorted(missing)))
    return f"Rank {names} stopped or hangs: no answer to rank {world.rank} (engine.timeout_s {world.timeout_s:.0f})"
