"""Zero-shot tagging: items with several classes, scored by mean average precision over classes.

A class's AP is taken over all items, ranked by their score for the class; ties count against the model. mAP is the
plain mean over the classes that have items (FSD50K, VOC, AudioSet).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dualenc_evals.features import Store, digest_of
from dualenc_evals.kinds.classification import PromptedTask, classes_of, prompted
from dualenc_evals.kinds.examples import QUERIES, Shown, drawn, hits
from dualenc_evals.kinds.kind import Kind, Measured, kinds
from dualenc_evals.metrics import ranking
from dualenc_evals.metrics import scores as metrics
from dualenc_evals.metrics.scores import Floats, Ints, Positives
from dualenc_evals.read.rows import Content, Rows

RESAMPLES = 200
"""Bootstrap resamples: each costs a pass over items × classes."""
CHUNK = 25


class MultilabelTask(PromptedTask):
    """``kind: multilabel``."""

    kind: Literal["multilabel"]
    several_labels: ClassVar[bool] = True

    def known(self) -> tuple[str, ...]:
        """Mean average precision."""
        return ("mAP",)

    def check_keys(self) -> None:
        """The task must say where several labels are: no source provides them itself."""
        super().check_keys()
        if self.label is None:
            raise ValueError("label: name the column that lists an item's classes")


@dataclass(slots=True)
class Tagged:
    """Items with the class numbers of each, and what was left out."""

    items: list[Content]
    digests: list[str]
    tags: list[list[int]]
    names: list[list[str]]
    titles: list[str]
    skipped: list[dict[str, str]]
    asked: int
    notes: list[str]
    data_digest: str


def class_precision(scores: Floats, positive: npt.NDArray[np.bool_]) -> float:
    """AP of one class from ``scores [N]``; an item without the class ranks before one with it at the same score."""
    wrong = np.sort(scores[~positive])
    ahead = np.sort(len(wrong) - np.searchsorted(wrong, scores[positive], side="left"))
    number = np.arange(1, len(ahead) + 1)
    return float(np.mean(number / (ahead + number)))


def resampled_precision(scores: Floats, positive: npt.NDArray[np.bool_], weights: npt.NDArray[np.uint8]) -> Floats:
    """[R] :func:`class_precision` of the items taken ``weights [R, N]`` times; NaN where the class has no item."""
    order = np.lexsort((positive, -scores))
    hit = positive[order]
    out = []
    for start in range(0, len(weights), CHUNK):
        w = weights[start : start + CHUNK][:, order].astype(np.float64)
        upto = np.cumsum(w, 1)
        found = np.cumsum(w * hit, 1)
        with np.errstate(invalid="ignore", divide="ignore"):
            # The second copy of an item ranks right behind the first: their mean precision, to first order.
            precision = np.where(upto > 0, found / upto, 0.0)
            out.append((precision * w * hit).sum(1) / (w * hit).sum(1))
    return np.concatenate(out)


@kinds.register("multilabel")
class Multilabel(Kind[MultilabelTask, Tagged]):
    """See the module."""

    Task = MultilabelTask

    def collect(self, task: MultilabelTask, rows: Rows, store: Store) -> Tagged:
        """Inspect every item, leave broken ones out and say why, number the classes."""
        modality = task.modalities[0]
        order, names = classes_of(task, rows.rows)
        number = {label: n for n, label in enumerate(order)}
        skipped = [{"id": r.id, "reason": f"has no {modality}"} for r in rows.rows if not r.contents[modality]]
        used = [r for r in rows.rows if r.contents[modality]]
        items = [r.contents[modality][0] for r in used]
        seen = store.inspect(modality, items)
        skipped += [{"id": items[i].id, "reason": why} for i, why in seen.bad.items()]
        good = [i for i in range(len(items)) if i not in seen.bad]
        tags = [sorted({number[x] for x in used[i].labels if x in number}) for i in good]
        titles = [n[0] if len(n) == 1 else label for label, n in zip(order, names, strict=True)]
        there = {c for own in tags for c in own}
        empty = [repr(t) for c, t in enumerate(titles) if c not in there]
        notes = list(rows.notes)
        if empty:
            few = ", ".join(empty[:5]) + (f", … ({len(empty)} in all)" if len(empty) > 5 else "")
            notes.append(f"No items of class {few}: left out of the mean.")
        provenance = [[r.id, list(r.labels), d] for r, d in zip(used, seen.digests, strict=True)]
        kept, digests = [items[i] for i in good], [seen.digests[i] for i in good]
        return Tagged(
            kept, digests, tags, names, titles, skipped, len(rows.rows), notes, digest_of([provenance, order])
        )

    def evaluate(self, task: MultilabelTask, data: Tagged, store: Store, seed: int, details: bool) -> Measured:
        """mAP, its interval and chance; the AP of each class in the details."""
        weights, templates = prompted(task, data.names, store)
        x = store.features(task.modalities[0], data.items, data.digests)
        n = len(data.items)
        draws = metrics.bootstrap_weights(np.arange(n), seed=seed, resamples=RESAMPLES)
        taken = np.stack([np.minimum(w, 255).astype(np.uint8) for w in draws])
        by_class: list[list[int]] = [[] for _ in data.names]
        for i, own in enumerate(data.tags):
            for c in own:
                by_class[c].append(i)
        rows, inverse = metrics.distinct_rows(x)
        values, resampled, chance = [], [], []
        for start, stop in metrics.block_starts(len(weights), n):
            scores = (rows @ weights[start:stop].T)[inverse].numpy().astype(np.float64)
            for c in (c for c in range(start, stop) if by_class[c]):
                positive = np.zeros(n, dtype=bool)
                positive[by_class[c]] = True
                values.append(class_precision(scores[:, c - start], positive))
                resampled.append(resampled_precision(scores[:, c - start], positive, taken))
                chance.append(ranking.chance_average_precision(np.array([len(by_class[c])]), n, n))
        means = np.nanmean(np.stack(resampled), axis=0)
        # An item drawn twice is in the list twice, which raises the AP of a rare class: the spread is right, the centre
        # is not, so the interval is shifted by the difference.
        low, high = np.percentile(means, [2.5, 97.5]) - means.mean() + np.mean(values)
        out: Measured = {
            "metrics": metrics.rounded({"mAP": float(np.mean(values))}),
            "ci": metrics.rounded({"mAP": [max(float(low), 0.0), min(float(high), 1.0)]}),
            "chance": metrics.rounded({"mAP": float(np.mean(chance))}),
            "n": {task.modalities[0]: n, "classes": len(data.names)},
            "templates": templates,
        }
        if details and store.ranks.is_main:
            out["details"] = _details(task, data, (x, weights), by_class, values, seed)
        return out


def _details(
    task: MultilabelTask,
    data: Tagged,
    features: tuple[Tensor, Tensor],
    by_class: list[list[int]],
    values: list[float],
    seed: int,
) -> dict[str, Any]:
    shown = Shown()
    some = [i for i, own in enumerate(data.tags) if own]
    chosen = [some[i] for i in drawn(len(some), QUERIES, seed, f"{task.name}/{task.modalities[0]}")]
    few = features[0][torch.tensor(chosen)]
    ranks: Ints = metrics.best_ranks(few, features[1], Positives([data.tags[i] for i in chosen], len(by_class)))
    queries = ([data.items[i] for i in chosen], few)
    prompts = [Content(f"class:{c}", text=t) for c, t in enumerate(data.titles)]
    right = [set(data.tags[i]) for i in chosen]
    rows = hits(shown, queries, (prompts, features[1]), right, ranks, list(range(len(chosen))))
    precision = iter(values)
    return {
        "classes": data.titles,
        "per_class": {
            "n": [len(own) for own in by_class],
            "average_precision": [round(next(precision), 6) if own else None for own in by_class],
        },
        "examples": [{"query": task.modalities[0], "gallery": task.modalities[1], "rows": rows}],
        "items": shown.items,
    }
