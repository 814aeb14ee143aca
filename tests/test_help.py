"""Every command says what it takes: ``--help`` of each ends well and names each of its options and arguments."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import typer
from _shared import PYTHONPATH
from typer.testing import CliRunner

from dualenc.cli import app


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, group
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, (*path, name))


FOUND = dict(commands(typer.main.get_command(app)))


def said_by(path: tuple[str, ...]) -> str:
    env = {"COLUMNS": "200", "TERMINAL_WIDTH": "200", "NO_COLOR": "1"}
    done = CliRunner().invoke(app, [*path, "--help"], env=env, terminal_width=200)
    assert done.exit_code == 0, (path, done.output, done.exception)
    return re.sub(r"\x1b\[[0-9;]*m", "", done.output)


def test_all_commands_are_found() -> None:
    named = {" ".join(p) for p in FOUND}
    assert {"", "train", "launch", "eval", "embed", "shards", "shards build", "shards check", "compare"} <= named
    assert len(named) > 15


@pytest.mark.parametrize("path", FOUND, ids=" ".join)
def test_help_names_every_option_and_argument(path: tuple[str, ...]) -> None:
    command, said = FOUND[path], said_by(path)
    for parameter in command.params:
        names = [n for n in parameter.opts if n.startswith("--")] or [parameter.metavar or parameter.name]
        for name in names:
            assert name.lower() in said.lower(), (path, name)
    if command.callback is None or not path:
        return
    signature = inspect.signature(inspect.unwrap(command.callback))
    asked = {n for n, p in signature.parameters.items() if "Context" not in str(p.annotation)}
    assert asked == {p.name for p in command.params if p.name != "help"}
    first = " ".join(command.help.split())[:40]
    assert first
    assert first in " ".join(said.split())


@pytest.mark.parametrize("path", [("eval",), ("train",), ("shards", "build")], ids=" ".join)
def test_help_in_a_process_of_its_own(path: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", PYTHONPATH)
    command = [sys.executable, "-m", "dualenc", *path, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "--debug" in done.stdout
    assert done.stderr == ""
