"""Raw items → rows, several at a time: the pool decodes the next batches while one is on the device."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, TypeVar

from dualenc.data.modalities import DecodeError, ModalityInput
from dualenc.data.modalities.modality import of_one_item

T = TypeVar("T")

_AHEAD = 2
"""Batches decoded while another is on the device."""


def read_ahead(read: Callable[[int], T], count: int, batch_size: int) -> Iterator[list[T | DecodeError]]:
    """The results of ``read`` for 0 … count − 1, ``batch_size`` at a time, in order.

    PIL and tokenizers free the GIL, so threads are enough. Whatever goes wrong while one item is read is that item's:
    its place holds the error.
    """

    def one(i: int) -> T | DecodeError:
        try:
            with of_one_item():
                return read(i)
        except DecodeError as e:
            return e

    starts = iter(range(0, count, batch_size))
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:

        def ask(start: int) -> list[Any]:
            return [pool.submit(one, i) for i in range(start, min(start + batch_size, count))]

        waiting = [ask(s) for s in islice(starts, _AHEAD)]
        while waiting:
            got = [future.result() for future in waiting.pop(0)]
            waiting += [ask(s) for s in islice(starts, 1)]
            yield got


def collate_usable(
    source: ModalityInput, rows: Mapping[int, Sequence[Any]], batch_size: int, bad: dict[int, DecodeError]
) -> list[Any]:
    """Collate the rows of some items (item → its rows), ``batch_size`` rows at a time, in order.

    Items that cannot be collated are left out and added to ``bad``.
    """
    flat = [row for i, item in rows.items() if i not in bad for row in item]
    try:
        return [source.collate(flat[k : k + batch_size]) for k in range(0, len(flat), batch_size)]
    except Exception:
        found = {i: why for i, item in rows.items() if i not in bad and (why := _cannot_collate(source, item))}
        if not found:
            raise  # no single item's fault
    bad.update(found)
    return collate_usable(source, rows, batch_size, bad)


def _cannot_collate(source: ModalityInput, rows: Sequence[Any]) -> DecodeError | None:
    try:
        with of_one_item():
            for row in rows:
                source.collate([row])
    except DecodeError as e:
        return e
    return None
