"""What frozen features say about classes, without prompts: k-NN, linear probe, few-shot episodes.

k-NN (Wu et al. 2018, arXiv 1805.01978; DINO's settings): the k nearest training items vote with exp(cosine / T). The
linear probe is :mod:`dualenc_evals.metrics.linear`, its C chosen on a fifth of the training items.
Episodes are :mod:`dualenc_evals.metrics.fewshot`. Only the first modality of the model is used, unless the training
items are of another one (``train.modality``).

Whether what is retrieved is of use (the idea of seed S44, where a retriever chooses a language model's demonstrations):
``knn_gain`` is what the vote of the k nearest items has right more than that of k items drawn at random.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from dualenc.config import Positive, Section
from dualenc_evals.features import Store, digest_of
from dualenc_evals.kinds.classification import Labelled, both_parts, distances
from dualenc_evals.kinds.kind import Kind, Measured, kinds
from dualenc_evals.metrics import fewshot, linear, separability
from dualenc_evals.metrics import scores as metrics
from dualenc_evals.metrics.scores import Floats, Ints
from dualenc_evals.read.rows import Rows
from dualenc_evals.task import ClassesTask, Train

UTILITY = ("knn_random_top1", "majority_top1", "knn_gain")
DRAWS = 20
"""Times that k items are drawn at random for every test item."""


class ProbeSettings(Section):
    """How features are probed. Defaults: k-NN of DINO (arXiv 2104.14294), 5-way episodes with 15 queries a class."""

    k: Positive = Field(default=20, description="neighbours of the k-NN probe")
    temperature: Annotated[float, Field(gt=0)] = Field(
        default=0.07, description="weights of the neighbours: exp(cosine / temperature)"
    )
    ways: Annotated[int, Field(ge=2)] = Field(default=5, description="classes of a few-shot episode")
    queries: Positive = Field(default=15, description="test items per class of an episode")
    episodes: Positive = Field(default=600, description="few-shot episodes")


FEW = "fewshot|prototype|opta|context"
"""Few-shot methods; the number of labelled items comes after the name."""


class ProbeTask(ClassesTask):
    """``kind: probe``."""

    kind: Literal["probe"]
    one_class: ClassVar[bool] = True
    metric_pattern: ClassVar[str] = rf"({FEW})[1-9]\d*_top1|{'|'.join(separability.METRICS + UTILITY)}"
    train: Train = Field(description="where the training items come from")
    probe: ProbeSettings = Field(default_factory=ProbeSettings, description="settings of the probes")

    @model_validator(mode="before")
    @classmethod
    def _says_train(cls, raw: Any) -> Any:
        if isinstance(raw, Mapping) and raw.get("train") is None:
            raise ValueError("train: say where the training items come from, for example train: {split: train}")
        return raw

    def known(self) -> tuple[str, ...]:
        """k-NN, the linear probe and every few-shot method. On request ``fisher_ratio`` and ``silhouette``: how far
        apart the classes of the test items are; ``knn_random_top1``, ``majority_top1`` and ``knn_gain``: the vote of k
        random training items, their most frequent class, and what the k nearest have right more than random ones;
        ``context5_top1``: attention over the labelled items of an episode."""
        few = ("fewshot5", "prototype1", "opta1", "prototype5", "opta5")
        return ("knn_top1", "linear_top1", *(f"{name}_top1" for name in few))

    def needed(self) -> list[str]:
        """The first modality, and that of the training items if it is another."""
        return list(dict.fromkeys([self.modalities[0], self.train.modality or self.modalities[0]]))


@dataclass(slots=True)
class Probed:
    """Test and training items, and what was left out of each."""

    test: Labelled
    train: Labelled
    skipped: list[dict[str, str]]
    asked: int
    notes: list[str]
    data_digest: str


def nearest_neighbours(
    x: Tensor, labels: Ints, y: Tensor, truth: Ints, classes: int, k: int, temperature: float
) -> Ints:
    """[M] rank of the true class among the votes of the ``k`` nearest training items; ties against the model.

    Args:
        x: [N, D] training features; labels: [N] their classes; y: [M, D] test features; truth: [M].
    """
    known = torch.from_numpy(labels)
    ranks = []
    for s, e in metrics.block_starts(len(y), max(len(x), classes)):
        near = (y[s:e] @ x.T).topk(min(k, len(x)), dim=1)
        weights = torch.exp((near.values.double() - 1) / temperature)
        votes = torch.zeros(e - s, classes, dtype=torch.float64).scatter_add_(1, known[near.indices], weights)
        ranks.append(metrics.class_ranks(votes, truth[s:e])[0])
    return np.concatenate(ranks)


def random_neighbours(labels: Ints, truth: Ints, classes: int, k: int, seed: int, draws: int = DRAWS) -> Floats:
    """[M] how often the vote of ``k`` training items drawn at random, one vote each, is right; a tie is wrong.

    Args:
        labels: [N] classes of the training items; truth: [M] of the test items.
    """
    rng = np.random.default_rng(seed)
    have = np.bincount(labels, minlength=classes)
    right = np.zeros(len(truth))
    for _ in range(draws):
        votes = rng.multivariate_hypergeometric(have, min(k, len(labels)), size=len(truth), method="marginals")
        right += metrics.class_ranks(torch.from_numpy(votes.astype(np.float64)), truth)[0] == 1
    return right / draws


@kinds.register("probe")
class Probing(Kind[ProbeTask, Probed]):
    """See the module."""

    Task = ProbeTask

    def collect(self, task: ProbeTask, rows: Rows, store: Store) -> Probed:
        """Inspect the items of both splits; their classes are numbered together."""
        test, train, notes = both_parts(task, task.at(task.train), rows, store)
        return Probed(
            test, train, [*test.skipped, *train.skipped], test.asked + train.asked, notes,
            digest_of([test.data_digest, train.data_digest]),
        )  # fmt: skip

    def evaluate(self, task: ProbeTask, data: Probed, store: Store, seed: int, details: bool) -> Measured:
        """The probes the task asks for, with intervals and chance; ``settings`` says what was chosen and drawn."""
        test, train = data.test, data.train
        item = task.modalities[0]
        x = store.features(task.train.modality or item, train.items, train.digests)
        y = store.features(item, test.items, test.digests)
        classes = len(test.names)
        wanted = task.wanted()
        settings: dict[str, Any] = {}
        values: dict[str, Floats] = {}
        chance: dict[str, float] = {}
        notes: list[str] = []
        if "knn_top1" in wanted or "knn_gain" in wanted:
            k, temperature = task.probe.k, task.probe.temperature
            ranks = nearest_neighbours(x, train.labels, y, test.labels, classes, k, temperature)
            values["knn_top1"] = (ranks == 1).astype(np.float64)
            settings["knn"] = {"k": k, "temperature": temperature}
        if "linear_top1" in wanted:
            weights, strength = linear.tuned(x, train.labels, classes, seed)
            values["linear_top1"] = (linear.ranks_under(weights, y, test.labels)[0] == 1).astype(np.float64)
            settings["linear"] = {"C": strength}
        chance |= dict.fromkeys(values, 1 / classes)
        if set(UTILITY) & set(wanted):
            values |= _utility(task, train.labels, test.labels, classes, values.get("knn_top1"), seed)
            values = {n: v for n, v in values.items() if n in wanted}
            chance = {n: v for n, v in chance.items() if n in values}
        for shots in task.numbers(rf"(?:{FEW})([1-9]\d*)_top1"):
            _episodes(task, (x, train.labels), (y, test.labels), shots, seed, (values, chance, settings, notes))
        apart = separability.separability(y, test.labels, classes, wanted)
        out: Measured = {
            "metrics": metrics.rounded({n: float(np.mean(v)) for n, v in values.items()} | apart),
            "ci": metrics.rounded({n: metrics.bootstrap_ci({n: v}, seed=seed)[n] for n, v in values.items()}),
            "chance": metrics.rounded(chance),
            "n": {item: len(test.items), "training": len(train.items), "classes": classes},
            "notes": notes,
            "settings": settings,
        }
        if details and store.ranks.is_main and apart:
            out["details"] = distances(task, test, y)
        return out


def _utility(
    task: ProbeTask, labels: Ints, truth: Ints, classes: int, knn: Floats | None, seed: int
) -> dict[str, Floats]:
    """Per-item values of :data:`UTILITY`; ``knn [M]``: whether the vote of the nearest is right."""
    out = {"knn_random_top1": random_neighbours(labels, truth, classes, task.probe.k, seed)}
    out["majority_top1"] = (truth == np.bincount(labels).argmax()).astype(np.float64)
    return out if knn is None else out | {"knn_gain": knn - out["knn_random_top1"]}


def _episodes(
    task: ProbeTask,
    train: tuple[Tensor, Ints],
    test: tuple[Tensor, Ints],
    shots: int,
    seed: int,
    out: tuple[dict[str, Floats], dict[str, float], dict[str, Any], list[str]],
) -> None:
    """All few-shot methods of one number of shots, on the same episodes."""
    values, chance, settings, notes = out
    found = (re.fullmatch(rf"({FEW}){shots}_top1", m) for m in task.wanted())
    methods = [m.group(1) for m in found if m is not None]
    probe = task.probe
    drawn = fewshot.draw_episodes(
        train[1], test[1], ways=probe.ways, shots=shots, queries=probe.queries, episodes=probe.episodes, seed=seed
    )
    if drawn is None:
        notes.append(f"Fewer than two classes have {shots} training items and a test item: no {shots}-shot number.")
        return
    ways = drawn.support.shape[1]
    for method, got in fewshot.accuracies(train[0], test[0], drawn, methods).items():
        values[f"{method}{shots}_top1"] = got
        chance[f"{method}{shots}_top1"] = 1 / ways
    settings[f"{shots}-shot"] = {"ways": ways, "queries": drawn.queries.shape[2], "episodes": len(drawn.queries)}
