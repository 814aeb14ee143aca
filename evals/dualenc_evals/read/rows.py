"""What every source gives: rows of contents, held as an index; bytes are read when they are embedded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dualenc.data.arrays import read_npy
from dualenc.data.modalities import modalities
from dualenc.data.sources.item import Content, captions
from dualenc.errors import ConfigError, DataError
from dualenc_evals.task import ClassesTask, Task

__all__ = ["Content", "Row", "Rows", "captions"]


@dataclass(frozen=True, slots=True)
class Row:
    """One sample: contents per modality (several captions: several contents) and its label.

    ``labels``: all of a multi-label item's classes. A retrieval row's label is the value of ``same`` or ``bags.by``.
    """

    id: str
    contents: dict[str, list[Content]]
    label: str | None = None
    labels: tuple[str, ...] = ()


@dataclass(slots=True)
class Rows:
    """What a source holds, and notes about it for people."""

    rows: list[Row]
    notes: list[str] = field(default_factory=list)


# --- shared by readers -------------------------------------------------------------------------------------------


def needed(task: Task) -> list[str]:
    """Modalities read from the source: prompts are made, not read."""
    return task.read_modalities()


def member_specs(task: Task, modality: str) -> list[str]:
    """Shard endings of a modality: the task's, else those that training reads."""
    default = modalities[modality].default_members if modality in modalities else [modality]
    return task.source.members.get(modality) or default


def kept(task: Task, value: Callable[[str], Any], rows_have_splits: bool = False) -> bool:
    """Whether a row passes ``where`` and, if the rows have a split column, ``split``."""
    rules: dict[str, str | list[str]] = dict(task.source.where)
    if task.source.split is not None and rows_have_splits:
        rules["split"] = task.source.split
    for key, allowed in rules.items():
        if str(value(key)) not in ([allowed] if isinstance(allowed, str) else allowed):
            return False
    return True


def label_spec(task: Task) -> str | None:
    """Where a row has its label: the class, or what makes retrieval rows the same or puts them in one bag."""
    place = task.label_place()
    return place[1] if place is not None else None


def label(task: Task, spec: str | None, value: Callable[[str], Any], row: str) -> str | None:
    """The one label of a row; None where the kind of task has none.

    A class number of −1 means that there is no label; a one-hot list is the number of its class. If a task drops
    items that are in no class, a row without a label is one of them.

    Raises:
        DataError: for a row without a label, or one that has several.
    """
    if task.several_labels or spec is None:
        return None
    got = value(spec)
    if not isinstance(task, ClassesTask):
        if got is None:
            raise DataError(f"task {task.name}: label: {row} has no {spec!r}")
        return str(got).strip()
    hot = _hot(task, got, f"{row}, {spec}")
    if hot is not None:
        if len(hot) > 1:
            raise DataError(
                f"task {task.name}: label: {row} has {len(hot)} classes in {spec!r}; a {task.kind} task needs one, "
                "use kind: multilabel"
            )
        got = hot[0] if hot else None
    elif isinstance(got, list | tuple):
        raise DataError(
            f"task {task.name}: label: {row} has the list {str(list(got))[:60]} in {spec!r}; a {task.kind} task needs "
            "one class name, one class number or a one-hot list"
        )
    if isinstance(got, float) and got.is_integer():
        got = int(got)
    text = None if got is None else str(got).strip()
    if text == "-1" and text not in _declared(task):
        text = None
    if text is None and not task.drops_unlabelled:
        none = "no" if got is None else "the label −1, which means no label, in"
        raise DataError(
            f"task {task.name}: label: {row} has {none} {spec!r}; leave such items out with other_labels: drop"
        )
    return text


def labels(task: Task, spec: str | None, value: Callable[[str], Any], row: str = "") -> tuple[str, ...]:
    """All labels of a multi-label row: lists of names or numbers, multi-hot lists or .npy members, or strings cut at
    ``source.separator``; ``a+b`` joins columns."""
    if not task.several_labels or spec is None:
        return ()
    out: list[Any] = []
    for part in spec.split("+"):
        got = value(part)
        hot = _hot(task, got, f"{row}, {part}")
        if hot is not None:
            out += hot
        elif got is not None:
            out += got if isinstance(got, list | tuple) else str(got).split(task.source.separator)
    texts = (str(x).strip() for x in out if x is not None)
    return tuple(dict.fromkeys(x for x in texts if x and (x != "-1" or x in _declared(task))))


def _declared(task: Task) -> Sequence[str]:
    """The classes that the task itself lists."""
    classes = task.classes if isinstance(task, ClassesTask) else None
    return list(classes) if isinstance(classes, list | dict) else ()


def _hot(task: Task, value: Any, where: str) -> list[str] | None:
    """The classes that a one-hot or multi-hot vector (a list of 0 and 1, the bytes of a .npy) stands for.

    A list of 0 and 1 counts as one if it is as long as the task's list of classes or, where that is not known, longer
    than two. None: the value is not such a vector.

    Raises:
        DataError: a damaged .npy, or other numbers in it; classes without names.
    """
    if isinstance(value, bytes):
        vector = _from_npy(value, f"task {task.name}: label: {where}")
    elif isinstance(value, list | tuple) and value and all(isinstance(v, int | float) and v in (0, 1) for v in value):
        vector = [int(v) for v in value]
        known = len(_declared(task))
        if not (len(vector) == known if known else len(vector) > 2):
            return None
    else:
        return None
    classes = task.classes if isinstance(task, ClassesTask) else None
    if classes is None and not task.source.brings_prompts:
        raise DataError(
            f"task {task.name}: label: {where} is a vector of {len(vector)} zeros and ones; name the classes in that "
            "order, classes: [NAME, …]"
        )
    count = len(_declared(task)) or len(vector)
    if count != len(vector):
        raise DataError(f"task {task.name}: label: {where} has {len(vector)} numbers for {count} classes")
    order = list(classes) if isinstance(classes, dict) else [str(i) for i in range(count)]
    return [order[i] for i, v in enumerate(vector) if v]


def _from_npy(raw: bytes, where: str) -> list[int]:
    try:
        vector = read_npy(raw)
    except DataError as e:
        raise DataError(f"{where} is not a readable .npy: {e}") from e
    if vector.ndim != 1 or not np.isin(vector, (0, 1)).all():
        raise DataError(f"{where} has shape {list(vector.shape)}; a multi-hot label is one row of zeros and ones")
    return [int(v) for v in vector]


def require_some(task: Task, rows: list[Row], specs: Callable[[Task, str], list[str]]) -> None:
    """Raises ConfigError if no row has a modality at all: the task looks in the wrong place."""
    for m in needed(task) if rows else []:
        if not any(r.contents[m] for r in rows):
            where = ", ".join(specs(task, m))
            raise ConfigError(f"task {task.name}: source.members.{m}: no row has any of {where}; say where to find {m}")
