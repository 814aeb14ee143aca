"""What every source yields: items, each with its contents by modality and its fields; bytes are read when needed.

A source is a :class:`Layout`: its settings and a function from them to items. It is written once, registered under a
name, and then serves all of these::

    dualenc shards build NAME path=… --out DIR          (dualenc_data_tools: items → checked records → shards)
    source: {kind: NAME, path: …}                       (dualenc_evals: items → rows of a task)
    iter_source(NAME, {"path": …})                      (embedding: items → keys and raw values)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from dualenc.config import Section
from dualenc.data.modalities.text import whole
from dualenc.data.sources.opened import MAX_BYTES, open_binary
from dualenc.errors import DataError
from dualenc.registry import Registry

S = TypeVar("S", bound=Section)


@dataclass(frozen=True, slots=True)
class Content:
    """One item of one modality: a string, or bytes in a file (or in a part of it: a shard's member).

    Attributes:
        id: its name in reports; never a path on this machine.
        error: why it cannot be read, as "REASON: details".
        load: makes the bytes where they are not part of a file (a cell of a table, a crop), or a dictionary of joined
            members of a shard.
        shown: how a page shows it, where the source knows better than the bytes (see :mod:`dualenc.data.show`).
    """

    id: str
    text: str | None = None
    path: str = ""
    offset: int = 0
    size: int = -1
    error: str = ""
    load: Callable[[], Any] | None = None
    shown: Callable[[], dict[str, str]] | None = None

    def __post_init__(self) -> None:
        if self.text is not None:
            object.__setattr__(self, "text", whole(self.text))

    def read(self) -> Any:
        """The string, or the bytes (for joined members: ending → value). Raises DataError when they cannot be read."""
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
class Item:
    """One sample of a source.

    Attributes:
        id: its name in reports, unique within a source.
        contents: modality → its contents (several captions: several contents). Empty in tables, whose columns are
            assigned to modalities by ``members`` (:mod:`dualenc.data.sources.columns`).
        fields: everything else that is known of it: labels, columns.
        name: the basis of its key in shards; default: ``id``.
        split: which part of the data set it belongs to, where the source knows.
        label: its class, where the layout has one (the folder's name).
        folder: where relative paths in ``fields`` start.
    """

    id: str
    contents: Mapping[str, list[Content]] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    split: str = ""
    label: str | None = None
    folder: str = ""


@dataclass(frozen=True)
class Layout(Generic[S]):
    """A registered source.

    Attributes:
        settings: its settings; their docstring and descriptions are the documentation.
        read: settings → items, in an order that is always the same. Raises DataError or ConfigError.
        about: one line for listings.
        table: items are rows of columns; ``members`` says which column is which modality.
        shuffles: ``read`` obeys a setting ``shuffle_seed`` itself.
        notes: settings → remarks on the data for the user (an empty class folder).
    """

    settings: type[S]
    read: Callable[[S], Iterable[Item]]
    about: str
    table: bool = False
    shuffles: bool = False
    notes: Callable[[S], list[str]] | None = None


sources: Registry[Layout[Any]] = Registry("source", "dualenc.sources", needs=("settings", "read", "table"))
"""Every layout that can be read, by name. Other packages register theirs here."""


def captions(item: str, value: Any) -> list[Content]:
    """The strings of one item; empty ones are left out."""
    texts = [str(v).strip() for v in (value if isinstance(value, list | tuple) else [value])]
    return [Content(f"{item}#{i}", text=t) for i, t in enumerate(texts) if t]
