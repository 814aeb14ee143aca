"""One class per name, and no file called as two others are: a name in an error or a question means one thing."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
CODE = sorted(p for top in ("dualenc", "evals", "data_tools", "benchmarks") for p in (ROOT / top).rglob("*.py"))
EVERYWHERE = {"__init__.py", "__main__.py", "conftest.py"}


def classes(path: Path) -> list[str]:
    """Names of a module's classes, without those inside a class (``Config``) and the module's own (``_X``)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [n.name for n in tree.body if isinstance(n, ast.ClassDef) and not n.name.startswith("_")]


def test_no_class_name_stands_twice() -> None:
    where = defaultdict(list)
    for path in CODE:
        for name in classes(path):
            where[name].append(path.relative_to(ROOT).as_posix())
    twice = {name: paths for name, paths in where.items() if len(paths) > 1}
    assert twice == {}


def test_no_file_is_called_as_two_others_are() -> None:
    where = defaultdict(list)
    for path in CODE:
        where[path.name].append(path.relative_to(ROOT).as_posix())
    three = {name: paths for name, paths in where.items() if len(paths) > 2 and name not in EVERYWHERE}
    assert three == {}


def test_the_walk_sees_a_class(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text("class A:\n    class Config: ...\nclass _B: ...\n")
    assert classes(tmp_path / "x.py") == ["A"]
