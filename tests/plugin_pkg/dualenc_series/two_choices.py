"""A kind of evaluation task: is an item nearer to its own partner than to the next item's? Chance is a half."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from dualenc.data.sources import Content
from dualenc_evals.features import Store, digest_of
from dualenc_evals.kinds import Kind, Measured
from dualenc_evals.metrics import scores
from dualenc_evals.read.rows import Rows
from dualenc_evals.task import Task


class TwoChoicesTask(Task):
    """The keys of such a task: ``step``, how far away the other partner stands."""

    step: int = 1

    def known(self) -> tuple[str, ...]:
        return ("two_choices_score",)


@dataclass
class Pairs:
    a: list[Content]
    b: list[Content]
    digests: tuple[list[str], list[str]]
    skipped: list[dict[str, str]]
    asked: int
    data_digest: str
    notes: list[str] = field(default_factory=list)


class TwoChoices(Kind[TwoChoicesTask, Pairs]):
    """What ``kind: two_choices`` names."""

    Task = TwoChoicesTask

    def collect(self, task: TwoChoicesTask, rows: Rows, store: Store) -> Pairs:
        both = [[r.contents[m][0] for r in rows.rows] for m in task.modalities]
        seen = [store.inspect(m, side) for m, side in zip(task.modalities, both, strict=True)]
        bad = {i: why for s in seen for i, why in s.bad.items()}
        good = [i for i in range(len(rows.rows)) if i not in bad]
        a, b = ([side[i] for i in good] for side in both)
        digests = ([seen[0].digests[i] for i in good], [seen[1].digests[i] for i in good])
        skipped = [{"id": both[0][i].id, "reason": why} for i, why in sorted(bad.items())]
        return Pairs(a, b, digests, skipped, len(rows.rows), digest_of(digests), rows.notes)

    def evaluate(self, task: TwoChoicesTask, data: Pairs, store: Store, seed: int, details: bool) -> Measured:
        first, second = task.modalities
        x = store.features(first, data.a, data.digests[0]).numpy()
        y = store.features(second, data.b, data.digests[1]).numpy()
        right = ((x * y).sum(1) > (x * np.roll(y, -task.step, 0)).sum(1)).astype(np.float64)
        name = "two_choices_score"
        return {
            "metrics": {name: float(right.mean())},
            "ci": scores.bootstrap_ci({name: right}, seed=seed),
            "chance": {name: 0.5},
            "n": {first: len(x), second: len(y)},
        }
