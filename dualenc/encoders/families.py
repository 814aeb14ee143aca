"""Where towers come from: ``own/…``, ``open_clip/…``, ``timm/…``, ``hf/…``.

A family knows its names, what each demands of its input, and how to build it. A new own tower is one file in this
folder that registers a class in ``own_towers``; a new family is one file that registers it in ``families``. A tower
from outside is such a class too, named without a family: by its entry point or registered name, or ``pkg.mod:Name``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from pydantic import BaseModel

from dualenc.config import Component, settings_as
from dualenc.encoders.tower import Tower
from dualenc.errors import ConfigError, did_you_mean
from dualenc.plugins import is_reference
from dualenc.registry import Registry


class Family(Protocol):
    """Towers of one origin. ``kind`` is the modality's kind ("image", "text", …), ``name`` what follows the slash."""

    kinds: ClassVar[tuple[str, ...]]
    """Modalities that it has towers for; none: each of its towers says so itself."""
    Config: ClassVar[type[BaseModel]]

    def names(self) -> list[str]:
        """Names that can be listed (a family of paths and repositories may list none)."""

    def input_defaults(self, kind: str, name: str, config: Any) -> dict[str, Any]:
        """Settings of the modality's ``input`` that this tower was made with; only what it cares about."""

    def demands(self, kind: str, name: str, config: Any) -> dict[str, Any]:
        """Those of them that must not differ: another value would silently change the features."""

    def build(
        self, kind: str, name: str, config: Any, describe: Mapping[str, Any], embed_dim: int, where: str
    ) -> Tower:
        """A tower with features [n, embed_dim]; its random weights are drawn from torch's global generator."""


class OwnTower(Protocol):
    """A tower of this project: a class with its kinds, its settings, and a constructor."""

    kinds: ClassVar[tuple[str, ...]]
    Config: ClassVar[type[BaseModel]]

    def __call__(self, config: Any, describe: Mapping[str, Any], embed_dim: int) -> Tower:
        """Build it."""


own_towers: Registry[Any] = Registry("encoder", "dualenc.encoders", needs=("kinds", "Config"))
"""Name → a class as :class:`OwnTower` describes it."""
families: Registry[type[Family]] = Registry("encoder family", "dualenc.families", needs=("kinds", "Config", "build"))


def find(kind: str, component: Component, where: str) -> tuple[Family, str, BaseModel]:
    """The family, the name within it and the checked settings of ``component``.

    Raises:
        ConfigError: for an unknown family, name or setting, or a family that has no towers of this kind.
    """
    head, name = split(component.name, where)
    family = families[head]()
    if family.kinds and kind not in family.kinds:
        raise ConfigError(f"{where}.name: {head} has no towers for {kind!r}, only for {', '.join(family.kinds)}.")
    cls = family.Config
    if head == "own":
        tower = own_towers_for(kind, name, where)
        cls = tower.Config
    return family, name, settings_as(cls, component.settings, where)


def split(full: str, where: str) -> tuple[str, str]:
    """The family and the name within it; a tower from outside, which is named without one, is built as own ones are.

    Raises:
        ConfigError: for a name without a family that no plugin brings.
    """
    head, slash, name = full.partition("/")
    if slash and name:
        return head, name
    if is_reference(full) and full.partition(":")[0] in families.loaded():
        raise ConfigError(f"{where}.name: write {full.replace(':', '/', 1)}, not {full}")
    if full in own_towers and own_towers.origin(full) is not None:
        return "own", full
    near = [f"{f}/{n}" for f in families for n in families[f]().names() if n == full]
    hint = f"Did you mean {near[0]!r}?" if near else f"Write FAMILY/NAME; families: {', '.join(families)}."
    raise ConfigError(f"{where}.name: {full!r} has no family, and no plugin provides it. {hint}")


def encoder_origin(component: Component) -> str | None:
    """The plugin module of an encoder or its family; None for one of this project."""
    head, name = split(component.name, "encoder")
    return own_towers.origin(name) if head == "own" else families.origin(head)


def own_towers_for(kind: str, name: str, where: str) -> OwnTower:
    """The own tower ``name``, refused where it is of another kind."""
    fitting = [shown(n) for n, t in own_towers.loaded().items() if kind in t.kinds]
    if name not in own_towers:
        known = fitting or [shown(n) for n in own_towers.loaded()]
        raise ConfigError(f"{where}.name: there is no tower 'own/{name}'. {did_you_mean(f'own/{name}', known)}")
    tower: OwnTower = own_towers[name]
    if kind not in tower.kinds:
        instead = (
            f"Use {' or '.join(fitting)}." if fitting else f"There is no tower for {kind!r}; name a plugin with one."
        )
        raise ConfigError(
            f"{where}.name: {shown(name)} is a tower for {', '.join(tower.kinds)}, not for {kind!r}. {instead}"
        )
    return tower


def shown(name: str) -> str:
    """A tower of ``own_towers`` as a recipe names it."""
    return name if own_towers.origin(name) is not None else f"own/{name}"


@families.register("own")
class _Own:
    """Towers of this project, made to be small and to start from random weights."""

    Config: ClassVar[type[BaseModel]] = BaseModel
    """Each own tower has its own."""

    kinds: ClassVar[tuple[str, ...]] = ()

    def names(self) -> list[str]:
        return [n for n in own_towers if own_towers.source(n) == "dualenc"]

    def input_defaults(self, kind: str, name: str, config: Any) -> dict[str, Any]:
        return {}

    def demands(self, kind: str, name: str, config: Any) -> dict[str, Any]:
        return {}

    def build(
        self, kind: str, name: str, config: Any, describe: Mapping[str, Any], embed_dim: int, where: str
    ) -> Tower:
        tower: Tower = own_towers[name](config, describe, embed_dim)
        if own_towers.origin(name) is not None:  # it does not know under which name it was asked for
            said = vars(tower)
            settings = tower.component.settings if "component" in said else config.model_dump(mode="json")
            tower.component = Component(name=name, **settings)
            tower.embed_dim = said.get("embed_dim", embed_dim)
        return tower
