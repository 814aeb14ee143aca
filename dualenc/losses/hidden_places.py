"""What losses on places that a tower hides from itself have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from dualenc.distributed.gather import gather_ids
from dualenc.errors import ConfigError
from dualenc.losses.loss import Extras, Loss


class OnHiddenPlaces(Loss):
    """A loss of one tower, ``config.modality``, on the places that it hides: see own/audio_transformer."""

    takes_extras = True
    called: ClassVar[str]
    """Its name in a recipe."""
    config: Any

    def named(self, modalities: Sequence[str]) -> str:
        """The loss's modality.

        Raises:
            ConfigError: it is in none of the loss's pairs.
        """
        name: str = self.config.modality
        if name not in modalities:
            raise ConfigError(f"loss.modality: {name!r} is in none of the loss's pairs; write {modalities[0]}")
        return name

    def places(self, ids: Tensor, extras: Extras | None) -> tuple[Mapping[str, Tensor], Tensor, Tensor]:
        """The groups of the tower and of the loss's heads on it; which places take part, bool [n, K]; and how many of
        the global batch do, at least 1. Divided by that number over the world size, a rank's sum over its own places is
        its share of the mean.

        Raises:
            ConfigError: the tower hides nothing.
        """
        name = self.config.modality
        side = {} if extras is None else extras.a if extras.pair[0] == name else extras.b
        if extras is None or name not in extras.pair or "masked_there" not in side:
            raise ConfigError(
                f"loss: {self.called} needs places that modalities.{name} hides: set its encoder to "
                "{name: own/audio_transformer, masked: true} and its input.augment.hide to a number of spans"
            )
        there = (ids >= 0)[:, None] & (side["masked_there"] > 0)
        return side, there, gather_ids(there.sum(1)).sum().clamp(min=1)
