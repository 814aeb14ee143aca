"""Dense zero-shot classification: every cell of a grid over an image has a class, and is scored by the place under its
centre (:mod:`dualenc.encoders.places`), against prompts (MaskCLIP, arXiv 2112.01071) or against prototypes of labelled
cells of other images (OVDiff, arXiv 2306.09316).

The label of an image is one string: the classes of its cells row by row, separated by ``cells``; an empty one says
nothing and is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from dualenc.encoders.places import at_centres
from dualenc.errors import ConfigError
from dualenc_evals.features import Store, digest_of
from dualenc_evals.kinds.classification import (
    MAX_CONFUSION,
    PromptedTask,
    Prototypes,
    prompted,
)
from dualenc_evals.kinds.kind import Kind, Measured, kinds
from dualenc_evals.metrics import scores as metrics
from dualenc_evals.metrics.prototypes import ByPrompts, ByPrototypes, make_prototypes
from dualenc_evals.metrics.scores import Floats, Ints
from dualenc_evals.read.rows import Content, Row, Rows
from dualenc_evals.read.shards import read_rows

NOTHING = -1
"""Number of a cell without a class."""


class DenseTask(PromptedTask):
    """``kind: dense``."""

    kind: Literal["dense"]
    cells: str = Field(default=",", min_length=1, description="separates the classes of an image's cells, row by row")
    prototypes: Prototypes | None = Field(None, description="labelled images in the place of prompts")

    def known(self) -> tuple[str, ...]:
        """Mean intersection over union of the classes (of those that occur or are predicted), and the share of right
        cells."""
        return ("mIoU", "accuracy")

    @property
    def prompts(self) -> bool:
        """Prototypes need none, unless prompts choose the classes that may win."""
        return self.prototypes is None or self.prototypes.keep is not None

    def needed(self) -> list[str]:
        """The images' modality, and that of the prompts if there are any."""
        return list(self.modalities) if self.prompts else [self.modalities[0]]

    def check_keys(self) -> None:
        """Cells of one image are told apart by the separator, and the classes by the task."""
        super().check_keys()
        if not isinstance(self.classes, list | dict):
            raise ValueError("classes: list the classes; a label holds those of many cells")
        if self.prototypes is not None and self.prototypes.background is not None:
            raise ValueError("prototypes.background: make it one of the classes; cells without a class are left out")


@dataclass(slots=True)
class Cells:
    """Images with the class numbers [n, G²] of their cells, the classes' names and titles, and what was left out."""

    items: list[Content]
    digests: list[str]
    numbers: Ints
    names: list[list[str]]
    titles: list[str]
    skipped: list[dict[str, str]]
    asked: int
    notes: list[str]
    data_digest: str
    support: Cells | None = None
    """The images that prototypes are made of."""


def numbers_of(task: DenseTask, rows: Sequence[Row]) -> tuple[Ints, list[str], list[list[str]]]:
    """(class numbers [n, G²], labels in class order, their names).

    Raises:
        ConfigError: a cell's label that is not a class, or images with different numbers of cells.
    """
    classes = task.classes
    assert isinstance(classes, list | dict), "checked by check_keys"
    labels = list(classes)
    names = [
        [v] if isinstance(v, str) else list(v) for v in (classes.values() if isinstance(classes, dict) else labels)
    ]
    number = {"": NOTHING} | {label: n for n, label in enumerate(labels)}
    out = []
    for row in rows:
        cells = [c.strip() for c in (row.label or "").split(task.cells)]
        strange = [c for c in cells if c not in number]
        if strange and task.other_labels == "error":
            raise ConfigError(
                f"task {task.name}: classes: {row.id} has a cell of {strange[0]!r}, which is not a class; add it, or "
                "leave such cells out with other_labels: drop"
            )
        out.append([number.get(c, NOTHING) for c in cells])
    sizes = sorted({len(x) for x in out})
    if len(sizes) > 1:
        raise ConfigError(f"task {task.name}: label: images have {sizes[0]} and {sizes[-1]} cells; give all one grid")
    return np.array(out, dtype=np.int64).reshape(len(out), -1), labels, names


def collected(task: DenseTask, rows: Rows, store: Store) -> Cells:
    """Inspect every image, leave broken ones out, and number the classes of the cells."""
    modality = task.modalities[0]
    used = [r for r in rows.rows if r.contents[modality]]
    skipped = [{"id": r.id, "reason": f"has no {modality}"} for r in rows.rows if not r.contents[modality]]
    items = [r.contents[modality][0] for r in used]
    seen = store.inspect(modality, items)
    skipped += [{"id": items[i].id, "reason": why} for i, why in seen.bad.items()]
    numbers, order, names = numbers_of(task, used)
    good = [i for i in range(len(items)) if i not in seen.bad]
    kept, digests = [items[i] for i in good], [seen.digests[i] for i in good]
    about = digest_of([[[r.id, r.label, d] for r, d in zip(used, seen.digests, strict=True)], order])
    return Cells(kept, digests, numbers[good], names, order, skipped, len(rows.rows), list(rows.notes), about)


def intersection_over_union(confusion: Ints | Floats) -> Floats:
    """[C] of a matrix true × predicted; NaN for a class that neither occurs nor is predicted."""
    right = np.diag(confusion).astype(np.float64)
    union = confusion.sum(0) + confusion.sum(1) - right
    out: Floats = np.divide(right, union, out=np.full(len(right), np.nan), where=union > 0)
    return out


@kinds.register("dense")
class Dense(Kind[DenseTask, Cells]):
    """See the module."""

    Task = DenseTask

    def collect(self, task: DenseTask, rows: Rows, store: Store) -> Cells:
        """See :func:`collected`; with prototypes also the images that they are made of."""
        test = collected(task, rows, store)
        if task.prototypes is None:
            return test
        other = task.at(task.prototypes.support)
        support = collected(other, store.ranks.agree(lambda: read_rows(other)), store)
        both = len(set(test.digests) & set(support.digests))
        notes = [f"{both} test images are also among those of the prototypes, byte for byte."] if both else []
        return replace(
            test,
            skipped=[*test.skipped, *support.skipped],
            asked=test.asked + support.asked,
            notes=[*test.notes, *notes],
            data_digest=digest_of([test.data_digest, support.data_digest]),
            support=support,
        )

    def evaluate(self, task: DenseTask, data: Cells, store: Store, seed: int, details: bool) -> Measured:
        """mIoU and accuracy, with intervals over images, and the confusion of classes to look at."""
        names = data.names
        x, labels, owner = _cells(task, data, store)
        weights, templates = prompted(task, names, store) if task.prompts else (None, [])
        by: ByPrompts | ByPrototypes
        prompts = None if weights is None else ByPrompts(weights)
        if task.prototypes is not None and data.support is not None:
            y, known, _ = _cells(task, data.support, store)
            table, owners = make_prototypes(y, known, [task.prototypes.each] * len(names))
            by = ByPrototypes(table, owners, len(names), task.prototypes.keep, prompts)
        else:
            assert prompts is not None, "without prototypes there are prompts"
            by = prompts
        predicted = np.concatenate(
            [by.scores(x[s:e]).argmax(1).numpy() for s, e in metrics.block_starts(len(x), by.width)]
        )
        per_image = np.zeros((len(data.items), len(names), len(names)), dtype=np.int64)
        np.add.at(per_image, (owner, labels, predicted), 1)
        confusion = per_image.sum(0)

        def miou(w: Floats) -> float:
            return float(np.nanmean(intersection_over_union(np.tensordot(w, per_image, 1))))

        def accuracy(w: Floats) -> float:
            drawn = np.tensordot(w, per_image, 1)
            return float(np.trace(drawn) / max(drawn.sum(), 1))

        of = {"mIoU": miou, "accuracy": accuracy}
        every = np.ones(len(per_image))
        wanted = [m for m in task.wanted() if m in of]
        counts = np.bincount(labels, minlength=len(names))
        out: Measured = {
            "metrics": metrics.rounded({m: of[m](every) for m in wanted}),
            "ci": metrics.rounded({m: metrics.bootstrap_of(of[m], len(per_image), seed=seed) for m in wanted}),
            "chance": metrics.rounded({"accuracy": 1 / len(names)} if "accuracy" in wanted else {}),
            "n": {task.modalities[0]: len(per_image), "cells": len(labels), "classes": len(names)},
            "largest_class_share": round(float(counts.max() / max(counts.sum(), 1)), 6),
        }
        if task.prompts:
            out["templates"] = templates
        if isinstance(by, ByPrototypes):
            out["settings"] = {"prototypes": len(by.table)}
        if details and store.ranks.is_main:
            iou = intersection_over_union(confusion)
            out["details"] = {
                "classes": data.titles,
                "per_class": {"n": counts.tolist(), "IoU": [None if np.isnan(v) else round(v, 6) for v in iou]},
                "confusion": confusion.tolist() if len(names) <= MAX_CONFUSION else None,
            }
        return out


def _cells(task: DenseTask, data: Cells, store: Store) -> tuple[Tensor, Ints, Ints]:
    """(features [N, D] of the cells with a class, their classes [N], the images they are of [N])."""
    x = store.places(task.modalities[0], data.items)
    places = at_centres(x.shape[1], data.numbers.shape[1])
    image, cell = np.nonzero(data.numbers != NOTHING)
    if not len(image):
        raise ConfigError(f"task {task.name}: label: no cell of any image has a class")
    features: Any = x[torch.from_numpy(image), places[torch.from_numpy(cell)]]
    return features, data.numbers[image, cell], image
