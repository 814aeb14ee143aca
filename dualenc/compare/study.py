"""What is compared: a YAML file with methods, or recipes named on the command line."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator, model_validator

from dualenc.config import settings_as
from dualenc.config.reading import read_yaml
from dualenc.config.section import Positive, Section
from dualenc.errors import ConfigError, did_you_mean

_NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")
_RUN = re.compile(r"\brun:([A-Za-z0-9][\w+-]*(?:\.[\w+-]+)*)")


class Method(Section):
    """One method: a recipe and what is changed in it."""

    recipe: str = Field(default="", description="YAML file, or a name from dualenc list recipes; empty: the study's")
    overrides: list[str] = Field(
        default=[],
        description="key=value, after those of the study; run:NAME is the run folder of an earlier method at this seed",
    )
    note: str = Field(default="", description="a few words for the table")

    def needs(self, known: Sequence[str]) -> list[str]:
        """The methods whose runs the overrides name."""
        return [n for item in self.overrides for n in _RUN.findall(item) if n in known]


class Comparison(Section):
    """Methods, of which the first is the control, and what they have in common."""

    name: str = Field(description="name of the study; its folder is runs/compare/NAME unless --out names another")
    recipe: str = Field(default="", description="recipe of the methods that name none of their own")
    overrides: list[str] = Field(default=[], description="key=value for every run: the budget, the size of the towers")
    seeds: Annotated[list[int], Field(min_length=1)] = Field(
        default=[0, 1, 2], description="how many seeds (3: 0, 1, 2), or a list of them"
    )
    tasks: list[str] = Field(default=[], description="tasks measured at the end; empty: each recipe's eval.tasks")
    ranks: Positive = Field(default=1, description="processes of each run, as in dualenc launch --nproc")
    methods: dict[str, Method] = Field(
        min_length=2, description="name → recipe, overrides, note; the first is the control"
    )

    @field_validator("seeds", mode="before")
    @classmethod
    def _count(cls, said: object) -> object:
        return list(range(said)) if isinstance(said, int) and not isinstance(said, bool) else said

    @field_validator("methods", mode="before")
    @classmethod
    def _bare(cls, said: object) -> object:
        """``NAME:`` alone is a method without changes."""
        return {k: {} if v is None else v for k, v in said.items()} if isinstance(said, Mapping) else said

    @model_validator(mode="after")
    def _consistent(self) -> Comparison:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: {self.seeds} names a seed twice")
        before: list[str] = []
        for name, method in self.methods.items():
            if not _NAME.fullmatch(name):
                raise ValueError(f"methods: {name!r} cannot be the name of a folder; use letters, digits and . _ + -")
            if not (method.recipe or self.recipe):
                raise ValueError(f"methods: {name} has no recipe; give it one, or give one for the study")
            for needed in (n for item in method.overrides for n in _RUN.findall(item)):
                if needed not in before:
                    raise ValueError(
                        f"methods: {name} needs run:{needed}, which is not listed before it. "
                        f"{did_you_mean(needed, before)}"
                    )
            before.append(name)
        return self

    @property
    def control(self) -> str:
        """The method that the others are compared with."""
        return next(iter(self.methods))

    def command(self, name: str, seed: int, folder: Path) -> list[str]:
        """The recipe and overrides of a method's run at a seed, below ``folder``."""
        method = self.methods[name]

        def path(found: re.Match[str]) -> str:
            return str(run_folder(folder, found[1], seed))

        changed = [_RUN.sub(path, item) for item in method.overrides]
        tasks = [f"eval.tasks=[{','.join(self.tasks)}]"] if self.tasks else []
        own = [f"out={run_folder(folder, name, seed)}", f"seed={seed}"]
        return [method.recipe or self.recipe, *self.overrides, *tasks, *changed, *own]


def run_folder(folder: Path, method: str, seed: int) -> Path:
    """Where the run of a method with a seed is."""
    return folder / method / f"seed-{seed}"


def is_comparison(path: str) -> bool:
    """Whether this is a YAML file that names methods, rather than a recipe."""
    file = Path(path)
    return file.suffix in (".yaml", ".yml") and file.is_file() and "methods" in read_yaml(file)[0]


def read_comparison(path: str | Path, overrides: Sequence[str] = (), **given: object) -> Comparison:
    """Read a comparison; ``overrides`` come after its own, ``given`` replaces keys.

    Raises:
        ConfigError: naming the key, its value and what to write instead.
    """
    raw, _ = read_yaml(Path(path))
    raw = {"name": Path(path).stem, **raw, **given}
    raw["overrides"] = [*raw.get("overrides", []), *overrides]
    return settings_as(Comparison, raw, str(path))


def from_recipes(recipes: Sequence[str], overrides: Sequence[str] = (), **given: object) -> Comparison:
    """A comparison of recipes, each a method called after its file or name.

    Raises:
        ConfigError: fewer than two, or two of one name.
    """
    names = [Path(r).stem if r.endswith((".yaml", ".yml")) else r.replace("/", ".") for r in recipes]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise ConfigError(
            f"dualenc compare: two recipes are called {twice[0]}; write a comparison file, which names its methods"
        )
    if len(recipes) < 2:
        raise ConfigError("dualenc compare: name at least two recipes, the control first, or a file with methods")
    methods = {n: {"recipe": r} for n, r in zip(names, recipes, strict=True)}
    return settings_as(
        Comparison, {"name": names[0], "overrides": list(overrides), "methods": methods, **given}, "dualenc compare"
    )
