"""Items of evaluation tasks, as the tools for shards compare them: where evals and data_tools meet."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from dualenc.errors import DataError
from dualenc.files import write_atomically

if TYPE_CHECKING:
    from dualenc_data_tools.choose.duplicates import Items, Occurrence


def items_of(names: Sequence[str], near: bool = False) -> list[Items]:
    """The fingerprints of the images and audio clips of tasks, one group for each task and modality.

    ``near``: near clips, and texts (equal and near), are compared, too.

    Raises:
        ConfigError: no such task; DataError: its data is not there, or it has neither images nor audio.
    """
    from dualenc_data_tools.choose.duplicates import Items, empty_prints
    from dualenc_evals.catalog import load_task
    from dualenc_evals.read.shards import read_rows

    out: list[Items] = []
    for name in names:
        task = load_task(name)
        rows = read_rows(task).rows
        compared = ("image", "audio", "text") if near else ("image", "audio")
        kinds = [m for m in task.read_modalities() if m in compared]
        if not kinds:
            raise DataError(f"task {task.name} has neither images nor audio clips to compare")
        for m in kinds:
            items = [(row.id, content) for row in rows for content in row.contents[m]]
            prints = empty_prints(len(items), m, near)
            for i, (_, content) in enumerate(items):
                try:
                    raw = content.read()
                except DataError:
                    continue  # the evaluation counts and names it
                if isinstance(raw, bytes | str):
                    prints.put(i, m, raw)
            out.append(Items(m, [i for i, _ in items], [task.name] * len(items), prints))
    return out


def write_hits(path: Path, hits: Sequence[Occurrence]) -> None:
    """One JSON object a line."""
    write_atomically(path, "".join(json.dumps(asdict(h), ensure_ascii=False) + "\n" for h in hits))
