"""The few exchanges between ranks that an evaluation needs. A single process needs neither them nor a process group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from dualenc.distributed.world import World, agree, all_gather_object, current_world

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those that evaluate together."""

    world: World = field(default_factory=World)

    @property
    def rank(self) -> int:
        """0 ≤ rank < size."""
        return self.world.rank

    @property
    def size(self) -> int:
        """How many processes evaluate together."""
        return self.world.world_size

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.world.rank == 0

    def gather(self, obj: T) -> list[T]:
        """Every rank's object, in rank order, on every rank."""
        return all_gather_object(obj, self.world)

    def share(self, make: Callable[[], T]) -> T:
        """What rank 0's ``make()`` returns, on every rank; an error of rank 0 is raised on every rank."""
        got = agree(lambda: make() if self.is_main else None, self.world)
        shared = self.gather(got)[0]
        return shared  # type: ignore[return-value]  # rank 0 made it

    def agree(self, make: Callable[[], T]) -> T:
        """Run ``make`` on every rank; an error on any is raised on all (:func:`dualenc.distributed.world.agree`)."""
        return agree(make, self.world)


def ranks_of(world: World | None) -> Ranks:
    """The ranks of ``world``; default: those of the process group, if there is one."""
    return Ranks(current_world() if world is None else world)
