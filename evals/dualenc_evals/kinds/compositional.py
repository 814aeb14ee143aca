"""Compositional puzzles: match captions and images when the captions use nearly the same words.

Winoground (Thrush et al. 2022, arXiv 2204.03162): two images and two captions; text score: each image prefers its
own caption; image score: each caption prefers its own image; group score: both. SugarCrepe (Hsieh et al. 2023,
arXiv 2306.14610): one image, its caption and a wrong one; its accuracy is the text score here. Preferring means
scoring strictly higher.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dualenc.errors import DataError
from dualenc_evals.features import Inspected, Store, digest_of
from dualenc_evals.kinds.examples import QUERIES, Shown, drawn
from dualenc_evals.kinds.kind import Kind, Measured, kinds
from dualenc_evals.metrics import scores as metrics
from dualenc_evals.metrics.scores import Floats
from dualenc_evals.read.rows import Content, Row, Rows
from dualenc_evals.task import Task


class CompositionalTask(Task):
    """``kind: compositional``."""

    kind: Literal["compositional"]

    def known(self) -> tuple[str, ...]:
        """Each score is named after the modality that is chosen."""
        return (f"{self.modalities[1]}_score", f"{self.modalities[0]}_score", "group_score")


@dataclass(slots=True)
class Puzzles:
    """R complete puzzles of k items of the first side and m ≥ k of the second; item i belongs to item i."""

    a: list[Content]
    b: list[Content]
    a_digests: list[str]
    b_digests: list[str]
    shape: tuple[int, int]
    skipped: list[dict[str, str]]
    asked: int
    data_digest: str
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.a) // self.shape[0]


def _broken(
    row: Row, sides: tuple[str, str], shape: tuple[int, int], seen: list[Inspected], ranges: list[range]
) -> str | None:
    for s, side in enumerate(sides):
        if len(ranges[s]) != shape[s]:
            return f"has {len(ranges[s])} {side}, the other puzzles have {shape[s]}"
        for i, content in zip(ranges[s], row.contents[side], strict=True):
            if i in seen[s].bad:
                return f"{side} {content.id}: {seen[s].bad[i]}"
    return None


def puzzle_scores(a: Tensor, b: Tensor) -> tuple[Floats, Floats, Floats]:
    """From ``a [R, k, D]``, ``b [R, m, D]``: (every a prefers its own b, every b its own a, both), each [R], 0 or 1.

    The first k of the m are partners, the others distractors. With k = 1 there is nothing to choose for b: all ones.
    """
    k, m = a.shape[1], b.shape[1]
    # Sums of products in fp64: equal captions score exactly the same at any position.
    scores = (a.double()[:, :, None] * b.double()[:, None]).sum(-1)
    eye = torch.eye(k, m, dtype=torch.bool)
    own = torch.diagonal(scores, dim1=1, dim2=2)
    second = (scores < own[:, :, None]).logical_or(eye).all(2).all(1)
    first = (scores[:, :, :k] < own[:, None, :]).logical_or(eye[:, :k]).all(1).all(1)
    return tuple(v.numpy().astype(np.float64) for v in (second, first, second & first))  # type: ignore[return-value]


def chance(k: int, m: int) -> tuple[float, float, float | None]:
    """What random scores give, exactly; the group score only where it is known in closed form.

    Two by two: both right scores must beat both wrong ones, 2!·2!/4! = 1/6.
    """
    group = (1 / m) if k == 1 else 1 / 6 if (k, m) == (2, 2) else None
    return (1 / m) ** k, (1 / k) ** k, group


@kinds.register("compositional")
class Compositional(Kind[CompositionalTask, Puzzles]):
    """See the module."""

    Task = CompositionalTask

    def collect(self, task: CompositionalTask, rows: Rows, store: Store) -> Puzzles:
        """Inspect every item; a puzzle with a broken or missing part is left out and reported."""
        sides = task.modalities
        seen = [store.inspect(m, [c for r in rows.rows for c in r.contents[m]]) for m in sides]
        counts = Counter((len(r.contents[sides[0]]), len(r.contents[sides[1]])) for r in rows.rows)
        k, m = counts.most_common(1)[0][0]
        if not (k >= 1 and m >= 2 and m >= k):
            raise DataError(
                f"task {task.name}: a puzzle needs at least one {sides[0]} and two {sides[1]}, and no fewer "
                f"{sides[1]} than {sides[0]}; most rows have {k} and {m} (source.members: a+b reads two columns)"
            )
        out = Puzzles([], [], [], [], (k, m), [], len(rows.rows), "", rows.notes)
        at = [0, 0]
        provenance = []
        for row in rows.rows:
            ranges = [range(at[s], at[s] + len(row.contents[side])) for s, side in enumerate(sides)]
            at = [r.stop for r in ranges]
            provenance.append([row.id, *([seen[s].digests[i] for i in ranges[s]] for s in (0, 1))])
            why = _broken(row, sides, (k, m), seen, ranges)
            if why is not None:
                out.skipped.append({"id": row.id, "reason": why})
                continue
            out.a += row.contents[sides[0]]
            out.b += row.contents[sides[1]]
            out.a_digests += [seen[0].digests[i] for i in ranges[0]]
            out.b_digests += [seen[1].digests[i] for i in ranges[1]]
        out.data_digest = digest_of(provenance)
        return out

    def evaluate(self, task: CompositionalTask, data: Puzzles, store: Store, seed: int, details: bool) -> Measured:
        """The three scores, their intervals and chance."""
        first, second = task.modalities
        k, m = data.shape
        x = store.features(first, data.a, data.a_digests).reshape(len(data), k, -1)
        y = store.features(second, data.b, data.b_digests).reshape(len(data), m, -1)
        got = dict(zip(task.known(), puzzle_scores(x, y), strict=True))
        by_chance = dict(zip(task.known(), chance(k, m), strict=True))
        wanted = [name for name in task.wanted() if k > 1 or name == f"{second}_score"]
        out: Measured = {
            "metrics": metrics.rounded({n: float(np.mean(got[n])) for n in wanted}),
            "ci": metrics.rounded(metrics.bootstrap_ci({n: got[n] for n in wanted}, seed=seed)) if wanted else {},
            "chance": metrics.rounded({n: v for n in wanted if (v := by_chance[n]) is not None}),
            "n": {"puzzles": len(data), first: len(data.a), second: len(data.b)},
        }
        if k == 1 and set(task.metrics) - set(wanted):
            out["notes"] = [f"With one {first} per puzzle, only {second}_score is defined."]
        if details and store.ranks.is_main:
            out["details"] = _details(task, data, (x, y), got["group_score"], seed)
        return out


def _details(task: Task, data: Puzzles, features: tuple[Tensor, Tensor], solved: Floats, seed: int) -> dict[str, Any]:
    k, m = data.shape
    shown = Shown()
    rows = []
    for q in drawn(len(data) * k, QUERIES, seed, task.name):
        r, i = divmod(q, k)
        scores = (features[1][r] @ features[0][r, i]).tolist()
        order = sorted(range(m), key=lambda j: (-scores[j], j == i))
        best = [{"item": shown.add(data.b[r * m + j]), "score": round(scores[j], 4), "right": j == i} for j in order]
        answer = shown.add(data.b[r * m + i])
        rows.append({"query": shown.add(data.a[q]), "rank": order.index(i) + 1, "hits": best, "answer": answer})
    example = {"query": task.modalities[0], "gallery": task.modalities[1], "rows": rows}
    return {"solved": int(solved.sum()), "examples": [example], "items": shown.items}
