"""What every source gives: rows of contents, held as an index; bytes are read when they are embedded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dualenc.data.modalities import modalities
from dualenc.errors import ConfigError, DataError
from dualenc_evals.read.files import MAX_BYTES, open_binary
from dualenc_evals.task import Task

MEMBERS = {"text": ["txt", "json:captions", "json:caption"]}
COLUMNS = {"text": ["captions", "caption", "text"]}


@dataclass(frozen=True, slots=True)
class Content:
    """One item of one modality: a string, or bytes in a file (a part of it: a shard's member).

    Attributes:
        id: what reports call it; never a path on this machine.
        load: makes the bytes where they are no part of a file (a data set's table, a crop).
        shown: how a page shows it, where the source knows better than the bytes (as ``dualenc.data.show`` says).
    """

    id: str
    text: str | None = None
    path: str = ""
    offset: int = 0
    size: int = -1
    error: str = ""
    load: Callable[[], bytes] | None = None
    shown: Callable[[], dict[str, str]] | None = None

    def read(self) -> bytes | str:
        """The string, or the bytes. Raises DataError when they cannot be read."""
        if self.error:
            raise DataError(self.error)
        if self.text is not None:
            return self.text
        if self.load is not None:
            return self.load()
        if self.size > MAX_BYTES:
            raise DataError(f"claims {self.size} bytes, more than {MAX_BYTES}")
        with open_binary(self.path) as f:
            f.seek(self.offset)
            raw = f.read(self.size if self.size >= 0 else MAX_BYTES + 1)
        if len(raw) > MAX_BYTES or (self.size >= 0 and len(raw) != self.size):
            raise DataError(f"has {len(raw)} bytes where {self.size if self.size >= 0 else MAX_BYTES} were expected")
        return raw


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
    """What a source holds, and what a person should know about it."""

    rows: list[Row]
    notes: list[str] = field(default_factory=list)


def captions(row: str, value: Any) -> list[Content]:
    """The strings of one row; empty ones are left out."""
    texts = [str(v).strip() for v in (value if isinstance(value, list) else [value])]
    return [Content(f"{row}#{i}", text=t) for i, t in enumerate(texts) if t]


# --- what all share -----------------------------------------------------------------------------------------------


def needed(task: Task) -> list[str]:
    """Modalities read from the source: prompts are made, not read."""
    prompted = task.kind in ("classification", "multilabel", "probe")
    return [task.modalities[0]] if prompted else list(task.modalities)


def member_specs(task: Task, modality: str) -> list[str]:
    """Shard endings of a modality: the task's, else those that training reads."""
    default = modalities[modality].default_members if modality in modalities else [modality]
    return task.source.members.get(modality) or MEMBERS.get(modality, default)


def column_specs(task: Task, modality: str) -> list[str]:
    """List columns of a modality: the task's, else strings for text and files for the rest."""
    return task.source.members.get(modality) or COLUMNS.get(modality, [f"file:{modality}"])


def kept(task: Task, value: Callable[[str], Any]) -> bool:
    """Whether a row passes ``where`` and, in lists, ``split``."""
    rules: dict[str, str | list[str]] = dict(task.source.where)
    if task.source.split is not None and task.source.kind in ("jsonl", "json", "csv"):
        rules["split"] = task.source.split
    for key, allowed in rules.items():
        if str(value(key)) not in ([allowed] if isinstance(allowed, str) else allowed):
            return False
    return True


def label_spec(task: Task) -> str | None:
    """Where a row's label stands: the class, or what makes retrieval rows the same, or puts them in one bag."""
    if task.kind == "retrieval":
        return task.same or (task.bags.by if task.bags is not None and task.bags.by != "neighbours" else None)
    return task.label if task.kind != "compositional" else None


def label(task: Task, spec: str | None, value: Callable[[str], Any], row: str) -> str | None:
    """The one label of a row; None where the kind of task has none. Raises DataError for a row without it.

    Where a task drops what belongs to no class, a row without a label is such a row.
    """
    if task.kind in ("compositional", "multilabel") or spec is None:
        return None
    got = value(spec)
    if got is None:
        if task.kind == "classification" and task.other_labels == "drop":
            return None
        raise DataError(f"task {task.name}: label: {row} has no {spec!r}")
    return str(got).strip()


def labels(task: Task, spec: str | None, value: Callable[[str], Any]) -> tuple[str, ...]:
    """All labels of a multi-label row: lists, or strings cut at ``source.separator``; ``a+b`` joins columns."""
    if task.kind != "multilabel" or spec is None:
        return ()
    out: list[str] = []
    for part in spec.split("+"):
        got = value(part)
        if got is not None:
            out += got if isinstance(got, list) else str(got).split(task.source.separator)
    return tuple(dict.fromkeys(str(x).strip() for x in out if str(x).strip()))


def require_some(task: Task, rows: list[Row], specs: Callable[[Task, str], list[str]]) -> None:
    """Raises ConfigError when a modality is in no row at all: then the task looks in the wrong place."""
    for m in needed(task) if rows else []:
        if not any(r.contents[m] for r in rows):
            where = ", ".join(specs(task, m))
            raise ConfigError(f"task {task.name}: source.members.{m}: no row has any of {where}; say where {m} stands")
