"""A small transformer over log-mel frames that can hide spans of a clip from itself, for pretraining on audio alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from dualenc.config import Component, Positive, Section
from dualenc.encoders.audio_front import mel_front
from dualenc.encoders.families import own_towers
from dualenc.encoders.own.audio_vgg import StandardConv
from dualenc.encoders.own.transformer import Block
from dualenc.encoders.tower import HeadKind, Tower, build_head
from dualenc.errors import ConfigError


@own_towers.register("audio_transformer")
class AudioTransformer(Tower):
    """Strided convolutions over (time, band), then pre-norm blocks over time; the mean over time is pooled.

    With ``masked: true``, rows that say which spans to hide (``input.augment.hide``) also get the groups that losses on
    masked places need, for the K = hide · span places of the spans (D is ``embed_dim``):

    - ``masked_target`` [n, K, D]: from the convolutions, which see the whole clip;
    - ``masked_context`` [n, K, D] after half of the blocks and ``masked_last`` [n, K, D] after all of them, which see a
      learned vector at every hidden place;
    - ``masked_patch`` [n, K, P]: the log-mel of the frames that a place was made of, 0 beyond the clip's end;
    - ``masked_there`` [n, K]: 0 for a place to leave out, as spans overlap or the clip is shorter than a span.

    Attention does not see what lies beyond a clip's end.
    """

    kinds: ClassVar[tuple[str, ...]] = ("audio",)

    class Config(Section):
        """Settings of own/audio_transformer."""

        widths: list[Positive] = Field(
            [16, 32], min_length=1, description="channels of the convolutions; each halves frames and bands"
        )
        width: Positive = Field(default=128, description="width of a token")
        layers: Positive = Field(default=4, description="transformer blocks")
        heads: Positive = Field(default=4, description="attention heads")
        masked: bool = Field(default=False, description="give losses on masked places what they compare")
        span: Positive = Field(default=5, description="masked: tokens of a hidden span")
        head: HeadKind = Field(default="linear", description="from the pooled feature to the shared space")

        @model_validator(mode="after")
        def _divisible(self) -> Any:
            if self.width % self.heads or self.width % 2:
                raise ValueError(f"width ({self.width}) must be even and a multiple of heads ({self.heads})")
            return self

    def __init__(self, config: Config, describe: Mapping[str, Any], embed_dim: int) -> None:
        super().__init__()
        if config.head == "none" and config.width != embed_dim:
            raise ConfigError(
                f"own/audio_transformer: head: none needs width ({config.width}) = embed_dim ({embed_dim})."
            )
        self.front = mel_front("own/audio_transformer", describe)
        places = self.front.width
        for _ in config.widths:
            places = -(-places // 2)
        before = [1, *config.widths[:-1]]
        self.convs = nn.ModuleList(StandardConv(i, o, 2) for i, o in zip(before, config.widths, strict=True))
        self.into = nn.Sequential(
            nn.LayerNorm(places * config.widths[-1]), nn.Linear(places * config.widths[-1], config.width)
        )
        self.layers = nn.ModuleList(AudioBlock(config.width, config.heads, 4.0, 0.0) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = build_head(config.head, config.width, embed_dim)
        self.masked, self.span, self.middle = config.masked, config.span, -(-config.layers // 2)
        if config.masked:
            self.mask_token = nn.Parameter(torch.randn(config.width) * 0.02)
            self.masked_heads = nn.ModuleDict(
                {
                    name: nn.Linear(config.width, embed_dim)
                    for name in ("masked_target", "masked_context", "masked_last")
                }
            )
        self.component = Component(name="own/audio_transformer", **config.model_dump(mode="json"))
        self.embed_dim = embed_dim

    def outputs(self, x: Any) -> dict[str, Tensor]:
        """As of every tower, and the groups of masked places where rows have some to hide."""
        pooled, more = self._run(x)
        return {"features": self.head(pooled), "pooled": pooled, **more}

    def pooled(self, x: Any) -> Tensor:
        """``{"wave": [n, T], "length": [n], …}`` → [n, W]."""
        return self._run(x)[0]

    def blocks(self) -> list[nn.Module]:
        """The transformer's blocks."""
        return list(self.layers)

    def _run(self, x: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        heard = self.front(x)
        y, mask = heard.values[:, None], heard.mask
        for conv in self.convs:
            y = conv(y * mask[:, None, :, None]).relu()
            mask = mask[:, ::2]
        y = self.into(y.transpose(1, 2).flatten(2))  # [n, L, W]
        more: dict[str, Tensor] = {}
        hides = self.masked and "hide" in x
        if hides:
            at, there = hidden_places(x["hide"], mask.sum(1), self.span)
            more["masked_target"] = self._at("masked_target", y, at)
            more["masked_patch"] = pieces(heard.values * heard.mask[..., None], 1 << len(self.convs), at)
            more["masked_there"] = there.float()
            hidden = torch.zeros_like(mask).scatter_(1, at, True)
            y = torch.where(hidden[..., None], self.mask_token.to(y.dtype), y)
        y = y + sinusoids(y.shape[1], y.shape[2], y.device).to(y.dtype)
        for number, block in enumerate(self.layers, 1):
            y = block(y, mask)
            if hides and number == self.middle:
                more["masked_context"] = self._at("masked_context", y, at)
        if hides:
            more["masked_last"] = self._at("masked_last", y, at)
        real = mask[..., None]
        pooled: Tensor = self.norm(torch.where(real, y, 0.0).sum(1) / real.sum(1))
        return pooled, more

    def _at(self, name: str, y: Tensor, at: Tensor) -> Tensor:
        """Tokens [n, L, W] → the head ``name`` of those at [n, K], [n, K, D] fp32."""
        out: Tensor = self.masked_heads[name](y.gather(1, at[..., None].expand(-1, -1, y.shape[2])))
        return out.float()


class AudioBlock(Block):
    """A block of own/transformer whose attention sees real places only, before and after each."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        """[n, L, W], bool [n, L] → [n, L, W]."""
        x = x + self.drop(self.attention(self.norm1(x), False, mask))
        out: Tensor = x + self.drop(self.mlp(self.norm2(x)))
        return out


def hidden_places(starts: Tensor, count: Tensor, span: int) -> tuple[Tensor, Tensor]:
    """Where spans of tokens lie.

    Args:
        starts: [n, S] in [0, 1): where each span begins, as a share of the places where it can.
        count: [n] tokens of each clip.
        span: tokens of a span.

    Returns:
        places [n, S · span], and bool [n, S · span]: false for a place that was named before or is beyond the end.
    """
    first = (starts * (count - span + 1).clamp(min=1)[:, None]).long()
    at = (first[..., None] + torch.arange(span, device=starts.device)).flatten(1)
    inside = at < count[:, None]
    at = torch.minimum(at, count[:, None] - 1)
    again = (at[:, :, None] == at[:, None, :]).tril(-1).any(2)
    return at, inside & ~again


def pieces(values: Tensor, each: int, at: Tensor) -> Tensor:
    """Log-mel [n, F, M] cut into pieces of ``each`` frames → those at places [n, K]: [n, K, each · M]."""
    n, frames, mels = values.shape
    whole = nn.functional.pad(values, (0, 0, 0, -frames % each)).reshape(n, -1, each * mels)
    return whole.gather(1, at[..., None].expand(-1, -1, whole.shape[2]))


def sinusoids(length: int, width: int, device: torch.device) -> Tensor:
    """Positions [length, width] of Vaswani et al. 2017, sines before cosines."""
    rates = torch.exp(torch.arange(width // 2, device=device) * (-9.21034 / (width // 2)))
    angles = torch.arange(length, device=device)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)
