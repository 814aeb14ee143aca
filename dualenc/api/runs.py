"""Train and evaluate: what ``dualenc train`` and ``dualenc eval`` do, as functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualenc.config import Recipe, apply_override, load_recipe, parse

if TYPE_CHECKING:
    from dualenc.api.model import Model
    from dualenc.model import Bundle
    from dualenc_evals.task import Task

__all__ = ["evaluate", "evaluation_of", "load_recipe", "resolve_tasks", "train"]


def train(recipe: Recipe | str | Path, overrides: Iterable[str] = (), profile: int | None = None) -> Path:
    """Train a recipe; called again, it resumes from the newest checkpoint. All ranks of a launcher call it alike.

    Args:
        recipe: a recipe, a YAML file, or the name of one that comes with the package, such as ``quickstart``.
        overrides: ``key.sub=value``, as on the command line.
        profile: after a short warm-up, measure where the time of so many steps goes (``profile.md`` in the run folder).

    Returns:
        The run folder, which :func:`dualenc.load_model` reads.

    Raises:
        ConfigError: naming the key, its value and what to write instead.
        DataError: shards that are missing or too broken.
        DivergenceError: too many non-finite steps in a row.
    """
    from dualenc.train.check import check_recipe
    from dualenc.train.loop import train as run

    loaded = _with(recipe, list(overrides))
    check_recipe(loaded)
    tasks, guarded = tasks_of(loaded)
    return run(loaded, evaluation_of(tasks) if tasks else None, evaluation_of(guarded) if guarded else None, profile)


def tasks_of(recipe: Recipe) -> tuple[list[Task], list[Task]]:
    """The tasks of ``eval.tasks`` and ``eval.guard.tasks``, once the data of each has been found.

    Raises:
        ConfigError: an unknown task or key.
        DataError: data that is missing or damaged: before the first step, not after the last.
    """
    from dualenc_evals.read.shards import read_rows

    tasks = resolve_tasks(recipe.eval.tasks)
    guarded = resolve_tasks(recipe.eval.guard.tasks) if recipe.eval.guard is not None else []
    for task in (*tasks, *guarded):
        read_rows(task)
    return tasks, guarded


def _with(recipe: Recipe | str | Path, overrides: list[str]) -> Recipe:
    if not isinstance(recipe, Recipe):
        from dualenc.model.start_from import completed

        return load_recipe(recipe, overrides, completed)
    if not overrides:
        return recipe
    raw, origin = recipe.model_dump(mode="json"), dict[str, str]()
    for item in overrides:
        apply_override(raw, item, origin)
    return parse(Recipe, raw, origin, recipe.name)


def evaluate(
    model: Model | Bundle | str | Path,
    tasks: str | Path | Task | Sequence[str | Path | Task],
    *,
    out: str | Path | None = None,
    cache_dir: str | Path | None = None,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = False,
    details: bool = False,
) -> dict[str, Any]:
    """Zero-shot evaluation; in a process group every rank calls it and shares the work.

    Args:
        model: from :func:`dualenc.load_model`, or what that takes.
        tasks: names (``dualenc list tasks`` shows them), YAML files or tasks.
        out: where results.json goes.
        cache_dir: features are kept there and found by the next run.
        batch_size: items embedded at once.
        seed: of the bootstrap intervals.
        details: examples, confusions and similarities too, for a report.

    Returns:
        ``{"model", "tasks": {name: {"metrics", "ci", "chance", "n", …}}, "environment", "run"}``.

    Raises:
        ConfigError: an unknown task, or one that the model lacks a modality for.
        DataError: data that is not there or too broken.
    """
    from dualenc.api.model import Model, load_model
    from dualenc.model import Bundle
    from dualenc_evals.harness import evaluate as run
    from dualenc_evals.overlap import training_sources

    loaded = load_model(model) if isinstance(model, str | Path) else model
    embedder = loaded.embedder() if isinstance(loaded, Bundle) else loaded.embedder
    assert isinstance(loaded, Model | Bundle)
    asked = [tasks] if isinstance(tasks, str | Path) or not isinstance(tasks, Sequence) else tasks
    return run(
        embedder,
        resolve_tasks(asked),
        out=None if out is None else Path(out),
        cache_dir=None if cache_dir is None else Path(cache_dir),
        batch_size=batch_size,
        seed=seed,
        progress=progress,
        details=details,
        training=training_sources(model) if isinstance(model, str | Path) else (),
    )


def resolve_tasks(names: Sequence[str | Path | Task]) -> list[Task]:
    """Task names or YAML files → tasks; empty names are skipped.

    Raises:
        ConfigError: an unknown name; raised before the first step, not after the last.
    """
    from dualenc_evals.catalog import load_task
    from dualenc_evals.task import Task

    return [n if isinstance(n, Task) else load_task(n) for n in names if not isinstance(n, str) or n]


def evaluation_of(tasks: list[Task]) -> Callable[[Any, Any], Mapping[str, float]]:
    """The evaluation that the training loop calls, so that the loop need not know tasks."""
    seen: dict[Any, Any] = {}  # a run evaluates the same files again and again

    def measure(embedder: Any, world: Any) -> dict[str, float]:
        from dualenc_evals.harness import evaluate as run

        results = run(embedder, tasks, world=world, progress=False, details=False, seen=seen)
        return {f"{name}/{k}": v for name, r in results["tasks"].items() for k, v in r["metrics"].items()}

    return measure
