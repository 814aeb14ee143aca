"""dualenc task new: an evaluation task for data of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dualenc.cli.app import Debug, app
from dualenc.errors import ConfigError
from dualenc.terminal import PatientConsole

task_app = typer.Typer(help="Evaluation tasks of your own.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(task_app, name="task")


@task_app.callback()
def _task() -> None:
    """Evaluation tasks of your own."""


@task_app.command("new")
def new(
    data: Annotated[
        str,
        typer.Option(
            "--data", help="A .csv, .tsv, .jsonl, .json or .parquet file, a folder of images or audio, or shards."
        ),
    ],
    kind: Annotated[
        str | None, typer.Option("--kind", help="retrieval, classification or multilabel. Default: what the data have.")
    ] = None,
    label: Annotated[str | None, typer.Option("--label", help="Column (of shards: ending) of the class.")] = None,
    out: Annotated[Path, typer.Option("--out", help="Task to write.")] = Path("task.yaml"),
    debug: Debug = False,
) -> None:
    """Write a commented task for data of your own, which dualenc eval MODEL --tasks FILE runs as it is.

    Looks at the data: which column or member is an image or audio, a caption, a class.
    """
    from dualenc.files import write_atomically
    from dualenc_evals.new_task import new_task

    if out.exists():
        raise ConfigError(f"{out} exists; choose another name with --out, or remove it")
    if out.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"--out {out}: the name of a task ends in .yaml")
    text, said = new_task(data, out, kind, label)
    write_atomically(out, text)
    console = PatientConsole(stderr=True)
    for line in (said, f"task: {out}", f"next: dualenc eval MODEL --tasks {out}"):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
