"""Pooling by latents (NV-Embed, Lee et al. 2024, arXiv 2405.17428): tokens read from a trained dictionary, then their
mean."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dualenc.config import Positive, Section


class LatentPooling(Section):
    """``pooling: {name: latents}``: each token attends to ``latents`` trained vectors, then a small MLP, then the mean
    over the tokens that are not padding. NV-Embed has 512 latents and 8 heads of the model's width."""

    name: Literal["latents"] = Field(default="latents", description="latents")
    latents: Positive = Field(default=512, description="trained vectors that the tokens attend to")
    heads: Positive = Field(default=8, description="attention heads; they must divide the model's width")
    mlp_ratio: Positive = Field(default=4, description="width of the MLP over the model's")


class LatentPool(nn.Module):
    """States [n, L, W] and mask [n, L] → [n, W].

    With H the states, R the latents, LN layer norms: H ← H + softmax(q(LN H) k(LN R)ᵀ / √d) v(LN R); H ← H + MLP(LN H);
    the mean over the mask. Output layers start at zero, so that training starts from the mean of the states.
    """

    def __init__(self, width: int, config: LatentPooling) -> None:
        super().__init__()
        self.heads = config.heads
        self.latent = nn.Parameter(torch.empty(config.latents, width))
        nn.init.normal_(self.latent, std=width**-0.5)
        self.norm, self.latent_norm, self.mlp_norm = (nn.LayerNorm(width) for _ in range(3))
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        hidden = config.mlp_ratio * width
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        for last in (self.out, self.mlp[2]):
            nn.init.zeros_(last.weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.mlp[2].bias)  # type: ignore[arg-type]

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """See the class."""
        n, length, width = states.shape
        q = self.query(self.norm(states)).view(n, length, self.heads, -1).transpose(1, 2)
        kv = self.key_value(self.latent_norm(self.latent)).view(1, -1, 2, self.heads, width // self.heads)
        k, v = kv.permute(2, 0, 3, 1, 4).expand(2, n, -1, -1, -1)
        read = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, length, width)
        states = states + self.out(read)
        states = states + self.mlp(self.mlp_norm(states))
        weights = mask.unsqueeze(-1).to(states.dtype)
        out: Tensor = (states * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
        return out
