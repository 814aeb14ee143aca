"""Instance retrieval within one modality: every item asks all others, those with its label are right.

As in GPR1200 (Schall et al. 2021, arXiv 2111.13122), by which MOFI (seed S46) judges image features: mean average
precision over the whole ranking, the query itself left out. Equal scores count against the model. An item without
another of its label is a wrong answer to the others, and asks nothing itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from dualenc.errors import DataError
from dualenc_evals.features import Store
from dualenc_evals.kinds.classification import Labelled, labelled
from dualenc_evals.kinds.examples import QUERIES, Shown, drawn, hits, worst
from dualenc_evals.kinds.kind import Kind, Measured, kinds
from dualenc_evals.metrics import ranking
from dualenc_evals.metrics import scores as metrics
from dualenc_evals.metrics.scores import Floats, Ints, Positives
from dualenc_evals.read.rows import Rows
from dualenc_evals.task import ClassesTask


class InstancesTask(ClassesTask):
    """``kind: instances``."""

    kind: Literal["instances"]
    one_class: ClassVar[bool] = True
    metric_pattern: ClassVar[str] = r"(R|mAP)@[1-9]\d*"

    def known(self) -> tuple[str, ...]:
        """Mean average precision over the whole ranking, and whether the nearest other item is right."""
        return ("mAP", "R@1")

    def needed(self) -> list[str]:
        """The first modality alone."""
        return [self.modalities[0]]


@kinds.register("instances")
class Instances(Kind[InstancesTask, Labelled]):
    """See the module."""

    Task = InstancesTask

    def collect(self, task: InstancesTask, rows: Rows, store: Store) -> Labelled:
        """Inspect every item and leave broken ones out.

        Raises:
            DataError: no two items have the same label.
        """
        data = labelled(task, rows, store)
        if len(data.labels) and np.bincount(data.labels).max() < 2:
            raise DataError(f"task {task.name}: no two items have the same label, so no item has a right answer")
        return data

    def evaluate(self, task: InstancesTask, data: Labelled, store: Store, seed: int, details: bool) -> Measured:
        """mAP and recall of the items that have a right answer, with intervals and chance."""
        modality = task.modalities[0]
        x = store.features(modality, data.items, data.digests)
        queries = np.flatnonzero(np.bincount(data.labels)[data.labels] > 1)
        shard = (store.ranks.rank, store.ranks.size)
        ahead, positives = others_ahead(x, data.labels, queries, shard)
        ahead = np.sum(store.ranks.gather(ahead), axis=0)
        size = len(x) - 1
        cuts = {name: int(name[4:]) if "@" in name else size for name in task.wanted() if name.startswith("mAP")}
        values: dict[str, Floats] = {name: ranking.average_precision(ahead, positives, k) for name, k in cuts.items()}
        chance = {n: ranking.chance_average_precision(positives.counts, size, k) for n, k in cuts.items()}
        _, number, place = ranking.places(ahead, positives)
        ranks: Ints = place[number == 1]
        ks = task.numbers(r"R@(\d+)")
        values |= {f"R@{k}": (ranks <= k).astype(np.float64) for k in ks}
        chance |= metrics.chance_retrieval(positives.counts, size, ks)
        names = [n for n in task.wanted() if n in values]
        alone = len(x) - len(queries)
        out: Measured = {
            "metrics": metrics.rounded({n: float(np.mean(values[n])) for n in names}),
            "ci": metrics.rounded(metrics.bootstrap_ci({n: values[n] for n in names}, seed=seed)),
            "chance": metrics.rounded({n: chance[n] for n in names}),
            "n": {modality: len(x), "queries": len(queries), "labels": len(np.unique(data.labels))},
            "notes": [f"{alone} items have a label of their own: they are answers, not queries."] if alone else [],
        }
        if details and store.ranks.is_main:
            out["details"] = _details(task, data, x, (queries, positives, ranks), Shown(store.kinds), seed)
        return out


def others_ahead(
    x: Tensor, labels: Ints, queries: Ints, shard: tuple[int, int] = (0, 1), elements: int = metrics.BLOCK_ELEMENTS
) -> tuple[Ints, Positives]:
    """For ``queries [Q]``, rows of ``x [N, D]``: (how many items of other labels score at least as high as each right
    answer [P], the right answers), the query itself left out.

    ``shard`` and ``elements`` as of :func:`dualenc_evals.metrics.scores.best_ranks`.
    """
    by_label: dict[int, list[int]] = {}
    for i, label in enumerate(labels.tolist()):
        by_label.setdefault(label, []).append(i)
    right = [by_label[label] for label in labels[queries].tolist()]
    # With itself among its right answers an item is never a wrong one; then it is dropped.
    positives = Positives(right, len(x))
    ahead = ranking.wrong_ahead(x[torch.from_numpy(queries)], x, positives, elements=elements, shard=shard)
    others = positives.rows != np.repeat(queries, positives.counts)
    without = [[j for j in own if j != i] for i, own in zip(queries.tolist(), right, strict=True)]
    return ahead[others], Positives(without, len(x))


def _details(
    task: InstancesTask,
    data: Labelled,
    x: Tensor,
    found: tuple[Ints, Positives, Ints],
    shown: Shown,
    seed: int,
) -> dict[str, Any]:
    queries, positives, ranks = found
    modality = task.modalities[0]
    asked = [data.items[i] for i in queries.tolist()]
    rows: Sequence[Ints] = np.split(positives.rows, positives.offsets[1:-1])
    sides = ((asked, x[torch.from_numpy(queries)]), (data.items, x))
    right, own = [set(r.tolist()) for r in rows], queries.tolist()
    chosen = drawn(len(asked), QUERIES, seed, f"{task.name}/{modality}")
    first = hits(shown, *sides, right, ranks, chosen, (modality, modality), own)
    bad = hits(shown, *sides, right, ranks, worst(ranks, ranks > 1), (modality, modality), own)
    return {
        "examples": [{"query": modality, "gallery": modality, "rows": first, "worst": bad}],
        "items": shown.items,
    }
