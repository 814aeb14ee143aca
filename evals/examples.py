"""What a person looks at: a few queries with what they found, and how alike a few pairs are.

The queries are drawn by seed, not chosen. Pictures come as thumbnails inside the results, each once.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dualenc.data.modalities import DecodeError
from dualenc.data.thumbnails import thumbnail_uri
from dualenc.errors import DataError
from evals.metrics import Ints, top_k
from evals.rows import Content

QUERIES = 12
TOP = 5
PAIRS = 24


def show(content: Content) -> dict[str, str]:
    """A content as a page can show it: a picture, a text, or only its name."""
    try:
        raw = content.read()
    except DataError as e:
        return {"name": content.id, "error": str(e)}
    if isinstance(raw, str):
        return {"text": raw}
    try:
        return {"name": content.id, "picture": thumbnail_uri(raw)}
    except DecodeError:  # a sound or a point cloud: named, not drawn
        return {"name": content.id}


def drawn(n: int, k: int, seed: int, salt: str) -> list[int]:
    """``k`` of ``n`` places by seed, ascending."""
    return sorted(random.Random(f"{seed}/{salt}").sample(range(n), min(k, n)))


class Shown:
    """Collects the items that examples mention, each once: results carry ``items`` beside the examples."""

    def __init__(self) -> None:
        self.items: dict[str, dict[str, str]] = {}

    def add(self, content: Content) -> str:
        if content.id not in self.items:
            self.items[content.id] = show(content)
        return content.id


def hits(
    shown: Shown,
    queries: tuple[Sequence[Content], Tensor],
    gallery: tuple[Sequence[Content], Tensor],
    right: Sequence[set[int]],
    ranks: Ints,
    chosen: Sequence[int],
) -> list[dict[str, Any]]:
    """For each chosen query: its rank and its ``TOP`` best gallery items with score and whether they are right."""
    if not chosen:
        return []
    found, scores = top_k(queries[1][torch.tensor(chosen)], gallery[1], TOP)
    rows = []
    for q, columns, values in zip(chosen, found.tolist(), scores.tolist(), strict=True):
        best = [
            {"item": shown.add(gallery[0][j]), "score": round(s, 4), "right": j in right[q]}
            for j, s in zip(columns, values, strict=True)
        ]
        answers = [shown.add(gallery[0][j]) for j in sorted(right[q])[:1]]
        rows.append({"query": shown.add(queries[0][q]), "rank": int(ranks[q]), "hits": best, "answer": answers[0]})
    return rows


def similarity(
    shown: Shown, a: tuple[Sequence[Content], Tensor], b: tuple[Sequence[Content], Tensor], pairs: Mapping[int, int]
) -> dict[str, Any]:
    """Cosines of a few pairs, everyone with everyone: the diagonal holds the pairs."""
    rows, columns = list(pairs), list(pairs.values())
    matrix = (a[1][torch.tensor(rows)] @ b[1][torch.tensor(columns)].T).tolist() if rows else []
    return {
        "rows": [shown.add(a[0][i]) for i in rows],
        "columns": [shown.add(b[0][j]) for j in columns],
        "matrix": [[round(v, 4) for v in row] for row in matrix],
    }
