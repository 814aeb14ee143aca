"""A text tower with an expert for each domain or language, chosen by what the data says and not by a router (enforced
routing, Hallee et al. 2024, arXiv 2401.15713)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dualenc.config import Component, Positive
from dualenc.encoders.families import own_towers
from dualenc.encoders.own.transformer import Block, TextTransformer, end_of_text
from dualenc.encoders.packing import Packing
from dualenc.errors import ConfigError


class Route(NamedTuple):
    """Which rows go to which expert: ``order`` [n] lists the rows expert after expert, ``counts`` how many each has."""

    order: Tensor
    counts: list[int]


def routed(domain: Tensor, experts: int) -> Route:
    """The route of rows of these domains [n]. The counts are read from the device, once for a forward."""
    return Route(domain.argsort(stable=True), torch.bincount(domain, minlength=experts).tolist())


class RoutedBlock(Block):
    """A block with an MLP for each expert, all of them copies of the dense one at first."""

    def __init__(self, dense: Block, experts: int) -> None:
        nn.Module.__init__(self)
        self.norm1, self.attention, self.norm2, self.drop = dense.norm1, dense.attention, dense.norm2, dense.drop
        self.experts = nn.ModuleList(copy.deepcopy(dense.mlp) for _ in range(experts))

    def forward(self, x: Tensor, causal: bool, packing: Packing | None = None, route: Route | None = None) -> Tensor:
        """[n, L, W] → [n, L, W]. An expert without rows runs on none, so its gradient is 0 and not missing."""
        assert packing is None
        assert route is not None
        x = x + self.drop(self.attention(self.norm1(x), causal))
        parts = self.norm2(x)[route.order].split(route.counts)
        y = torch.cat([mlp(part) for mlp, part in zip(self.experts, parts, strict=True)])
        out: Tensor = x + self.drop(torch.empty_like(y).index_copy(0, route.order, y))
        return out


@own_towers.register("moe_transformer")
class MoETextTransformer(TextTransformer):
    """``own/transformer`` whose last blocks have an MLP for each of ``input.domains``; attention, embeddings and head
    are common. It starts as the dense tower. A text without a domain is of the first one."""

    kinds: ClassVar[tuple[str, ...]] = ("text",)
    packs = False  # experts take whole rows

    class Config(TextTransformer.Config):
        """Settings of own/moe_transformer."""

        routed: Positive | None = Field(default=None, description="last blocks that have experts; default: all")

    def __init__(self, config: Config, describe: Mapping[str, Any], embed_dim: int) -> None:
        super().__init__(config, describe, embed_dim)
        self.component = Component(name="own/moe_transformer", **config.model_dump(mode="json"))
        domains = describe["config"].get("domains") or []
        if not domains:
            raise ConfigError(
                "own/moe_transformer: input.domains is empty; list the domains, and name the member that says a text's "
                "in input.domain, or use own/transformer"
            )
        self.domains = len(domains)
        blocks = self.transformer.blocks
        for k in range(max(config.layers - (config.routed or config.layers), 0), config.layers):
            dense = blocks[k]
            assert isinstance(dense, Block)
            blocks[k] = RoutedBlock(dense, self.domains)

    def pooled(self, x: Mapping[str, Tensor]) -> Tensor:
        """``{"ids": int64 [n, L], "mask": bool [n, L], "domain": int64 [n]}`` → [n, W]."""
        ids, route = x["ids"], routed(x["domain"], self.domains)
        y = self.drop(self.tokens(ids) + self.positions[: ids.shape[1]])
        for block in self.transformer.blocks:
            more = (None, route) if isinstance(block, RoutedBlock) else ()
            if self.transformer.grad_checkpointing and self.training:
                y = checkpoint(block, y, True, *more, use_reentrant=False)
            else:
                y = block(y, True, *more)
        out: Tensor = self.norm(y[torch.arange(len(ids), device=ids.device), end_of_text(ids, x["mask"], self.eot_id)])
        return out
