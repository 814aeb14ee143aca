"""The base of losses around another loss: on a part of the features, or on what becomes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pydantic import Field, field_validator
from torch import Tensor, nn

from dualenc.config import Component, Section
from dualenc.errors import ConfigError
from dualenc.losses.loss import Extras, Loss, LossOutput
from dualenc.losses.weighted_sum import JOINT, loss_of, of_part
from dualenc.memory import LossState, RunShape

INNER = "inner"


class WrapperConfig(Section):
    """Settings of a loss around another."""

    loss: Component = Field(default=Component(name="info_nce"), description="the loss inside, a name or {name: …}")

    @field_validator("loss", mode="before")
    @classmethod
    def _name(cls, raw: Any) -> Any:
        return {"name": raw} if isinstance(raw, str) else raw


class Wrapper(Loss):
    """A loss around another: a subclass gives it other features.

    The wrapped loss's needs, pairs and heads are this one's. Memory and columns are those of the loss inside, for each
    time that it is called.
    """

    takes_extras = True

    def __init__(self, config: WrapperConfig) -> None:
        super().__init__()
        self.loss = loss_of(config.loss, "loss.loss")
        self.needs, self.names_pairs = tuple(self.loss.needs), tuple(self.loss.names_pairs)
        self.hidden, self.places_of = tuple(self.loss.hidden), tuple(self.loss.places_of)
        self.captioning = {f"{INNER}{JOINT}{group}": asked for group, asked in self.loss.captioning.items()}
        self.in_context = {f"{INNER}{JOINT}{group}": asked for group, asked in self.loss.in_context.items()}

    def heads(self, dim: int, modalities: Sequence[str]) -> dict[str, Mapping[str, nn.Module]]:
        """Those of the loss inside, under names of their own."""
        return {f"{INNER}{JOINT}{group}": head for group, head in self.loss.heads(dim, modalities).items()}

    def check_pairs(self, pairs: Sequence[tuple[str, str]]) -> None:
        """See the base class: the loss inside's."""
        self.loss.check_pairs(pairs)

    def memory(self, run: RunShape) -> dict[str, LossState]:
        """None: the loss inside may be called several times a step, on parts of the features.

        Raises:
            ConfigError: the loss inside remembers something.
        """
        kept = self.loss.memory(replace(run, device="meta")) or self.loss.slow(run.pairs) or self.loss.views(run.pairs)
        if kept:
            raise ConfigError(
                f"loss.loss: {type(self.loss).__name__} keeps keys or numbers from step to step and cannot be inside "
                f"{type(self).__name__}; list both: loss: [ … ]"
            )
        return {}

    def inside(
        self,
        a: Tensor,
        b: Tensor,
        ids: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None,
        extras: Extras | None,
    ) -> LossOutput:
        """The wrapped loss of these features."""
        more = {"extras": None if extras is None else of_part(extras, INNER)} if self.loss.takes_extras else {}
        return self.loss(a, b, ids, logit_scale, logit_bias, **more)
