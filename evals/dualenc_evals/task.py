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
from dualenc.plugins import import_plugins, named_in
from dualenc_evals.kinds import kinds as task_kinds
from dualenc_evals.read.files import read_text

TASKS = Path(__file__).parent / "tasks"
DEFAULT_METRICS: dict[str, tuple[str, ...]] = {
    "classification": ("top1", "top5", "mean_per_class_recall", "calibration_error"),
    "retrieval": ("R@1", "R@5", "R@10", "MRR", "median_rank", "mean_rank"),
    "multilabel": ("mAP",),
    "probe": (
        "knn_top1",
        "linear_top1",
        "fewshot5_top1",
        "prototype1_top1",
        "opta1_top1",
        "prototype5_top1",
        "opta5_top1",
    ),
}
METRIC_PATTERNS = {
    "retrieval": r"(R|mAP|nDCG)@[1-9]\d*",
    "probe": r"(fewshot|prototype|opta)[1-9]\d*_top1",
}
"""Metrics with a number in their name, beside the default ones."""
NAMED = ("classification", "multilabel")
"""Kinds whose classes are shown to the model by name, in prompts."""
LISTS = ("jsonl", "json", "csv")


class Every(Section):
    """Rows ``offset, offset + step, …``: a fixed held-out share of a set that has no split of its own."""

    step: Positive
    offset: Annotated[int, Field(ge=0)] = 0
    others: bool = Field(False, description="all rows but those")

    def of(self, rows: list[Any]) -> list[Any]:
        """The rows that this names."""
        if self.others:
            return [r for i, r in enumerate(rows) if i < self.offset or (i - self.offset) % self.step]
        return rows[self.offset :: self.step]


class Corruption(Section):
    """Sensors that fail; what is drawn depends on the picture's name only (:mod:`dualenc_evals.read.corruption`)."""

    beams: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="share of the LiDAR's beams that are silent"
    )
    pictures: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.0, description="share of the pictures that are black"
    )
    turned_deg: Annotated[float, Field(ge=0)] = Field(
        default=0.0,
        description="standard deviation of the error of the camera's calibration, about each axis, in degrees",
    )
    fog: Annotated[float, Field(ge=0)] = Field(
        default=0.0,
        description="how thick fog-like noise on the LiDAR is: 1 / the metres a beam goes before 63 % are lost",
    )


class Source(Section):
    """What is read. ``path`` is a file, pattern, folder or name; see ``kind``."""

    kind: Literal["shards", "clip_benchmark", "folder", "jsonl", "json", "csv", "hf", "kitti", "nuscenes"] = Field(
        description="shards: webdataset tars; clip_benchmark: its exported folder (SPLIT/N.tar, classnames.txt); "
        "folder: one folder a class; jsonl, json, csv: one row an item, files beside it; hf: a Hugging Face data set "
        "by name, or a local folder; kitti, nuscenes: the folder as published (camera and lidar)"
    )
    path: str | list[str]
    split: str | None = Field(
        None,
        description="hf: the split; jsonl, json, csv: rows whose 'split' is this; folder, clip_benchmark: subfolder",
    )
    subset: str | None = Field(None, description="hf: the configuration, where a data set has several")
    revision: str | None = Field(None, description="hf: the commit or tag that is read")
    where: dict[str, str | list[str]] = Field(default_factory=dict, description="keep rows whose column has this value")
    every: Every | None = None
    limit: Positive | None = Field(None, description="only the first so many")
    members: dict[str, list[str]] = Field(
        default_factory=dict,
        description="modality → endings (shards; 'json:KEY' takes a key of the .json member) or columns, tried in "
        "turn; 'a+b' takes both columns; 'file:COLUMN' and 'file:fold{fold}/{name}.wav' are files",
    )
    files: str | None = Field(None, description="jsonl, json, csv: the folder of 'file:' columns; default: the list's")
    columns: list[str] | None = Field(None, description="csv without a line of names: the names")
    separator: str = Field(",", min_length=1, description="what stands between the labels of a multi-label column")
    group: str | None = Field(None, description="lists, hf: rows with the same value of this column are one item")
    unit: Literal["frames", "objects"] = Field("frames", description="kitti, nuscenes: pictures, or labelled objects")
    corrupt: Corruption | None = Field(None, description="kitti, nuscenes: what is done to the sensors first")
    metadata: str | None = Field(
        None, description="shards: a .jsonl or .jsonl.gz with a 'key' per sample that adds columns"
    )
    obtain: str = Field("", description="how a person gets this data")

    @model_validator(mode="after")
    def _fits(self) -> Source:
        here = {
            "subset": ("hf",), "revision": ("hf",), "files": LISTS, "columns": ("csv",), "group": (*LISTS, "hf"),
            "metadata": ("shards",), "corrupt": ("kitti", "nuscenes"),
        }  # fmt: skip
        for key, kinds in here.items():
            if getattr(self, key) is not None and self.kind not in kinds:
                raise ValueError(f"{key}: belongs to {', '.join(kinds)}, this source is {self.kind}")
        if self.kind == "hf" and self.split is None:
            raise ValueError("split: name the split of the Hugging Face data set, for example test")
        if self.kind == "hf" and not isinstance(self.path, str):
            raise ValueError("path: one data set, not a list of them")
        return self


class Train(Section):
    """Where a probe's training items stand: the task's source, but for these keys."""

    path: str | list[str] | None = None
    split: str | None = None
    where: dict[str, str | list[str]] | None = None
    every: Every | None = None
    limit: Positive | None = None


class Probe(Section):
    """How features are probed. Defaults: k-NN of DINO (arXiv 2104.14294), 5-way episodes with 15 queries a class."""

    k: Positive = 20
    temperature: Annotated[float, Field(gt=0)] = 0.07
    ways: Annotated[int, Field(ge=2)] = 5
    queries: Positive = 15
    episodes: Positive = 600


class Bags(Section):
    """Hard-bag retrieval (TrueMatch): R@1 inside small bags of look-alikes.

    ``by``: a column whose equal values make items look alike, or ``neighbours``: those whose features of the evaluated
    model are nearest, which is hardest for that model and does not compare between models.
    """

    by: str
    sizes: list[Annotated[int, Field(ge=2)]] = Field(default_factory=lambda: [3, 5, 7], min_length=1)


class Reference(Section):
    """A number that somebody published for this task."""

    model: str
    metric: str
    value: float
    source: str


class Task(Section):
    """One evaluation.

    ``modalities`` are (what is looked at, what it is matched with): for classification and multilabel the items and
    the prompts, for retrieval the two sides (both directions are measured), for compositional the two sides of a small
    puzzle (which caption belongs to which picture); a probe uses the first alone.
    """

    name: str
    version: Positive = 1
    kind: str
    plugins: list[str] = Field(
        default_factory=list, exclude=True, description="modules imported first: they bring kinds and modalities"
    )
    description: str = ""
    source: Source
    modalities: tuple[str, str] = ("image", "text")
    label: str | None = Field(
        None,
        description="where the class stands: a column, a member ending, json:KEY or metadata:KEY; folder: the folder; "
        "multilabel: a column of several labels, 'a+b' takes those of both",
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
    same: str | None = Field(
        None,
        description="retrieval: a column; items with equal values are right for each other (one object seen twice)",
    )
    bags: Bags | None = Field(None, description="retrieval: also R@1 inside bags of look-alikes")
    train: Train | None = Field(None, description="probe: where its training items stand")
    probe: Probe = Field(default_factory=Probe)
    metrics: list[str] = Field(default_factory=list, description="default: those of the kind")
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
        if self.kind not in task_kinds:
            raise ValueError(f"kind: there is no task kind {self.kind!r}. {did_you_mean(self.kind, task_kinds)}")
        known = self.known()
        for m in self.metrics:
            if m not in known and not re.fullmatch(METRIC_PATTERNS.get(self.kind, r"(?!)"), m):
                raise ValueError(f"metrics: a {self.kind} task has no metric {m!r}. {did_you_mean(m, known)}")
        for r in self.reference:
            if self.kind != "retrieval" and r.metric not in self.wanted():
                raise ValueError(f"reference: {r.model}'s {r.metric!r} is no metric of this task ({self.wanted()})")
        if isinstance(self.templates, list):
            check_templates(self.templates)
        if self.modalities[0] == self.modalities[1]:
            raise ValueError(f"modalities: two different ones, got {list(self.modalities)}")
        if task_kinds.origin(self.kind) is None:
            self._keys_of_the_kind()
        return self

    def _keys_of_the_kind(self) -> None:
        """Raises ValueError for a key that the kind lacks, or needs."""
        owners = {
            "label": (*NAMED, "probe"), "classes": (*NAMED, "probe"), "templates": NAMED, "same": ("retrieval",),
            "bags": ("retrieval",), "train": ("probe",),
        }  # fmt: skip
        for key, kinds in owners.items():
            if getattr(self, key) is not None and self.kind not in kinds:
                raise ValueError(f"{key}: a {self.kind} task has no {key}; kind: {' or '.join(kinds)} has")
        own = self.source.kind
        says_itself = own in ("folder", "clip_benchmark", "kitti", "nuscenes")
        if self.kind in NAMED and self.templates is None and own != "clip_benchmark":
            raise ValueError(
                "templates: give the prompts, for example ['a photo of a {}.'], or ['{}'] for the bare name"
            )
        if self.label is None and self.kind in (*NAMED, "probe") and not says_itself:
            raise ValueError(f"label: say where a {own} row's class stands, for example label: json:class")
        if self.label is None and self.kind == "multilabel":
            raise ValueError("label: name the column that lists an item's classes")
        if self.kind == "probe" and self.train is None:
            raise ValueError("train: say where the training items stand, for example train: {split: train}")
        if self.same is not None and self.bags is not None and self.bags.by not in ("neighbours", self.same):
            raise ValueError(f"bags.by: with same: {self.same} bags are made by that column or by neighbours")

    def known(self) -> tuple[str, ...]:
        """Metrics of the kind; those of a compositional task are called after what is to be chosen."""
        if self.kind == "compositional":
            return (f"{self.modalities[1]}_score", f"{self.modalities[0]}_score", "group_score")
        return DEFAULT_METRICS[self.kind]

    def wanted(self) -> list[str]:
        """The metrics asked for; default: those of the kind."""
        return list(self.metrics or self.known())

    def recall_ks(self) -> list[int]:
        """The k of every R@k asked for."""
        return self.numbers(r"R@(\d+)")

    def numbers(self, pattern: str) -> list[int]:
        """The number in every wanted metric that ``pattern`` matches whole."""
        found = (re.fullmatch(pattern, m) for m in self.wanted())
        return sorted({int(m.group(1)) for m in found if m is not None})

    def needed(self) -> list[str]:
        """The modalities a model must have."""
        return [self.modalities[0]] if self.kind == "probe" else list(self.modalities)

    def training(self) -> Task:
        """A probe's task with the source of its training items."""
        assert self.train is not None, "Task._fits sees to it"
        source = {**self.source.model_dump(), **self.train.model_dump(exclude_unset=True)}
        return self.model_copy(update={"source": Source.model_validate(source)})


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
    source = origin.get("plugins", str(path))
    import_plugins(named_in(raw, source), f"plugins (in {source})")
    kind = raw.get("kind")
    try:
        model: type[Task] = task_kinds[kind].Task if isinstance(kind, str) else Task
    except ConfigError as e:
        raise ConfigError(f"kind (in {origin.get('kind', str(path))}): {e}") from e
    return parse(model, raw, origin, str(path))


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
