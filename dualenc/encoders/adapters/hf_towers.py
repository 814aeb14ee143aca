"""Towers around transformers' models: texts with their pooling, and the trunk of image models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dualenc.encoders.length_groups import in_length_groups
from dualenc.encoders.own.transformer import end_of_text
from dualenc.encoders.tower import Tower
from dualenc.errors import ConfigError

Pooling = Literal["mean", "cls", "eot", "model"]


class HFText(Tower):
    """A transformers text model; padding is masked, so a batch cut to its longest caption gives the same features.

    SigLIP's text tower was trained without a mask on captions padded to 64: its batches are padded to that here.
    """

    def __init__(self, net: nn.Module, head: nn.Module, pooling: Pooling, eot_id: int, pad: tuple[int, int]) -> None:
        super().__init__()
        self.net, self.head, self.pooling = net, head, pooling
        self.eot_id, (self.pad_to, self.pad_id) = eot_id, pad

    def pooled(self, x: Mapping[str, Tensor]) -> Tensor:
        """``{"ids": int64 [n, L], "mask": bool [n, L]}`` → [n, W]."""
        return in_length_groups(self._encode, x) if self.length_groups and not self.pad_to else self._encode(x)

    def _encode(self, x: Mapping[str, Tensor]) -> Tensor:
        ids, mask = x["ids"], x["mask"]
        if self.pad_to:
            ids = nn.functional.pad(ids, (0, self.pad_to - ids.shape[1]), value=self.pad_id)
            out = self.net(input_ids=ids)
        else:
            out = self.net(input_ids=ids, attention_mask=mask.long())
        return self._pool(out, ids, mask)

    def _pool(self, out: Any, ids: Tensor, mask: Tensor) -> Tensor:
        if self.pooling == "model":
            return pooled_output(out)
        states: Tensor = out.last_hidden_state
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
