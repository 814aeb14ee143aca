"""The plans a recipe can name under ``data.sampling``: which sample is at which position of the global stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dualenc.config import Component, Section, settings_as
from dualenc.data.order import Counts, Plan
from dualenc.errors import ConfigError
from dualenc.registry import Registry

plans: Registry[Any] = Registry("plan", "dualenc.plans", needs=("Config", "at", "digest"))
"""Name → a class with a pydantic ``Config``, built from (names, counts, seed, weights, lanes, window, config). A
subclass of :class:`~dualenc.data.order.Plan` only defines what it changes, such as ``at(positions) -> Refs``. It must
be a pure function of its arguments: two plans built from the same ones, on other ranks, in workers or after a restart,
give the same sample for every position."""


@plans.register("without_replacement")
class WithoutReplacement(Plan):
    """Every sample once per epoch, in a seeded order."""

    Config = Section

    def __init__(
        self,
        names: Sequence[str],
        counts: Sequence[Counts],
        seed: int,
        weights: Sequence[float],
        lanes: int,
        window: int,
        config: Any,
    ) -> None:
        super().__init__(names, counts, seed, weights, "without_replacement", lanes, window)


@plans.register("with_replacement")
class WithReplacement(Plan):
    """Every position draws a sample independently."""

    Config = Section

    def __init__(
        self,
        names: Sequence[str],
        counts: Sequence[Counts],
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
    counts: Sequence[Counts],
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
    factory, config = chosen(sampling)
    plan: Plan = factory(names, counts, seed, weights, lanes, window, config)
    return plan


def chosen(sampling: str | Component) -> tuple[Any, Any]:
    """The class that ``data.sampling`` names, and its settings.

    Raises:
        ConfigError: as :func:`plan_for`; the data are not needed to say so.
    """
    component = Component(name=sampling) if isinstance(sampling, str) else sampling
    try:
        factory = plans[component.name]
    except ConfigError as e:
        raise ConfigError(f"data.sampling: {e}") from e
    return factory, settings_as(factory.Config, component.settings, "data.sampling")
