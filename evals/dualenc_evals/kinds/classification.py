"""Zero-shot classification: prompts become a classifier, items are scored by cosine.

A class's weight is the mean of its prompts' normalised features, normalised again (CLIP, arXiv 2103.00020, 3.1.4).
With ``prototypes`` labelled items take the place of prompts (:mod:`dualenc_evals.metrics.prototypes`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from dualenc.config import Positive, Section
from dualenc.errors import ConfigError, did_you_mean
from dualenc.model.zero_shot import classifier
from dualenc_evals.features import Store, digest, digest_of
from dualenc_evals.kinds.examples import PAIRS, QUERIES, Shown, drawn, hits, similarity, worst
from dualenc_evals.kinds.kind import Kind, Measured, kinds
from dualenc_evals.last_blocks import Fused
from dualenc_evals.metrics import scores as metrics
from dualenc_evals.metrics import separability
from dualenc_evals.metrics.prototypes import ByPrompts, ByPrototypes, Lazily, make_prototypes
from dualenc_evals.metrics.scores import Floats, Ints
from dualenc_evals.read.rows import Content, Row, Rows
from dualenc_evals.read.shards import read_rows
from dualenc_evals.task import ClassesTask, Train, paths_of, read_lines

SELECTIVE = r"top1@([1-9]\d?)%"
"""Accuracy of the share of the items that the model is most confident of; only where a task asks for it."""
BACKGROUND = "background"
MAX_CONFUSION = 64
"""With more classes than this, only the most frequent confusions are kept, no matrix of classes × classes."""


class PromptedTask(ClassesTask):
    """Classes that the model sees by name, in prompts."""

    templates: list[str] | str | None = Field(
        None, description="prompts with {} for the class name; or a .txt file, one per line"
    )

    @property
    def prompts(self) -> bool:
        """Whether prompts are used at all."""
        return True

    def check_keys(self) -> None:
        """Prompts are given in the task or come with the data."""
        if isinstance(self.templates, list):
            check_templates(self.templates)
        if self.templates is None and self.prompts and not self.source.brings_prompts:
            raise ValueError(
                "templates: give the prompts, for example ['a photo of a {}.'], or ['{}'] for the bare name"
            )
        super().check_keys()


class ItemPrototypes(Section):
    """Classes by labelled items instead of prompts (OVDiff, S43)."""

    support: Train = Field(description="where the labelled items come from: keys of the source that differ")
    each: Positive = Field(default=1, description="prototypes of a class: their mean, or the means of k-means clusters")
    background: Positive | None = Field(
        default=None, description="prototypes of the items in none of the classes, which then are a class of their own"
    )
    keep: Positive | None = Field(default=None, description="only so many classes may win: the best ones by prompts")


class ClassificationTask(PromptedTask):
    """``kind: classification``."""

    kind: Literal["classification"]
    prototypes: ItemPrototypes | None = Field(None, description="labelled items in the place of prompts")
    depths: Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(min_length=1)] | None = Field(
        None,
        description="the items' features are the mean of those after these shares of their tower's blocks; 1: the last",
    )
    one_class: ClassVar[bool] = True
    metric_pattern: ClassVar[str] = rf"AURC|{SELECTIVE}|{'|'.join(separability.METRICS)}"

    def known(self) -> tuple[str, ...]:
        """Accuracy among the best one and five classes, recall by class, calibration of the confidences. On request:
        AURC (mean risk over all coverages) and ``top1@80%``, the accuracy of the 80 % that it is most confident of;
        ``fisher_ratio`` and ``silhouette`` (how far apart the classes are in the items' features)."""
        return ("top1", "top5", "mean_per_class_recall", "calibration_error")

    @property
    def prompts(self) -> bool:
        """Prototypes need none, unless prompts choose the classes that may win."""
        return self.prototypes is None or self.prototypes.keep is not None

    @property
    def others(self) -> Literal["error", "drop", "background"]:
        """With prototypes of the background, items of no class are a class of their own."""
        return "background" if self.prototypes is not None and self.prototypes.background else self.other_labels

    def needed(self) -> list[str]:
        """The items' modality, and those of prompts and prototypes if there are any."""
        further = None if self.prototypes is None else self.prototypes.support.modality
        used = [*self.modalities] if self.prompts else [self.modalities[0]]
        return used if further is None or further in used else [*used, further]

    def check_keys(self) -> None:
        """The background is what is in none of the classes that the task lists."""
        if self.others == "background" and self.classes is None:
            raise ValueError("prototypes.background: list the classes; items of all other labels are the background")
        super().check_keys()


def check_templates(templates: list[str]) -> None:
    """Raises ValueError for a prompt that does not have exactly one ``{}`` for the class name."""
    if not templates:
        raise ValueError("templates: give at least one, for example 'a photo of a {}.'")
    for t in templates:
        if t.count("{}") != 1:
            raise ValueError(f"templates: {t!r} needs exactly one {{}} where the class name goes")


@dataclass(slots=True)
class Labelled:
    """Items with class numbers, the classes' names (one or more each) and titles, and what was left out."""

    items: list[Content]
    digests: list[str]
    labels: Ints
    names: list[list[str]]
    titles: list[str]
    skipped: list[dict[str, str]]
    asked: int
    notes: list[str]
    data_digest: str
    support: Labelled | None = None
    """The items that prototypes are made of."""


def classes_of(task: ClassesTask, rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """(labels in class order, names shown to the model for each).

    Raises:
        ConfigError: a label that is not a class (names the nearest), unless the task drops such items.
    """
    seen = sorted({x for r in rows for x in (r.labels or (r.label,)) if x is not None})
    declared = task.classes
    if declared is None and task.source.brings_prompts:
        declared = f"{paths_of(task)[0].rstrip('/')}/classnames.txt"
    if declared is None:
        return seen, [[label.replace("_", " ")] for label in seen]
    if isinstance(declared, dict):
        names = [[v] if isinstance(v, str) else list(v) for v in declared.values()]
        return _known(task, list(declared), seen), names
    if isinstance(declared, str):
        declared = read_lines(declared, task, "classes")
    numbers = [str(i) for i in range(len(declared))]
    by_number = bool(seen) and not set(seen) <= set(declared) and all(label.isdigit() for label in seen)
    return _known(task, numbers if by_number else declared, seen), [[n] for n in declared]


def _known(task: ClassesTask, labels: list[str], seen: list[str]) -> list[str]:
    twice = {x for x in labels if labels.count(x) > 1} if len(set(labels)) < len(labels) else set()
    if twice:
        raise ConfigError(f"task {task.name}: classes: {sorted(twice)[0]!r} is listed twice")
    strange = [s for s in seen if s not in set(labels)]
    if strange and task.others == "error":
        raise ConfigError(
            f"task {task.name}: classes: the data contain the label {strange[0]!r}, which is not a class. "
            f"{did_you_mean(strange[0], labels)} Or drop such items with other_labels: drop"
        )
    return labels


def labelled(task: ClassesTask, rows: Rows, store: Store, every: Sequence[Row] | None = None) -> Labelled:
    """Inspect every item, leave broken ones out and say why, number the classes (over ``every`` row, if given)."""
    modality = task.modalities[0]
    order, names = classes_of(task, list(every or rows.rows))
    if task.others == "background" and BACKGROUND not in order:
        order, names = [*order, BACKGROUND], [*names, [BACKGROUND]]
    number = {label: n for n, label in enumerate(order)}
    used = rows.rows
    if task.others == "background":
        used = [r if r.label in number or r.label is None else replace(r, label=BACKGROUND) for r in used]
    used = [r for r in used if r.label in number]
    notes = list(rows.notes)
    if len(used) < len(rows.rows):
        notes.append(
            f"{len(rows.rows) - len(used)} items have a label that is not a class of this task and were left out."
        )
    skipped = [{"id": r.id, "reason": f"has no {modality}"} for r in used if not r.contents[modality]]
    used = [r for r in used if r.contents[modality]]
    items = [r.contents[modality][0] for r in used]
    seen = store.inspect(modality, items)
    skipped += [{"id": items[i].id, "reason": why} for i, why in seen.bad.items()]
    good = [i for i in range(len(items)) if i not in seen.bad]
    labels = np.array([number[used[i].label or ""] for i in good], dtype=np.int64)
    # A class with several names is titled by its label, one with a single name by that name.
    titles = [n[0] if len(n) == 1 else label for label, n in zip(order, names, strict=True)]
    empty = [titles[n] for n in sorted(set(range(len(order))) - set(labels.tolist()))]
    if empty:
        few = ", ".join(repr(n) for n in empty[:5]) + (f", … ({len(empty)} in all)" if len(empty) > 5 else "")
        notes.append(
            f"No items of class {few}: such a class can only be a wrong answer; the mean recall leaves it out."
        )
    provenance = [[r.id, r.label, d] for r, d in zip(used, seen.digests, strict=True)]
    asked = len(items) + sum(s["reason"].startswith("has no ") for s in skipped)
    kept, digests = [items[i] for i in good], [seen.digests[i] for i in good]
    return Labelled(kept, digests, labels, names, titles, skipped, asked, notes, digest_of([provenance, order]))


def both_parts(task: ClassesTask, other: ClassesTask, rows: Rows, store: Store) -> tuple[Labelled, Labelled, list[str]]:
    """(test items, the further labelled items of ``other``, notes on both); their classes are numbered together."""
    further = store.ranks.agree(lambda: read_rows(other))
    every = [*rows.rows, *further.rows]
    test, train = labelled(task, rows, store, every), labelled(other, further, store, every)
    notes = [*test.notes, *(f"Training: {n}" for n in train.notes if n not in test.notes)]
    both = len(set(test.digests) & set(train.digests))
    if both:
        notes.append(f"{both} test items are also training items, byte for byte: the numbers are too optimistic.")
    return test, train, notes


def templates_of(task: PromptedTask) -> list[str]:
    """The prompts of a classification task, ``{}`` for the class name; CLIP_benchmark's ``{c}`` is read too."""
    if isinstance(task.templates, list):
        return task.templates
    path = task.templates
    if path is None and task.source.brings_prompts:
        path = f"{paths_of(task)[0]}/zeroshot_classification_templates.txt"
    assert path is not None, "checked by PromptedTask.check_keys"
    lines = [line.replace("{c}", "{}") for line in read_lines(path, task, "templates")]
    try:
        check_templates(lines)
    except ValueError as e:
        raise ConfigError(f"task {task.name}: {e} (in {path})") from e
    return lines


def prompted(task: PromptedTask, names: Sequence[Sequence[str]], store: Store) -> tuple[Tensor, list[str]]:
    """([C, D] weights of the classes from their prompts, the prompts with ``{}``)."""
    templates = templates_of(task)
    owners, texts = [], []
    for c, own in enumerate(names):
        for name in own:
            for template in templates:
                owners.append(c)
                texts.append(Content(f"{c}", text=template.replace("{}", name)))
    prompts = store.features(task.modalities[1], texts, [digest(t.text or "") for t in texts])
    return classifier(prompts, torch.tensor(owners), len(names)), templates


def scale_of(store: Store, modalities: tuple[str, str]) -> float | None:
    """The logit scale that the model reports for this pair; None if it reports none (a run in training)."""
    scales = store.embedder.describe().get("logit_scale")
    if isinstance(scales, dict):
        a, b = modalities
        scales = scales.get(f"{a}-{b}", scales.get(f"{b}-{a}"))
    return float(scales) if isinstance(scales, int | float) else None


@kinds.register("classification")
class Classification(Kind[ClassificationTask, Labelled]):
    """See the module."""

    Task = ClassificationTask

    def collect(self, task: ClassificationTask, rows: Rows, store: Store) -> Labelled:
        """See :func:`labelled`; with prototypes also the items that they are made of."""
        if task.prototypes is None:
            return labelled(task, rows, store)
        test, support, notes = both_parts(task, task.at(task.prototypes.support), rows, store)
        return replace(
            test,
            skipped=[*test.skipped, *support.skipped],
            asked=test.asked + support.asked,
            notes=notes,
            data_digest=digest_of([test.data_digest, support.data_digest]),
            support=support,
        )

    def evaluate(self, task: ClassificationTask, data: Labelled, store: Store, seed: int, details: bool) -> Measured:
        """top-1, top-5, mean per-class recall, calibration error, intervals and chance, and details to look at."""
        if task.depths is not None:
            store = replace(store, embedder=Fused(store.embedder, task.depths, task.modalities[0]))
        classes, templates = _classes(task, data, store)
        x = store.features(task.modalities[0], data.items, data.digests)
        wanted = task.wanted()
        of_confidence = [m for m in wanted if m in ("calibration_error", "AURC") or re.fullmatch(SELECTIVE, m)]
        scale = scale_of(store, task.modalities) if of_confidence else None
        ranks, predicted, confidence = _scored(x, classes, data.labels, twins_after(data.names), scale)
        values = metrics.classification_values(ranks, data.labels, predicted)
        values |= separability.separability(x, data.labels, len(data.names), wanted)
        notes = []
        risks: Floats | None = None
        if confidence is not None:
            values["calibration_error"] = metrics.calibration_error(confidence, ranks == 1)
            risks = metrics.selective_risks(confidence, ranks == 1)
            values["AURC"] = float(risks.mean())
            for share in task.numbers(SELECTIVE):
                values[f"top1@{share}%"] = 1 - float(risks[max(1, round(len(risks) * share / 100)) - 1])
        else:
            notes += [
                f"The model reports no logit scale for this pair, so there is no {m.replace('_', ' ')}."
                for m in of_confidence
                if m in task.metrics
            ]
        per_item = {"top1": (ranks <= 1).astype(np.float64), "top5": (ranks <= 5).astype(np.float64)}
        asked = {k: v for k, v in per_item.items() if k in wanted}
        ci = metrics.bootstrap_ci(asked, seed=seed) if asked else {}
        if "mean_per_class_recall" in wanted:
            recall = metrics.weighted_class_recall(data.labels, predicted)
            ci["mean_per_class_recall"] = metrics.bootstrap_of(recall, len(ranks), seed=seed)
        chance = metrics.chance_classification(len(data.names))
        counts = np.bincount(data.labels, minlength=len(data.names))
        out: Measured = {
            "metrics": metrics.rounded({k: v for k, v in values.items() if k in wanted}),
            "ci": metrics.rounded(ci),
            "chance": metrics.rounded({k: v for k, v in chance.items() if k in wanted}),
            "n": {task.modalities[0]: len(data.items), "classes": len(data.names)},
            "largest_class_share": round(float(counts.max() / counts.sum()), 6),
            "notes": notes,
        }
        if task.prompts:
            out["templates"] = templates
        if confidence is not None:
            out["settings"] = {"logit_scale": scale}
        if task.depths is not None:
            out["settings"] = out.get("settings", {}) | {"depths": task.depths}
        if isinstance(classes, ByPrototypes) and data.support is not None:
            out["n"]["support"] = len(data.support.items)
            out["settings"] = out.get("settings", {}) | {"prototypes": len(classes.table)}
        if details and store.ranks.is_main:
            out["details"] = _details(task, data, x, classes, (ranks, predicted), Shown(store.kinds), seed)
            out["details"] |= distances(task, data, x)
            if risks is not None:
                out["details"]["risk_coverage"] = metrics.risk_curve(risks, int((ranks != 1).sum()))
        return out


def distances(task: ClassesTask, data: Labelled, x: Tensor) -> dict[str, Any]:
    """The details of a task that measures how far apart its classes are: the distances between them."""
    if not set(separability.METRICS) & set(task.wanted()) or len(data.titles) > MAX_CONFUSION:
        return {}
    far = separability.centroid_distances(x, data.labels, len(data.titles))
    return {"classes": data.titles, "centroid_distances": far}


def twins_after(names: list[list[str]]) -> Ints:
    """[C]: how many later classes have the same names, so the same prompts."""
    counts: Counter[tuple[str, ...]] = Counter()
    out = []
    for n in reversed([tuple(n) for n in names]):
        out.append(counts[n])
        counts[n] += 1
    return np.array(out[::-1], dtype=np.int64)


def _classes(task: ClassificationTask, data: Labelled, store: Store) -> tuple[ByPrompts | ByPrototypes, list[str]]:
    """What scores the classes, and the prompts with ``{}`` if there are any."""
    support, about = data.support, task.prototypes
    named = [n for n in data.names if n != [BACKGROUND]] if task.others == "background" else data.names
    weights, templates = prompted(task, named, store) if task.prompts else (None, [])
    prompts = None if weights is None else ByPrompts(weights)
    if about is None or support is None:
        assert prompts is not None, "without prototypes there are prompts"
        return prompts, templates
    x = store.features(about.support.modality or task.modalities[0], support.items, support.digests)
    each = [about.each] * len(named) + [about.background or 0] * (len(data.names) - len(named))
    table, owners = make_prototypes(x, support.labels, each)
    return ByPrototypes(table, owners, len(data.names), about.keep, prompts), templates


def _scored(
    x: Tensor, classes: ByPrompts | ByPrototypes, labels: Ints, twins: Ints, scale: float | None
) -> tuple[Ints, Ints, Floats | None]:
    """Score block by block, so that no [N, C] matrix is needed; confidences [N] if a scale is given."""
    ranks, predicted, confidence = [], [], []
    for start, stop in metrics.block_starts(len(x), classes.width):
        scores = classes.scores(x[start:stop])
        r, p = metrics.class_ranks(scores, labels[start:stop], twins)
        ranks.append(r)
        predicted.append(p)
        if scale is not None:
            confidence.append(metrics.confidences(scores, scale))
    return np.concatenate(ranks), np.concatenate(predicted), np.concatenate(confidence) if confidence else None


def _details(
    task: ClassificationTask,
    data: Labelled,
    x: Tensor,
    by: ByPrompts | ByPrototypes,
    scored: tuple[Ints, Ints],
    shown: Shown,
    seed: int,
) -> dict[str, Any]:
    ranks, predicted = scored
    names = data.titles
    classes = len(names)
    prompts = [Content(f"class:{c}", text=n) for c, n in enumerate(names)]
    chosen = drawn(len(data.items), QUERIES, seed, f"{task.name}/{task.modalities[0]}")
    right = [{int(c)} for c in data.labels]
    # Against the unit vectors a row of scores is itself.
    features: tuple[Tensor | Lazily, Tensor] = (
        (x, by.weights) if isinstance(by, ByPrompts) else (Lazily(x, by), torch.eye(classes))
    )
    sides = ((data.items, features[0]), (prompts, features[1]))
    rows = hits(shown, *sides, right, ranks, chosen, task.modalities)
    # The most confident mistakes: by how much the wrong class is above the right one.
    mistakes = worst(_margins(x, by, predicted, data.labels), predicted != data.labels)
    bad = hits(shown, *sides, right, ranks, mistakes, task.modalities)
    confusion = metrics.confusion_matrix(data.labels, predicted, classes)
    counts = confusion.sum(1)
    recall = [round(float(confusion[c, c] / n), 6) if n else None for c, n in enumerate(counts.tolist())]
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:10]
    pairs = [divmod(int(f), classes) for f in order if wrong.flat[int(f)] > 0]
    one_each = {int(c): i for i, c in reversed(list(enumerate(data.labels.tolist())))}
    some = [c for c in drawn(classes, PAIRS, seed, f"{task.name}/similarity") if c in one_each]
    return {
        "classes": names,
        "per_class": {"n": counts.tolist(), "recall": recall},
        "confusion": confusion.tolist() if classes <= MAX_CONFUSION else None,
        "most_confused": [{"true": names[t], "predicted": names[p], "n": int(wrong[t, p])} for t, p in pairs],
        "examples": [{"query": task.modalities[0], "gallery": task.modalities[1], "rows": rows, "worst": bad}],
        "similarity": similarity(shown, *sides, {one_each[c]: c for c in some}, task.modalities),
        "items": shown.items,
    }


def _margins(x: Tensor, by: ByPrompts | ByPrototypes, predicted: Ints, labels: Ints) -> Floats:
    """[N] score of the predicted class less that of the true one."""
    won, true = torch.from_numpy(predicted), torch.from_numpy(labels)
    if isinstance(by, ByPrompts):
        return ((by.weights[won] - by.weights[true]) * x).sum(1).numpy()
    parts = []
    for s, e in metrics.block_starts(len(x), by.width):
        scores = by.scores(x[s:e])
        parts.append((scores.gather(1, won[s:e, None]) - scores.gather(1, true[s:e, None]))[:, 0].numpy())
    return np.concatenate(parts)
