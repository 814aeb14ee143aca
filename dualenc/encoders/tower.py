"""The base of every tower: collated inputs of one modality → features [n, D], not yet normalised."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

from dualenc.config import Component

HeadKind = Literal["linear", "mlp", "none"]


class Tower(nn.Module):
    """Base of all towers.

    Attributes:
        component: name and settings that build this architecture again, without weights and without any file.
        embed_dim: D of the features.
        head: what turns the encoder's own embedding into features; ``lock: trunk`` trains it alone.
        freeze_bn: batch norms use their running statistics in training too (their gains and biases are trained).
            Statistics of the batch would make a gradient depend on how the global batch is cut into ranks and
            micro-batches, and a released tower has good ones already.
        channels_last: its weights and pictures lie in that order in memory.
        length_groups: a text tower need not pad captions to the batch's longest. One that ``packs`` runs on their real
            tokens alone (see :mod:`dualenc.encoders.packing`), one call for a batch. Others encode captions of like
            length apart (:func:`dualenc.encoders.length_groups.in_length_groups`): how many calls that makes depends on
            a rank's captions, so under engines that gather weights at each call they cannot.
        packs: the tower can run on packed tokens.
        packs_on_device: it does so on a GPU as well, where the lengths are read back from it once a batch.
        keeps_shape: its blocks have to see the batch as it was padded, once: they are compiled, or their outputs kept.
        fresh: names of parts whose weights are new where the rest may be released: adapters leave them out, and they
            are trained whole.
    """

    component: Component
    embed_dim: int
    head: nn.Module
    freeze_bn: bool = True
    channels_last: bool = False
    length_groups: bool = False
    packs: bool = False
    packs_on_device: bool = False
    keeps_shape: bool = False
    fresh: tuple[str, ...] = ()

    def pooled(self, x: Any) -> Tensor:
        """The collated rows of one modality → [n, W]: the encoder's own output, before the head."""
        raise NotImplementedError

    def outputs(self, x: Any) -> dict[str, Tensor]:
        """``features`` [n, D] and ``pooled`` [n, W] of the collated rows, and whatever else the tower says of each row:
        a further group of the model's outputs by that name."""
        y = self.pooled(x)
        return {"features": self.head(y), "pooled": y}

    def forward(self, x: Any) -> dict[str, Tensor]:
        """The collated rows of one modality → all :meth:`outputs`."""
        return self.outputs(x)

    def encode(self, x: Any) -> Tensor:
        """The collated rows of one modality → features [n, D], not normalised."""
        features: Tensor = self(x)["features"]
        return features

    def train(self, mode: bool = True) -> Self:
        """As ``nn.Module.train``; frozen batch norms stay in eval mode."""
        super().train(mode)
        self.settle_batch_norms()
        return self

    def settle_batch_norms(self) -> None:
        """Put the batch norms in eval mode if they are frozen."""
        if self.freeze_bn:
            for norm in batch_norms(self):
                norm.eval()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward instead of keeping them; small towers ignore it."""

    def blocks(self) -> list[nn.Module]:
        """The repeated blocks, from input to output: what ``unlocked_groups`` and ``layer_decay`` count."""
        return [b for name, child in self.named_children() if name != "head" for b in repeated(child, named=True)]

    def levels(self) -> dict[str, int]:
        """Name of each parameter → 0 for what stands before the blocks (embeddings), 1 … n for the n blocks, n + 1
        for what comes after them: last norms, projections, the head."""
        inside = {id(p): k for k, block in enumerate(self.blocks(), 1) for p in block.parameters()}
        n = len(self.blocks())
        out, passed = {}, n == 0
        for name, p in self.named_parameters():
            passed = passed or inside.get(id(p)) == n
            after = passed or name.startswith("head.") or name.rpartition(".")[2] in _OUTPUTS
            out[name] = inside.get(id(p), n + 1 if after else 0)
        return out


def channels_last(y: Tensor) -> bool:
    """Whether what a block of an image tower says is a square map [n, h, w, C], as of Swin; others are [n, C, h, w]."""
    return y.ndim == 4 and y.shape[1] == y.shape[2] != y.shape[3]


@runtime_checkable
class Recomputing(Protocol):
    """A trunk that can recompute its activations in the backward (open_clip's, timm's, own/vit)."""

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Switch it on or off."""


class ImageTower(Tower):
    """Images uint8 [n, 3, S, S] (or a mapping that has them as ``pixels``) → normalised on the device → ``trunk`` →
    ``head`` → [n, D].

    Mean and std are an input's settings, kept in dualenc.json; the buffers that hold them are not part of the weights.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, trunk: nn.Module, head: nn.Module, describe: Mapping[str, Any], channels_last: bool) -> None:
        super().__init__()
        config = describe["config"]
        self.trunk, self.head = trunk, head
        self.channels_last = channels_last
        self.register_buffer("mean", torch.tensor(config["mean"]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config["std"]).view(1, 3, 1, 1), persistent=False)

    def pooled(self, x: Any) -> Tensor:
        """uint8 [n, 3, S, S] → [n, W]."""
        out: Tensor = self.trunk(self.pixels(x))
        return out

    def pixels(self, x: Tensor | Mapping[str, Tensor]) -> Tensor:
        """uint8 [n, 3, S, S] → what the trunk takes."""
        x = x["pixels"] if isinstance(x, Mapping) else x
        y = (x.to(self.mean.dtype) / 255 - self.mean) / self.std
        return y.contiguous(memory_format=torch.channels_last) if self.channels_last else y

    def features_of(self, pixels: Tensor) -> Tensor:
        """What the trunk takes → features [n, D], not normalised: the part of the tower that an exported graph has."""
        out: Tensor = self.head(self.trunk(pixels))
        return out

    def set_channels_last(self) -> None:
        """Weights and images in channels-last layout, if it convolves more than once; a ViT only cuts patches so."""
        if sum(isinstance(m, nn.Conv2d) for m in self.trunk.modules()) > 1:
            self.channels_last = True
            self.trunk.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Passed on to trunks that have the switch (open_clip, timm, own ViT)."""
        if isinstance(self.trunk, Recomputing):
            self.trunk.set_grad_checkpointing(enable)


def batch_norms(module: nn.Module) -> list[nn.Module]:
    """The batch norms of a tower; those of a nested tower, which has its own setting, are excluded."""
    found: list[nn.Module] = []
    for child in module.children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            found.append(child)
        elif not isinstance(child, Tower):
            found += batch_norms(child)
    return found


def with_batch_norms(tower: Tower, frozen: bool) -> Tower:
    """Set :attr:`Tower.freeze_bn`; only the setting that is not the default is kept in the component, so that towers
    without batch norm are described as they always were."""
    tower.freeze_bn = frozen
    if not frozen:
        settings = tower.component.model_dump(mode="json") | {"freeze_bn": False}
        tower.component = Component.model_validate(settings)
    return tower


_OUTPUTS = ("proj", "text_projection", "ln_final")
"""Parameters of a model's last layer that are registered before its blocks."""


def repeated(model: nn.Module, named: bool = False) -> list[nn.Module]:
    """The repeated blocks of a model (layers of a transformer): the outermost lists of two or more alike modules.

    Args:
        named: ``model`` itself may be such a list.
    """
    if named and _alike(model):
        return list(model.children())
    return [b for child in model.children() for b in (child.children() if _alike(child) else repeated(child))]


def _alike(module: nn.Module) -> bool:
    inner = list(module.children())
    same = len(inner) > 1 and len({type(m) for m in inner}) == 1 and any(True for _ in inner[0].children())
    return same and isinstance(module, nn.ModuleList | nn.Sequential)


def build_head(kind: HeadKind, width: int, embed_dim: int) -> nn.Module:
    """Projection of pooled features [n, width] to the shared space [n, embed_dim], without bias (as in CLIP).

    ``mlp`` is one hidden layer of ``width`` with GELU.
    """
    if kind == "none":
        return nn.Identity()
    last = nn.Linear(width, embed_dim, bias=False)
    nn.init.normal_(last.weight, std=1 / math.sqrt(width))
    return last if kind == "linear" else nn.Sequential(nn.Linear(width, width), nn.GELU(), last)


def activations(module: nn.Module) -> list[str]:
    """The distinct activation functions in ``module``, such as ``["GELU(approximate='none')"]``.

    A model run with another activation than it was trained with gives lower numbers and no error (open_clip#771): so a
    bundle records them, and loading compares.
    """
    found = set()
    for m in module.modules():
        kind = type(m)
        named = any(part in kind.__name__.lower() for part in ("gelu", "relu", "silu", "swish", "hardtanh"))
        if ".activation" in kind.__module__ or (named and next(m.children(), None) is None):
            # extra_repr also says "inplace": no number depends on it
            extra = ", ".join(p for p in m.extra_repr().split(", ") if p and "inplace" not in p)
            found.add(f"{kind.__name__}({extra})")
    return sorted(f for f in found if not f.startswith(("MultiheadAttention", "NonDynamically")))
