"""Texts of classes changed by what an image says: the post-model prompting of DenseCLIP (Rao et al. 2022, arXiv
2112.01518).

    t_k ← norm( t_k + γ ⊙ Dec(t_k; [x; v_1 … v_P]) )

x is the feature of the image, v_p those of its places, γ a factor for each channel that starts at 1e-4. Dec maps both
to its own width, and has blocks of attention to what the image says and an MLP. DenseCLIP's texts also attend to each
other; here one text's feature does not depend on which others a sample lists.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, scaled_dot_product_attention

from dualenc.errors import ConfigError

_GAMMA = 1e-4


@dataclass(frozen=True, slots=True)
class InContext:
    """A head that a loss asks for: the texts that samples of modality ``texts`` list (``input.negatives``), given the
    images of ``of``."""

    of: str
    texts: str
    layers: int
    width: int
    heads: int


class ContextBlock(nn.Module):
    """Attention to other states, then an MLP; each after a layer norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.query = nn.LayerNorm(width), nn.Linear(width, width)
        self.seen, self.out = nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """[n, K, W], states to look at [n, M, W] → [n, K, W]."""
        q = self.query(self.norm1(x)).unflatten(2, (self.heads, -1)).transpose(1, 2)
        k, v = self.seen(memory).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class ContextHead(nn.Module):
    """See the module; it serves a loss and is in no saved model.

    Raises:
        ConfigError: the attention heads do not divide the width.
    """

    def __init__(self, asked: InContext, dim: int) -> None:
        super().__init__()
        width = asked.width
        if width % asked.heads:
            raise ConfigError(f"loss.context: heads ({asked.heads}) must divide width ({width})")
        self.asked = asked
        self.memory = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, width), nn.LayerNorm(width))
        self.texts = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, width))
        self.blocks = nn.ModuleList(ContextBlock(width, asked.heads) for _ in range(asked.layers))
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, dim))
        self.gamma = nn.Parameter(torch.full((dim,), _GAMMA))

    def forward(self, texts: Tensor, image: Tensor, places: Tensor, partner: Tensor, paired: Tensor) -> Tensor:
        """The texts' features with what the image says; without an image they stay.

        Args:
            texts: [n, K, D] unit rows; image: [k, D] and places: [k, P, D] of k images.
            partner: int64 [n]: the image of each list of texts; paired: bool [n]: whether there is one.

        Returns:
            [n, K, D] unit rows, fp32.
        """
        dtype = self.gamma.dtype
        memory = self.memory(torch.cat([image[:, None], places], 1).to(dtype))[partner]
        x = self.texts(texts.to(dtype))
        for block in self.blocks:
            x = block(x, memory)
        change = self.gamma * self.out(x)
        return normalize(texts + torch.where(paired[:, None, None], change, 0.0).to(texts.dtype), dim=2)
