"""Several losses as one: Σ weight · loss, for the pairs that each names.

A recipe's ``loss:`` as a list is this loss::

    loss: [info_nce, {name: koleo, weight: 0.1}, {name: info_nce, pairs: [[image, image2]], weight: 0.5}]

Each is averaged over its own pairs before it is weighted, so that a loss restricted to one of three pairs counts as one
that all three have. Every loss's value is the metric ``loss/NAME/PAIR``; a name that is listed twice has its place in
the list behind it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from dualenc.config import Component, Section, settings_as
from dualenc.losses.loss import Extras, Loss, LossOutput, SideName, losses
from dualenc.memory import LearnedView, LossState, RunShape, SlowTowers

JOINT = "__"
"""Between a loss's name and the name of a head of it."""


class WeightedLoss(Component):
    """One loss of the list; its other keys are the loss's own settings."""

    weight: Annotated[float, Field(gt=0)] = Field(1.0, description="factor in the sum")
    pairs: list[tuple[str, str]] | None = Field(default=None, description="pairs it is for; default: all")
    warmup_samples: Annotated[int, Field(ge=0)] = Field(
        default=0, description="the weight rises linearly from 0 over so many samples"
    )


@losses.register("sum")
class WeightedSum(Loss):
    """Several losses, each with a weight, for all pairs or some: what loss: [ … ] means.

    Formula: Σ_t weight_t · mean over its pairs of L_t
    Paper: none
    Needs: what its losses need
    """

    takes_extras = True

    class Config(Section):
        """Settings."""

        terms: list[WeightedLoss] = Field(min_length=1, description="losses, each with weight, pairs, settings")

        @field_validator("terms", mode="before")
        @classmethod
        def _names(cls, raw: Any) -> Any:
            return [{"name": x} if isinstance(x, str) else x for x in raw] if isinstance(raw, list) else raw

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        names = [re.sub(r"\W", "_", t.name) for t in config.terms]  # a plugin's has dots and a colon
        self.names = [f"{n}{k}" if names.count(n) > 1 else n for k, n in enumerate(names)]
        self.parts = nn.ModuleList(loss_of(t, f"loss.terms.{k}") for k, t in enumerate(config.terms))
        self.needs = tuple(dict.fromkeys(name for part in self.children_losses() for name in part.needs))
        self.hidden = tuple(dict.fromkeys(depth for part in self.children_losses() for depth in part.hidden))
        self.places_of = tuple(dict.fromkeys(m for part in self.children_losses() for m in part.places_of))
        named = list(zip(self.names, self.children_losses(), strict=True))
        self.captioning = {f"{n}{JOINT}{group}": asked for n, p in named for group, asked in p.captioning.items()}
        self.in_context = {f"{n}{JOINT}{group}": asked for n, p in named for group, asked in p.in_context.items()}
        self.names_pairs = tuple(
            pair
            for t, part in zip(config.terms, self.children_losses(), strict=True)
            for pair in [*(t.pairs or ()), *part.names_pairs]
        )

    def heads(self, dim: int, modalities: Sequence[str]) -> dict[str, Mapping[str, nn.Module]]:
        """Those of every loss, under its name."""
        return {
            f"{name}{JOINT}{group}": head
            for name, part in zip(self.names, self.children_losses(), strict=True)
            for group, head in part.heads(dim, modalities).items()
        }

    def check_pairs(self, pairs: Sequence[tuple[str, str]]) -> None:
        """See the base class: each loss for its own pairs."""
        for term, part in zip(self.config.terms, self.children_losses(), strict=True):
            part.check_pairs(pairs_of(term.pairs, pairs))

    def memory(self, run: RunShape) -> dict[str, LossState]:
        """That of every loss, under its name."""
        return {
            f"{name}/{key}": state
            for name, term, part in zip(self.names, self.config.terms, self.children_losses(), strict=True)
            for key, state in part.memory(replace(run, pairs=pairs_of(term.pairs, run.pairs))).items()
        }

    def slow(self, pairs: Sequence[tuple[str, str]]) -> dict[str, SlowTowers]:
        """Those of every loss, under its name."""
        return {
            f"{name}{JOINT}{key}": inside(name, asked)
            for name, term, part in zip(self.names, self.config.terms, self.children_losses(), strict=True)
            for key, asked in part.slow(pairs_of(term.pairs, pairs)).items()
        }

    def gathers(self, global_batch: int, device: torch.device) -> set[SideName]:
        """What any of the losses for all pairs gathers."""
        return {
            side
            for term, part in zip(self.config.terms, self.children_losses(), strict=True)
            if term.pairs is None
            for side in part.gathers(global_batch, device)
        }

    def views(self, pairs: Sequence[tuple[str, str]]) -> dict[str, LearnedView]:
        """Those of every loss, under its name."""
        return {
            f"{name}/{key}": asked
            for name, term, part in zip(self.names, self.config.terms, self.children_losses(), strict=True)
            for key, asked in part.views(pairs_of(term.pairs, pairs)).items()
        }

    def forward(
        self,
        a: Tensor,
        b: Tensor,
        ids: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        extras: Extras | None = None,
    ) -> LossOutput:
        """See the module."""
        value, metrics = logit_scale.new_zeros(()), {}
        given = extras or Extras(("a", "b"), {}, {})
        seen = given.samples_seen(len(ids))
        for name, term, part in zip(self.names, self.config.terms, self.children_losses(), strict=True):
            share = share_of_pair(term.pairs, given)
            if not share:
                continue
            more = {"extras": of_part(given, name)} if part.takes_extras else {}
            out = part(a, b, ids, logit_scale, logit_bias, **more)
            ramp = min(1.0, seen / term.warmup_samples) if term.warmup_samples else 1.0
            value = value + term.weight * ramp * share * out.value
            metrics[f"loss/{name}"] = out.value.detach()
            metrics |= {key if key not in metrics else f"{name}_{key}": x for key, x in out.metrics.items()}
        return LossOutput(value, metrics)

    def children_losses(self) -> list[Loss]:
        """The losses of the list, in its order."""
        return [part for part in self.parts if isinstance(part, Loss)]


def loss_of(component: Component, where: str) -> Loss:
    """The loss that a component names, from its settings at the dotted key ``where``.

    Raises:
        ConfigError: for an unknown name (with the nearest known one) or setting.
    """
    factory = losses[component.name]
    loss = factory(settings_as(factory.Config, component.settings, where))
    if not isinstance(loss, Loss):
        raise TypeError(f"loss {component.name!r}: {factory.__name__} is not a subclass of dualenc.losses.Loss")
    return loss


def share_of_pair(pairs: Sequence[tuple[str, str]] | None, extras: Extras) -> float:
    """What a pair's value is multiplied by so that the mean over all pairs is the mean over ``pairs``; 0: not one."""
    if pairs is None:
        return 1.0
    named = {frozenset(p) for p in pairs}
    if frozenset(extras.pair) not in named:
        return 0.0
    return len(extras.pairs) / len(named) if extras.pairs else 1.0


def pairs_of(named: Sequence[tuple[str, str]] | None, pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Those of ``pairs`` that a loss of the list is for."""
    wanted = None if named is None else {frozenset(p) for p in named}
    return [p for p in pairs if wanted is None or frozenset(p) in wanted]


def inside(name: str, asked: SlowTowers) -> SlowTowers:
    """What one loss of the list asks of a slow copy, with its own heads under the names that the model has them."""
    groups = {
        f"{name}{JOINT}{k}": group if group == "features" else f"{name}{JOINT}{group}"
        for k, group in asked.groups.items()
    }
    return replace(asked, groups=groups)


def of_part(extras: Extras, name: str) -> Extras:
    """The extras with the heads of one loss under the names it gave them."""
    start = f"{name}{JOINT}"
    a, b = (
        {**side, **{k.removeprefix(start): x for k, x in side.items() if k.startswith(start)}}
        for side in (extras.a, extras.b)
    )
    return replace(extras, a=a, b=b)
