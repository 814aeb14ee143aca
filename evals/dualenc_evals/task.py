"""An evaluation task is data: a YAML file that says what is read, which classes and prompts, what others measured.

This file has what every task has (its source and where to find it) and what all with classes have. Each kind of task
(:mod:`dualenc_evals.kinds`) adds its own keys in a subclass; :mod:`dualenc_evals.catalog` finds and reads the files.
"""

from __future__ import annotations

import json
import os
import re
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from dualenc.config import Positive, Section, Share
from dualenc.data.driving.corruption import Corruption
from dualenc.data.sources.opened import read_text
from dualenc.errors import ConfigError, DataError, did_you_mean
from dualenc.plugins import is_reference

LISTS = ("jsonl", "json", "csv", "parquet")
SHARDS = ("shards", "clip_benchmark")
"""Sources that only evaluations have: training reads shards as its recipe says."""


def _wrong(key: str, why: str, value: Any = None) -> ValidationError:
    """The error of one key of a section, for a check that sees all keys."""
    told = PydanticCustomError("value_error", why)  # type: ignore[arg-type]
    return ValidationError.from_exception_data("source", [{"type": told, "loc": (key,), "input": value}])


class Every(Section):
    """Rows ``offset, offset + step, …``: a fixed held-out share of a set that has no split of its own."""

    step: Positive = Field(description="take every step-th row")
    offset: Annotated[int, Field(ge=0)] = Field(default=0, description="first row that is taken")
    others: bool = Field(False, description="take all other rows instead")

    def of(self, rows: list[Any]) -> list[Any]:
        """The rows that this selects."""
        if self.others:
            return [r for i, r in enumerate(rows) if i < self.offset or (i - self.offset) % self.step]
        return rows[self.offset :: self.step]


class TaskSource(Section):
    """What is read. ``path`` is a file, pattern, folder or name; see ``kind``.

    ``kind`` is also any source that is registered in :data:`dualenc.data.sources.sources`; its own settings are
    further keys of this section.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    kind: str = Field(
        description="shards: webdataset tars; clip_benchmark: its exported folder (SPLIT/N.tar, classnames.txt); "
        "folder: one folder per class, or texts next to the files; jsonl, json, csv, parquet: one row per item, "
        "files next to it; hf: a Hugging Face data set by name, or a local folder; kitti, kitti_raw, nuscenes: the "
        "folder as published (camera and lidar); or the name of a source that another package registers"
    )
    path: str | list[str] = Field(default="", description="file, pattern, folder or name, as kind says")
    split: str | None = Field(
        None,
        description="hf: the split; tables: rows whose 'split' is this; folder, clip_benchmark: subfolder; nuscenes: "
        "the folder of tables",
    )
    subset: str | None = Field(None, description="hf: the configuration, where a data set has several")
    revision: str | None = Field(None, description="hf: the commit or tag to read")
    where: dict[str, str | list[str]] = Field(default_factory=dict, description="keep rows whose column has this value")
    every: Every | None = Field(default=None, description="a fixed share of the rows, for sets without a split")
    limit: Positive | None = Field(None, description="read only this many rows")
    members: dict[str, list[str]] = Field(
        default_factory=dict,
        description="modality → endings (shards; 'json:KEY' takes a key of the .json member) or columns, tried in "
        "order; 'a+b' takes both columns; 'file:COLUMN' and 'file:fold{fold}/{name}.wav' are files",
    )
    files: str | None = Field(
        None, description="jsonl, json, csv: the folder of 'file:' columns; default: the list's folder"
    )
    columns: list[str] | None = Field(None, description="csv without a header: the column names")
    separator: str = Field(",", min_length=1, description="separates the labels in a multi-label column")
    group: str | None = Field(None, description="lists, hf: rows with equal values in this column are one item")
    unit: Literal["frames", "objects"] = Field(
        "frames", description="kitti, nuscenes: an item is a frame or a labelled object"
    )
    corrupt: Corruption | None = Field(None, description="kitti, nuscenes: sensor failures to simulate")
    metadata: str | None = Field(
        None, description="shards: a .jsonl or .jsonl.gz with a 'key' per sample that adds columns"
    )
    obtain: str = Field("", description="how to get this data")

    @model_validator(mode="before")
    @classmethod
    def _short_members(cls, raw: Any) -> Any:
        """``image: filepath`` and ``caption: title`` of a table, as in packing, are its members."""
        from dualenc.data.sources import sources
        from dualenc.data.sources.columns import SHORT, with_short_members
        from dualenc.data.sources.samples import accepted

        if not isinstance(raw, dict) or not SHORT.keys() & raw.keys() or str(raw.get("kind")) in SHARDS:
            return raw
        try:
            layout = sources[str(raw.get("kind"))]
            return with_short_members(raw, accepted(layout.settings)) if layout.table else raw
        except ConfigError as e:
            raise ValueError(str(e)) from e

    @model_validator(mode="after")
    def _fits(self) -> TaskSource:
        own = self._own_settings()
        here = {
            "subset": ("hf",), "revision": ("hf",), "files": LISTS, "columns": ("csv",), "group": (*LISTS, "hf"),
            "metadata": ("shards",), "corrupt": ("kitti", "kitti_raw", "nuscenes"),
        }  # fmt: skip
        for key, kinds in here.items():
            if getattr(self, key) is not None and self.kind not in kinds and key not in own:
                raise ValueError(f"{key}: only sources of kind {', '.join(kinds)} have this key, not {self.kind}")
        if not self.path and ("path" in own or self.kind in SHARDS):
            raise _wrong("path", f"missing: a {self.kind} source needs the path of its data")
        if self.kind == "hf" and self.split is None:
            raise ValueError("split: name the split of the Hugging Face data set, for example test")
        if self.kind == "hf" and not isinstance(self.path, str):
            raise ValueError("path: name one data set, not a list")
        return self

    def _own_settings(self) -> set[str]:
        """Keys of the source's own settings. Raises ValidationError for an unknown source or key, with the nearest."""
        from dualenc.data.sources import sources
        from dualenc.data.sources.samples import accepted

        own: set[str] = set()
        if self.kind not in SHARDS:
            try:
                own = accepted(sources[self.kind].settings)
            except ConfigError as e:
                if is_reference(self.kind):
                    raise _wrong("kind", str(e), self.kind) from e
                near = did_you_mean(self.kind, [*SHARDS, *sources])
                raise _wrong("kind", f"unknown source. {near}", self.kind) from e
        for key in self.model_extra or {}:
            if key not in own:
                known = {*type(self).model_fields, *own}
                raise _wrong(key, f"unknown key of this source. {did_you_mean(key, known)}")
        return own

    @property
    def says_class(self) -> bool:
        """Whether the data themselves give the class of an item; for tables, the task has to name a column."""
        from dualenc.data.sources import sources

        return self.kind == "clip_benchmark" or (self.kind not in SHARDS and not sources[self.kind].table)

    @property
    def brings_prompts(self) -> bool:
        """Whether class names and prompts come with the data."""
        return self.kind == "clip_benchmark"

    @property
    def has_sensors(self) -> bool:
        """Whether it has cameras and LiDAR, whose failures :class:`Corruption` simulates."""
        return "corrupt" in self._own_settings()

    def settings(self) -> dict[str, Any]:
        """The source's own settings that are set, without the path."""
        own = self._own_settings() - {"path"}
        given = {**{k: getattr(self, k) for k in type(self).model_fields}, **(self.model_extra or {})}
        return {k: v for k, v in given.items() if k in own and k in self.model_fields_set and v is not None}


class Train(Section):
    """Where further labelled items of a task come from: its own source with these keys replaced."""

    path: str | list[str] | None = Field(default=None, description="file, pattern or folder of the training items")
    split: str | None = Field(default=None, description="split of the training items")
    where: dict[str, str | list[str]] | None = Field(default=None, description="keep rows whose column has this value")
    every: Every | None = Field(default=None, description="a fixed share of the rows")
    limit: Positive | None = Field(default=None, description="read only this many rows")
    modality: str | None = Field(default=None, description="another modality of theirs, such as text")


class Reference(Section):
    """A number that somebody published for this task."""

    model: str = Field(description="the model that was measured")
    metric: str = Field(description="name of the metric")
    value: float = Field(description="the published number")
    source: str = Field(description="where it was published")


class Task(Section):
    """One evaluation: what every kind of task has, and what the readers of sources ask of one.

    ``modalities`` are (what is looked at, what it is matched with): for classification and multilabel the items and
    the prompts, for retrieval the two sides (both directions are measured), for compositional the two sides of a small
    puzzle (which caption belongs to which image); a probe uses the first alone.
    """

    several_labels: ClassVar[bool] = False
    """An item may belong to several classes."""
    one_class: ClassVar[bool] = False
    """Every item belongs to one class, which some sources provide themselves."""
    metric_pattern: ClassVar[str] = r"(?!)"
    """Metrics with a number in their name, besides the default ones."""

    name: str = Field(description="its name in results; default: the file's")
    version: Positive = Field(default=1, description="raised when a change moves its numbers")
    kind: str = Field(description="what is measured")
    plugins: list[str] = Field(
        default_factory=list, exclude=True, description="modules to import first; they register kinds and modalities"
    )
    description: str = Field(default="", description="one line for lists and reports")
    source: TaskSource = Field(description="what is read")
    modalities: tuple[str, str] = Field(
        default=("image", "text"), description="what is looked at, and what it is matched with"
    )
    metrics: list[str] = Field(default_factory=list, description="default: those of the kind of task")
    max_skipped: Share = Field(0.1, description="fail if more than this share of the items cannot be read")
    reference: list[Reference] = Field(
        default_factory=list, description="published numbers, shown beside the measured ones"
    )
    license: str = Field(default="", description="license of the data")
    citation: str = Field(default="", description="how to cite the data")

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][\w.\-]*", name):
            raise ValueError("a task's name may contain only letters, digits, '_', '-' and '.'")
        return name

    @model_validator(mode="after")
    def _fits(self) -> Task:
        known = self.known()
        for m in self.metrics:
            if m not in known and not re.fullmatch(self.metric_pattern, m):
                raise ValueError(f"metrics: a {self.kind} task has no metric {m!r}. {did_you_mean(m, known)}")
        for r in self.reference:
            if not self.may_state(r.metric):
                raise ValueError(f"reference: {r.model}'s {r.metric!r} is not a metric of this task ({self.wanted()})")
        if self.modalities[0] == self.modalities[1]:
            raise ValueError(f"modalities: name two different ones, got {list(self.modalities)}")
        self.check_keys()
        return self

    def check_keys(self) -> None:
        """Raises ValueError if keys of the kind contradict each other or one is missing."""

    def known(self) -> tuple[str, ...]:
        """The metrics of a task that names none."""
        raise NotImplementedError

    def may_state(self, metric: str) -> bool:
        """Whether a published number may be of this metric."""
        return metric in self.wanted()

    def wanted(self) -> list[str]:
        """The metrics asked for; default: those of the kind."""
        return list(self.metrics or self.known())

    def numbers(self, pattern: str) -> list[int]:
        """The number in every wanted metric that ``pattern`` fully matches."""
        found = (re.fullmatch(pattern, m) for m in self.wanted())
        return sorted({int(m.group(1)) for m in found if m is not None})

    def needed(self) -> list[str]:
        """The modalities a model must have."""
        return list(self.modalities)

    def read_modalities(self) -> list[str]:
        """The modalities that come from the source (prompts are made, not read)."""
        return list(self.modalities)

    def label_place(self) -> tuple[str, str] | None:
        """(key of the task, place in a row) of a row's label; None if no label is read."""
        return None

    @property
    def drops_unlabelled(self) -> bool:
        """Whether an item without a label is left out; else it is an error."""
        return False

    @property
    def numbers_classes(self) -> bool:
        """Whether class numbers of a table stay numbers, because the task lists the names in that order."""
        return False


class ClassesTask(Task):
    """What all tasks with classes share."""

    label: str | None = Field(
        None,
        description="where the class is: a column, a member ending, json:KEY or metadata:KEY; folder: the folder; "
        "multilabel: a column of several labels, 'a+b' takes those of both",
    )
    classes: list[str] | dict[str, str | list[str]] | str | None = Field(
        None,
        description="names in label order; or label → name(s) shown to the model; or a .txt; default: the labels",
    )
    other_labels: Literal["error", "drop"] = Field("error", description="items whose label is not a class")

    def check_keys(self) -> None:
        """Unless the data give the class themselves, the task must say where it is."""
        if self.label is None and not self.source.says_class:
            raise ValueError(f"label: say where a {self.source.kind} row has its class, for example label: json:class")

    def read_modalities(self) -> list[str]:
        """The items; what they are matched with is made of the classes' names."""
        return [self.modalities[0]]

    def label_place(self) -> tuple[str, str] | None:
        """The class."""
        return ("label", self.label) if self.label is not None else None

    @property
    def others(self) -> Literal["error", "drop", "background"]:
        """What becomes of items whose label is not a class."""
        return self.other_labels

    @property
    def drops_unlabelled(self) -> bool:
        """Where other labels are dropped, an item without one belongs to no class too."""
        return self.others != "error"

    def at(self, rows: Train) -> Self:
        """This task with another part of its data."""
        source = {**self.source.model_dump(), **rows.model_dump(exclude_unset=True, exclude={"modality"})}
        first = rows.modality or self.modalities[0]
        modalities = (first, next(m for m in reversed(self.modalities) if m != first))
        return self.model_copy(update={"source": TaskSource.model_validate(source), "modalities": modalities})

    @property
    def numbers_classes(self) -> bool:
        """With a list of names, numbers are places in it."""
        return isinstance(self.classes, list | str)


# --- what a task names outside itself -----------------------------------------------------------------------------


def locate(path: str, task: Task) -> str:
    """Fill in ``${DUALENC_DATA}``.

    Raises:
        DataError: the variable is not set; says which data are needed and how to get them.
        ConfigError: another variable.
    """
    names = re.findall(r"\$\{(\w*)\}", path)
    for n in names:
        if n != "DUALENC_DATA":
            raise ConfigError(
                f"task {task.name}: source.path: only ${{DUALENC_DATA}} is expanded, got ${{{n}}} in {path!r}"
            )
    root = os.environ.get("DUALENC_DATA", "")
    if names and not root:
        how = f" How to get it: {task.source.obtain}" if task.source.obtain else ""
        raise DataError(
            f"Task {task.name} reads {path}, which is not shipped: "
            f"set the environment variable DUALENC_DATA to the folder that holds it.{how}"
        )
    return path.replace("${DUALENC_DATA}", root.rstrip("/"))


def paths_of(task: Task) -> list[str]:
    """The source's paths with variables filled in."""
    paths = task.source.path if isinstance(task.source.path, list) else [task.source.path]
    return [locate(p, task) for p in paths]


def read_lines(path: str, task: Task, key: str) -> list[str]:
    """Lines of a .txt (or the strings of a .json list); a ConfigError names the task's key when there are none."""
    file = locate(path, task)
    try:
        text = read_text(file)
    except DataError as e:
        raise ConfigError(f"task {task.name}: {key}: {e}") from e
    if file.endswith(".json"):
        try:
            got: Any = json.loads(text)
        except json.JSONDecodeError as e:
            raise ConfigError(f"task {task.name}: {key}: {file} is not valid JSON: {e}") from e
        if not isinstance(got, list) or not all(isinstance(x, str) for x in got):
            raise ConfigError(f"task {task.name}: {key}: {file} must hold a list of strings")
        return got
    # A blank line in between is a class without a name (CLEVR's middle distance); it must not move the others.
    return [line.strip() for line in text.rstrip().splitlines()]
