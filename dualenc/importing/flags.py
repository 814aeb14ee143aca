"""A command line of another trainer, read by a table of its flags."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dualenc.errors import ConfigError, did_you_mean

Kind = Literal["text", "count", "number", "switch", "numbers", "counts", "words", "pairs"]


@dataclass(frozen=True)
class Flag:
    """What a flag takes, and what it is when it is not given."""

    kind: Kind
    default: Any = None


Table = Mapping[str, Flag]


def switches(names: str) -> dict[str, Flag]:
    """Flags without a value."""
    return {name: Flag("switch", False) for name in names.split()}


def taking(kind: Kind, names: str) -> dict[str, Flag]:
    """Flags with a value and no default."""
    return {name: Flag(kind) for name in names.split()}


@dataclass
class Given:
    """The flags of one command line.

    Attributes:
        program: what they are flags of, for messages.
        values: flag (with underscores) → value; defaults included.
        said: the flags that the command line names.
        world: number of processes, where the command line or params.txt says it.
    """

    program: str
    values: dict[str, Any]
    said: set[str] = field(default_factory=set)
    world: int | None = None

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def __contains__(self, name: object) -> bool:
        """Whether the command line names it (a default does not count)."""
        return name in self.said

    def shown(self, name: str) -> str:
        """The flag as it is written: ``--batch-size 256``."""
        flag = "--" + name.replace("_", "-")
        value = self.values[name]
        if isinstance(value, bool):
            return flag
        if isinstance(value, Mapping):
            return " ".join([flag, *(f"{k}={v}" for k, v in value.items())])
        text = " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        return f"{flag} {text if len(text) <= 60 else text[:57] + '...'}"


def read_command(argv: Sequence[str], table: Table, program: str) -> Given:
    """The flags of a command line; what stands before the first flag of the script (torchrun …) may be there.

    Raises:
        ConfigError: naming a flag that the program does not have, or a value that is not of its kind.
    """
    words, world = _script_arguments(list(argv))
    given = Given(program, {name: flag.default for name, flag in table.items()}, world=world)
    at = 0
    while at < len(words):
        word = words[at]
        if not word.startswith("--"):
            raise ConfigError(f"{program}: {word!r} is not a flag; write --name value, and quote values with spaces")
        name, equals, value = word.partition("=")
        key = _known(name[2:].replace("-", "_"), table, program)
        at += 1
        follow: list[str] = [value] if equals else []
        if not equals and table[key].kind != "switch":
            many = table[key].kind in ("numbers", "counts", "words", "pairs")
            while at < len(words) and not _is_flag(words[at]) and (many or not follow):
                follow.append(words[at])
                at += 1
        given.values[key] = _value(table[key].kind, follow, name, program)
        given.said.add(key)
    return given


def read_params(path: Path, table: Table, program: str) -> Given:
    """The ``params.txt`` that a run of the program wrote: one ``name: value`` a line, defaults included.

    Raises:
        ConfigError: there is no such file, or no flag of the program is in it.
    """
    if not path.is_file():
        raise ConfigError(f"--params: there is no file {path}")
    given = Given(program, {name: flag.default for name, flag in table.items()})
    found = 0
    for line in path.read_text(encoding="utf-8").splitlines():
        name, _, text = line.partition(": ")
        if name == "world_size" and text.strip().isdigit():
            given.world = int(text)
        if name not in table:
            continue  # what the program worked out for itself: rank, log_path …
        found += 1
        value = _written(text.strip(), table[name].kind)
        if value != table[name].default:
            given.values[name] = value
            given.said.add(name)
    if not found:
        raise ConfigError(f"--params: {path} has no line of {program}'s flags, such as 'batch_size: 256'")
    return given


# --- words -------------------------------------------------------------------------------------------------------


def _script_arguments(words: list[str]) -> tuple[list[str], int | None]:
    """The script's own arguments, and the number of processes that a launcher in front of it says."""
    script = next((i for i, w in enumerate(words) if re.search(r"(^|[./])main(\.py)?$", w)), None)
    if script is None:
        return words, None
    before = " ".join(words[:script]).replace("=", " ").replace("_", "-").split()
    numbers = {"--nproc-per-node": 0, "--nnodes": 1}
    for flag, value in itertools.pairwise(before):
        if flag in numbers and value.isdigit():
            numbers[flag] = int(value)
    processes = numbers["--nproc-per-node"] * numbers["--nnodes"]
    return words[script + 1 :], processes or None


def _is_flag(word: str) -> bool:
    return word.startswith("--") or (word.startswith("-") and not re.fullmatch(r"-\d*\.?\d+(e-?\d+)?", word, re.I))


def _known(name: str, table: Table, program: str) -> str:
    """The flag of that name; argparse takes any beginning that only one flag has."""
    if name in table:
        return name
    begun = [n for n in table if n.startswith(name)]
    if name and len(begun) == 1:
        return begun[0]
    names = [n.replace("_", "-") for n in table]
    raise ConfigError(
        f"{program} has no flag --{name.replace('_', '-')}. {did_you_mean(name.replace('_', '-'), names)} "
        "If it is one of your own fork, leave it out."
    )


def _value(kind: Kind, words: list[str], flag: str, program: str) -> Any:
    if kind == "switch":
        if words:
            raise ConfigError(f"{program}: {flag} takes no value, got {words[0]!r}")
        return True
    if kind in ("words", "pairs") and not words:
        return [] if kind == "words" else {}
    if not words:
        raise ConfigError(f"{program}: {flag} needs a value")
    try:
        if kind == "count":
            return int(words[0])
        if kind == "number":
            return float(words[0])
        if kind in ("numbers", "counts"):
            return [(float if kind == "numbers" else int)(w) for w in words]
    except ValueError as e:
        raise ConfigError(f"{program}: {flag} takes numbers, got {' '.join(words)!r}") from e
    if kind == "pairs":
        return dict(_pairs(words, flag, program))
    return words if kind == "words" else words[0]


def _pairs(words: Sequence[str], flag: str, program: str) -> Iterator[tuple[str, Any]]:
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise ConfigError(f"{program}: {flag} takes key=value, got {word!r}")
        yield key, _literal(text)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _written(text: str, kind: Kind) -> Any:
    """A value as params.txt has it: what Python prints of it."""
    value = text if kind == "text" and text != "None" else _literal(text)
    if kind == "number" and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return list(value) if isinstance(value, tuple) else value
