"""What is asked of the other ranks, and of the device by the host."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = {
    "_local_scalar_dense",
    "is_nonzero",
    "nonzero",
    "masked_select",
    "repeat_interleave",
    "_unique2",
    "unique_consecutive",
    "unique_dim",
}
"""Operators after which the host needs a value, or a size that depends on values: on a GPU it waits for them."""


class Traffic(TorchDispatchMode):
    """Counts collectives, and readings of the device by the host."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, name = func._schema.name.split("::")
        if space == "c10d":
            self.calls[name] += 1
        places = args[1] if "index" in name and len(args) > 1 and isinstance(args[1], list | tuple) else ()
        by_mask = any(x is not None and x.dtype == torch.bool for x in places)
        # DDP's map of used parameters is int32 in host memory, whatever the device
        on_host = name == "_local_scalar_dense" and args[0].dtype == torch.int32
        if space == "aten" and (by_mask or name in WAITS) and not on_host:
            self.calls["waits"] += 1
        return func(*args, **(kwargs or {}))
