"""Views that are learned: a small network makes the rows of one modality from those of another, for both to be encoded
by one tower, and is trained against an objective of its own (AutoTCL, arXiv 2402.10434; MCLRec, SIGIR 2023).

A loss names them (``Loss.views``); ``dualenc.train.learned_views`` makes the rows before a step and trains the network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dualenc.errors import ConfigError


class ViewMaker(nn.Module):
    """Base of the networks."""

    def forward(self, rows: Any, numbers: Tensor, step: int) -> tuple[Any, Tensor]:
        """Make the view.

        Args:
            rows: collated rows of a modality, n of them.
            numbers: [n] int64, the number of each row's sample among all samples; what is random is a function of it
                and of ``step``, so that it does not depend on ranks or micro-batches.
            step: of the run.

        Returns:
            rows of the same form, and [n, K] numbers about them for the objective, both with gradient. A row's do not
            depend on the other rows.
        """
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class LearnedView:
    """A view that a loss asks for.

    Attributes:
        of, into: the modality whose rows are taken and the one whose rows are made; one tower encodes both.
        build: collated rows of ``of`` → the network.
        objective: (features of ``of`` [B, D], features of ``into`` [B, D], pair ids [B], numbers about the rows [B, K])
            → what the network minimises with the tower's weights as they are: a scalar whose mean over ranks is that of
            the global batch, as a loss's.
        lr: of the network's own Adam.
        every: it is trained on every so many steps.
        held_back: it learns from the tower as it is after the step (MCLRec), not before it (AutoTCL).
    """

    of: str
    into: str
    build: Callable[[Any], ViewMaker]
    objective: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    lr: float = 1e-3
    every: int = 1
    held_back: bool = False

    def check(self, shared: dict[str, str], pairs: list[tuple[str, str]]) -> None:
        """Refuse modalities that are not two views of one thing.

        Raises:
            ConfigError: naming the setting.
        """
        if shared.get(self.into) != self.of:
            raise ConfigError(
                f"loss: the learned view {self.into!r} needs the tower of {self.of!r}; write "
                f"modalities.{self.into}.shares: {self.of}"
            )
        if not any({self.of, self.into} == set(p) for p in pairs):
            raise ConfigError(
                f"loss: the learned view {self.into!r} is contrasted with {self.of!r} by no pair; add "
                f"[{self.of}, {self.into}] to pairs"
            )
