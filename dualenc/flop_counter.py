"""torch's counter of floating-point operations, for any model: without its bookkeeping by module."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

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
    """A context that counts matrix products, convolutions, attention and Fourier transforms between complex numbers, a
    multiplication and an addition as two; ``get_total_flops()`` has the sum."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode  # Triton comes with it: not for runs that count nothing

    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten._fft_c2c: _of_fft})
    counter.mod_tracker = _NoModules()  # type: ignore[assignment]
    return counter


def _of_fft(shape: Any, dims: Any, *_: Any, **__: Any) -> int:
    """5 N log₂ N for each transform of N numbers."""
    count = math.prod(shape[d] for d in dims)
    return round(5 * math.prod(shape) * math.log2(count)) if count > 1 else 0
