"""The loss scale of fp16: gradients below 6e-8 would vanish, so the loss is multiplied, and the gradient divided again.

As ``torch.amp.GradScaler`` does it (Micikevicius et al., arXiv 1710.03740), but on the device alone: a step is left out
where the norm of the reduced gradient is not finite, which all ranks see alike, so scale and steps need no agreement.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

START, LARGEST, PATIENCE = 2.0**16, 2.0**24, 2000
"""The first scale, the largest, and the steps after which it doubles if all were finite."""


class LossScale:
    """Attributes: ``scale`` and ``streak`` (finite steps since it last changed), scalar tensors on the device."""

    KEY = "loss_scale"
    """Where checkpoints keep it, among the scalars of the optimizer."""

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.full((), START, device=device)
        self.streak = torch.zeros((), device=device)

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss to differentiate."""
        return loss * self.scale

    @torch.no_grad()
    def unscale(self, grads: Sequence[Tensor]) -> None:
        """Divide gradients by the scale, in place; a power of two, so no bit of a normal number changes."""
        if grads:
            torch._foreach_mul_(list(grads), 1 / self.scale)

    def update(self, finite: Tensor) -> None:
        """After a step: halve the scale where the gradient was not ``finite``, double it after a long finite streak."""
        streak = torch.where(finite, self.streak + 1, 0.0)
        grown = torch.where(streak >= PATIENCE, (2 * self.scale).clamp(max=LARGEST), self.scale)
        self.scale = torch.where(finite, grown, (self.scale / 2).clamp(min=1.0))
        self.streak = torch.where(streak >= PATIENCE, 0.0, streak)

    def state(self) -> dict[str, float]:
        """For a checkpoint."""
        return {"scale": float(self.scale), "streak": float(self.streak)}

    def load(self, state: Mapping[str, float]) -> None:
        """What :meth:`state` gave; nothing where a checkpoint has none."""
        if state:
            self.scale.fill_(state["scale"])
            self.streak.fill_(state["streak"])
