"""dualenc init: a first recipe for some shards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dualenc.cli.app import Debug, app
from dualenc.errors import ConfigError
from dualenc.terminal import PatientConsole


@app.command()
def init(
    shards: Annotated[str, typer.Argument(help="A folder of shards, a brace pattern, or a URL.")],
    out: Annotated[Path, typer.Option("--out", help="Recipe to write.")] = Path("recipe.yaml"),
    debug: Debug = False,
) -> None:
    """Write a commented recipe for shards: looks at what is in them, and says why it chose what.

    Held-out shards (val-*.tar, or the last of many) become a task beside the recipe.
    """
    from dualenc.files import write_atomically
    from dualenc_data_tools.first_recipe import first_recipe, task_file

    for path in (out, task_file(out)):
        if path.exists():
            raise ConfigError(f"{path} exists; choose another name with --out, or remove it")
    written = first_recipe(shards, out)
    write_atomically(out, written.recipe)
    console = PatientConsole(stderr=True)
    if written.task is not None:
        write_atomically(task_file(out), written.task)
        console.print(f"task: {task_file(out)}", highlight=False, markup=False, soft_wrap=True)
    for line in written.said:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(f"recipe: {out}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"next: dualenc train {out}", highlight=False, markup=False, soft_wrap=True)
