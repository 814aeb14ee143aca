"""Where towers come from: ``own/…``, ``open_clip/…``, ``timm/…``, ``hf/…``.

A family knows its names, what each demands of its input, and how to build it. A new own tower is one file in this
folder that registers a class in ``own_towers``; a new family is one file that registers it in ``families``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from pydantic import BaseModel

from dualenc.config import Component, settings_as
from dualenc.encoders.tower import Tower
from dualenc.errors import ConfigError, did_you_mean
from dualenc.registry import Registry


class Family(Protocol):
    """Towers of one origin. ``kind`` is the modality's kind ("image", "text", …), ``name`` what follows the slash."""

    kinds: ClassVar[tuple[str, ...]]
    Config: ClassVar[type[BaseModel]]

    def names(self) -> list[str]:
        """Names that can be listed (a family of paths and repositories may list none)."""

    def input_defaults(self, kind: str, name: str, config: Any) -> dict[str, Any]:
        """Settings of the modality's ``input`` that this tower was made with; only what it cares about."""

    def demands(self, kind: str, name: str, config: Any) -> dict[str, Any]:
        """Of those, the ones that must not differ: another value would give other features and no error."""

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


own_towers: Registry[Any] = Registry("own tower")
"""Name → a class as :class:`OwnTower` describes it."""
families: Registry[type[Family]] = Registry("encoder family")


def find(kind: str, component: Component, where: str) -> tuple[Family, str, BaseModel]:
    """The family, the name within it and the checked settings of ``component``.

    Raises:
        ConfigError: for an unknown family, name or setting, or a family that has no towers of this kind.
    """
    head, slash, name = component.name.partition("/")
    if not slash or not name:
        near = [f"{f}/{n}" for f in families for n in families[f]().names() if n == component.name]
        hint = f"Did you mean {near[0]!r}?" if near else f"Write FAMILY/NAME; families: {', '.join(families)}."
        raise ConfigError(f"{where}.name: {component.name!r} has no family. {hint}")
    family = families[head]()
    if kind not in family.kinds:
        raise ConfigError(f"{where}.name: {head} has no towers for {kind!r}, only for {', '.join(family.kinds)}.")
    cls = family.Config
    if head == "own":
        tower = own_towers_for(kind, name, where)
        cls = tower.Config
    return family, name, settings_as(cls, component.settings, where)


def own_towers_for(kind: str, name: str, where: str) -> OwnTower:
    """The own tower ``name``, refused where it is of another kind."""
    fitting = [n for n in own_towers if kind in own_towers[n].kinds]
    if name not in own_towers:
        known = [f"own/{n}" for n in fitting or own_towers]
        raise ConfigError(f"{where}.name: there is no tower 'own/{name}'. {did_you_mean(f'own/{name}', known)}")
    tower: OwnTower = own_towers[name]
    if kind not in tower.kinds:
        raise ConfigError(
            f"{where}.name: own/{name} is a tower for {', '.join(tower.kinds)}, not for {kind!r}. "
            f"Write {' or '.join('own/' + n for n in fitting)}."
        )
    return tower


@families.register("own")
class _Own:
    """Towers of this project, made to be small and to start from random weights."""

    Config: ClassVar[type[BaseModel]] = BaseModel
    """Each own tower has its own."""

    kinds: ClassVar[tuple[str, ...]] = ("image", "text", "audio", "lidar", "camera")

    def names(self) -> list[str]:
        return list(own_towers)

    def input_defaults(self, kind: str, name: str, config: Any) -> dict[str, Any]:
        return {}

    def demands(self, kind: str, name: str, config: Any) -> dict[str, Any]:
        return {}

    def build(
        self, kind: str, name: str, config: Any, describe: Mapping[str, Any], embed_dim: int, where: str
    ) -> Tower:
        tower: Tower = own_towers[name](config, describe, embed_dim)
        return tower
