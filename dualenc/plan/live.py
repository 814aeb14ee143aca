"""How many bytes of tensors are alive while code runs, allocation by allocation."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, the bytes of all storages that torch's operators make are counted while they live.

    It works on real tensors and on fake ones, which have a size and no memory. Storages that existed before do not
    count, nor does scratch memory within a kernel.

    Args:
        grew: called with the live bytes after every operator that allocated.

    Attributes:
        live: bytes alive now.
    """

    def __init__(self, grew: Callable[[int], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self._grew = grew
        self._held: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._before: set[int] = set()

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Tensors that existed before, so that an operator in place on them is no allocation."""
        self._before |= {_key(x) for x in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        before = self.live
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._add(x)
        if self.live > before:
            self._grew(self.live)
        return out

    def _add(self, x: Tensor) -> None:
        storage, key = x.untyped_storage(), _key(x)
        if key in self._held or key in self._before:
            return
        size = storage.nbytes()

        def freed(_: Any) -> None:
            self.live -= size
            self._held.pop(key, None)

        self._held[key] = weakref.ref(storage, freed)
        self.live += size


def _key(x: Tensor) -> int:
    return int(x.untyped_storage()._cdata)
