"""Work that some rank may fail at: an error meant for the user on one rank is raised on all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from dualenc.distributed.world import World, all_gather_object
from dualenc.errors import DataError, DualencError

T = TypeVar("T")


def agree(make: Callable[[], T], world: World) -> T:
    """Run ``make`` on every rank; every rank must call this.

    Without it one rank would leave (a file missing on its machine) and the others wait for it until timeout.

    Raises:
        DualencError: the rank's own error where it failed, a DataError that names the first rank that did elsewhere.
    """
    result: T | None = None
    error: DualencError | None = None
    try:
        result = make()
    except DualencError as e:
        error = e
    messages = all_gather_object(None if error is None else str(error), world)
    if error is not None:
        raise error
    for rank, message in enumerate(messages):
        if message is not None:
            raise DataError(f"rank {rank}: {message}")
    return result  # type: ignore[return-value]
