"""Names to classes, for the parts a recipe refers to by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from dualenc.errors import ConfigError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """A dictionary that explains itself when a name is wrong.

    >>> losses: Registry[type] = Registry("loss")
    >>> @losses.register("info_nce")
    ... class InfoNCE: ...
    >>> losses["info_nce"].__name__
    'InfoNCE'
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorate a class or function to make it known as ``name``; a name is taken only once."""

        def add(entry: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.what} {name!r} is registered twice")
            self._entries[name] = entry
            return entry

        return add

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            raise ConfigError(f"There is no {self.what} {name!r}. {did_you_mean(name, self._entries)}")
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def __len__(self) -> int:
        return len(self._entries)
