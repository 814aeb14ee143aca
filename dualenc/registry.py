"""Names to classes, for the parts a recipe refers to by name: those of this project, and those of plugins."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

from dualenc import plugins
from dualenc.errors import ConfigError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """A dictionary that suggests names when one is wrong, and finds parts of plugins (:mod:`dualenc.plugins`).

    >>> losses: Registry[type] = Registry("loss")
    >>> @losses.register("info_nce")
    ... class InfoNCE: ...
    >>> losses["info_nce"].__name__
    'InfoNCE'

    A name is looked up among what is registered; then among what ``--plugins`` names; then among the entry points of
    installed packages. ``pkg.mod:Name`` is taken from that module. Plugins cannot take a name of this project.

    Args:
        what: "loss", "modality" …, for messages.
        group: entry points that provide more; None: there are none.
        needs: attributes that a part must have; a plugin's part without them is refused by name.
        base: the class that a plugin's part must derive from; None: any with the needed attributes.
    """

    def __init__(
        self, what: str, group: str | None = None, needs: Sequence[str] = (), base: type | None = None
    ) -> None:
        self.what, self.group, self.needs, self.base = what, group, tuple(needs), base
        self._entries: dict[str, T] = {}
        self._referenced: dict[str, T] = {}
        self._origins: dict[str, str | None] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorate a class or function to make it known as ``name``; a name can be used only once."""
        origin = plugins.origin(str(sys._getframe(1).f_globals.get("__name__", "__main__")))

        def add(entry: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.what} {name!r} is registered twice")
            self._keep(name, entry, origin)
            return entry

        return add

    def __getitem__(self, name: str) -> T:
        if not self._find(name):
            raise ConfigError(f"There is no {self.what} {name!r}. {did_you_mean(name, self)}")
        return self._referenced[name] if name in self._referenced else self._entries[name]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._find(name)

    def __iter__(self) -> Iterator[str]:
        """Every name, sorted; entry points are named without being imported."""
        plugins.import_allowed()
        outside = plugins.entry_points(self.group) if self.group is not None else {}
        return iter(sorted({*self._entries, *outside}))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def loaded(self) -> dict[str, T]:
        """Name → entry of what is in memory: of entry points only those that were used."""
        return dict(sorted(self._entries.items()))

    def origin(self, name: str) -> str | None:
        """The module that provides ``name``, or None for a part of this project.

        Raises:
            ConfigError: if there is no such name.
        """
        self[name]
        return self._origins.get(name)

    def source(self, name: str) -> str:
        """Where ``name`` comes from, as text for lists; nothing is imported."""
        if name in self._origins:
            return self._origins[name] or "dualenc"
        if self.group is None:
            return "dualenc"
        return ", ".join(e.module for e in plugins.entry_points(self.group).get(name, []))

    def _find(self, name: str) -> bool:
        if name in self._entries or name in self._referenced:
            return True
        if plugins.is_reference(name):
            module, entry = plugins.referenced(name, self.what)
            self._check(name, entry)
            self._referenced[name], self._origins[name] = entry, plugins.origin(module)
            return True
        plugins.import_allowed()
        if name not in self._entries and self.group is not None:
            found = plugins.entry(self.group, name, self.what)
            if found is not None and self._entries.get(name, found[1]) is not found[1]:
                raise ConfigError(
                    f"{self.what} {name!r}: its module registers another one under that name; tell its authors"
                )
            if found is not None and name not in self._entries:
                self._keep(name, found[1], plugins.origin(found[0]))
        return name in self._entries

    def _keep(self, name: str, entry: T, origin: str | None) -> None:
        if origin is not None:
            self._check(name, entry)
        self._entries[name], self._origins[name] = entry, origin

    def _check(self, name: str, entry: Any) -> None:
        if self.base is not None and not (isinstance(entry, type) and issubclass(entry, self.base)):
            raise ConfigError(
                f"{self.what} {name!r} must be a class that derives from {_public(self.base)}; docs/extend shows one"
            )
        lacking = [n for n in self.needs if not hasattr(entry, n)]
        if lacking:
            raise ConfigError(f"{self.what} {name!r} has no {lacking[0]!r}; docs/extend says what one needs")


def _public(cls: type) -> str:
    """A class as others import it: from the highest package that has it."""
    parts = cls.__module__.split(".")
    packages = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
    where = next(p for p in packages if p in sys.modules and vars(sys.modules[p]).get(cls.__name__) is cls)
    return f"{where}.{cls.__name__}"
