"""torch's counter of floating-point operations, for any model: without its bookkeeping by module."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode


class _NoModules:
    """In place of torch's module tracker, whose hooks fail where a module is given a view of a parameter under
    ``no_grad``, as timm's attention pooling is (torch 2.14: "Expected gradient function to be set")."""

    parents = frozenset({"Global"})

    def __enter__(self) -> _NoModules:
        return self

    def __exit__(self, *_: object) -> None:
        return None


def counting() -> FlopCounterMode:
    """A context that counts matrix products, convolutions and attention, a multiplication and an addition as two;
    ``get_total_flops()`` has the sum."""
    from torch.utils.flop_counter import FlopCounterMode  # Triton comes with it: not for runs that count nothing

    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _NoModules()  # type: ignore[assignment]
    return counter
