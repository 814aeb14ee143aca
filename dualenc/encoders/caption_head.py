"""How likely a caption is, given an item of another modality: the upper half of a captioner (CoCa, Yu et al. 2022,
arXiv 2205.01917; COSMO, arXiv 2401.00849) whose lower half is the text tower."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, pad, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from dualenc.encoders.hidden import Hidden, PlaceStates
from dualenc.encoders.own.transformer import Attention, end_of_text
from dualenc.encoders.tower import Tower
from dualenc.errors import ConfigError

TILE = 1 << 25
"""Logits that are held at once; more are computed in tiles, and again in the backward."""


@dataclass(frozen=True, slots=True)
class Captioning:
    """A head that a loss asks for: the captions of modality ``captions`` given the items of ``of``."""

    of: str
    captions: str
    layers: int
    heads: int


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """How many tokens there are; and the one that ends a text, if padding after it is not masked."""

    size: int
    end: int | None = None


class CaptionBlock(nn.Module):
    """Causal self-attention, attention to the states of another modality, MLP; each after a layer norm."""

    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads, 0.0)
        self.norm2, self.query = nn.LayerNorm(width), nn.Linear(width, width)
        self.seen, self.out = nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.norm3 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        branch = width**-0.5 * (3 * layers) ** -0.5
        for weight in (self.attention.qkv.weight, self.query.weight, self.seen.weight):
            nn.init.normal_(weight, std=width**-0.5)
        for last in (self.attention.out, self.out, self.mlp[2]):
            nn.init.normal_(last.weight, std=branch)  # type: ignore[arg-type]

    def forward(self, x: Tensor, memory: Tensor, there: Tensor | None) -> Tensor:
        """[n, L, W], states to look at [n, K, W] and which of these there are, bool [n, K] → [n, L, W]."""
        x = x + self.attention(self.norm1(x), True)
        q = self.query(self.norm2(x)).unflatten(2, (self.heads, -1)).transpose(1, 2)
        k, v = self.seen(memory).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mask = None if there is None else there[:, None, None, :]
        y = scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        out: Tensor = x + self.mlp(self.norm3(x))
        return out


class CaptionHead(nn.Module):
    """Blocks on the text tower's last states, then logits of the next token; it serves a loss and is in no saved model.

    Args:
        asked: between which modalities, and how deep.
        width: W of the text tower's states, and of the blocks.
        memory: width of the other tower's states.
        vocabulary: the tokens.

    Raises:
        ConfigError: the attention heads do not divide W.
    """

    def __init__(self, asked: Captioning, width: int, memory: int, vocabulary: Vocabulary) -> None:
        super().__init__()
        if width % asked.heads:
            raise ConfigError(
                f"loss: caption: heads ({asked.heads}) must divide the width of the states of "
                f"modalities.{asked.captions}.encoder ({width})"
            )
        self.asked, self.end = asked, vocabulary.end
        self.norm_text, self.norm_memory = nn.LayerNorm(width), nn.LayerNorm(memory)
        self.memory = nn.Linear(memory, width)
        self.blocks = nn.ModuleList(CaptionBlock(width, asked.heads, asked.layers) for _ in range(asked.layers))
        self.norm = nn.LayerNorm(width)
        # A parameter of its own and no layer: engines that gather weights at each call of a layer would count tiles.
        self.tokens = nn.Parameter(0.02 * torch.randn(vocabulary.size, width))

    def forward(
        self, text: PlaceStates, x: Mapping[str, Tensor], of: PlaceStates, partner: Tensor, paired: Tensor
    ) -> Tensor:
        """How likely each caption is.

        Args:
            text: the text tower's states [n, L, W] of ``x``, causal.
            x: ``ids`` int64 [n, L] and ``mask`` bool [n, L].
            of: the other tower's states [k, K, M] of k items.
            partner: int64 [n]: the item of each caption.
            paired: bool [n]: whether there is one.

        Returns:
            [n, 2], fp32: −Σ log p of a caption's tokens after its first, and their number; 0 and 0 without an item.
        """
        ids, dtype = x["ids"], self.tokens.dtype
        real = x["mask"] if self.end is None else self._until_end(ids, x["mask"])
        real = real[:, 1:] & paired[:, None]
        memory = self.memory(self.norm_memory(of.states.to(dtype)))[partner]
        there = None if of.there is None else of.there[partner]
        y = self.norm_text(text.states[:, : ids.shape[1] - 1].to(dtype))
        for block in self.blocks:
            y = block(y, memory, there)
        y = self.norm(y.to(dtype))
        nll = self._tokens(y.flatten(0, 1), ids[:, 1:].flatten(), real.flatten()).view(real.shape)
        return torch.stack([nll.sum(1), real.sum(1).to(nll.dtype)], 1)

    def _until_end(self, ids: Tensor, mask: Tensor) -> Tensor:
        ends = end_of_text(ids, mask, -1 if self.end is None else self.end)
        return mask & (torch.arange(ids.shape[1], device=ids.device) <= ends[:, None])

    def _tokens(self, y: Tensor, targets: Tensor, real: Tensor) -> Tensor:
        """States [T, W], next tokens [T] → [T], −log p; 0 where not ``real``."""
        at = chosen_places(real)
        if at is not None:
            found = self._in_tiles(y[at], targets[at])
            return found.new_zeros(len(real)).index_copy(0, at, found)
        return torch.where(real, self._in_tiles(y, targets), 0.0)

    def _in_tiles(self, y: Tensor, targets: Tensor) -> Tensor:
        size = max(TILE // len(self.tokens), 1)
        if len(y) <= size:
            return self._nll(y, targets)
        tiles = zip(torch.split(y, size), torch.split(targets, size), strict=True)
        return torch.cat(
            [checkpoint(self._nll, *tile, use_reentrant=False, preserve_rng_state=False) for tile in tiles]
        )

    def _nll(self, y: Tensor, targets: Tensor) -> Tensor:
        logits = linear(y, self.tokens)
        return cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), targets, reduction="none")


def chosen_places(real: Tensor) -> Tensor | None:
    """Where ``real`` is true, int64; None where the host would wait for the device to say how many these are."""
    if type(real) is not Tensor or real.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    return real.nonzero().flatten()


def partners(
    rows: Mapping[str, Tensor] | None, captions: str, of: str, counts: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """The item of each caption, int64 [n], and whether there is one, bool [n].

    Args:
        rows: modality → the slots of its rows, as in :class:`dualenc.data.batch.Batch`; None: row i belongs to row i.
        counts: rows of either modality, n and k; a row without a slot is a dummy.

    Raises:
        ValueError: without ``rows`` the numbers of rows differ.
    """
    n, k = counts
    if rows is None:
        if n != k:
            raise ValueError(f"{n} rows of {captions} and {k} of {of}: say with telling_rows which belong together")
        return torch.arange(n, device=device), torch.ones(n, dtype=torch.bool, device=device)
    mine, theirs = (pad(r, (0, m - len(r)), value=v) for r, m, v in ((rows[captions], n, -2), (rows[of], k, -1)))
    order = theirs.argsort()
    at = order[torch.searchsorted(theirs[order], mine).clamp(max=k - 1)]
    return at, theirs[at] == mine


def refuse_unless_causal(tower: Tower, hidden: Hidden, x: Mapping[str, Any], tokens: int, where: str) -> None:
    """Refuse a text tower whose tokens see later ones: it would be asked what it has seen.

    Args:
        hidden: it keeps the tower's places.
        x: collated rows; the first one is tried, as it is and with another last token.
        tokens: size of the vocabulary.
        where: the tower's key in a recipe.

    Raises:
        ConfigError: naming the tower, and what to use.
    """
    length = int(x["mask"][0].sum())
    two = {k: v[:1].repeat(2, *[1] * (v.ndim - 1)) for k, v in x.items() if isinstance(v, Tensor)}
    two |= {k: two[k][:, :length] for k in ("ids", "mask")}
    two["ids"][1, -1] = (two["ids"][1, -1] + 1) % tokens
    hidden.begin()
    with torch.no_grad():
        tower(two)
    hidden.take(two)
    places = hidden.take_places()
    assert places is not None
    one, other = places.states[:, : length - 1]
    if places.states.shape[1] >= length and torch.allclose(one, other, rtol=1e-4, atol=1e-4 * float(one.abs().max())):
        return
    raise ConfigError(
        f"loss: caption needs a text tower in which a token sees only those before it, and {where} "
        f"({tower.component.name}) is not one; use own/transformer, or CLIP's text tower of open_clip or transformers"
    )
