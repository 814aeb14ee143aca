"""Dense zero-shot classification: the class of every labelled pixel, from features of the places of an image.

The image tower's places (:func:`dualenc_evals.last_blocks.features_of_places`) are scored by the classes' prompts, or
by prototypes of labelled places of other images (OVDiff, seed S43); scores are bilinear between places. Masks are
``.npy`` arrays or grey or palette images of the size of the image, one number a pixel; a pixel whose number is not a
class (255 in most sets) does not count.

The background is a class of which every name, or prototype, stands for itself: sky and road have nothing in common.
Mean IoU is given with it, and without: then its pixels are left out and it cannot win.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor

from dualenc.config import Positive, Section
from dualenc.data.arrays import read_npy
from dualenc.data.modalities.image import ImageInput
from dualenc.data.modalities.picture import label_map
from dualenc.distributed.devices import autocast
from dualenc.encoders.dual_encoder import prefix
from dualenc.errors import ConfigError, DataError, DecodeError
from dualenc_evals.features import Store, digest_of
from dualenc_evals.kinds.classification import PromptedTask, prompted
from dualenc_evals.kinds.kind import Kind, Measured, kinds
from dualenc_evals.last_blocks import features_of_places, own_tower
from dualenc_evals.metrics import dense
from dualenc_evals.metrics import scores as metrics
from dualenc_evals.metrics.prototypes import BELOW, ByPrototypes, make_prototypes
from dualenc_evals.metrics.scores import Floats, Ints
from dualenc_evals.read.rows import Content, Rows
from dualenc_evals.read.shards import read_rows
from dualenc_evals.task import Train

MASK = "mask"


class PlacePrototypes(Section):
    """Classes by labelled places instead of prompts."""

    support: Train = Field(description="where the images with masks come from: keys of the source that differ")
    each: Positive = Field(default=1, description="prototypes of a class: their mean, or the means of k-means clusters")
    background: Positive = Field(default=1, description="prototypes of the background, if there is one")


class DenseTask(PromptedTask):
    """``kind: dense``."""

    kind: Literal["dense"]
    background: str | None = Field(None, description="the number in the masks that is the background, a class too")
    prototypes: PlacePrototypes | None = Field(None, description="labelled places in the place of prompts")

    @field_validator("classes", mode="before")
    @classmethod
    def _numbers_as_text(cls, raw: Any) -> Any:
        return {str(k): v for k, v in raw.items()} if isinstance(raw, dict) else raw

    @field_validator("background", mode="before")
    @classmethod
    def _number_as_text(cls, raw: Any) -> Any:
        return str(raw) if isinstance(raw, int) else raw

    def known(self) -> tuple[str, ...]:
        """Mean IoU over the classes, the same without the background, and the share of right pixels."""
        return ("mIoU", *(("mIoU_foreground",) if self.background is not None else ()), "pixel_accuracy")

    @property
    def prompts(self) -> bool:
        """Prototypes need none."""
        return self.prototypes is None

    def needed(self) -> list[str]:
        """The images' modality, and that of the prompts if there are any."""
        return list(self.modalities) if self.prompts else [self.modalities[0]]

    def read_modalities(self) -> list[str]:
        """The images and their masks."""
        return [self.modalities[0], MASK]

    def numbers_named(self) -> dict[int, list[str]]:
        """Number in the masks → the class's names."""
        named = (
            self.classes if isinstance(self.classes, dict) else {str(i): v for i, v in enumerate(self.classes or ())}
        )
        return {int(k): [v] if isinstance(v, str) else list(v) for k, v in named.items()}

    def check_keys(self) -> None:
        """Masks hold numbers, which the classes name."""
        if isinstance(self.classes, str) or not self.classes or not all(str(k).isdigit() for k in _keys(self.classes)):
            raise ValueError("classes: name the numbers in the masks, for example {0: [road, sky], 1: car}")
        if self.background is not None and self.background not in map(str, self.numbers_named()):
            raise ValueError(f"background: {self.background!r} is not one of the classes' numbers")
        if self.prompts and self.templates is None:
            raise ValueError("templates: give the prompts, for example ['a photo of a {}.'], or name prototypes")


def _keys(classes: list[str] | dict[str, Any]) -> list[str]:
    return [str(i) for i in range(len(classes))] if isinstance(classes, list) else list(classes)


@dataclass(slots=True)
class Masked:
    """Images with their masks, and what was left out."""

    images: list[Content]
    masks: list[Content]
    skipped: list[dict[str, str]]
    asked: int
    notes: list[str]
    data_digest: str
    support: Masked | None = field(default=None)


@dataclass(slots=True)
class Looked:
    """What a model saw of one image.

    Attributes:
        places: [h, w, D] features; truth: [n] places in the list of classes of the labelled pixels that it saw.
        at: [n, 2] where these are, see :func:`dualenc_evals.metrics.dense.positions`.
        cut_off: labelled pixels that it did not see.
    """

    places: Tensor
    truth: Ints
    at: Floats
    cut_off: int


def read_mask(content: Content) -> Ints:
    """[H, W] numbers of the pixels. Raises DataError for anything else."""
    raw = content.read()
    if not isinstance(raw, bytes):
        raise DataError(f"{content.id} is text, not a mask")
    try:
        mask = read_npy(raw) if raw.startswith(b"\x93NUMPY") else label_map(raw)
    except DecodeError as e:
        raise DataError(f"{content.id}: {e}") from e
    if mask.ndim != 2 or not np.issubdtype(mask.dtype, np.integer):
        raise DataError(
            f"{content.id}: a mask is one whole number for each pixel [H, W], not {mask.dtype} {mask.shape}"
        )
    return mask.astype(np.int64)


@kinds.register("dense")
class Dense(Kind[DenseTask, Masked]):
    """See the module."""

    Task = DenseTask

    def collect(self, task: DenseTask, rows: Rows, store: Store) -> Masked:
        """Images with their masks; one that lacks either, or has a broken one, is left out."""
        data = _masked(task, rows, store)
        if task.prototypes is not None:
            other = task.at(task.prototypes.support)
            further = store.ranks.agree(lambda: read_rows(other))
            data.support = _masked(task, further, store)
            data.skipped += data.support.skipped
            data.asked += data.support.asked
            data.data_digest = digest_of([data.data_digest, data.support.data_digest])
        return data

    def evaluate(self, task: DenseTask, data: Masked, store: Store, seed: int, details: bool) -> Measured:
        """Mean IoU with and without background, pixel accuracy, intervals over images and chance."""
        named = task.numbers_named()
        titles = [names[0] for names in named.values()]
        ground = None if task.background is None else list(named).index(int(task.background))
        by = _classes(task, data, store, ground)
        found = _each(task, data, store, lambda one: (_counted(one, by, ground), one.cut_off))
        table = np.stack([counted for counted, _ in found])
        left_out = sum(n for _, n in found)
        if not table[:, 0, 2].any():
            raise DataError(f"task {task.name}: no pixel that the model saw has one of the numbers in classes")
        total = table[:, 0].sum(0)
        values = {"mIoU": table[:, 0], "mIoU_foreground": table[:, 1]}
        chance = {"mIoU": dense.chance_iou(total[2]), "pixel_accuracy": 1 / len(named)}
        wanted, front = task.wanted(), table[:, 1].sum(0)[2]
        if front.any() and ground is not None:
            chance["mIoU_foreground"] = dense.chance_iou(np.delete(front, ground))
        else:  # no pixel of anything but the background
            wanted = [name for name in wanted if name != "mIoU_foreground"]
        out: Measured = {"metrics": {}, "ci": {}, "chance": {}, "n": {}}
        for name in wanted:
            statistic = dense.mean_iou(values[name]) if name in values else _accuracy(table[:, 0])
            out["metrics"] |= metrics.rounded({name: statistic(np.ones(len(table)))})
            out["ci"] |= metrics.rounded({name: metrics.bootstrap_of(statistic, len(table), seed=seed)})
            out["chance"] |= metrics.rounded({name: chance[name]})
        pixels = int(total[2].sum())
        out["n"] = {task.modalities[0]: len(data.images), "classes": len(named), "labelled pixels": pixels}
        notes = [
            f"No pixel of class {t!r}: left out of the mean." for t, n in zip(titles, total[2], strict=True) if not n
        ]
        if left_out:
            share = 100 * left_out / (left_out + pixels)
            notes.append(f"{share:.1f} % of the labelled pixels were cut off by the model's input.resize: not counted.")
        out["notes"] = notes
        if data.support is not None:
            out["settings"] = {"prototypes": len(by.table)}
            out["n"]["support"] = len(data.support.images)
        if details and store.ranks.is_main:
            each = [None if np.isnan(v) else round(float(v), 6) for v in dense.ious(total)]
            out["details"] = {"classes": titles, "per_class": {"n": total[2].tolist(), "iou": each}}
        return out


def _masked(task: DenseTask, rows: Rows, store: Store) -> Masked:
    sides = task.read_modalities()
    skipped = [{"id": r.id, "reason": f"has no {m}"} for m in sides for r in rows.rows if not r.contents[m]]
    both = [r for r in rows.rows if all(r.contents[m] for m in sides)]
    images, masks = ([r.contents[m][0] for r in both] for m in sides)
    seen = [store.inspect(m, side) for m, side in zip(sides, (images, masks), strict=True)]
    bad = {**seen[0].bad, **seen[1].bad, **_bad_masks(masks, store)}
    skipped += [{"id": both[i].id, "reason": why} for i, why in sorted(bad.items())]
    good = [i for i in range(len(both)) if i not in bad]
    provenance = [[r.id, *digests] for r, *digests in zip(both, seen[0].digests, seen[1].digests, strict=True)]
    digest = digest_of([provenance, {str(k): v for k, v in task.numbers_named().items()}])
    kept = [images[i] for i in good], [masks[i] for i in good]
    return Masked(*kept, skipped, len(rows.rows), list(rows.notes), digest)


def _bad_masks(masks: Sequence[Content], store: Store) -> dict[int, str]:
    """Why a mask cannot be used, by its place; looked at once something turned out to be broken, as images are."""
    bad: list[tuple[int, str]] = []
    for i in range(store.ranks.rank, len(masks), store.ranks.size) if store.strict else ():
        try:
            read_mask(masks[i])
        except DataError as e:
            bad.append((i, str(e)))
    return dict(one for part in store.ranks.gather(bad) for one in part)


T = TypeVar("T")


def _each(task: DenseTask, data: Masked, store: Store, keep: Callable[[Looked], T]) -> list[T]:
    """What ``keep`` makes of each image, in order, on every rank. The cut into batches does not depend on the number of
    ranks, so no number does."""
    size, ranks = store.batch_size, store.ranks

    def mine() -> list[tuple[int, list[T]]]:
        starts = range(0, len(data.images), size)
        own = [s for k, s in enumerate(starts) if k % ranks.size == ranks.rank]
        return [
            (s, [keep(one) for one in looked(task, data.images[s : s + size], data.masks[s : s + size], store)])
            for s in own
        ]

    parts = sorted((p for part in ranks.gather(ranks.agree(mine)) for p in part), key=lambda p: p[0])
    return [one for _, batch in parts for one in batch]


def looked(task: DenseTask, images: Sequence[Content], masks: Sequence[Content], store: Store) -> Iterator[Looked]:
    """Run the tower on a batch of images.

    Raises:
        ConfigError: the model has no tower with places.
        DataError: a broken image or mask, or a mask of another size than its image.
    """
    modality = task.modalities[0]
    embedder, tower = own_tower(store.embedder, modality, "dense")
    source = embedder.bundle.inputs[modality]
    if not isinstance(source, ImageInput):
        raise ConfigError(f"dense: modalities.{modality} does not take images")
    numbers = np.array(list(task.numbers_named()))
    order = np.argsort(numbers)
    raws = [c.read() for c in images]
    (x,) = list(embedder.batches(modality, raws, len(raws)))
    with torch.no_grad(), autocast(embedder.device, embedder.precision):
        found = prefix(features_of_places(tower, x)[0], embedder.dim).cpu()
    for raw, content, places in zip(raws, masks, found, strict=True):
        mask, (width, height) = read_mask(content), source.decode(raw).size
        if mask.shape != (height, width):
            raise DataError(f"{content.id} has {mask.shape[1]} × {mask.shape[0]} pixels, its image {width} × {height}")
        y, across = np.nonzero(np.isin(mask, numbers))
        truth = order[np.searchsorted(numbers, mask[y, across], sorter=order)]
        at = dense.positions(source.config, width, height, across, y)
        inside = (np.abs(at) <= 1).all(1)
        yield Looked(places, truth[inside], at[inside], int((~inside).sum()))


def _classes(task: DenseTask, data: Masked, store: Store, ground: int | None) -> ByPrototypes:
    """What scores the classes: prompts, or the prototypes of places."""
    names = list(task.numbers_named().values())
    if task.prototypes is not None and data.support is not None:
        parts = _each(task, data.support, store, lambda one: _labelled_places(one, len(names)))
        each = [task.prototypes.background if c == ground else task.prototypes.each for c in range(len(names))]
        x, labels = torch.cat([x for x, _ in parts]), np.concatenate([own for _, own in parts])
        return ByPrototypes(*make_prototypes(x, labels, each), len(names))
    owned = [(c, own) for c, own in enumerate(names) if c != ground]
    owned += [] if ground is None else [(ground, [name]) for name in names[ground]]
    weights, _ = prompted(task, [own for _, own in owned], store)
    return ByPrototypes(weights, np.array([c for c, _ in owned], dtype=np.int64), len(names))


def _labelled_places(one: Looked, classes: int) -> tuple[Tensor, Ints]:
    """(features [n, D], classes [n]) of the places with labelled pixels: the class that most of these have."""
    h, w = one.places.shape[:2]
    column, row = (np.minimum((one.at[:, k] + 1) / 2 * n, n - 1).astype(np.int64) for k, n in ((0, w), (1, h)))
    votes = np.bincount((row * w + column) * classes + one.truth, minlength=h * w * classes).reshape(h * w, classes)
    there = np.flatnonzero(votes.sum(1))
    return one.places.flatten(0, 1)[torch.from_numpy(there)], votes[there].argmax(1)


def _counted(one: Looked, by: ByPrototypes, ground: int | None) -> Ints:
    """[2, 3, C] :func:`dualenc_evals.metrics.dense.counts`, with the background and without."""
    h, w, width = one.places.shape
    maps = by.scores(one.places.reshape(-1, width)).view(h, w, -1)
    classes = maps.shape[-1]
    out = np.zeros((2, 3, classes), dtype=np.int64)
    for s, e in metrics.block_starts(len(one.truth), classes):
        scores, truth = dense.scores_at(maps, one.at[s:e]), one.truth[s:e]
        out[0] += dense.counts(scores, truth, classes)
        if ground is not None:
            front = truth != ground
            scores[:, ground] = BELOW
            out[1] += dense.counts(scores[torch.from_numpy(front)], truth[front], classes)
    return out


def _accuracy(by_image: Ints) -> Callable[[Floats], float]:
    """The share of right pixels as a function of the weights [N] of images."""
    right, there = by_image[:, 0].sum(1), by_image[:, 2].sum(1)
    return lambda weights: float(weights @ right / (weights @ there))
