"""A recipe's ``modalities``: how raw bytes become rows, the tower, and what of it is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from dualenc.config.section import Component, Positive, Section
from dualenc.config.stream import Stream
from dualenc.errors import ConfigError, did_you_mean


class Unlocked(Section):
    """Train only the last blocks of a tower."""

    unlocked_groups: Positive = Field(description="number of last blocks to train, besides the head")


class Lora(Section):
    """Low-rank adapters beside a tower's layers (Hu et al. 2021): nothing else of the tower is trained."""

    rank: Positive = Field(default=8, description="rank of each adapter")
    alpha: Annotated[float, Field(gt=0)] = Field(default=16.0, description="adapters are scaled by alpha / rank")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="dropout on the input of the adapters"
    )
    targets: Literal["auto"] | list[str] = Field(
        default="auto",
        description="endings of layer names; auto: every linear layer, or every convolution if there is none",
    )
    head: bool = Field(default=False, description="also train the projection to the shared space")


class Prompts(Section):
    """Learned tokens in a tower's blocks (PromptSRC, Khattak et al. 2023): nothing else of the tower is trained."""

    tokens: Positive = Field(
        default=4, description="learned tokens in each layer; texts: as many as input.prefix has (4: 'a photo of a')"
    )
    layers: Positive | None = Field(
        default=None,
        description="the first blocks that get tokens of their own; default: 9, or all where there are fewer",
    )
    head: bool = Field(default=False, description="also train the projection to the shared space")


class Modality(Section):
    """One modality: how its raw bytes become tensors, and its tower."""

    kind: str | None = Field(default=None, description="registered modality that handles it; default: the key itself")
    input: dict[str, Any] = Field(default_factory=dict, description="settings of that modality (size, tokenizer, …)")
    encoder: Component = Field(description="its tower: FAMILY/NAME and that tower's settings")
    lock: bool | Literal["trunk"] | Unlocked = Field(
        default=False,
        description="freeze the tower's weights (LiT); trunk: all but its projection; "
        "{unlocked_groups: N}: all but its last N blocks and its projection",
    )
    shares: str | None = Field(
        default=None, description="another modality whose tower also encodes this one; then leave encoder out"
    )
    stream: Stream | str | None = Field(
        default=None,
        description="with shares: a projector, dropout and drop path of its own; a name: those of that modality",
    )
    init_from: str | None = Field(
        default=None, description="start from the same tower of a trained MODEL; MODEL#NAME: from its modality NAME"
    )
    lora: Lora | None = Field(default=None, description="train adapters instead of the tower's weights")
    prompts: Prompts | None = Field(
        default=None, description="train tokens in the tower's blocks instead of its weights; a text needs input.prefix"
    )
    length_groups: bool | Literal["auto"] = Field(
        default="auto",
        description="text towers: do not pad a batch to its longest caption in training either; the same gradients "
        "but for rounding. Causal towers run on the real tokens alone, others on captions of like length apart (on a "
        "CPU, one process or DDP). auto: causal towers on a CPU, unless compiled or with dropout; true: wherever "
        "possible, on a GPU with one wait for the lengths a step",
    )

    @model_validator(mode="after")
    def _one_way(self) -> Modality:
        if self.lock and self.lora is not None:
            raise ValueError("lora already freezes the tower's own weights; leave lock out")
        if self.prompts is not None and (self.lock or self.lora is not None):
            other = "lora" if self.lora is not None else "lock"
            raise ValueError(f"prompts already freeze the tower's own weights; leave {other} out")
        if self.stream is not None and self.shares is None:
            raise ValueError("stream is for a modality that shares a tower; add shares, or leave stream out")
        return self

    @model_serializer(mode="wrap")
    def _as_before(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Recipes without streams and prompts are written, compared and resumed as before there were any."""
        out: dict[str, Any] = write(self)
        return {k: v for k, v in out.items() if k not in ("stream", "prompts") or v is not None}


_OF_THE_TOWER = ("encoder", "lock", "lora", "prompts", "init_from")
"""Keys of a modality that belong to its tower, and so to all modalities that share it."""


def with_shared(parts: Mapping[str, Any], name: str) -> Any:
    """One entry of a recipe's ``modalities``; with ``shares`` it takes the encoder, kind and lock of that modality."""
    part = parts[name]
    shares = part.get("shares") if isinstance(part, dict) else None
    if shares is None:
        return part
    other = parts.get(shares)
    if not isinstance(other, dict) or shares == name or other.get("shares") is not None:
        owners = [m for m, p in parts.items() if m != name and isinstance(p, dict) and p.get("shares") is None]
        raise ValueError(
            f"modalities.{name}.shares: {shares!r} has no tower of its own. {did_you_mean(shares, owners)}"
        )
    taken = {k: other[k] for k in _OF_THE_TOWER if k in other} | {"kind": other.get("kind") or shares}
    for key, value in part.items():
        if key in _OF_THE_TOWER and value != taken.get(key, value):
            raise ValueError(f"modalities.{name}.{key}: this modality shares the tower of {shares!r}; leave {key} out")
    return {**part, **taken, "shares": shares}


def streams_of(parts: Mapping[str, Modality]) -> dict[str, tuple[str, Stream]]:
    """Modality with a stream → the modality whose stream it is (itself, or the one it names) and its settings.

    Raises:
        ConfigError: it names a modality that has no stream of its own, or whose tower is another.
    """
    own = {m: p.stream for m, p in parts.items() if isinstance(p.stream, Stream)}
    out = {m: (m, stream) for m, stream in own.items()}
    for m, part in parts.items():
        if not isinstance(part.stream, str):
            continue
        if part.stream not in own or parts[part.stream].shares != part.shares:
            near = [o for o in own if parts[o].shares == part.shares]
            raise ConfigError(
                f"modalities.{m}.stream: {part.stream!r} is not a modality with a stream of its own that shares "
                f"{part.shares!r}. {did_you_mean(part.stream, near)}"
            )
        out[m] = (part.stream, own[part.stream])
    return out
