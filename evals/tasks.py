"""An evaluation task is data: a YAML file that says what is read, which classes and prompts, what others measured.

``include:`` names a task it starts from. Paths that begin with ``./`` or ``../`` are relative to the file;
``${DUALENC_DATA}/…`` is the folder where a person keeps data sets that cannot be shipped.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from dualenc.config import Positive, Section, Share, parse, read_yaml
from dualenc.errors import ConfigError, DataError, did_you_mean
from evals.files import read_text

TASKS = Path(__file__).parent / "tasks"
CLASSIFICATION_METRICS = ("top1", "top5", "mean_per_class_recall")
RETRIEVAL_METRICS = ("R@1", "R@5", "R@10", "MRR", "median_rank", "mean_rank")


class Every(Section):
    """Rows ``offset, offset + step, …``: a fixed held-out share of a set that has no split of its own."""

    step: Positive
    offset: Annotated[int, Field(ge=0)] = 0


class Source(Section):
    """What is read. ``path`` is a file, pattern or folder; see ``kind``."""

    kind: Literal["shards", "clip_benchmark", "folder", "jsonl", "csv"] = Field(
        description="shards: webdataset tars; clip_benchmark: its exported folder (SPLIT/N.tar, classnames.txt); "
        "folder: one folder a class; jsonl, csv: one row an item, files beside it"
    )
    path: str | list[str]
    split: str | None = Field(
        None, description="jsonl, csv: rows whose 'split' is this; folder, clip_benchmark: subfolder"
    )
    where: dict[str, str | list[str]] = Field(default_factory=dict, description="keep rows whose column has this value")
    every: Every | None = None
    limit: Positive | None = Field(None, description="only the first so many")
    members: dict[str, list[str]] = Field(
        default_factory=dict,
        description="modality → endings (shards; 'json:KEY' takes a key of the .json member) or columns, tried in turn",
    )
    metadata: str | None = Field(
        None, description="shards: a .jsonl or .jsonl.gz with a 'key' per sample that adds columns"
    )
    obtain: str = Field("", description="how a person gets this data")


class Reference(Section):
    """A number that somebody published for this task."""

    model: str
    metric: str
    value: float
    source: str


class Task(Section):
    """One zero-shot evaluation.

    ``modalities`` are (what is looked at, what it is matched with): for classification the items and the prompts,
    for retrieval the two sides (both directions are measured).
    """

    name: str
    version: Positive = 1
    kind: Literal["classification", "retrieval"]
    description: str = ""
    source: Source
    modalities: tuple[str, str] = ("image", "text")
    label: str | None = Field(
        None,
        description="where the class stands: a column, a member ending, json:KEY or metadata:KEY; folder: the folder",
    )
    classes: list[str] | dict[str, str | list[str]] | str | None = Field(
        None,
        description="names in label order; or label → name(s) shown to the model; or a .txt; default: the labels",
    )
    templates: list[str] | str | None = Field(None, description="prompts with {} for the name; or a .txt, one a line")
    other_labels: Literal["error", "drop"] = Field("error", description="items whose label is in no class")
    identical: Literal["distinct", "merge"] = Field(
        "distinct",
        description="retrieval, equal captions: each owns its copy (as published protocols have it), or both are right",
    )
    metrics: list[str] = Field(default_factory=list, description="default: all of the kind")
    max_skipped: Share = Field(0.1, description="refuse to give a number when more than this share could not be read")
    reference: list[Reference] = Field(default_factory=list)
    license: str = ""
    citation: str = ""

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][\w.\-]*", name):
            raise ValueError("a task's name is letters, digits, '_', '-', '.'")
        return name

    @model_validator(mode="after")
    def _fits(self) -> Task:
        known = CLASSIFICATION_METRICS if self.kind == "classification" else RETRIEVAL_METRICS
        for m in self.metrics:
            if m not in known and not (self.kind == "retrieval" and re.fullmatch(r"R@[1-9]\d*", m)):
                raise ValueError(f"metrics: a {self.kind} task has no metric {m!r}. {did_you_mean(m, known)}")
        if isinstance(self.templates, list):
            check_templates(self.templates)
        if self.kind == "retrieval":
            for key in ("label", "classes", "templates"):
                if getattr(self, key) is not None:
                    raise ValueError(f"{key}: a retrieval task has no {key}; kind: classification has")
        elif self.templates is None and self.source.kind != "clip_benchmark":
            raise ValueError(
                "templates: give the prompts, for example ['a photo of a {}.'], or ['{}'] for the bare name"
            )
        elif self.label is None and self.source.kind not in ("folder", "clip_benchmark"):
            raise ValueError(f"label: say where a {self.source.kind} row's class stands, for example label: json:class")
        if self.modalities[0] == self.modalities[1]:
            raise ValueError(f"modalities: two different ones, got {list(self.modalities)}")
        return self

    def wanted(self) -> list[str]:
        """The metrics asked for; default all."""
        default = CLASSIFICATION_METRICS if self.kind == "classification" else RETRIEVAL_METRICS
        return list(self.metrics or default)

    def recall_ks(self) -> list[int]:
        """The k of every R@k asked for."""
        return sorted({int(m[2:]) for m in self.wanted() if m.startswith("R@")})


def check_templates(templates: list[str]) -> None:
    """Raises ValueError for a prompt that does not have exactly one place for the class name."""
    if not templates:
        raise ValueError("templates: give at least one, for example 'a photo of a {}.'")
    for t in templates:
        if t.count("{}") != 1:
            raise ValueError(f"templates: {t!r} needs exactly one {{}} where the class name goes")


# --- finding ------------------------------------------------------------------------------------------------------


def task_files(root: Path = TASKS) -> dict[str, Path]:
    """Name → file of every built-in task; files that begin with ``_`` are shared parts."""
    return {p.stem: p for p in sorted(root.rglob("*.yaml")) if not p.name.startswith("_")}


def load_task(name: str | Path) -> Task:
    """A built-in task by name, or a YAML file by path.

    Raises:
        ConfigError: an unknown name or key (with the nearest), a wrong value.
    """
    text = str(name)
    if text.endswith((".yaml", ".yml")) or os.sep in text:
        path = Path(text)
    else:
        files = task_files()
        if text not in files:
            raise ConfigError(
                f"There is no task {text!r}. {did_you_mean(text, files)} Your own task: give its .yaml file."
            )
        path = files[text]
    raw, origin = read_yaml(path, key="include")
    # A name in an included file is that file's: a task is called what its own file is called, unless it says otherwise.
    if origin.get("name") != str(path):
        raw["name"] = path.stem
    return parse(Task, raw, origin, str(path))


def list_tasks() -> list[Task]:
    """Every built-in task, by name."""
    return [load_task(n) for n in sorted(task_files())]


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
                f"task {task.name}: source.path: only ${{DUALENC_DATA}} is filled in, got ${{{n}}} in {path!r}"
            )
    root = os.environ.get("DUALENC_DATA", "")
    if names and not root:
        how = f" How to get it: {task.source.obtain}" if task.source.obtain else ""
        raise DataError(
            f"Task {task.name} reads {path}, data you keep yourself: "
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


def templates_of(task: Task) -> list[str]:
    """The prompts of a classification task, ``{}`` for the class name; CLIP_benchmark's ``{c}`` is read too."""
    if isinstance(task.templates, list):
        return task.templates
    path = task.templates
    if path is None and task.source.kind == "clip_benchmark":
        path = f"{paths_of(task)[0]}/zeroshot_classification_templates.txt"
    assert path is not None, "Task._fits sees to it"
    lines = [line.replace("{c}", "{}") for line in read_lines(path, task, "templates")]
    try:
        check_templates(lines)
    except ValueError as e:
        raise ConfigError(f"task {task.name}: {e} (in {path})") from e
    return lines
