"""Retrieval, both directions, with several captions per item.

First modality → second (image → text): a query is a hit at k if any of its captions is among the first k.
Second → first (text → image): every caption is a query of its own. This is the COCO / Flickr protocol.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from dualenc.config import Section
from dualenc.errors import DataError
from dualenc_evals.features import Store, digest_of
from dualenc_evals.kinds.examples import PAIRS, QUERIES, Shown, drawn, hits, similarity, worst
from dualenc_evals.kinds.kind import Kind, Measured, kinds
from dualenc_evals.metrics import ranking
from dualenc_evals.metrics import scores as metrics
from dualenc_evals.metrics.bags import bag_values, make_bags
from dualenc_evals.metrics.scores import Floats, Ints, Positives
from dualenc_evals.read.rows import Content, Rows
from dualenc_evals.task import Task

CURVE = (1, 2, 3, 5, 10, 20, 50, 100)


class Bags(Section):
    """Hard-bag retrieval (TrueMatch): R@1 inside small bags of look-alikes.

    ``by``: a column whose equal values make items look alike, or ``neighbours``: those nearest in the
    evaluated model's features, which are hardest for that model, so numbers do not compare between models.
    """

    by: str = Field(description="a column, or neighbours")
    sizes: list[Annotated[int, Field(ge=2)]] = Field(
        default_factory=lambda: [3, 5, 7], min_length=1, description="items in a bag"
    )


class RetrievalTask(Task):
    """``kind: retrieval``."""

    kind: Literal["retrieval"]
    metric_pattern: ClassVar[str] = r"(R|mAP|nDCG)@[1-9]\d*"
    identical: Literal["distinct", "merge"] = Field(
        "distinct",
        description="equal captions: each item has its own (as in published protocols), or one is right for all",
    )
    same: str | None = Field(
        None, description="a column; items with equal values share their right answers (one object seen twice)"
    )
    bags: Bags | None = Field(None, description="also R@1 inside bags of look-alikes")

    def known(self) -> tuple[str, ...]:
        """For each direction."""
        return ("R@1", "R@5", "R@10", "MRR", "median_rank", "mean_rank")

    def may_state(self, metric: str) -> bool:
        """Published numbers name a direction too (image_to_text_R@1), so every name is accepted."""
        return True

    def check_keys(self) -> None:
        """``same`` and ``bags.by`` must name the same column."""
        if self.same is not None and self.bags is not None and self.bags.by not in ("neighbours", self.same):
            raise ValueError(
                f"bags.by: {self.bags.by!r} does not go with same: {self.same}; write {self.same} or neighbours"
            )

    def label_place(self) -> tuple[str, str] | None:
        """The column that makes items the same, or puts them in one bag."""
        if self.same is not None:
            return "same", self.same
        if self.bags is not None and self.bags.by != "neighbours":
            return "bags.by", self.bags.by
        return None

    def recall_ks(self) -> list[int]:
        """The k of every R@k asked for."""
        return self.numbers(r"R@(\d+)")


@dataclass(slots=True)
class Pairs:
    """The two sides after broken items are left out, and which items belong together."""

    a: list[Content]
    b: list[Content]
    a_digests: list[str]
    b_digests: list[str]
    right: list[list[int]]
    skipped: list[dict[str, str]]
    asked: int
    data_digest: str
    notes: list[str]
    labels: list[str | None] = field(default_factory=list)
    """The value of ``same`` or ``bags.by`` for each item of the first side."""

    def reverse(self) -> list[list[int]]:
        """Right items of the first side for each of the second."""
        out: list[list[int]] = [[] for _ in self.b]
        for i, js in enumerate(self.right):
            for j in js:
                out[j].append(i)
        return out


def joined(right: Sequence[Sequence[int]], labels: Sequence[str | None]) -> list[list[int]]:
    """Items with the same label share their right answers: the same object seen again is not a wrong answer."""
    union: dict[str | None, set[int]] = {}
    for label, own in zip(labels, right, strict=True):
        union.setdefault(label, set()).update(own)
    return [sorted(union[label]) for label in labels]


@kinds.register("retrieval")
class Retrieval(Kind[RetrievalTask, Pairs]):
    """See the module."""

    Task = RetrievalTask

    def collect(self, task: RetrievalTask, rows: Rows, store: Store) -> Pairs:
        """Inspect every item, leave broken ones out and say why, merge equal captions if the task asks for it."""
        first, second = task.modalities
        a_all = [c for r in rows.rows for c in r.contents[first][:1]]
        b_all = [c for r in rows.rows for c in r.contents[second]]
        a_seen, b_seen = store.inspect(first, a_all), store.inspect(second, b_all)
        skipped = [{"id": a_all[i].id, "reason": f"{first}: {why}"} for i, why in a_seen.bad.items()]
        skipped += [{"id": b_all[i].id, "reason": f"{second}: {why}"} for i, why in b_seen.bad.items()]
        pairs = Pairs([], [], [], [], [], skipped, len(a_all) + len(b_all), "", rows.notes)
        place: dict[str, int] = {}
        provenance: list[Any] = []
        i = j = asked = kept = 0
        for row in rows.rows:
            na, nb = len(row.contents[first][:1]), len(row.contents[second])
            good_a = [n for n in range(i, i + na) if n not in a_seen.bad]
            good_b = [n for n in range(j, j + nb) if n not in b_seen.bad]
            provenance.append([row.id, a_seen.digests[i : i + na], b_seen.digests[j : j + nb]])
            i, j = i + na, j + nb
            asked += max(nb, 1)
            if not good_a or not good_b:
                side = second if good_a else first
                if (nb if good_a else na) == 0:
                    skipped.append({"id": row.id, "reason": f"has no {side}"})
                continue
            kept += len(good_b)
            pairs.a.append(a_all[good_a[0]])
            pairs.a_digests.append(a_seen.digests[good_a[0]])
            own = []
            for n in good_b:
                key = b_seen.digests[n] if task.identical == "merge" else str(n)
                if key not in place:
                    place[key] = len(pairs.b)
                    pairs.b.append(b_all[n])
                    pairs.b_digests.append(b_seen.digests[n])
                own.append(place[key])
            pairs.right.append(sorted(set(own)))
            pairs.labels.append(row.label)
        if task.same is not None:
            pairs.right = joined(pairs.right, pairs.labels)
            provenance.append(pairs.labels)
        pairs.data_digest = digest_of(provenance)
        if asked - kept > task.max_skipped * asked:  # one broken image costs all its captions
            raise DataError(
                f"task {task.name}: {asked - kept} of {asked} pairs cannot be used (max_skipped is "
                f"{task.max_skipped}); the first: {skipped[0]['id']}: {skipped[0]['reason']}"
            )
        return pairs

    def evaluate(self, task: RetrievalTask, pairs: Pairs, store: Store, seed: int, details: bool) -> Measured:
        """Metrics of both directions, their intervals and chance, and details to look at."""
        first, second = task.modalities
        x = store.features(first, pairs.a, pairs.a_digests)
        y = store.features(second, pairs.b, pairs.b_digests)
        reverse = pairs.reverse()
        there = _direction(task, store, x, y, pairs.right, groups=None, seed=seed)
        # Captions of one item are drawn together in the bootstrap: they are not independent.
        owners = np.array([r[0] for r in reverse], dtype=np.int64)  # with several owners, the first stands for them
        back = _direction(task, store, y, x, reverse, groups=owners, seed=seed)
        out: Measured = {"metrics": {}, "ci": {}, "chance": {}, "n": {first: len(pairs.a), second: len(pairs.b)}}
        for name, part in ((f"{first}_to_{second}", there), (f"{second}_to_{first}", back)):
            out["metrics"] |= {f"{name}_{k}": v for k, v in part.metrics.items()}
            out["ci"] |= {f"{name}_{k}": v for k, v in part.ci.items()}
            out["chance"] |= {f"{name}_{k}": v for k, v in part.chance.items()}
        if task.bags is not None:
            _add_bags(task.bags, pairs, (first, second), (x, y), seed, out)
        flat = [(i, j) for i, js in enumerate(pairs.right) for j in js]
        index = torch.tensor(flat, dtype=torch.long)
        geometry = metrics.geometry(x, y, (index[:, 0], index[:, 1]), (first, second))
        out["metrics"] |= metrics.rounded(geometry)
        if details and store.ranks.is_main:
            out["details"] = _details(task, pairs, reverse, (x, y), (there, back), Shown(store.kinds), seed)
        return out


class _Direction(NamedTuple):
    """One direction: the rank of each query's best answer, which are right, and its numbers."""

    ranks: Ints
    positives: Positives
    metrics: dict[str, Any]
    ci: dict[str, Any]
    chance: dict[str, Any]


def _direction(
    task: RetrievalTask,
    store: Store,
    queries: Tensor,
    gallery: Tensor,
    right: Sequence[Sequence[int]],
    groups: Ints | None,
    seed: int,
) -> _Direction:
    """Rank ``gallery`` for every query; ``groups [N]``: queries that the bootstrap draws together."""
    positives = Positives(right, len(gallery))
    shard = (store.ranks.rank, store.ranks.size)
    parts = store.ranks.gather(metrics.best_ranks(queries, gallery, positives, shard=shard))
    ranks: Ints = np.sum(parts, axis=0)
    ks = task.recall_ks()
    wanted = task.wanted()
    values = {k: v for k, v in metrics.retrieval_values(ranks, ks).items() if k in wanted}
    chance = metrics.chance_retrieval(positives.counts, len(gallery), ks)
    items = {k: v for k, v in metrics.item_values(ranks, ks).items() if k in wanted}
    items |= _of_all_right(task, store, (queries, gallery), positives, chance)
    values |= {k: float(np.mean(items[k])) for k in items if k not in values}
    ci = metrics.bootstrap_ci(items, groups, seed=seed) if items else {}
    if "median_rank" in wanted:
        median = metrics.weighted_median(ranks)
        ci["median_rank"] = metrics.bootstrap_of(median, len(ranks), groups, seed=seed)
    if "mean_rank" in wanted:
        ci |= metrics.bootstrap_ci({"mean_rank": ranks}, groups, seed=seed)
    shown_chance = metrics.rounded({k: v for k, v in chance.items() if k in values})
    return _Direction(ranks, positives, metrics.rounded(values), metrics.rounded(ci), shown_chance)


def _of_all_right(
    task: RetrievalTask, store: Store, sides: tuple[Tensor, Tensor], positives: Positives, chance: dict[str, float]
) -> dict[str, Floats]:
    """Per-query values of the metrics that look at every right answer; their chance is added to ``chance``."""
    maps, gains = task.numbers(r"mAP@(\d+)"), task.numbers(r"nDCG@(\d+)")
    if not maps and not gains:
        return {}
    shard = (store.ranks.rank, store.ranks.size)
    parts = store.ranks.gather(ranking.wrong_ahead(*sides, positives, shard=shard))
    ahead: Ints = np.sum(parts, axis=0)
    size = len(sides[1])
    for k in maps:
        chance[f"mAP@{k}"] = ranking.chance_average_precision(positives.counts, size, k)
    for k in gains:
        chance[f"nDCG@{k}"] = ranking.chance_ndcg(positives.counts, size, k)
    values = {f"mAP@{k}": ranking.average_precision(ahead, positives, k) for k in maps}
    return values | {f"nDCG@{k}": ranking.ndcg(ahead, positives, k) for k in gains}


def _add_bags(
    asked: Bags, pairs: Pairs, modalities: tuple[str, str], features: tuple[Tensor, Tensor], seed: int, out: Measured
) -> None:
    """R@1 in both directions inside bags of look-alikes, by each item's first caption; chance is 1 / size."""
    first, second = modalities
    x = features[0]
    y = features[1][torch.tensor([r[0] for r in pairs.right])]
    labels = None if asked.by == "neighbours" else pairs.labels
    names = (f"{first}_to_{second}", f"{second}_to_{first}", "both_ways")
    for size in asked.sizes:
        bags = make_bags(x, y, labels, size, seed, owners=[r[0] for r in pairs.right])
        out["n"][f"bags of {size}"] = len(bags)
        if not len(bags):
            out.setdefault("notes", []).append(f"No bags of {size}: there are not enough look-alikes by {asked.by!r}.")
            continue
        got = dict(zip(names, bag_values(x, y, bags), strict=True))
        keys = {n: f"{n}_bag{size}_{'R@1' if '_to_' in n else 'all_correct'}" for n in names}
        out["metrics"] |= metrics.rounded({keys[n]: float(np.mean(v)) for n, v in got.items()})
        ci = metrics.bootstrap_ci({n: v.reshape(len(bags), -1).mean(1) for n, v in got.items()}, seed=seed)
        out["ci"] |= metrics.rounded({keys[n]: v for n, v in ci.items()})
        out["chance"] |= metrics.rounded({keys[n]: 1 / size for n in names if "_to_" in n})


def _details(
    task: RetrievalTask,
    pairs: Pairs,
    reverse: list[list[int]],
    features: tuple[Tensor, Tensor],
    found: tuple[_Direction, _Direction],
    shown: Shown,
    seed: int,
) -> dict[str, Any]:
    first, second = task.modalities
    a, b = (pairs.a, features[0]), (pairs.b, features[1])
    examples, curves = [], []
    for queries, gallery, right, part, names in (
        (a, b, pairs.right, found[0], (first, second)),
        (b, a, reverse, found[1], (second, first)),
    ):
        chosen = drawn(len(queries[0]), QUERIES, seed, f"{task.name}/{names[0]}")
        sets = [set(r) for r in right]
        rows = hits(shown, queries, gallery, sets, part.ranks, chosen, names)
        far = worst(part.ranks, part.ranks > 1)
        bad = hits(shown, queries, gallery, sets, part.ranks, far, names)
        examples.append({"query": names[0], "gallery": names[1], "rows": rows, "worst": bad})
        ks = [k for k in CURVE if k <= len(gallery[0])]
        chance = metrics.chance_retrieval(part.positives.counts, len(gallery[0]), ks)
        curves.append(
            {
                "name": f"{names[0]} → {names[1]}",
                "k": ks,
                "recall": [round(metrics.recall_at_k(part.ranks, k), 6) for k in ks],
                "chance": [round(chance[f"R@{k}"], 6) for k in ks],
            }
        )
    few = drawn(len(pairs.a), PAIRS, seed, f"{task.name}/similarity")
    # Two items with one merged caption would give two equal columns; the first of them stays.
    partner = {pairs.right[i][0]: i for i in reversed(few)}
    alike = similarity(shown, a, b, {i: pairs.right[i][0] for i in sorted(partner.values())}, (first, second))
    return {"examples": examples, "recall_curves": curves, "similarity": alike, "items": shown.items}
