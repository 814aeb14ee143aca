"""What a kind of evaluation is: the keys of its tasks, and how the rows of a task become numbers.

To add one: a file with a subclass of :class:`~dualenc_evals.task.Task` (with its own keys and
``kind: Literal["yours"]``) and a subclass of :class:`Kind` registered under the same name. A file in this folder is
imported in ``kinds/__init__.py``; one elsewhere registers its kind when it is imported.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Generic, NotRequired, Protocol, TypedDict, TypeVar

from dualenc.registry import Registry
from dualenc_evals.features import Store
from dualenc_evals.read.rows import Rows
from dualenc_evals.task import Task


class Collected(Protocol):
    """The data of a task after broken items are left out.

    Attributes:
        skipped: ``{"id", "reason"}`` of every item that was left out.
        asked: how many items there were.
        notes: what a person should know about the data.
        data_digest: of everything the numbers depend on besides the model.
    """

    skipped: list[dict[str, str]]
    asked: int
    notes: list[str]
    data_digest: str


class Measured(TypedDict):
    """The numbers of a task as they appear in the results."""

    metrics: dict[str, Any]
    ci: dict[str, Any]
    """95 % intervals, (low, high)."""
    chance: dict[str, Any]
    n: dict[str, int]
    notes: NotRequired[list[str]]
    templates: NotRequired[list[str]]
    settings: NotRequired[dict[str, Any]]
    largest_class_share: NotRequired[float]
    details: NotRequired[dict[str, Any]]
    """What a person looks at: examples, confusions, similarities."""


T = TypeVar("T", bound=Task)
D = TypeVar("D", bound=Collected)


class Kind(ABC, Generic[T, D]):
    """A kind of evaluation. ``Task``: the model of its tasks' YAML."""

    Task: ClassVar[type[Task]]

    @abstractmethod
    def collect(self, task: T, rows: Rows, store: Store) -> D:
        """Inspect every item and leave broken ones out. Every rank calls it and gets the same.

        Raises:
            ConfigError, DataError: the task does not fit the data.
        """

    @abstractmethod
    def evaluate(self, task: T, data: D, store: Store, seed: int, details: bool) -> Measured:
        """Embed and measure. Every rank calls it; only rank 0 has to return ``details``, if they are asked for."""


kinds: Registry[type[Kind[Any, Any]]] = Registry(
    "kind of task", "dualenc.tasks", needs=("Task", "collect", "evaluate"), base=Kind
)
"""Name (a task's ``kind``) → its :class:`Kind`."""
