"""dualenc list: what can be named in a recipe or on the command line."""

from __future__ import annotations

import ast
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from dualenc.cli.app import Debug, app
from dualenc.config import read_yaml
from dualenc.errors import ConfigError, did_you_mean
from dualenc.shipped import shipped_recipes


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
    table = Table(Column("recipe", overflow="fold"), "what it trains")
    for name, path in shipped_recipes().items():
        try:
            table.add_row(name, str(read_yaml(path)[0].get("description", "")))
        except ConfigError as e:
            table.add_row(name, f"[red]unusable:[/] {escape(str(e))}")
    Console().print(table)


def _encoders() -> None:
    from dualenc.encoders import list_encoders

    for family, names in list_encoders().items():
        Console().print(f"[bold]{family}/[/] {', '.join(names)}", highlight=False)


def _losses() -> None:
    _registered("loss", "losses", Path("losses"))


def _terms() -> None:
    _registered("distillation term", "terms", Path("distill") / "terms")


def _registered(what: str, registry: str, folder: Path) -> None:
    table = Table(what, "description")
    known = declared(registry, Path(__file__).parents[1] / folder)
    known |= {e.name: f"from {e.value}" for e in entry_points(group=f"dualenc.{registry}")}
    for name, doc in sorted(known.items()):
        table.add_row(name, escape(doc))
    Console().print(table)


def declared(registry: str, folder: Path) -> dict[str, str]:
    """Name → first line of the docstring of every class below ``folder`` that ``@REGISTRY.register("NAME")`` decorates.

    Read from the source: importing it would import torch, which takes seconds.
    """
    out = {}
    for path in sorted(folder.rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.ClassDef | ast.FunctionDef):
                continue
            for decorator in node.decorator_list:
                match decorator:
                    case ast.Call(
                        func=ast.Attribute(value=ast.Name(id=owner), attr="register"),
                        args=[ast.Constant(value=str(name))],
                    ) if owner == registry:
                        out[name] = (ast.get_docstring(node) or "").split("\n")[0]
    return out


def _tasks() -> None:
    from dualenc_evals.catalog import list_tasks

    table = Table("task", "kind", "what it measures")
    for task in list_tasks():
        table.add_row(task.name, task.kind, task.description)
    Console().print(table)
