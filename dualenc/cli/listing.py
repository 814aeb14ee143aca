"""dualenc list: what can be named in a recipe or on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from dualenc.cli.app import Debug, app
from dualenc.config import load_recipe
from dualenc.errors import ConfigError, did_you_mean

RECIPES = Path("recipes")


@app.command("list")
def list_(
    what: Annotated[str, typer.Argument(help="recipes, encoders, losses, terms or tasks")], debug: Debug = False
) -> None:
    """List what can be named in a recipe or on the command line."""
    listings = {"recipes": _recipes, "encoders": _encoders, "losses": _losses, "terms": _terms, "tasks": _tasks}
    if what not in listings:
        raise ConfigError(f"dualenc list: cannot list {what!r}. {did_you_mean(what, listings)}")
    listings[what]()


def _recipes() -> None:
    if not RECIPES.is_dir():
        raise ConfigError(
            f"There is no folder {RECIPES} here; recipes stand in the repository: run this at its top level"
        )
    table = Table(Column("recipe", overflow="fold"), "what it trains")
    for path in sorted(p for p in RECIPES.rglob("*.yaml") if "launch" not in p.parts):  # launchers' own files there
        try:
            table.add_row(str(path), load_recipe(path).description)
        except ConfigError as e:
            table.add_row(str(path), f"[red]cannot be used:[/] {escape(str(e))}")
    Console().print(table)


def _encoders() -> None:
    from dualenc.encoders import list_encoders

    for family, names in list_encoders().items():
        Console().print(f"[bold]{family}/[/] {', '.join(names)}", highlight=False)


def _losses() -> None:
    from dualenc.losses import losses

    _classes("loss", losses)


def _terms() -> None:
    from dualenc.distill import terms

    _classes("distillation term", terms)


def _classes(what: str, known: Any) -> None:
    table = Table(what, "what it is")
    for name in known:
        table.add_row(name, (known[name].__doc__ or "").strip().split("\n")[0])
    Console().print(table)


def _tasks() -> None:
    from dualenc_evals.catalog import list_tasks

    table = Table("task", "kind", "what it measures")
    for task in list_tasks():
        table.add_row(task.name, task.kind, task.description)
    Console().print(table)
