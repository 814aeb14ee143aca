"""What a loss takes and gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field
from torch import Tensor

from dualenc.config import Section
from dualenc.registry import Registry


@dataclass(slots=True)
class LossOutput:
    """A loss on one rank.

    Attributes:
        value: scalar tensor. Its mean over ranks is the loss of the global batch, and the mean over ranks of its
            gradients (what every engine computes) is the gradient of that loss.
        metrics: name → scalar tensor without gradient, on the same footing: the mean over ranks is the global number.
    """

    value: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


@dataclass(slots=True)
class Extras:
    """What stands beside the features of a pair, by slot like them: [B, …], zero where a slot has none.

    Attributes:
        pair: the two modalities.
        a, b: name → rows of either side: the batch's ``extras`` (a teacher's features, without gradient) and the
            model's further outputs (projections of the features, with gradient).
        both: name → rows of the pair as a whole (a fusion teacher's scores).
    """

    pair: tuple[str, str]
    a: dict[str, Tensor]
    b: dict[str, Tensor]
    both: dict[str, Tensor] = field(default_factory=dict)


class Loss(Protocol):
    """A contrastive loss between two sets of features: what ``losses.build_loss`` returns.

    A loss with a true attribute ``takes_extras`` is also given ``extras``, an :class:`Extras`.
    """

    def __call__(
        self, a: Tensor, b: Tensor, ids: Tensor, logit_scale: Tensor, logit_bias: Tensor | None = None
    ) -> LossOutput:
        """Compare the local rows with the columns of all ranks.

        Args:
            a, b: [B, D] L2-normalised fp32 features of this rank's slots; B is equal on all ranks.
            ids: [B] int64 pair ids. Slots with equal ids, here or on another rank, are positives of each other;
                −1 marks a slot that takes part in nothing.
            logit_scale, logit_bias: [1]; logits are ``logit_scale · cosine + logit_bias``.
        """
        ...


class TiledConfig(Section):
    """Settings of a loss that can be computed without its [B, N] matrix; both ways give the same numbers."""

    impl: Literal["auto", "plain", "tiled"] = Field("auto", description="auto: tiled from a global batch of 2048 on")
    strip_mb: Annotated[float, Field(gt=0)] = Field(64.0, description="MiB of logits that exist at one time")

    def choose(self, global_batch: int) -> float | None:
        """The strip size for this batch, or None for the plain matrix."""
        return self.strip_mb if self.impl == "tiled" or (self.impl == "auto" and global_batch >= 2048) else None


losses: Registry[type[Any]] = Registry("loss")
"""Name → a class with a pydantic ``Config`` that is built from one instance of it and is a :class:`Loss`."""
