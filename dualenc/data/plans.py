"""The plans a recipe can name under ``data.sampling``: which sample stands at which place of the global stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dualenc.config import Component, Section, settings_as
from dualenc.data.order import Plan
from dualenc.registry import Registry

plans: Registry[Any] = Registry("plan", "dualenc.plans", needs=("Config", "at", "digest"))
"""Name → a class with a pydantic ``Config``, built from (names, counts, seed, weights, lanes, window, config). Deriving
it from :class:`~dualenc.data.order.Plan` gives it all but what it changes, such as ``at(positions) -> Refs``. It is a
pure function of what it was built from: two of them built alike, on other ranks, in workers or after a kill, say the
same of every position."""


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
    plan: Plan = factory(names, counts, seed, weights, lanes, window, config)
    return plan
