"""A tower from its last block on: what stands after the blocks (pooling, norm, head) asked about something else than
what the last block said.

Given the output of an earlier block, it gives the features of that depth: :class:`Fused` embeds by their mean, so the
scores of prompts are the means of the depths' logits (the idea of seed S59, which contrasts the layers of a language
model). Given a map or sequence of which every place is one and the same, it gives the features of that place, pooled as
the tower pools: :func:`features_of_places`. Neither needs to know the architecture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dualenc.distributed.devices import autocast
from dualenc.encoders import places
from dualenc.encoders.dual_encoder import normalised, prefix
from dualenc.encoders.places import outputs_of_blocks
from dualenc.encoders.tower import Tower
from dualenc.errors import ConfigError
from dualenc.model import Embedder
from dualenc_evals.features import EvalModel

ELEMENTS = 2**24
"""Numbers of the copies of places that are pooled at once."""


def _once(said: list[Tensor], what: str) -> Tensor:
    if len(said) != 1:
        raise ConfigError(
            f"{what}: its blocks run {len(said)} times for a batch, so their outputs cannot be told apart"
        )
    return said[0]


def own_tower(model: EvalModel, modality: str, key: str) -> tuple[Embedder, Tower]:
    """The embedder and the tower whose blocks can be listened to.

    Raises:
        ConfigError: ``model`` is not one of ours, is in training (an engine may hold its weights in pieces), or the
            tower has no blocks.
    """
    if not isinstance(model, Embedder) or model.training_run:
        raise ConfigError(f"{key}: only a saved model of ours can be asked about its blocks, not one in training")
    tower = model.bundle.model.tower(modality)
    if not tower.blocks():
        raise ConfigError(f"{key}: the tower {tower.component.name} of {modality!r} has no repeated blocks")
    return model, tower


class Fused:
    """An embedder whose features are the mean of those at several depths of one modality's tower, of length 1 again.

    Cosines with a prompt are then, up to one positive factor for each item, the mean of the depths' cosines. Every
    depth but the last costs one more forward pass. Other modalities are embedded as they are.

    Args:
        depths: shares of the tower's blocks; 1 is the last block, so ``[1]`` alone changes nothing.
    """

    def __init__(self, model: EvalModel, depths: Sequence[float], modality: str) -> None:
        self._embedder, self._tower = own_tower(model, modality, "depths")
        self._depths, self._modality = sorted(set(depths)), modality
        self.modalities, self.device = self._embedder.modalities, self._embedder.device

    def describe(self) -> dict[str, Any]:
        """As the model, and the depths."""
        return {**self._embedder.describe(), "depths": {self._modality: self._depths}}

    def embed(self, modality: str, items: Sequence[Any], batch_size: int = 64) -> Tensor:
        """See :class:`dualenc_evals.features.EvalModel`.

        Raises:
            ConfigError: the block at a depth says something of another shape than the last one.
        """
        if modality != self._modality:
            return self._embedder.embed(modality, items, batch_size)
        out = []
        with torch.no_grad():
            for x in self._embedder.batches(modality, items, batch_size):
                features = self._of_all_depths(x)
                mean = features[0] if len(features) == 1 else normalised(torch.stack(features).mean(0))
                out.append(mean.cpu())
        return torch.cat(out) if out else torch.zeros(0, self._embedder.embed_dim)

    def _of_all_depths(self, x: Any) -> list[Tensor]:
        blocks = self._tower.blocks()
        with outputs_of_blocks(blocks) as said:
            whole = self._forward(x)
        states = [_once(s, "depths") for s in said]
        out = []
        for depth in self._depths:
            k = min(max(round(depth * len(blocks)), 1), len(blocks)) - 1
            if k == len(blocks) - 1:
                out.append(whole)
                continue
            if states[k].shape != states[-1].shape:
                raise ConfigError(
                    f"depths: block {k + 1} of {len(blocks)} gives {list(states[k].shape[1:])} for each item, the last "
                    f"one {list(states[-1].shape[1:])}; name depths after which the shape stays the same"
                )
            with outputs_of_blocks(blocks, states[k]):
                out.append(self._forward(x))
        return out

    def _forward(self, x: Any) -> Tensor:
        with autocast(self._embedder.device, self._embedder.precision):
            features = self._embedder.bundle.model({self._modality: x})["features"][self._modality]
        return prefix(features.float(), self._embedder.dim)


def features_of_places(tower: Tower, x: Tensor) -> tuple[Tensor, Tensor]:
    """(features of each place [n, h, w, D], features of the whole images [n, D]), both of length 1, fp32.

    Args:
        x: images uint8 [n, 3, S, S].

    Raises:
        ConfigError: see :func:`dualenc.encoders.places.features_of_places`.
    """
    with places.heard(tower, "dense") as said:
        whole = normalised(tower.encode(x))
    return normalised(places.features_of_places(tower, x, said, ELEMENTS)), whole
