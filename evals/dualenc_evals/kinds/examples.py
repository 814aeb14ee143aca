"""Examples to look at: a few queries with what they retrieved, and the similarities of a few pairs.

Queries are drawn by seed, not hand-picked. Images are stored in the results as thumbnails, each once.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dualenc.data.modalities import DecodeError
from dualenc.data.show import preview
from dualenc.errors import DataError
from dualenc_evals.metrics.prototypes import Lazily
from dualenc_evals.metrics.scores import Floats, Ints, top_k
from dualenc_evals.read.rows import Content

QUERIES = 12
WORST = 8
TOP = 5
PAIRS = 24


def show(content: Content, modality: str = "") -> dict[str, str]:
    """An item as a page can show it: an image, audio, text, or just its name."""
    try:
        if content.shown is not None:
            return {"name": content.id, **content.shown()}
        raw = content.read()
    except DataError as e:
        return {"name": content.id, "error": str(e)}
    try:
        shown = preview(raw, modality)
    except DecodeError:  # no preview for this kind of item: show its name
        return {"name": content.id}
    return shown if "text" in shown else {"name": content.id, **shown}


def drawn(n: int, k: int, seed: int, salt: str) -> list[int]:
    """``k`` of ``n`` indices by seed, ascending."""
    return sorted(random.Random(f"{seed}/{salt}").sample(range(n), min(k, n)))


class Shown:
    """Collects the items that examples refer to, each once; results hold them as ``items``.

    Args:
        kinds: modality → the registered kind that can show its items; a modality that is not listed is its own kind.
    """

    def __init__(self, kinds: Mapping[str, str] | None = None) -> None:
        self.items: dict[str, dict[str, str]] = {}
        self._kinds = dict(kinds or {})

    def add(self, content: Content, modality: str = "") -> str:
        """Remember an item of a modality and return the id under which ``items`` has it."""
        if content.id not in self.items:
            self.items[content.id] = show(content, self._kinds.get(modality, modality))
        return content.id


def worst(badness: Ints | Floats, wrong: npt.NDArray[np.bool_], k: int = WORST) -> list[int]:
    """The ``k`` wrong queries with the largest badness, worst first, then by index."""
    order = np.argsort(-np.where(wrong, badness.astype(np.float64), -np.inf), kind="stable")
    return [int(i) for i in order[:k] if wrong[i]]


def hits(
    shown: Shown,
    queries: tuple[Sequence[Content], Tensor | Lazily],
    gallery: tuple[Sequence[Content], Tensor],
    right: Sequence[set[int]],
    ranks: Ints,
    chosen: Sequence[int],
    names: tuple[str, str] = ("", ""),
    own: Sequence[int] | None = None,
) -> list[dict[str, Any]]:
    """For each chosen query: its rank and its ``TOP`` best gallery items with score and whether they are right.

    ``names``: the modalities of queries and gallery. ``own``: the row of each query in the gallery, which is left out.
    """
    if not chosen:
        return []
    found, scores = top_k(queries[1][torch.tensor(chosen)], gallery[1], TOP + (own is not None))
    rows = []
    for q, columns, values in zip(chosen, found.tolist(), scores.tolist(), strict=True):
        best = [
            {"item": shown.add(gallery[0][j], names[1]), "score": round(s, 4), "right": j in right[q]}
            for j, s in zip(columns, values, strict=True)
            if own is None or j != own[q]
        ][:TOP]
        answers = [shown.add(gallery[0][j], names[1]) for j in sorted(right[q])[:1]]
        rows.append(
            {"query": shown.add(queries[0][q], names[0]), "rank": int(ranks[q]), "hits": best, "answer": answers[0]}
        )
    return rows


def similarity(
    shown: Shown,
    a: tuple[Sequence[Content], Tensor | Lazily],
    b: tuple[Sequence[Content], Tensor],
    pairs: Mapping[int, int],
    names: tuple[str, str] = ("", ""),
) -> dict[str, Any]:
    """Cosines of all rows with all columns of a few pairs; the diagonal holds the pairs."""
    rows, columns = list(pairs), list(pairs.values())
    matrix = (a[1][torch.tensor(rows)] @ b[1][torch.tensor(columns)].T).tolist() if rows else []
    return {
        "rows": [shown.add(a[0][i], names[0]) for i in rows],
        "columns": [shown.add(b[0][j], names[1]) for j in columns],
        "matrix": [[round(v, 4) for v in row] for row in matrix],
    }
