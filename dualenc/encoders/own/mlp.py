"""Layers on vectors that are features already: heads on what a frozen tower said."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from dualenc.config import Component, Positive, Section
from dualenc.encoders.families import own_towers
from dualenc.encoders.tower import HeadKind, Tower, build_head
from dualenc.errors import ConfigError


class _Residual(nn.Module):
    """x + W₂ gelu(W₁ norm x); W₂ starts at zero, so the block starts as the identity."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner, self.act, self.drop = nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout)
        self.outer = nn.Linear(hidden, width)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[n, W] → the same shape."""
        out: Tensor = x + self.outer(self.drop(self.act(self.inner(self.norm(x)))))
        return out


@own_towers.register("mlp")
class MLP(Tower):
    """Residual blocks on a vector, then the head; ``layers: 0`` and ``head: linear`` is a linear probe's map."""

    kinds: ClassVar[tuple[str, ...]] = ("vector",)

    class Config(Section):
        """Settings of own/mlp."""

        layers: Annotated[int, Field(ge=0)] = Field(default=1, description="residual blocks")
        hidden: Positive = Field(default=512, description="width within a block")
        dropout: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.0, description="within the blocks")
        head: HeadKind = Field(default="linear", description="from the vector to the shared space")

    def __init__(self, config: Config, describe: Mapping[str, Any], embed_dim: int) -> None:
        super().__init__()
        width = int(describe["config"]["dim"])
        if config.head == "none" and width != embed_dim:
            raise ConfigError(f"own/mlp: head: none needs input.dim ({width}) = embed_dim ({embed_dim})")
        self.layers = nn.Sequential(*(_Residual(width, config.hidden, config.dropout) for _ in range(config.layers)))
        self.norm = nn.LayerNorm(width)
        self.head = build_head(config.head, width, embed_dim)
        self.component = Component(name="own/mlp", **config.model_dump(mode="json"))
        self.embed_dim = embed_dim

    def pooled(self, x: Mapping[str, Tensor]) -> Tensor:
        """``{"values": [n, W]}`` → [n, W]."""
        out: Tensor = self.norm(self.layers(x["values"]))
        return out
