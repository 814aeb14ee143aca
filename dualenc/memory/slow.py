"""Slow copies of towers: φ ← d φ + (1 − d) θ after every optimizer step (MoCo, arXiv 1911.05722; BYOL)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dualenc.checkpoint.ranges import Piece, Stored
from dualenc.data.batch import Batch, map_tensors
from dualenc.encoders import DualEncoder
from dualenc.memory.state import Replicated

CHUNK = 256
"""Rows that a slow copy encodes at once, where the recipe has no micro-batch."""


@dataclass(frozen=True, slots=True)
class SlowTowers:
    """A slow copy that a loss asks for.

    Attributes:
        decay: d in [0, 1) of a step.
        groups: what the loss reads in its extras → which group of the model's outputs it is, ``features`` or one of the
            loss's heads.
        modalities: whose towers are copied; None: of all pairs.
    """

    decay: float
    groups: Mapping[str, str] = field(default_factory=lambda: {"keys": "features"})
    modalities: tuple[str, ...] | None = None


class SlowModel:
    """A copy of a model's towers, in evaluation mode and without gradient, that follows the model.

    Every rank has it whole, in fp32, under every engine. Weights that are trained move by 1 − d; buffers, such as
    running statistics, are copied.

    Args:
        model: before an engine cuts it; with its heads.
    """

    def __init__(self, model: DualEncoder, asked: SlowTowers, device: torch.device | str) -> None:
        self.asked = asked
        self.modalities = tuple(asked.modalities or dict.fromkeys(m for pair in model.pairs for m in pair))
        self.trained = {name for name, p in model.named_parameters() if p.requires_grad}
        owners = {model.shared.get(m, m) for m in self.modalities}
        heads = {g for g in asked.groups.values() if g != "features"}
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        for m in [m for m in self.model.towers if m not in owners]:
            del self.model.towers[m]
        for g in [g for g in self.model.heads if g not in heads]:
            del self.model.heads[g]
        self.model.to(device)

    @torch.no_grad()
    def rows(self, batch: Batch, chunk: int | None = None) -> dict[str, dict[str, Tensor]]:
        """The groups that were asked for: what the loss calls them → modality → [n_m, …], as the batch's rows."""
        size = chunk or CHUNK
        out: dict[str, dict[str, Tensor]] = {name: {} for name in self.asked.groups}
        for m in self.modalities:
            cuts = [slice(k, k + size) for k in range(0, max(len(batch.rows[m]), 1), size)]
            parts = [self.model({m: map_tensors(batch.inputs[m], lambda v, cut=cut: v[cut])}) for cut in cuts]
            for name, group in self.asked.groups.items():
                if m in parts[0][group]:
                    out[name][m] = torch.cat([p[group][m] for p in parts])
        return out

    @torch.no_grad()
    def start(self, whole: Callable[[str], Tensor]) -> None:
        """Take the model's weights as they are; ``whole``: as in :meth:`follow`."""
        for name, x in self.model.state_dict().items():
            x.copy_(whole(name))

    @torch.no_grad()
    def follow(self, whole: Callable[[str], Tensor], skipped: Tensor) -> None:
        """Move towards the model after a step; where ``skipped`` (a scalar bool on the device), stay.

        Args:
            whole: a name of the state dict → the model's whole tensor. All ranks ask for the same ones in turn.
        """
        for name, x in self.model.state_dict(keep_vars=True).items():
            now = x
            if name in self.trained:
                now = x.lerp(whole(name).to(x.dtype), 1 - self.asked.decay)
            elif not isinstance(x, torch.nn.Parameter):
                now = whole(name).to(x.dtype)
            if now is not x:
                x.copy_(torch.where(skipped, x, now))

    def pieces(self, name: str, rank: int, ranks: int) -> list[Piece]:
        """What this rank writes of it."""
        return self._state().pieces(name, rank, ranks)

    def load(self, name: str, saved: Stored) -> None:
        """Set what :meth:`pieces` of all ranks wrote."""
        self._state().load(name, saved)

    def bytes(self) -> int:
        """On this rank."""
        return self._state().bytes()

    def _state(self) -> Replicated:
        return Replicated({k: x.detach() for k, x in self.model.state_dict().items()})
