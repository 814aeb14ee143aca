"""The plans a recipe can name under ``data.sampling``: which sample stands at which place of the global stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

from pydantic import BaseModel

from dualenc.config import Component, Section, settings_as
from dualenc.data.order import Ints, Plan, Refs
from dualenc.registry import Registry


class SampleOrder(Protocol):
    """What the loader asks of a plan. It is a pure function of what it was built from: two of them built alike, on
    other ranks, in workers or after a kill, say the same of every position."""

    def at(self, positions: Sequence[int] | Ints) -> Refs:
        """The samples at global positions (``step · N + slot``)."""

    def digest(self) -> str:
        """A fingerprint of everything the order depends on; a run is only resumed under the same."""


class PlanFactory(Protocol):
    """A class that is built from the sources; deriving it from :class:`~dualenc.data.order.Plan` gives it all but
    what it changes."""

    Config: ClassVar[type[BaseModel]]
    """Its settings in the recipe: ``sampling: {name: …, …}``."""

    def __call__(
        self,
        names: Sequence[str],
        counts: Sequence[Sequence[int]],
        seed: int,
        weights: Sequence[float],
        lanes: int,
        window: int,
        config: Any,
    ) -> Plan:
        """Names of the sources; for each the samples of each of its shards; seed, weights, lanes, window as in the
        recipe."""


plans: Registry[PlanFactory] = Registry("plan", "dualenc.plans", needs=("Config", "at", "digest"))


@plans.register("without_replacement")
class WithoutReplacement(Plan):
    """Every sample once a pass, in a seeded order."""

    Config = Section

    def __init__(
        self,
        names: Sequence[str],
        counts: Sequence[Sequence[int]],
        seed: int,
        weights: Sequence[float],
        lanes: int,
        window: int,
        config: Any,
    ) -> None:
        super().__init__(names, counts, seed, weights, "without_replacement", lanes, window)


@plans.register("with_replacement")
class WithReplacement(Plan):
    """Every position draws a sample anew."""

    Config = Section

    def __init__(
        self,
        names: Sequence[str],
        counts: Sequence[Sequence[int]],
        seed: int,
        weights: Sequence[float],
        lanes: int,
        window: int,
        config: Any,
    ) -> None:
        super().__init__(names, counts, seed, weights, "with_replacement", lanes, window)


def plan_for(
    sampling: str | Component,
    names: Sequence[str],
    counts: Sequence[Sequence[int]],
    seed: int,
    weights: Sequence[float],
    lanes: int,
    window: int,
) -> Plan:
    """The plan that ``data.sampling`` names.

    Raises:
        ConfigError: for an unknown plan (with the nearest known one), a setting it refuses, or weights that cannot be
            apportioned.
        DataError: if a source or a shard has no samples.
    """
    component = Component(name=sampling) if isinstance(sampling, str) else sampling
    factory = plans[component.name]
    config = settings_as(factory.Config, component.settings, "data.sampling")
    return factory(names, counts, seed, weights, lanes, window, config)
