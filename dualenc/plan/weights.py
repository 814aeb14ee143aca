"""A recipe's model without its weights: built on the meta device, and counted."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import nn

from dualenc.config import Recipe
from dualenc.data.modalities import ModalityInput, rows_of
from dualenc.encoders import DualEncoder, build_tower
from dualenc.encoders.tower import repeated
from dualenc.engine.optim import parameters_by_role
from dualenc.losses import build_loss
from dualenc.model.bundle import add_prompts, kind_of, locks, resolve_input, shared_of
from dualenc.plugins import import_plugins


@dataclass(frozen=True, slots=True)
class Leaf:
    """One parameter: its elements, those of one row of its first dimension, and whether it is trained."""

    elements: int
    row: int
    trained: bool

    def shard(self, ranks: int) -> int:
        """Elements of the largest shard when its rows are dealt out to ``ranks``."""
        return -(-(self.elements // self.row) // ranks) * self.row


@dataclass(frozen=True, slots=True)
class Weights:
    """What a model holds, in elements (all of them fp32).

    Attributes:
        units: the parameters of each unit that FSDP2 gathers at once: every repeated block, and last all others.
        matrices: trained elements that Muon updates, which keeps one number for each; others have two.
        buffers: bytes of buffers, such as running statistics.
    """

    units: list[list[Leaf]]
    matrices: int
    buffers: int

    @property
    def leaves(self) -> list[Leaf]:
        """All parameters."""
        return [leaf for unit in self.units for leaf in unit]

    @property
    def trained(self) -> int:
        """Elements that are trained."""
        return sum(leaf.elements for leaf in self.leaves if leaf.trained)

    @property
    def total(self) -> int:
        """All elements."""
        return sum(leaf.elements for leaf in self.leaves)

    @property
    def largest(self) -> int:
        """Elements of the largest trained parameter."""
        return max((leaf.elements for leaf in self.leaves if leaf.trained), default=0)


def count(model: nn.Module) -> Weights:
    """Count a model's parameters; those that two modules share once."""
    seen: set[int] = set()

    def leaves(module: nn.Module) -> list[Leaf]:
        out = []
        for p in module.parameters():
            if id(p) not in seen:
                seen.add(id(p))
                out.append(Leaf(p.numel(), max(p.numel() // max(p.shape[0], 1), 1), p.requires_grad))
        return out

    units = [leaves(block) for block in repeated(model)]
    units.append(leaves(model))
    return Weights(
        units,
        sum(p.numel() for p in parameters_by_role(model).get("matrix", [])),
        sum(x.numel() * x.element_size() for x in model.buffers()),
    )


def build_on(device: str, recipe: Recipe) -> tuple[DualEncoder, dict[str, ModalityInput]]:
    """A recipe's model with the heads that its loss trains, in training mode, and its inputs; on ``meta`` it has shapes
    and no memory.

    Its towers are those of :func:`dualenc.model.build_bundle`. Nothing is tried in them, and weights that a recipe
    starts from count for nothing here.

    Raises:
        ConfigError: as building the run's model does.
    """
    import_plugins(recipe.plugins, "plugins")
    parts, inputs, towers = {}, {}, {}
    for m, part in recipe.modalities.items():
        parts[m], inputs[m] = resolve_input(m, part)
        if part.shares is None:
            with torch.device(device), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter.*")  # released weights
                described = inputs[m].describe()
                towers[m] = build_tower(
                    rows_of(kind_of(m, part)), part.encoder, described, recipe.embed_dim, f"modalities.{m}.encoder"
                )
    with torch.device(device):
        model = DualEncoder(towers, recipe.pairs, recipe.logit_scale, *locks(parts), shared_of(parts))
        add_prompts(model, parts, inputs, recipe.seed, tried=False)
        for m, part in recipe.modalities.items():
            if part.lora is not None and part.shares is None:
                model.add_adapters(m, part.lora)
        for group, head in build_loss(recipe.loss).heads(recipe.embed_dim, model.modalities).items():
            model.add_head(group, head)
    return model.train(), inputs
