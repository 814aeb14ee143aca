"""The few exchanges between ranks that an evaluation needs. One process needs none, and no process group either."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from dualenc.errors import DataError, DualencError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those that evaluate together."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, obj: T) -> list[T]:
        """Every rank's object, in rank order, on every rank."""
        if self.size == 1:
            return [obj]
        out: list[Any] = [None] * self.size
        dist.all_gather_object(out, obj)
        return out

    def share(self, make: Callable[[], T]) -> T:
        """What rank 0's ``make()`` returns, on every rank; an error of rank 0 is raised on every rank."""
        got = self.agree(lambda: make() if self.is_main else None)
        return self.gather(got)[0]  # type: ignore[return-value]

    def agree(self, make: Callable[[], T]) -> T:
        """Run ``make`` on every rank; an error meant for the user on any rank is raised on all.

        Without this one rank would leave (a file missing on its machine) and the others wait for it until timeout.
        """
        result: T | None = None
        error: DualencError | None = None
        try:
            result = make()
        except DualencError as e:
            error = e
        messages = self.gather(None if error is None else str(error))
        if error is not None:
            raise error
        for rank, message in enumerate(messages):
            if message is not None:
                raise DataError(f"rank {rank}: {message}")
        return result  # type: ignore[return-value]


def ranks_of(world: Any) -> Ranks:
    """From a :class:`dualenc.distributed.world.World`, or from the process group when there is one and no world."""
    if world is not None:
        return Ranks(int(world.rank), int(world.world_size))
    if dist.is_available() and dist.is_initialized():
        return Ranks(dist.get_rank(), dist.get_world_size())
    return Ranks()
