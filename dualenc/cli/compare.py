"""dualenc compare: methods under one budget, or trained models beside their teacher."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dualenc.cli import names
from dualenc.cli.app import Debug, app
from dualenc.cli.evaluate import words
from dualenc.errors import ConfigError, DualencError
from dualenc.terminal import PatientConsole, say

if TYPE_CHECKING:
    from dualenc.compare import Comparison, Study
    from dualenc_evals.pages.comparison import MethodTable

SHOWN_FAILURES = 3


@app.command()
def compare(
    what: Annotated[
        list[str],
        typer.Argument(
            help="Recipes to train, the control first; or one YAML file with methods; or MODELs that are trained "
            "already, the teacher first. key=value changes every recipe.",
            autocompletion=names.recipes,
        ),
    ],
    seeds: Annotated[
        int | None, typer.Option("--seeds", min=1, help="Number of seeds. Default: the file's, else 3.")
    ] = None,
    tasks: Annotated[
        str, typer.Option("--tasks", help="Task names or YAML files, comma-separated. Default: the recipes' own.")
    ] = "",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Folder of the runs and of compare.html, .md and .json (default: runs/compare/NAME); for MODELs the "
            "HTML page (default: compare.html).",
        ),
    ] = None,
    ranks: Annotated[
        int | None, typer.Option("--ranks", min=1, help="Processes of each run. Default: the file's, else 1.")
    ] = None,
    equal_compute: Annotated[
        bool,
        typer.Option(
            "--equal-compute",
            help="Also train methods whose step costs more or less for as many steps as cost what the control's do.",
        ),
    ] = False,
    threads: Annotated[
        int, typer.Option("--threads", min=1, help="For MODELs: CPU threads of the timed forward passes.")
    ] = 1,
    debug: Debug = False,
) -> None:
    """Compare methods: train recipes under one budget with several seeds, or measure trained models.

    The same command resumes an interrupted comparison. dualenc compare quickstart quickstart/slip budget.steps=100
    """
    from dualenc.compare import from_recipes, read_comparison
    from dualenc.compare.study import is_comparison

    given = [w for w in what if not _is_override(w)]
    overrides = [w for w in what if _is_override(w)]
    if given and all(_is_model(w) for w in given):
        if overrides:
            raise ConfigError(f"dualenc compare: {overrides[0]}: models are trained already; overrides are for recipes")
        _models(given, tasks, out or Path("compare.html"), threads)
        return
    changed: dict[str, Any] = {k: v for k, v in {"seeds": seeds, "ranks": ranks, "tasks": words(tasks)}.items() if v}
    if len(given) == 1 and is_comparison(given[0]):
        comparison = read_comparison(given[0], overrides, **changed)
    else:
        models = [w for w in given if _is_model(w)]
        if models:
            raise ConfigError(
                f"dualenc compare: {models[0]} is a trained model, others are recipes; compare models with models "
                "or recipes with recipes"
            )
        comparison = from_recipes(given, overrides, **changed)
    _methods(comparison, out or Path("runs/compare") / comparison.name, equal_compute)


def _is_override(word: str) -> bool:
    return "=" in word and not Path(word).exists()


def _is_model(word: str) -> bool:
    return Path(word).is_dir() or word.split(":", 1)[0] in ("hf", "open_clip", "laion_clap")


def _models(models: list[str], tasks: str, out: Path, threads: int) -> None:
    from dualenc.api.runs import resolve_tasks
    from dualenc_evals.studies.compare import compare as run
    from dualenc_evals.studies.compare import markdown

    say(markdown(run(models, resolve_tasks(words(tasks)), out, threads=threads)))
    PatientConsole(stderr=True).print(f"page: {out}", highlight=False, soft_wrap=True)


def _methods(comparison: Comparison, folder: Path, equal_compute: bool) -> None:
    from dualenc.compare import run_study
    from dualenc.compare.method_table import table_of
    from dualenc.files import write_atomically
    from dualenc_evals.pages.comparison import explained, markdown, write_method_table

    console = PatientConsole(stderr=True)

    def progress(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    study = run_study(comparison, folder, equal_compute, progress)
    table: MethodTable = table_of(study)
    text = markdown(table)
    write_atomically(folder / "compare.md", f"{text}\n\n{explained(table)}\n")
    page = write_method_table(table, folder / "compare.html")
    say(text)
    progress(explained(table))
    progress(f"page: {page}")
    _end(study)


def _end(study: Study) -> None:
    """Raises DualencError if a run failed, when everything else is done and written."""
    failed = study.failed
    if failed:
        more = f"; and {len(failed) - SHOWN_FAILURES} more" if len(failed) > SHOWN_FAILURES else ""
        raise DualencError(
            f"{len(failed)} runs failed: {'; '.join(failed[:SHOWN_FAILURES])}{more}. The same command tries them again"
        )
