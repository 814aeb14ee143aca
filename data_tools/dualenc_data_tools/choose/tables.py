"""What filters found, as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from rich.console import Console
from rich.table import Table

from dualenc.data.shards.selection import Values
from dualenc_data_tools.choose.duplicates import Duplicates, Items, Occurrence


def print_scores(scores: Mapping[str, tuple[str, Values]]) -> None:
    """A row for each score: quantiles of numbers, the most frequent of texts."""
    table = Table("score", "samples", "without", "5 %", "median", "95 %", title="scores", title_justify="left")
    texts = []
    for name, (_, values) in scores.items():
        if values.dtype == object:
            said = [v for v in values.tolist() if v is not None]
            table.add_row(name, f"{len(said):,}", f"{len(values) - len(said):,}", "", "", "")
            most = ", ".join(f"{v} {n:,}" for v, n in Counter(said).most_common(8))
            texts.append(f"{name}: {most}")
            continue
        there = values[~np.isnan(values)]
        marks = [f"{q:.4g}" for q in np.quantile(there, [0.05, 0.5, 0.95])] if len(there) else ["", "", ""]
        table.add_row(name, f"{len(there):,}", f"{len(values) - len(there):,}", *marks)
    console = Console()
    console.print(table)
    for line in [*texts, *(f"file: {path}" for path, _ in scores.values())]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def print_duplicates(found: Duplicates) -> None:
    """How many there are, some of them, and the selection."""
    console = Console()
    total = len(found.kind)
    counts = [(k, found.count(k)) for k in ("exact", "near", "broken", "none")]
    said = ", ".join(f"{n:,} {k}" for k, n in counts if n) or "no duplicates"
    console.print(f"{total:,} samples by {found.of}: {said}", highlight=False)
    for kept, left_out, kind in found.examples:
        console.print(f"{kind}: {left_out} repeats {kept}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"selection: {found.path}", highlight=False, markup=False, soft_wrap=True)


def print_hits(hits: Sequence[Occurrence], items: Sequence[Items], selection: str, total: int) -> None:
    """A row for each task, some of the hits, and the selection."""
    compared = Counter(t for group in items for t in group.task)
    table = Table("task", "items", "in the shards", "exact", "near", title="contamination", title_justify="left")
    for task, count in compared.items():
        mine = [h for h in hits if h.task == task]
        kinds = {h.item: min(x.kind for x in mine if x.item == h.item) for h in mine}
        exact = sum(k == "exact" for k in kinds.values())
        table.add_row(task, f"{count:,}", f"{len(kinds):,}", f"{exact:,}", f"{len(kinds) - exact:,}")
    console = Console()
    console.print(table)
    for h in hits[:8]:
        console.print(f"{h.task}: {h.item} is {h.sample} ({h.kind})", highlight=False, markup=False, soft_wrap=True)
    left_out = len({h.sample for h in hits})
    console.print(
        f"selection without {left_out:,} of {total:,} samples: {selection}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
