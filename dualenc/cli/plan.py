"""The command ``plan``: memory and traffic of a recipe on a cluster, before there is one."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from dualenc.cli.app import Debug, Overrides, app
from dualenc.config import load_recipe
from dualenc.errors import ConfigError


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(help="A recipe: YAML file, or a name from dualenc list recipes.")],
    overrides: Overrides = None,
    ranks: Annotated[int, typer.Option("--ranks", min=1, help="World size: number of devices over all machines.")] = 1,
    memory: Annotated[float, typer.Option("--memory", help="Memory of one device in GiB.")] = 80.0,
    ranks_per_node: Annotated[int, typer.Option("--ranks-per-node", min=1, help="Devices in one machine.")] = 8,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON: every engine and micro-batch, in bytes.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Plan memory and traffic of a recipe for every engine and micro-batch, and recommend one; nothing is read."""
    from dualenc.model.start_from import completed

    if memory <= 0:
        raise ConfigError(f"--memory must be above 0 GiB, got {memory:g}")
    loaded = load_recipe(recipe, overrides or [], completed)
    from dualenc.plan import planning, table

    planned = planning.plan(loaded, ranks, memory * 2**30, ranks_per_node)
    print(json.dumps(planning.as_json(planned), indent=1) if as_json else table.printed(planned))
