"""Towers of open_clip models, one at a time: the image or the text half, with or without released weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field
from torch import Tensor, nn

from dualenc.config import Component, Section
from dualenc.encoders.adapters.open_clip_packed import take_packed
from dualenc.encoders.families import families
from dualenc.encoders.length_groups import in_length_groups
from dualenc.encoders.packing import can_pack
from dualenc.encoders.released.migrations import migrate_open_clip, resize_positions
from dualenc.encoders.released.weights import load_exactly, no_scalars, read_weights, strip_prefix
from dualenc.encoders.tower import ImageTower, Tower, build_head, with_batch_norms
from dualenc.errors import ConfigError, did_you_mean

logger = logging.getLogger(__name__)

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
TEXT_PARTS = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection", "cls_emb")


class OpenClipConfig(Section):
    """Settings of open_clip/NAME."""

    pretrained: bool | str = Field(default=False, description="an open_clip tag, or a file of weights")
    quick_gelu: bool | None = Field(
        default=None, description="default: as the tag was trained, else as in the model config"
    )
    patch_dropout: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        default=None, description="share of patches left out in training (FLIP); default: the architecture's"
    )
    head: Literal["auto", "linear", "mlp", "none"] = Field(
        default="auto", description="auto: linear where the widths differ"
    )
    freeze_bn: bool = Field(default=True, description="batch norms use their running statistics in training too")
    resize_positions: bool = Field(
        default=False, description="allow a size or context other than the weights': learned positions are resized"
    )
    config: dict[str, Any] | None = Field(default=None, description="the architecture, as stored in a checkpoint")


@families.register("open_clip")
class OpenClip:
    """``open_clip/NAME``: NAME as in ``open_clip.list_models()``."""

    kinds: ClassVar[tuple[str, ...]] = ("image", "text")
    Config: ClassVar[type[BaseModel]] = OpenClipConfig

    def names(self) -> list[str]:
        import open_clip

        return list(open_clip.list_models())

    def input_defaults(self, kind: str, name: str, config: OpenClipConfig) -> dict[str, Any]:
        """Size, normalisation, resize as the weights were trained; or tokenizer and context."""
        cfg = architecture(name, config)
        if kind == "image":
            return image_defaults(cfg, preprocessing(name, config))
        out = text_defaults(cfg, f"open_clip:{name}")
        if config.config is not None:  # the architecture itself: its name is anybody's, and says nothing of a tokenizer
            del out["tokenizer"]
        return out

    def demands(self, kind: str, name: str, config: OpenClipConfig) -> dict[str, Any]:
        if not config.pretrained:
            return {}
        defaults = self.input_defaults(kind, name, config)
        keys: tuple[str, ...] = ("size", "mean", "std") if kind == "image" else ("tokenizer", "context_length")
        if config.resize_positions:
            keys = tuple(k for k in keys if k not in ("size", "context_length"))
        return {k: defaults[k] for k in keys if k in defaults}

    def build(
        self, kind: str, name: str, config: OpenClipConfig, describe: Mapping[str, Any], embed_dim: int, where: str
    ) -> Tower:
        cfg = architecture(name, config)
        if kind == "text" and config.resize_positions:
            own = int(cfg["text_cfg"].get("context_length", 77))
            cfg["text_cfg"]["context_length"] = max(own, int(describe["config"]["context_length"]))
        build = build_image if kind == "image" else build_text
        tower = build(f"open_clip/{name}", cfg, describe, embed_dim, config.head)
        if config.pretrained:
            tensors = read_weights(pretrained_file(name, config.pretrained, f"{where}.pretrained"))
            tensors = migrate_open_clip(cfg, tensors)
            part = image_tensors(tensors) if kind == "image" else text_tensors(tensors)
            net = tower.trunk if isinstance(tower, ImageTower) else tower.net
            assert isinstance(net, nn.Module)
            if config.resize_positions:
                part = resize_positions(part, net)
            load_exactly(net, part, f"{where}.pretrained: {config.pretrained}")
        return with_batch_norms(tower, config.freeze_bn)


class OpenClipText(Tower):
    """An open_clip text tower fed with batches cut to their longest caption.

    Causal towers pool a token that sees nothing after it: a cut batch gives the same features. Towers that attend to
    the padding, or pool a fixed place (SigLIP, MobileCLIP, CoCa), get their full context back, here.
    """

    def __init__(self, net: nn.Module, head: nn.Module, context_length: int, fixed: bool, pad_id: int) -> None:
        super().__init__()
        self.net, self.head = net, head
        self.context_length, self.fixed, self.pad_id = context_length, fixed, pad_id

    def pooled(self, x: Mapping[str, Tensor]) -> Tensor:
        """``{"ids": int64 [n, L], …}`` → [n, W]."""
        if not self.length_groups or self.fixed:
            return self._encode(x)
        if not self.packs:
            return in_length_groups(self._encode, x)
        if can_pack(x["ids"], self.packs_on_device):
            out: Tensor = self.net(x["ids"], packed=True)
            return out
        return self._encode(x)

    def _encode(self, x: Mapping[str, Tensor]) -> Tensor:
        ids = x["ids"]
        if self.fixed and ids.shape[1] < self.context_length:
            ids = nn.functional.pad(ids, (0, self.context_length - ids.shape[1]), value=self.pad_id)
        out: Tensor = self.net(ids)
        return out

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """open_clip's own switch."""
        self.net.set_grad_checkpointing(enable)  # type: ignore[operator]


def architecture(name: str, config: OpenClipConfig) -> dict[str, Any]:
    """open_clip's description of the model, with ``quick_gelu`` decided and nothing that would download weights.

    Raises:
        ConfigError: for an unknown name (the nearest is named) or an activation that is not the tag's.
    """
    import open_clip

    cfg = config.config or open_clip.get_model_config(name)
    if cfg is None:
        raise ConfigError(f"There is no open_clip model {name!r}. {did_you_mean(name, open_clip.list_models())}")
    cfg = {**cfg, "vision_cfg": dict(cfg.get("vision_cfg", {})), "text_cfg": dict(cfg.get("text_cfg", {}))}
    tag = _tag(name, config.pretrained)
    if tag is not None:
        trained = bool(tag.get("quick_gelu", False))
        if config.quick_gelu is not None and config.quick_gelu != trained:
            raise ConfigError(f"quick_gelu: {name}/{config.pretrained} was trained with quick_gelu: {trained}.")
        cfg["quick_gelu"] = trained
    elif config.quick_gelu is not None:
        cfg["quick_gelu"] = config.quick_gelu
    cfg["vision_cfg"] |= {"timm_model_pretrained": False, "output_tokens": False}
    cfg["text_cfg"] |= {"hf_model_pretrained": False, "output_tokens": False}
    if config.patch_dropout is not None:
        cfg["vision_cfg"]["patch_dropout"] = config.patch_dropout
    return cfg


def preprocessing(name: str, config: OpenClipConfig) -> dict[str, Any]:
    """open_clip's preprocessing of the tag; without one, that of all the model's tags if they agree."""
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

    tag = _tag(name, config.pretrained)
    if tag is not None:
        return tag
    tags = [get_pretrained_cfg(name, t) for t in list_pretrained_tags_by_model(name)]
    keys = ("mean", "std", "interpolation", "resize_mode")
    distinct = {tuple(t.get(k) for k in keys) for t in tags}
    if len(distinct) == 1:
        return dict(zip(keys, distinct.pop(), strict=True))
    return {}


def image_defaults(cfg: Mapping[str, Any], pre: Mapping[str, Any]) -> dict[str, Any]:
    """The ``input`` of an image tower from an architecture and a preprocessing in open_clip's words."""
    size = pre.get("size") or cfg["vision_cfg"].get("image_size", 224)
    return {
        "size": int(size[0] if isinstance(size, list | tuple) else size),
        "mean": tuple(pre.get("mean") or OPENAI_MEAN),
        "std": tuple(pre.get("std") or OPENAI_STD),
        "interpolation": pre.get("interpolation") or "bicubic",
        "resize": pre.get("resize_mode") or "shortest",
    }


def text_defaults(cfg: Mapping[str, Any], tokenizer: str) -> dict[str, Any]:
    """The ``input`` of a text tower. CoCa's context leaves its last position to the class token."""
    return {"tokenizer": tokenizer, "context_length": int(cfg["text_cfg"].get("context_length", 77))}


def build_image(
    label: str, cfg: Mapping[str, Any], describe: Mapping[str, Any], embed_dim: int, head: str = "auto"
) -> ImageTower:
    """The image half, random weights."""
    from open_clip.model import CLIPVisionCfg, _build_vision_tower

    size = int(describe["config"]["size"])
    vision = {**cfg["vision_cfg"], "image_size": size}
    quick = bool(cfg.get("quick_gelu", False))
    trunk = no_scalars(_build_vision_tower(int(cfg["embed_dim"]), CLIPVisionCfg(**vision), quick))
    kind, module = _head(head, int(cfg["embed_dim"]), embed_dim)
    # timm's trunks in open_clip are convolutional as often as not; ViTs do not care.
    tower = ImageTower(trunk, module, describe, channels_last=False)
    kept = {"embed_dim": cfg["embed_dim"], "quick_gelu": quick, "vision_cfg": vision}
    tower.component, tower.embed_dim = (
        Component.model_validate({"name": label, "head": kind, "config": kept}),
        embed_dim,
    )
    return tower


def build_text(
    label: str, cfg: Mapping[str, Any], describe: Mapping[str, Any], embed_dim: int, head: str = "auto"
) -> OpenClipText:
    """The text half, random weights.

    Raises:
        ConfigError: if the tokenizer has more ids than the tower, or the context is longer.
    """
    from open_clip.model import CLIPTextCfg, _build_text_tower

    text, quick = dict(cfg["text_cfg"]), bool(cfg.get("quick_gelu", False))
    try:
        net = _build_text_tower(int(cfg["embed_dim"]), CLIPTextCfg(**text), quick)
    except OSError as e:
        raise ConfigError(
            f"{label}: its text tower {text.get('hf_model_name')!r} is on the Hugging Face Hub and cannot be loaded "
            f"({str(e).splitlines()[0]})"
        ) from e
    from_hub = bool(text.get("hf_model_name"))
    context = int(describe["config"]["context_length"])
    fixed, packs = False, False
    if not from_hub:
        if context > net.context_length:
            raise ConfigError(f"{label}: input.context_length ({context}) exceeds the tower's {net.context_length}.")
        if int(describe["tokenizer"]["vocab_size"]) > net.vocab_size:
            raise ConfigError(
                f"{label}: input.tokenizer has {describe['tokenizer']['vocab_size']} ids, the tower {net.vocab_size}."
            )
        fixed = net.attn_mask is None or net.cls_emb is not None or net.pool_type == "last"
        packs = take_packed(net)
    kind, module = _head(head, int(cfg["embed_dim"]), embed_dim)
    length = context if from_hub else net.context_length
    # open_clip's own pad is 0; SigLIP's tokenizers pad with their own id, and the tower has seen that one.
    tower = OpenClipText(no_scalars(net), module, length, fixed, int(describe["tokenizer"]["pad_id"]))
    tower.packs = packs and not fixed
    kept = {"embed_dim": cfg["embed_dim"], "quick_gelu": quick, "text_cfg": text}
    tower.component, tower.embed_dim = (
        Component.model_validate({"name": label, "head": kind, "config": kept}),
        embed_dim,
    )
    return tower


def _head(kind: str, width: int, embed_dim: int) -> tuple[str, nn.Module]:
    if kind == "auto":
        kind = "none" if width == embed_dim else "linear"
    if kind == "none" and width != embed_dim:
        raise ConfigError(f"head: none needs embed_dim: {width}, got {embed_dim}.")
    return kind, build_head(kind, width, embed_dim)  # type: ignore[arg-type]


# --- weights -----------------------------------------------------------------------------------------------------


def image_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The image half of a CLIP's tensors (a file with the tower alone is taken as it is)."""
    return strip_prefix(tensors, "visual.") or tensors


def text_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The text half of a CLIP's tensors, in the layout of a text tower."""
    return strip_prefix(tensors, "text.") or {k: v for k, v in tensors.items() if k.startswith(TEXT_PARTS)}


def pretrained_file(name: str, pretrained: bool | str, where: str) -> Path:
    """The file of a tag (downloaded once) or the path itself.

    Raises:
        ConfigError: if it is neither, or the tag's file cannot be fetched.
    """
    from open_clip.pretrained import download_pretrained, get_pretrained_cfg, list_pretrained_tags_by_model

    tags = list_pretrained_tags_by_model(name)
    if pretrained is True:
        raise ConfigError(f"{where}: give a tag or a weights file. Tags of {name}: {', '.join(tags) or 'none'}.")
    tag = get_pretrained_cfg(name, str(pretrained))
    if tag:
        try:
            return Path(download_pretrained(tag, prefer_hf_hub=True))
        except Exception as e:
            raise ConfigError(f"{where}: {name}/{pretrained} cannot be downloaded ({str(e).splitlines()[0]})") from e
    path = Path(str(pretrained)).expanduser()
    if not path.is_file():
        raise ConfigError(
            f"{where}: {pretrained!r} is neither a file nor a tag of {name}. {did_you_mean(str(pretrained), tags)}"
        )
    return path


def _tag(name: str, pretrained: bool | str) -> dict[str, Any] | None:
    """What open_clip knows about a tag; None if ``pretrained`` is not a tag."""
    from open_clip.pretrained import get_pretrained_cfg

    if not isinstance(pretrained, str):
        return None
    return dict(get_pretrained_cfg(name, pretrained)) or None
