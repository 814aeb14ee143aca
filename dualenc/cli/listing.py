"""dualenc list: what can be named in a recipe or on the command line."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from dualenc import plugins
from dualenc.cli.app import Debug, app
from dualenc.config import read_yaml
from dualenc.errors import ConfigError, did_you_mean
from dualenc.registry import Registry
from dualenc.shipped import shipped_recipes


@app.command("list")
def list_(
    what: Annotated[str, typer.Argument(help="recipes, encoders, losses, terms, sources or tasks")],
    debug: Debug = False,
) -> None:
    """List what can be named in a recipe or on the command line."""
    listings = {
        "recipes": _recipes,
        "encoders": _encoders,
        "losses": _losses,
        "terms": _terms,
        "sources": _sources,
        "tasks": _tasks,
    }
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
    from dualenc.encoders import list_encoders, own_towers

    for family, names in list_encoders().items():
        Console().print(f"[bold]{family}/[/] {', '.join(names)}", highlight=False)
    _print_outside("encoders", own_towers)


def _losses() -> None:
    _registered("loss", "losses", "dualenc.losses")


def _terms() -> None:
    _registered("distillation term", "terms", "dualenc.distill.terms")


def _registered(what: str, registry: str, room: str) -> None:
    """A list of ``registry`` in the package ``room``: nothing is imported but what ``--plugins`` names."""
    package, *below = room.split(".")
    found = docstrings(registry, Path(__file__).parents[1].joinpath(*below))
    rows = {n: (summary(doc), "dualenc") for n, doc in found.items()}
    group = f"{package}.{registry}"
    rows |= {n: ("", ", ".join(e.module for e in same)) for n, same in plugins.entry_points(group).items()}
    if plugins.are_named():
        entries: Registry[Any] = vars(import_module(".".join([package, below[0]])))[registry]
        outside = (n for n in entries if entries.source(n) != "dualenc")
        rows |= {n: (summary(entries.loaded()[n].__doc__ or ""), entries.source(n)) for n in outside}
    _print(what, ((n, *row) for n, row in sorted(rows.items())))


def _sources() -> None:
    from dualenc.data.sources import sources as layouts
    from dualenc_data_tools.sources import sources

    _print(
        "source", ((n, _about(sources if n in sources.loaded() else layouts, n), sources.source(n)) for n in sources)
    )


def _about(registry: Registry[Any], name: str) -> str:
    """What an entry says of itself in a line; nothing for an entry point that nobody has imported."""
    entry = registry.loaded().get(name)
    if entry is None or isinstance(entry, type):
        return ((entry.__doc__ if entry is not None else "") or "").strip().split("\n")[0]
    return str(entry.about)


def _print(what: str, rows: Iterable[tuple[str, str, str]]) -> None:
    """(name, what it is, which package brings it); the last is shown where one is from outside."""
    listed = list(rows)
    outside = any(origin != "dualenc" for _, _, origin in listed)
    table = Table(
        what, "description", *(["from"] if outside else []), show_lines=any("\n" in doc for _, doc, _ in listed)
    )
    for name, doc, origin in listed:
        table.add_row(name, escape(doc), *([origin] if outside else []))
    Console().print(table)


def _print_outside(what: str, registry: Registry[Any]) -> None:
    outside = {n: registry.source(n) for n in registry}
    said = ", ".join(f"{n} ({source})" for n, source in outside.items() if source != "dualenc")
    if said:
        Console().print(f"{what} from outside: {said}", highlight=False, markup=False)


LINES = ("Formula", "Paper", "Needs")
"""What a loss or term says of itself in lines of its docstring that begin so."""


def said(doc: str) -> dict[str, str]:
    """Formula, Paper and Needs of a docstring, those that it has."""
    found = (line.strip().partition(": ") for line in doc.split("\n"))
    return {name: text for name, _, text in found if name in LINES}


def summary(doc: str) -> str:
    """The first line of a docstring, then its formula, paper and needs, a line each."""
    lines = said(doc)
    more = [lines["Formula"]] if "Formula" in lines else []
    more += [f"{name.lower()}: {lines[name]}" for name in LINES[1:] if name in lines]
    return "\n".join([doc.strip().split("\n")[0], *more])


def declared(registry: str, folder: Path) -> dict[str, str]:
    """Name → first line of the docstring of what ``@REGISTRY.register("NAME")`` decorates below ``folder``."""
    return {name: doc.split("\n")[0] for name, doc in docstrings(registry, folder).items()}


def docstrings(registry: str, folder: Path) -> dict[str, str]:
    """Name → docstring of every class or function below ``folder`` that ``@REGISTRY.register("NAME")`` decorates.

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
                        out[name] = ast.get_docstring(node) or ""
    return out


def _tasks() -> None:
    from dualenc_evals.catalog import list_tasks
    from dualenc_evals.kinds import kinds

    table = Table("task", "kind", "what it measures")
    for task in list_tasks():
        table.add_row(task.name, task.kind, task.description)
    Console().print(table)
    _print_outside("kinds of task", kinds)
