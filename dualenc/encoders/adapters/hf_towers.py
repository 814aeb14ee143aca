"""Towers around transformers' models: texts with their pooling, and the trunk of image models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dualenc.encoders.adapters.latents import LatentPool, LatentPooling
from dualenc.encoders.length_groups import in_length_groups
from dualenc.encoders.own.transformer import end_of_text
from dualenc.encoders.tower import Tower
from dualenc.errors import ConfigError

Pooling = Literal["mean", "cls", "eot", "model"]


class HFText(Tower):
    """A transformers text model; padding is masked, so a batch cut to its longest caption gives the same features.

    SigLIP's text tower was trained without a mask on captions padded to 64: its batches are padded to that here.

    Args:
        pooling: how the states become one feature; :class:`LatentPooling` is trained along.
        width: of the states, for latents.
        bidirectional: every token sees every other, in decoders too (NV-Embed, arXiv 2405.17428): the mask of future
            tokens is replaced by that of padding.
    """

    def __init__(
        self,
        net: nn.Module,
        head: nn.Module,
        pooling: Pooling | LatentPooling,
        eot_id: int,
        pad: tuple[int, int],
        width: int = 0,
        bidirectional: bool = False,
    ) -> None:
        super().__init__()
        self.net, self.head, self.bidirectional = net, head, bidirectional
        self.pooling: Pooling | Literal["latents"] = pooling if isinstance(pooling, str) else "latents"
        self.eot_id, (self.pad_to, self.pad_id) = eot_id, pad
        if not isinstance(pooling, str):
            self.pool, self.fresh = LatentPool(width, pooling), ("pool",)

    def pooled(self, x: Mapping[str, Tensor]) -> Tensor:
        """``{"ids": int64 [n, L], "mask": bool [n, L]}`` → [n, W]."""
        return in_length_groups(self._encode, x) if self.length_groups and not self.pad_to else self._encode(x)

    def _encode(self, x: Mapping[str, Tensor]) -> Tensor:
        ids, mask = x["ids"], x["mask"]
        if self.pad_to:
            ids = nn.functional.pad(ids, (0, self.pad_to - ids.shape[1]), value=self.pad_id)
            out = self.net(input_ids=ids)
        elif self.bidirectional:
            out = self.net(input_ids=ids, attention_mask=self._both_ways(mask))
        else:
            out = self.net(input_ids=ids, attention_mask=mask.long())
        return self._pool(out, ids, mask)

    def _both_ways(self, mask: Tensor) -> Tensor:
        """[n, L] → [n, 1, L, L] as the model's attention takes it: which tokens each may see. A token of padding sees
        itself, so that no row of the attention is empty; nobody sees it."""
        length = mask.shape[1]
        seen = mask[:, None, None, :] | torch.eye(length, dtype=torch.bool, device=mask.device)
        if self.net.config._attn_implementation == "sdpa":  # type: ignore[union-attr]
            return seen
        dtype = next(self.net.parameters()).dtype
        return torch.zeros(seen.shape, dtype=dtype, device=mask.device).masked_fill_(~seen, torch.finfo(dtype).min)

    def _pool(self, out: Any, ids: Tensor, mask: Tensor) -> Tensor:
        if self.pooling == "model":
            return pooled_output(out)
        states: Tensor = out.last_hidden_state
        if self.pooling == "latents":
            pooled: Tensor = self.pool(states, mask)
            return pooled
        if self.pooling == "cls":
            return states[:, 0]
        if self.pooling == "eot":
            return states[torch.arange(ids.shape[0], device=ids.device), end_of_text(ids, mask, self.eot_id)]
        weights = mask.unsqueeze(-1).to(states.dtype)
        return (states * weights).sum(1) / weights.sum(1).clamp(min=1e-9)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """transformers' own switch."""
        switch_checkpointing(self.net, enable)


class HFImageTrunk(nn.Module):
    """A transformers vision model → one vector per image."""

    def __init__(self, net: nn.Module, pooling: Pooling) -> None:
        super().__init__()
        self.net, self.pooling = net, pooling

    def forward(self, x: Tensor, **more: Tensor) -> Tensor:
        """[n, 3, S, S] → [n, W]; ``more``: what else the model takes."""
        out = self.net(pixel_values=x, **more)
        if self.pooling == "model":
            return pooled_output(out)
        states: Tensor = out.last_hidden_state
        return states[:, 0] if self.pooling == "cls" else states.mean(1)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """transformers' own switch."""
        switch_checkpointing(self.net, enable)


def pooled_output(out: Any) -> Tensor:
    """The model's own pooled output, projected if the model projects."""
    for key in ("image_embeds", "text_embeds", "audio_embeds", "pooler_output"):
        value = out.get(key)
        if isinstance(value, Tensor):
            return value
    raise ConfigError("pooling: model needs a tower that does its own pooling; use mean, cls or eot.")


def switch_checkpointing(net: nn.Module, enable: bool) -> None:
    """Turn gradient checkpointing of a transformers model on or off."""
    if enable:
        net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    else:
        net.gradient_checkpointing_disable()  # type: ignore[operator]
