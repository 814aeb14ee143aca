"""Write a selection beside shards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dualenc.data.shards.selection import Floats, file_of, write_selection
from dualenc.errors import DataError
from dualenc_data_tools.choose.expression import evaluate
from dualenc_data_tools.choose.filter import Opened


def select(patterns: str | Sequence[str], expression: str, name: str) -> tuple[str, int, int, float]:
    """Write what an expression selects as the selection ``name`` (or path).

    Returns:
        Its file, how many samples it selects, of how many, and the sum of their weights.

    Raises:
        ConfigError, DataError: as :func:`dualenc_data_tools.choose.expression.evaluate`; nothing is selected.
    """
    opened = Opened.of(patterns)
    try:
        weight = evaluate(expression, opened.shards)
        path, count = keep(opened, weight, expression, name)
        return path, count, opened.total, float(weight.sum())
    finally:
        opened.close()


def keep(opened: Opened, weight: Floats, why: str | Sequence[str], name: str, about: str = "") -> tuple[str, int]:
    """Write a selection of open shards; its file and the number of its rows.

    Raises:
        DataError: nothing is selected.
    """
    if not np.count_nonzero(weight):
        raise DataError(f"{name}: {why if isinstance(why, str) else about!r} selects none of {opened.total:,} samples")
    path = file_of(name, opened.shards)
    told = about or (why if isinstance(why, str) else "")
    return path, write_selection(Path(path), opened.shards, opened.index_of, weight, why, told)
