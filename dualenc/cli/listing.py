"""dualenc list: what can be named in a recipe or on the command line."""

from __future__ import annotations

import ast
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from dualenc import plugins
from dualenc.cli import names
from dualenc.cli.app import Debug, app
from dualenc.config import read_yaml
from dualenc.errors import ConfigError, did_you_mean
from dualenc.registry import Registry
from dualenc.shipped import shipped_recipes

FEW = 40
MOST_GROUPS = 60


@app.command("list")
def list_(
    what: Annotated[
        str,
        typer.Argument(help="recipes, encoders, losses, terms, plans, sources or tasks", autocompletion=names.lists),
    ],
    only: Annotated[
        str, typer.Argument(metavar="[FILTER]", help="Only names that contain this: dualenc list encoders vit_base")
    ] = "",
    debug: Debug = False,
) -> None:
    """List what can be named in a recipe or on the command line."""
    listings: dict[str, Callable[[str], None]] = {
        "recipes": _recipes,
        "encoders": _encoders,
        "losses": _losses,
        "terms": _terms,
        "plans": _plans,
        "sources": _sources,
        "tasks": _tasks,
    }
    if what not in listings:
        raise ConfigError(f"dualenc list: cannot list {what!r}. {did_you_mean(what, listings)}")
    listings[what](only.lower())


def _recipes(only: str) -> None:
    rows = []
    for name, path in shipped_recipes().items():
        if only in name.lower():
            try:
                rows.append((name, str(read_yaml(path)[0].get("description", ""))))
            except ConfigError as e:
                rows.append((name, f"unusable: {e}"))
    _table(("recipe", "what it trains"), rows, only)


def _encoders(only: str) -> None:
    """Families with a handful of names as they are; of hundreds, how many begin alike. With a filter every match."""
    from dualenc.encoders import list_encoders, own_towers

    console = Console()
    found = {f: [n for n in all_of if only in f"{f}/{n}".lower()] for f, all_of in list_encoders().items()}
    if not any(found.values()):
        raise ConfigError(f"dualenc list encoders: no encoder has {only!r} in its name")
    for family, fitting in found.items():
        if not fitting:
            continue
        plural = "s" if len(fitting) > 1 else ""
        console.print(f"[bold]{family}/[/]  {len(fitting):,} encoder{plural}", highlight=False)
        if only or len(fitting) <= FEW or not console.is_terminal:
            shown = [f"{family}/{n}" for n in fitting] if only or not console.is_terminal else fitting
            _columns(console, shown)
        else:
            groups = Counter(re.split(r"[_\-.:/]|\d", n.lower(), maxsplit=1)[0] for n in fitting)
            most = [f"{g}… ({n})" if n > 1 else g for g, n in groups.most_common(MOST_GROUPS)]
            _columns(console, most)
            console.print(
                f"  dualenc list encoders {family}/{groups.most_common(1)[0][0]} lists those", highlight=False
            )
    _print_outside("encoders", own_towers)


def _columns(console: Console, texts: Sequence[str]) -> None:
    """Names beside each other on a terminal, one a line elsewhere; none is broken."""
    if not console.is_terminal:
        for text in texts:
            console.print(f"  {text}", highlight=False, markup=False, soft_wrap=True)
        return
    width = min(max(map(len, texts)) + 2, console.width)
    per_line = max((console.width - 2) // width, 1)
    for i in range(0, len(texts), per_line):
        line = "".join(t.ljust(width) for t in texts[i : i + per_line])
        console.print(f"  {line.rstrip()}", highlight=False, markup=False, soft_wrap=True)


def _losses(only: str) -> None:
    _registered("loss", "losses", "dualenc.losses", only)


def _terms(only: str) -> None:
    _registered("distillation term", "terms", "dualenc.distill.terms", only)


def _plans(only: str) -> None:
    _registered("batch plan", "batch_plans", "dualenc.data.batches", only, home="dualenc.data.batches")


def _registered(what: str, registry: str, room: str, only: str, home: str | None = None) -> None:
    """A list of ``registry`` in the package ``room``: nothing is imported but what ``--plugins`` names.

    Args:
        home: the package that has the registry itself; default: the one below dualenc.
    """
    package, *below = room.split(".")
    found = docstrings(registry, Path(__file__).parents[1].joinpath(*below))
    rows = {n: (summary(doc), "dualenc") for n, doc in found.items()}
    group = f"{package}.{registry}"
    rows |= {n: ("", ", ".join(e.module for e in same)) for n, same in plugins.entry_points(group).items()}
    if plugins.are_named():
        entries: Registry[Any] = vars(import_module(home or ".".join([package, below[0]])))[registry]
        outside = (n for n in entries if entries.source(n) != "dualenc")
        rows |= {n: (summary(entries.loaded()[n].__doc__ or ""), entries.source(n)) for n in outside}
    _print(what, ((n, *row) for n, row in sorted(rows.items())), only)


def _sources(only: str) -> None:
    from dualenc.data.sources import sources as layouts
    from dualenc_data_tools.sources import sources

    rows = ((n, _about(sources if n in sources.loaded() else layouts, n), sources.source(n)) for n in sources)
    _print("source", rows, only)


def _about(registry: Registry[Any], name: str) -> str:
    """What an entry says of itself in a line; nothing for an entry point that nobody has imported."""
    entry = registry.loaded().get(name)
    if entry is None or isinstance(entry, type):
        return ((entry.__doc__ if entry is not None else "") or "").strip().split("\n")[0]
    return str(entry.about)


def _print(what: str, rows: Iterable[tuple[str, str, str]], only: str) -> None:
    """(name, what it is, which package brings it); the last is shown where one is from outside."""
    listed = [row for row in rows if only in row[0].lower()]
    outside = any(origin != "dualenc" for _, _, origin in listed)
    heads = (what, "description", *(["from"] if outside else []))
    _table(heads, [row if outside else row[:2] for row in listed], only)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], only: str) -> None:
    """Names are never broken; what is beside them wraps between words. Not on a terminal: a tab-separated line each.

    Raises:
        ConfigError: the filter leaves nothing.
    """
    if not rows and only:
        raise ConfigError(f"dualenc list: nothing has {only!r} in its name")
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        for row in rows:
            print("\t".join(" ".join(x.split()) for x in row).rstrip())  # rich would turn tabs into spaces
        return
    first, *others = heads
    lined = any("\n" in text for row in rows for text in row)
    columns = (Column(h, overflow="fold") for h in others)
    table = Table(Column(first, no_wrap=True), *columns, show_lines=lined)
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)


def _print_outside(what: str, registry: Registry[Any]) -> None:
    outside = {n: registry.source(n) for n in registry}
    said = ", ".join(f"{n} ({source})" for n, source in outside.items() if source != "dualenc")
    if said:
        Console().print(f"{what} from outside: {said}", highlight=False, markup=False)


LINES = ("Formula", "Paper", "Needs")
"""What a loss or term says of itself in lines of its docstring that begin so."""


OF_PLANS = ("Keeps", "Paper", "Needs")
"""The same of a batch plan."""


def said(doc: str) -> dict[str, str]:
    """Formula, Keeps, Paper and Needs of a docstring, those that it has."""
    found = (line.strip().partition(": ") for line in doc.split("\n"))
    return {name: text for name, _, text in found if name in (*LINES, *OF_PLANS)}


def summary(doc: str) -> str:
    """The first line of a docstring, then its formula, what it keeps, paper and needs, a line each."""
    lines = said(doc)
    more = [lines["Formula"]] if "Formula" in lines else []
    more += [f"{name.lower()}: {lines[name]}" for name in OF_PLANS if name in lines]
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


def _tasks(only: str) -> None:
    from dualenc_evals.catalog import list_tasks
    from dualenc_evals.kinds import kinds

    rows = [(t.name, t.kind, t.description) for t in list_tasks() if only in t.name.lower()]
    _table(("task", "kind", "what it measures"), rows, only)
    _print_outside("kinds of task", kinds)
