"""Run tasks on a model: the one entry for the command line, for training, and for any object that can embed.

Results are a plain dictionary (and a JSON file) that says what was measured, on what, by which model and versions:

    {"model": what the model says of itself,
     "tasks": {name: {version, definition, kind, n, metrics, ci, chance, reference, data_digest, templates, skipped,
                      in_training, notes, details}},
     "environment": versions, seed, batch size,
     "run": when, on how many ranks}

All but ``run`` is a function of model, tasks, data and environment: byte for byte the same on 1 or 8 ranks, in one go
or after a kill and ``resume``.

Broken items are left out of the numbers, counted and named in ``skipped``; beyond the task's ``max_skipped`` no
number is given. Shares are between 0 and 1. The same command gives the same numbers on any number of ranks.
"""

from __future__ import annotations

import errno
import json
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from dualenc.config import Source
from dualenc.data.modalities import DecodeError, ModalityInput, modalities
from dualenc.data.modalities.modality import of_one_item
from dualenc.distributed.world import World
from dualenc.errors import ConfigError, DataError
from dualenc.files import replacing, write_atomically
from dualenc.model import Bundle
from dualenc.terminal import PatientConsole
from dualenc.versions import versions
from dualenc_evals.features import EvalModel, Seen, Store, digest_of
from dualenc_evals.kinds import Collected, Measured, kinds
from dualenc_evals.overlap import TrainingShards, overlap, sentence
from dualenc_evals.pages.table import print_table
from dualenc_evals.ranks import ranks_of
from dualenc_evals.read.shards import Rows, read_rows
from dualenc_evals.task import Task

PACKAGES = ("dualenc", "torch", "numpy", "open_clip_torch", "timm", "transformers", "pillow")
SHOWN_SKIPPED = 100
OTHER_KINDS_KEYS: dict[str, Any] = {
    **dict.fromkeys(("label", "classes", "templates", "same", "bags", "train")),
    "other_labels": "error",
    "identical": "distinct",
    "probe": {"k": 20, "temperature": 0.07, "ways": 5, "queries": 15, "episodes": 600},
}
"""Counted in every task's ``definition``: results were first written when all kinds shared one set of keys."""
LATER_KEYS: dict[str, Any] = {"prototypes": None, "depths": None, "train.modality": None}
"""Keys that tasks got later: left out of the ``definition`` where they have their default."""

__all__ = ["EvalModel", "environment", "evaluate", "print_table", "run_task", "write_json"]


def evaluate(
    embedder: EvalModel,
    tasks: Sequence[Task],
    world: World | None = None,
    out: Path | None = None,
    cache_dir: Path | None = None,
    batch_size: int = 64,
    progress: bool = True,
    seed: int = 0,
    details: bool = True,
    resume: bool = False,
    seen: Seen | None = None,
    training: Sequence[Source] = (),
) -> dict[str, Any]:
    """Evaluate ``embedder`` on ``tasks``; every rank of ``world`` must call this.

    Args:
        embedder: any object with ``embed(modality, items, batch_size) → [n, D]`` and ``describe() → dict``, see
            :class:`dualenc_evals.features.EvalModel`.
        world: the ranks that share the work; default: the process group if there is one.
        out: where rank 0 writes the results; written after each task, so a kill loses one task at most.
        cache_dir: features are kept here by content (model, data, batch size) and reused by the next run.
        batch_size: items embedded at once.
        seed: of the bootstrap intervals and of the examples drawn.
        details: examples, confusion, similarity, for the report (rank 0's result has them).
        resume: take the finished tasks from ``out`` as they are and continue with the next. Within a task, features in
            ``cache_dir`` are reused whether or not ``resume`` is set.
        seen: what is known of the data's files, kept by the caller from one evaluation to the next (training evaluates
            the same files again and again and need not read, digest and check them each time).
        training: the shards the model was trained on (:func:`dualenc_evals.overlap.training_sources`): each task then
            says how many of its items occur in those that are on this machine (``in_training``).

    Returns:
        The results, the same on every rank except for ``details``.

    Raises:
        ConfigError, DataError: task, model and data do not fit together; ``out`` holds results of another evaluation
            than the one to resume. The same on every rank.
    """
    ranks = ranks_of(world)
    names = [t.name for t in tasks]
    twice = {n for n in names if names.count(n) > 1}
    if twice:
        raise ConfigError(f"tasks: {sorted(twice)[0]!r} is listed twice")
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
    if out is not None:
        ranks.share(lambda: check_writable(Path(out)))
    results: dict[str, Any] = {
        "model": json.loads(json.dumps(embedder.describe(), default=str)),
        "tasks": {},
        "environment": environment(seed, batch_size),
        "run": {"date": datetime.now(UTC).isoformat(timespec="seconds"), "ranks": ranks.size},
    }
    done = ranks.share(lambda: finished(out, results, tasks) if resume else {})
    shown_as = (
        {m: part.kind or m for m, part in embedder.bundle.parts.items()} if isinstance(embedder, OfBundle) else {}
    )
    with Progress(progress and ranks.is_main) as bar:
        known = {} if seen is None else seen
        trained_on = TrainingShards(training) if training else None
        store = Store(embedder, ranks, Checker(embedder), batch_size, cache_dir, bar.advance, shown_as, known)
        for task in tasks:
            bar.begin(task.name)
            kept = done.get(task.name)
            results["tasks"][task.name] = run_task(task, store, seed, details, trained_on) if kept is None else kept
            if out is not None and ranks.is_main:
                write_json(Path(out), results)
    return results


def finished(out: Path | None, now: dict[str, Any], tasks: Sequence[Task]) -> dict[str, Any]:
    """The tasks that ``out`` holds already, by name.

    Raises:
        ConfigError: no ``out``; or it was written by another model, other versions or settings, or the task has
            changed: resuming would mix two evaluations in one file.
        DataError: ``out`` is damaged.
    """
    if out is None:
        raise ConfigError("resume: name the results file to resume (out, --out FILE.json)")
    out = Path(out)
    if not out.is_file():
        return {}
    try:
        old = json.loads(out.read_text(encoding="utf-8"))
        parts = {key: old[key] for key in ("model", "environment")}
        done = dict(old["tasks"])
    except (ValueError, KeyError, TypeError) as e:
        raise DataError(f"resume: {out} is not a results file ({e!r}); remove it to start over") from e
    for key, saved in parts.items():
        other = sorted(k for k in {*saved, *now[key]} if saved.get(k) != now[key].get(k))
        if other:
            raise ConfigError(
                f"resume: {out} was written with {key}.{other[0]} = {saved.get(other[0])!r}, now it is "
                f"{now[key].get(other[0])!r}; leave out --resume, or give another --out"
            )
    for task in tasks:
        if task.name in done and done[task.name].get("definition") != definition(task):
            raise ConfigError(f"resume: task {task.name} has changed since {out} was written; leave out --resume")
    return done


def definition(task: Task) -> str:
    """Digest of everything a task says; of absolute paths only the last part, so that machines agree.

    It is taken over the keys of all built-in kinds, those that the task's own kind lacks with their defaults.
    """

    def plain(x: Any) -> Any:
        if isinstance(x, dict):
            return {k: plain(v) for k, v in x.items()}
        if isinstance(x, list):
            return [plain(v) for v in x]
        return Path(x).name if isinstance(x, str) and x.startswith("/") else x

    said = task.model_dump(mode="json")
    for key, default in LATER_KEYS.items():
        *outer, last = key.split(".")
        at = said
        for name in outer:
            at = at.get(name) or {}
        if last in at and at[last] == default:
            del at[last]
    return digest_of(plain(OTHER_KINDS_KEYS | said))


def run_task(
    task: Task, store: Store, seed: int, details: bool, training: TrainingShards | None = None
) -> dict[str, Any]:
    """One task: rows → contents → features → numbers."""
    for modality in task.needed():
        store.require(modality)
    rows = store.ranks.agree(lambda: read_rows(task))
    try:
        data, got = _measure(task, rows, store, seed, details)
    except DataError:
        if store.strict:
            raise
        # Perhaps an item is broken: check all of them, leave out what is broken and try again. Checking decodes every
        # item once more, so a single process does it only after something went wrong.
        store.strict = True
        data, got = _measure(task, rows, store, seed, details)
    notes = [*data.notes, *got.get("notes", [])]
    if data.skipped:
        first = data.skipped[0]
        notes.append(
            f"{len(data.skipped)} of {data.asked} items were left out; the first: {first['id']}: {first['reason']}."
        )
    seen = None if training is None else overlap(rows.rows, task.read_modalities(), store, training)
    if seen is not None and sentence(seen):
        notes.append(sentence(seen))
    result: dict[str, Any] = {
        "version": task.version,
        "definition": definition(task),
        "kind": task.kind,
        "description": task.description,
        "modalities": list(task.modalities),
        "n": got["n"],
        "metrics": got["metrics"],
        "ci": got["ci"],
        "chance": got["chance"],
        "reference": [r.model_dump() for r in task.reference],
        "data_digest": data.data_digest,
        "templates": got.get("templates"),
        "skipped": {"count": len(data.skipped), "of": data.asked, "items": data.skipped[:SHOWN_SKIPPED]},
        "notes": notes,
    }
    if seen is not None:
        result["in_training"] = seen
    result |= {k: v for k, v in got.items() if k in ("largest_class_share", "settings", "details")}
    return result


def _measure(task: Task, rows: Rows, store: Store, seed: int, details: bool) -> tuple[Collected, Measured]:
    kind = kinds[task.kind]()
    data = kind.collect(task, rows, store)
    refuse_too_many(task, data.skipped, data.asked)
    return data, kind.evaluate(task, data, store, seed, details)


def refuse_too_many(task: Task, skipped: Sequence[dict[str, str]], asked: int) -> None:
    """Raises DataError if too many items are broken for the number to mean anything, or none is left."""
    if len(skipped) > task.max_skipped * asked or len(skipped) >= asked:
        first = skipped[0]
        raise DataError(
            f"task {task.name}: {len(skipped)} of {asked} items cannot be used (max_skipped is {task.max_skipped}); "
            f"the first: {first['id']}: {first['reason']}"
        )


@runtime_checkable
class OfBundle(Protocol):
    """The embedder of a bundle, which knows how each modality's items are decoded and shown."""

    @property
    def bundle(self) -> Bundle:
        """The model with its inputs."""
        ...


class Checker:
    """(modality, raw) → why an item cannot be embedded, or None: what the model's own decoder says of it.

    For an embedder without a bundle, the modality's decoder with its default settings decides.
    """

    def __init__(self, embedder: EvalModel) -> None:
        self._inputs: dict[str, ModalityInput] = dict(embedder.bundle.inputs) if isinstance(embedder, OfBundle) else {}
        self._own = frozenset(self._inputs)

    def __call__(self, modality: str, raw: bytes | str) -> str | None:
        if isinstance(raw, str) and modality not in self._own:
            return None
        if modality not in self._inputs and modality in modalities:
            cls = modalities[modality]
            self._inputs[modality] = cls(cls.Config())
        decoder = self._inputs.get(modality)
        try:
            if decoder is not None:
                with of_one_item():
                    decoder.eval(decoder.decode(raw))
        except DecodeError as e:
            return str(e)
        return None


def environment(seed: int, batch_size: int) -> dict[str, Any]:
    """What else a number depends on. World size and date are not in it: they change nothing."""
    return {
        "seed": seed,
        "batch_size": batch_size,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions(PACKAGES),  # an optional package that is missing was not used
    }


def check_writable(out: Path) -> None:
    """Find out before hours of work whether the results can be written.

    Raises:
        ConfigError: they cannot.
    """
    try:
        if out.is_dir():
            raise IsADirectoryError(errno.EISDIR, "Is a directory")
        with replacing(out.with_name(f"{out.name}.probe")) as probe:
            probe.touch()
        out.with_name(f"{out.name}.probe").unlink()
    except (OSError, ValueError) as e:
        why = (e.strerror or str(e)) if isinstance(e, OSError) else str(e)
        raise ConfigError(f"out: {str(out)!r} cannot be written ({why}); name another file") from e


def write_json(path: Path, results: dict[str, Any]) -> None:
    """Write the results, so that a reader finds the old file or the new one, never half of it."""
    write_atomically(path, json.dumps(results, ensure_ascii=False, indent=1, allow_nan=False) + "\n")


class Progress:
    """A bar on the terminal, or nothing."""

    def __init__(self, visible: bool) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Bar(*columns, console=PatientConsole(stderr=True), disable=not visible, transient=True)
        self._name, self._what = "", ""
        self._id: Any = None

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def begin(self, name: str) -> None:
        """Name the task that the next bars belong to."""
        self._name, self._what = name, ""

    def advance(self, what: str, done: int, total: int) -> None:
        """``done`` of ``total`` items of the modality ``what`` are embedded."""
        if what != self._what:
            self._what = what
            self._id = self._bar.add_task(f"{self._name}: {what}", total=total)
        self._bar.update(self._id, completed=done)
