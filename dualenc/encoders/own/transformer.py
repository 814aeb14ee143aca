"""A pre-norm transformer (Vaswani et al. 2017; Radford et al. 2021) and the own text tower built on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dualenc.config import Component, Positive, Section
from dualenc.encoders.families import own_towers
from dualenc.encoders.packing import Packing, attend, attend_last, can_pack, pack
from dualenc.encoders.tower import HeadKind, Tower, build_head
from dualenc.errors import ConfigError

Rate = Annotated[float, Field(ge=0, lt=1)]


class Attention(nn.Module):
    """Multi-head self-attention with one matrix for query, key and value."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, causal: bool, real: Tensor | None = None) -> Tensor:
        """[n, L, W] → [n, L, W]; places where ``real`` (bool [n, L]) is false are not attended to."""
        n, length, width = x.shape
        q, k, v = self.qkv(x).view(n, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        keys = None if real is None else real[:, None, None, :]
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=keys, dropout_p=dropout, is_causal=causal)
        out: Tensor = self.out(y.transpose(1, 2).reshape(n, length, width))
        return out

    def packed(self, x: Tensor, packing: Packing) -> Tensor:
        """Packed rows [T, W] → [T, W], in the last block [n, W]."""
        dropout = self.dropout if self.training else 0.0
        q, k, v = torch.unflatten(self.qkv(x), 1, (3, self.heads, -1)).unbind(1)
        y = attend_last(q[packing.ends], k, v, packing, dropout) if packing.last else attend(q, k, v, packing, dropout)
        out: Tensor = self.out(y)
        return out


class Block(nn.Module):
    """x + attention(norm x), then x + mlp(norm x)."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, dropout: float) -> None:
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads, dropout)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, causal: bool, packing: Packing | None = None) -> Tensor:
        """[n, L, W] → [n, L, W]; packed rows [T, W] → [T, W], in the last block [n, W]."""
        if packing is not None:
            y = self.attention.packed(self.norm1(x), packing)
            x = (x[packing.ends] if packing.last else x) + self.drop(y)
        else:
            x = x + self.drop(self.attention(self.norm1(x), causal))
        out: Tensor = x + self.drop(self.mlp(self.norm2(x)))
        return out


class Transformer(nn.Module):
    """``layers`` blocks, initialised as in CLIP: the residual branches shrink with depth."""

    def __init__(self, width: int, layers: int, heads: int, mlp_ratio: float, dropout: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, dropout) for _ in range(layers))
        self.grad_checkpointing = False
        branch = width**-0.5 * (2 * layers) ** -0.5
        for block in self.blocks:
            assert isinstance(block, Block)
            nn.init.normal_(block.attention.qkv.weight, std=width**-0.5)
            nn.init.normal_(block.attention.out.weight, std=branch)
            nn.init.normal_(block.mlp[0].weight, std=(2 * width) ** -0.5)  # type: ignore[arg-type]
            nn.init.normal_(block.mlp[2].weight, std=branch)  # type: ignore[arg-type]

    def forward(self, x: Tensor, causal: bool, packing: Packing | None = None) -> Tensor:
        """[n, L, W] → [n, L, W]; ``causal``: a place sees only itself and those before it.

        Packed rows, which are causal, [T, W] → [n, W]: the last token of each, in the order of packing.
        """
        for i, block in enumerate(self.blocks, 1):
            more = () if packing is None else (packing.in_last_block() if i == len(self.blocks) else packing,)
            if self.grad_checkpointing and self.training:
                x = checkpoint(block, x, causal, *more, use_reentrant=False)
            else:
                x = block(x, causal, *more)
        return x


@own_towers.register("transformer")
class TextTransformer(Tower):
    """Causal transformer over token ids, pooled at the end-of-text token.

    Nothing after that token can reach it, so a batch cut to its longest caption gives the features of full padding.
    """

    kinds: ClassVar[tuple[str, ...]] = ("text",)
    packs = True

    class Config(Section):
        """Settings of own/transformer."""

        width: Positive = Field(default=256, description="width of a token")
        layers: Positive = Field(default=4, description="transformer blocks")
        heads: Positive = Field(default=4, description="attention heads")
        mlp_ratio: Annotated[float, Field(gt=0)] = Field(default=4.0, description="width of the MLPs relative to width")
        dropout: Rate = Field(default=0.0, description="in the blocks")
        head: HeadKind = Field(default="linear", description="from the pooled feature to the shared space")

        @model_validator(mode="after")
        def _divisible(self) -> Any:
            if self.width % self.heads:
                raise ValueError(f"width ({self.width}) must be a multiple of heads ({self.heads})")
            return self

    def __init__(self, config: Config, describe: Mapping[str, Any], embed_dim: int) -> None:
        super().__init__()
        tokenizer = describe["tokenizer"]
        self.component = Component(name="own/transformer", **config.model_dump(mode="json"))
        self.embed_dim, self.eot_id = embed_dim, int(tokenizer["eot_id"])
        self.context_length = int(describe["config"]["context_length"])
        if config.head == "none" and config.width != embed_dim:
            raise ConfigError(f"own/transformer: head: none needs width ({config.width}) = embed_dim ({embed_dim}).")
        self.tokens = nn.Embedding(int(tokenizer["vocab_size"]), config.width)
        self.positions = nn.Parameter(torch.empty(self.context_length, config.width))
        self.drop = nn.Dropout(config.dropout)
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.01)
        self.transformer = Transformer(config.width, config.layers, config.heads, config.mlp_ratio, config.dropout)
        self.norm = nn.LayerNorm(config.width)
        self.head = build_head(config.head, config.width, embed_dim)

    def pooled(self, x: Mapping[str, Tensor]) -> Tensor:
        """``{"ids": int64 [n, L], "mask": bool [n, L]}`` → [n, W]."""
        ids, ends = x["ids"], end_of_text(x["ids"], x["mask"], self.eot_id)
        if self.packs and self.length_groups and can_pack(ids, self.packs_on_device):
            packing = pack(ends + 1, ids.shape[1])
            y = self.drop(self.tokens(ids.reshape(-1)[packing.tokens]) + self.positions[packing.positions])
            out: Tensor = self.norm(self.transformer(y, True, packing))
            return out[packing.back]
        y = self.drop(self.tokens(ids) + self.positions[: ids.shape[1]])
        y = self.transformer(y, causal=True)
        out = self.norm(y[torch.arange(ids.shape[0], device=ids.device), ends])
        return out

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward."""
        self.transformer.grad_checkpointing = enable


def end_of_text(ids: Tensor, mask: Tensor, eot_id: int) -> Tensor:
    """Place of the first ``eot_id`` of each row (padding may use the same id); without one, the last real token.

    [n, L] → int64 [n].
    """
    is_end = ids == eot_id
    last = mask.long().sum(1) - 1
    return torch.where(is_end.any(1), is_end.int().argmax(1), last)
