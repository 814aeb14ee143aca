"""What an import has found out: a recipe, the reasons for its values, and what became of every flag."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from dualenc.config import Recipe
from dualenc.config.commented import commented_yaml
from dualenc.config.reading import parse

Became = Literal["taken", "different", "left out"]
"""taken: the recipe has it; different: it has a counterpart that is not the same, or acts differently here; left out:
there is none."""


@dataclass(frozen=True)
class Note:
    """What became of one flag, or of a default that matters."""

    flag: str
    became: Became
    why: str


@dataclass
class Draft:
    """A recipe in the making.

    Attributes:
        raw: the recipe.
        comments: dotted key → comment in the file.
        notes: one for every flag that was given, and for defaults that matter.
        steps_per_epoch: where the number of samples is known.
        whole: whether the recipe names its towers; else they are those of ``checkpoint.init_from``, and are read when
            training starts.
    """

    raw: dict[str, Any] = field(default_factory=dict)
    comments: dict[str, str] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)
    steps_per_epoch: int | None = None
    whole: bool = True

    def set(self, key: str, value: Any, why: str = "") -> None:
        """Set a dotted key, with a comment above it."""
        *parents, last = key.split(".")
        node = self.raw
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = value
        if why:
            self.comments[key] = why

    def note(self, flag: str, became: Became, why: str) -> None:
        """Say what became of a flag."""
        self.notes.append(Note(flag, became, why))

    def recipe(self) -> Recipe:
        """The recipe, checked.

        Raises:
            ConfigError: naming the key that is not valid.
        """
        return parse(Recipe, self.ordered(), {}, "the recipe of this command line")

    def ordered(self) -> dict[str, Any]:
        """The recipe's keys in the order in which recipes have them."""
        return {k: self.raw[k] for k in (*Recipe.model_fields,) if k in self.raw}

    def text(self, head: str) -> str:
        """The recipe as YAML; what is different here stands at the top, with the reasons."""
        said = [f"{n.flag}: {n.why}" for n in self.notes if n.became == "different"]
        parts = [head, *(["", "What is different from that command line:"] if said else []), *said]
        return commented_yaml(self.ordered(), self.comments, "\n".join(parts))
