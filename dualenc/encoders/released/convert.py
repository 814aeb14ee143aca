"""One tower in the layouts of other libraries: open_clip's names and settings, and those of transformers.

A half is a tower as the other library would hold it inside a whole model. Towers that came from that library are only
renamed; between the two libraries tensors are renamed, transposed, stacked or cut, so that no value changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dualenc.encoders.adapters.hf_halves import VISION_TEXT, WHOLE
from dualenc.encoders.adapters.hf_towers import HFImageTrunk
from dualenc.encoders.released.whole_models import FAMILIES
from dualenc.encoders.tower import ImageTower, Tower
from dualenc.errors import ConfigError

_PARTS = {
    "image": ("vision_model.", "visual_projection"),
    "audio": ("audio_model.", "audio_projection"),
    "text": ("text_model.", "text_projection"),
}


class NoSuchLayoutError(ConfigError):
    """The tower cannot be written in the layout asked for; the message is the reason."""


@dataclass
class Half:
    """One tower in another library's layout.

    Attributes:
        family: transformers: model_type of the whole; open_clip: "open_clip".
        config: that library's settings of this half.
        tensors: by their names in the whole model.
        embed_dim: D.
    """

    family: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    embed_dim: int


@dataclass(frozen=True)
class _Rule:
    """``oc`` and ``hf`` hold the same values: rows of several tensors in one, transposed, or with a leading 1."""

    oc: tuple[str, ...]
    hf: tuple[str, ...]
    how: Literal["rows", "transposed", "leading_one"] = "rows"
    shares: tuple[int, ...] = ()


def to_transformers(tower: Tower, kind: str) -> Half:
    """A tower as a half of a CLIPModel, SiglipModel …

    Raises:
        NoSuchLayoutError: if transformers has no such architecture; the reason names the setting.
    """
    family, settings = _origin(tower)
    if family == "hf":
        return _hf_direct(tower, kind, settings)
    if family == "open_clip":
        return _oc_to_hf(tower, kind, settings)
    raise NoSuchLayoutError(f"transformers has no dual encoder with the tower {tower.component.name}")


def to_open_clip(tower: Tower, kind: str) -> Half:
    """A tower as a half of an open_clip model: settings ``embed_dim``, ``quick_gelu``, ``vision_cfg`` or ``text_cfg``.

    Raises:
        NoSuchLayoutError: if open_clip has no such architecture; the reason names the setting.
    """
    family, settings = _origin(tower)
    if family == "open_clip":
        _no_head(settings, tower)
        prefix = "visual." if kind == "image" else "text."
        tensors = {prefix + k: v for k, v in _net(tower).state_dict().items()}
        return Half("open_clip", dict(settings["config"]), tensors, tower.embed_dim)
    if family == "hf":
        return _hf_to_oc(_hf_direct(tower, kind, settings), kind)
    raise NoSuchLayoutError(f"open_clip has no place for the tower {tower.component.name}")


def _origin(tower: Tower) -> tuple[str, dict[str, Any]]:
    return tower.component.name.partition("/")[0], dict(tower.component.settings)


def _net(tower: Tower) -> nn.Module:
    net = tower.trunk if isinstance(tower, ImageTower) else tower.net
    net = net.net if isinstance(net, HFImageTrunk) else net
    assert isinstance(net, nn.Module)
    return net


def _no_head(settings: Mapping[str, Any], tower: Tower) -> None:
    if settings.get("head") != "none":
        raise NoSuchLayoutError(f"encoder.head: {tower.component.name} has an added projection")


# --- transformers' own towers ------------------------------------------------------------------------------------

# Settings of dualenc or of the environment, not of the architecture.
_OURS = ("dualenc_projection", WHOLE)


def _hf_direct(tower: Tower, kind: str, settings: Mapping[str, Any]) -> Half:
    config = {k: v for k, v in settings["config"].items() if k not in _OURS}
    family = VISION_TEXT if WHOLE in settings["config"] else str(config["model_type"])
    for half in ("vision", "audio", "text"):
        family = family.removesuffix(f"_{half}_model")
    part, projection = _PARTS[kind]
    if family not in FAMILIES or settings.get("pooling") != "model":
        raise NoSuchLayoutError(
            f"{tower.component.name} ({config['model_type']}, pooling {settings.get('pooling')}) is not a half of "
            f"{', '.join(FAMILIES.values())}"
        )
    tensors = {k if k.startswith((part, projection)) else part + k: v for k, v in _net(tower).state_dict().items()}
    if family == "altclip":  # transformers 5 renames these when it reads; files keep the name they were released with
        old, new = "text_model.roberta.encoder.layers.", "text_model.roberta.encoder.layer."
        tensors = {k.replace(old, new): v for k, v in tensors.items()}
    if family == "clip" and settings.get("head") == "linear" and not settings["config"].get("dualenc_projection"):
        # Our head without bias is what CLIP calls its projection.
        tensors[f"{projection}.weight"] = tower.head.weight  # type: ignore[union-attr, assignment]
    else:
        _no_head(settings, tower)
    if family == "align" and kind == "text":  # AlignModel carries a pooler along that nothing reads
        width = int(config["hidden_size"])
        tensors |= {"text_model.pooler.dense.weight": torch.zeros(width, width)}
        tensors |= {"text_model.pooler.dense.bias": torch.zeros(width)}
    if not family.startswith("siglip"):
        config["projection_dim"] = tower.embed_dim
    return Half(family, config, tensors, tower.embed_dim)


_POOLER_IS_FIRST = ("dinov2", "dinov2_with_registers")
"""Image models whose own pooled output is their first token, normed: what ``pooling: cls`` takes."""


def to_vision_text(tower: Tower, kind: str) -> Half:
    """A tower as a half of a VisionTextDualEncoderModel: any vision or text model of transformers that pools by itself,
    and a projection without bias.

    Raises:
        NoSuchLayoutError: naming what does not fit.
    """
    family, settings = _origin(tower)
    if family != "hf":
        raise NoSuchLayoutError(f"transformers has no dual encoder with the tower {tower.component.name}")
    kept = settings["config"]
    config, pooling = {k: v for k, v in kept.items() if k not in _OURS}, settings.get("pooling")
    if pooling != "model" and not (pooling == "cls" and config["model_type"] in _POOLER_IS_FIRST):
        raise NoSuchLayoutError(
            f"encoder.pooling: VisionTextDualEncoderModel takes a model's own pooled output, this {kind} tower's is "
            f"{pooling}"
        )
    if kind not in ("image", "text") or kept.get("dualenc_projection") or settings.get("head") != "linear":
        raise NoSuchLayoutError(f"encoder.head: VisionTextDualEncoderModel needs a linear head after the {kind} tower")
    part, projection = _PARTS[kind]
    tensors = {part + k.removeprefix(part): v for k, v in _net(tower).state_dict().items()}
    tensors[f"{projection}.weight"] = tower.head.weight  # type: ignore[assignment]
    return Half(VISION_TEXT, config, tensors, tower.embed_dim)


# --- between the two ---------------------------------------------------------------------------------------------


def _oc_to_hf(tower: Tower, kind: str, settings: Mapping[str, Any]) -> Half:
    _no_head(settings, tower)
    cfg = settings["config"]
    tensors = _net(tower).state_dict()
    if kind == "image":
        timm = cfg["vision_cfg"].get("timm_model_name")
        family, config = ("siglip", _timm_config(tower)) if timm else ("clip", _oc_vision_config(cfg))
        rules = (_timm_rules if timm else _vision_rules)(config["num_hidden_layers"])
    else:
        family, config = _oc_text_config(cfg, tower)
        rules = _text_rules(config["num_hidden_layers"], family)
    return Half(family, config, _apply(rules, tensors, to_hf=True, name=tower.component.name), tower.embed_dim)


def _hf_to_oc(half: Half, kind: str) -> Half:
    if half.family not in ("clip", "siglip"):
        raise NoSuchLayoutError(f"open_clip has no {FAMILIES[half.family]} towers")
    c = half.config
    act = str(c["hidden_act"])
    layers = int(c["num_hidden_layers"])
    if kind == "image":
        if half.family == "siglip":
            part: dict[str, Any] = {
                "image_size": int(c["image_size"]),
                "timm_model_name": _timm_name(c),
                "timm_model_pretrained": False,
                "timm_pool": "map",
                "timm_proj": "none",
            }
            rules, act = _timm_rules(layers), "gelu"  # the name says which; open_clip's switch does not reach timm
        else:
            part = {
                "image_size": int(c["image_size"]),
                "patch_size": int(c["patch_size"]),
                "head_width": int(c["hidden_size"]) // int(c["num_attention_heads"]),
                **_oc_shape(c),
            }
            rules = _vision_rules(layers)
    else:
        part = {
            "context_length": int(c["max_position_embeddings"]),
            "vocab_size": int(c["vocab_size"]),
            "heads": int(c["num_attention_heads"]),
            **_oc_shape(c),
        }
        if half.family == "siglip":
            part |= {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
        rules = _text_rules(layers, half.family)
    tensors = _apply(rules, half.tensors, to_hf=False, name=f"a {half.family} tower")
    prefix = "visual." if kind == "image" else "text."
    config = {
        "embed_dim": half.embed_dim,
        "quick_gelu": act == "quick_gelu",
        "vision_cfg" if kind == "image" else "text_cfg": part,
    }
    return Half("open_clip", config, {prefix + k: v for k, v in tensors.items()}, half.embed_dim)


def _apply(rules: Sequence[_Rule], tensors: Mapping[str, Tensor], to_hf: bool, name: str) -> dict[str, Tensor]:
    """Every tensor is used once; one without a rule means another architecture than the rules are for."""
    out: dict[str, Tensor] = {}
    used: set[str] = set()
    for rule in rules:
        source, target = (rule.oc, rule.hf) if to_hf else (rule.hf, rule.oc)
        absent = [k for k in source if k not in tensors]
        if absent:
            raise NoSuchLayoutError(f"{name}: it has no tensor {absent[0]!r}")
        used |= set(source)
        whole = torch.cat([tensors[k] for k in source]) if len(source) > 1 else tensors[source[0]]
        if rule.how == "transposed":
            whole = whole.T.contiguous()
        elif rule.how == "leading_one":
            whole = whole[0] if to_hf else whole[None]
        shares = rule.shares or (1,) * len(target)
        unit = len(whole) // sum(shares)
        pieces = torch.split(whole, [unit * s for s in shares]) if len(target) > 1 else (whole,)
        out |= dict(zip(target, pieces, strict=True))
    left = sorted(set(tensors) - used)
    if left:
        raise NoSuchLayoutError(f"{name}: tensor {left[0]!r} has no counterpart")
    return out


# --- names -------------------------------------------------------------------------------------------------------


def _pairs(oc: str, hf: str) -> list[_Rule]:
    return [_Rule((f"{oc}.{p}",), (f"{hf}.{p}",)) for p in ("weight", "bias")]


def _blocks(layers: int, oc: str, hf: str, names: Mapping[str, str], qkv: str) -> list[_Rule]:
    rules = []
    for i in range(layers):
        ours, theirs = f"{oc}.{i}", f"{hf}.encoder.layers.{i}"
        for a, b in names.items():
            rules += _pairs(f"{ours}.{a}", f"{theirs}.{b}")
        for p in ("weight", "bias"):
            three = tuple(f"{theirs}.self_attn.{x}_proj.{p}" for x in "qkv")
            rules.append(_Rule((f"{ours}.{qkv}{p}",), three))
    return rules


_RESBLOCK = {
    "ln_1": "layer_norm1",
    "attn.out_proj": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_TIMM_BLOCK = {
    "norm1": "layer_norm1",
    "attn.proj": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


@lru_cache
def _vision_rules(layers: int) -> tuple[_Rule, ...]:
    """CLIP's image half."""
    m = "vision_model"
    return (
        _Rule(("class_embedding",), (f"{m}.embeddings.class_embedding",)),
        _Rule(("positional_embedding",), (f"{m}.embeddings.position_embedding.weight",)),
        _Rule(("conv1.weight",), (f"{m}.embeddings.patch_embedding.weight",)),
        *_pairs("ln_pre", f"{m}.pre_layrnorm"),
        *_blocks(layers, "transformer.resblocks", m, _RESBLOCK, "attn.in_proj_"),
        *_pairs("ln_post", f"{m}.post_layernorm"),
        _Rule(("proj",), ("visual_projection.weight",), "transposed"),
    )


@lru_cache
def _text_rules(layers: int, family: str) -> tuple[_Rule, ...]:
    """CLIP's and SigLIP's text halves."""
    m = "text_model"
    last = (_Rule(("text_projection",), ("text_projection.weight",), "transposed"),)
    return (
        _Rule(("token_embedding.weight",), (f"{m}.embeddings.token_embedding.weight",)),
        _Rule(("positional_embedding",), (f"{m}.embeddings.position_embedding.weight",)),
        *_blocks(layers, "transformer.resblocks", m, _RESBLOCK, "attn.in_proj_"),
        *_pairs("ln_final", f"{m}.final_layer_norm"),
        *(last if family == "clip" else _pairs("text_projection", f"{m}.head")),
    )


@lru_cache
def _timm_rules(layers: int) -> tuple[_Rule, ...]:
    """SigLIP's image half, in open_clip a timm trunk."""
    m, pool = "vision_model", "trunk.attn_pool"
    head = f"{m}.head"
    joined = [
        _Rule((f"{pool}.q.{p}", f"{pool}.kv.{p}"), (f"{head}.attention.in_proj_{p}",), shares=(1, 2))
        for p in ("weight", "bias")
    ]
    return (
        _Rule(("trunk.pos_embed",), (f"{m}.embeddings.position_embedding.weight",), "leading_one"),
        *_pairs("trunk.patch_embed.proj", f"{m}.embeddings.patch_embedding"),
        *_blocks(layers, "trunk.blocks", m, _TIMM_BLOCK, "attn.qkv."),
        *_pairs("trunk.norm", f"{m}.post_layernorm"),
        _Rule((f"{pool}.latent",), (f"{head}.probe",)),
        *joined,
        *_pairs(f"{pool}.proj", f"{head}.attention.out_proj"),
        *_pairs(f"{pool}.norm", f"{head}.layernorm"),
        *_pairs(f"{pool}.mlp.fc1", f"{head}.mlp.fc1"),
        *_pairs(f"{pool}.mlp.fc2", f"{head}.mlp.fc2"),
    )


# --- settings ----------------------------------------------------------------------------------------------------

# What an open_clip tower may say besides its shape and still be CLIP's or SigLIP's architecture.
_HARMLESS = ("image_size", "layers", "width", "head_width", "heads", "mlp_ratio", "patch_size", "context_length",
             "vocab_size", "hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs", "output_tokens", "patch_dropout",
             "timm_model_pretrained", "hf_model_pretrained", "norm_kwargs", "act_kwargs", "pad_id", "eos_id",
             "final_ln_after_pool")  # fmt: skip
_CLIP_VALUES = {"pool_type": ("tok", "argmax"), "pos_embed_type": ("learnable",), "proj_type": ("linear",)}


def _plain(section: Mapping[str, Any], where: str, also: Mapping[str, Any] | None = None) -> None:
    """Refuse a setting that leaves the architecture the rules are for."""
    allowed = {**_CLIP_VALUES, **(also or {})}
    for key, value in section.items():
        if key in _HARMLESS or value in (None, False, "") or value in allowed.get(key, ()):
            continue
        raise NoSuchLayoutError(f"{where}.{key}: {value!r} has no counterpart in transformers")


def _act(section: Mapping[str, Any], quick: bool) -> str:
    if quick:
        return "quick_gelu"
    tanh = (section.get("act_kwargs") or {}).get("approximate") == "tanh"
    return "gelu_pytorch_tanh" if tanh else "gelu"


def _shape(section: Mapping[str, Any], heads: int, quick: bool, width: int, layers: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": int(width * float(section.get("mlp_ratio", 4.0))),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_act": _act(section, quick),
        "layer_norm_eps": float((section.get("norm_kwargs") or {}).get("eps", 1e-5)),
        "attention_dropout": 0.0,
    }


def _oc_vision_config(cfg: Mapping[str, Any]) -> dict[str, Any]:
    section = cfg["vision_cfg"]
    _plain(section, "vision_cfg")
    layers, width = section.get("layers", 12), int(section.get("width", 768))
    if not isinstance(layers, int):
        raise NoSuchLayoutError("vision_cfg.layers: transformers does not have CLIP's ResNets")
    heads = width // int(section.get("head_width", 64))
    return {
        "model_type": "clip_vision_model",
        **_shape(section, heads, bool(cfg.get("quick_gelu")), width, layers),
        "image_size": int(section.get("image_size", 224)),
        "patch_size": int(section.get("patch_size", 16)),
        "num_channels": 3,
        "projection_dim": int(cfg["embed_dim"]),
    }


def _oc_text_config(cfg: Mapping[str, Any], tower: Tower) -> tuple[str, dict[str, Any]]:
    section = cfg["text_cfg"]
    siglip = bool(section.get("no_causal_mask"))
    also = {"no_causal_mask": (True,), "pool_type": ("last",), "proj_bias": (True,)} if siglip else {}
    _plain(section, "text_cfg", also)
    if siglip and not (section.get("pool_type") == "last" and section.get("proj_bias")):
        raise NoSuchLayoutError("text_cfg.no_causal_mask: without pool_type last and proj_bias it is not SigLIP's text")
    config = {
        "model_type": "siglip_text_model" if siglip else "clip_text_model",
        **_shape(
            section,
            int(section.get("heads", 8)),
            bool(cfg.get("quick_gelu")),
            int(section.get("width", 512)),
            int(section.get("layers", 12)),
        ),
        "max_position_embeddings": int(section.get("context_length", 77)),
        "vocab_size": int(section.get("vocab_size", 49408)),
    }
    config |= {"projection_size" if siglip else "projection_dim": int(cfg["embed_dim"])}
    return ("siglip" if siglip else "clip"), config


def _oc_shape(c: Mapping[str, Any]) -> dict[str, Any]:
    width, inner = int(c["hidden_size"]), int(c["intermediate_size"])
    act = str(c["hidden_act"])
    if act not in ("gelu", "quick_gelu", "gelu_pytorch_tanh"):
        raise NoSuchLayoutError(f"hidden_act: {act!r} has no counterpart in open_clip")
    out: dict[str, Any] = {
        "width": width,
        "layers": int(c["num_hidden_layers"]),
        "mlp_ratio": inner / width,
        "norm_kwargs": {"eps": float(c["layer_norm_eps"])},
    }
    if int(width * out["mlp_ratio"]) != inner:
        raise NoSuchLayoutError(f"intermediate_size: {inner} is not a multiple of the width that open_clip supports")
    if act == "gelu_pytorch_tanh":
        out["act_kwargs"] = {"approximate": "tanh"}
    return out


# --- SigLIP's image tower is one of timm's names ------------------------------------------------------------------


def _timm_config(tower: Tower) -> dict[str, Any]:
    section = tower.component.settings["config"]["vision_cfg"]
    name = section["timm_model_name"]
    if section.get("timm_pool") != "map" or section.get("timm_proj") != "none":
        raise NoSuchLayoutError(f"vision_cfg.timm_model_name: transformers has no dual encoder with {name!r}")
    trunk: Any = _net(tower).trunk
    facts = _facts(trunk)
    if facts is None:
        raise NoSuchLayoutError(f"vision_cfg.timm_model_name: {name!r} is not SigLIP's architecture")
    return {
        "model_type": "siglip_vision_model",
        **facts,
        "image_size": _side(trunk),
        "num_channels": 3,
        "attention_dropout": 0.0,
    }


_TANH = "gelu_pytorch_tanh"
_ACTS = {"GELU(approximate='none')": "gelu", "GELUTanh()": _TANH, "GELU(approximate='tanh')": _TANH}


def _facts(trunk: Any) -> dict[str, Any] | None:
    """A timm ViT in transformers' words; None where it is not SigLIP's."""
    pool: Any = dict(trunk.named_children()).get("attn_pool")
    if pool is None or "cls_token" in dict(trunk.named_parameters(recurse=False)):
        return None
    block = trunk.blocks[0]
    act = _ACTS.get(repr(block.mlp.act))
    if act is None or act != _ACTS.get(repr(pool.mlp.act)) or pool.num_heads != block.attn.num_heads:
        return None
    return {
        "hidden_size": int(trunk.embed_dim),
        "intermediate_size": int(block.mlp.fc1.out_features),
        "num_hidden_layers": len(trunk.blocks),
        "num_attention_heads": int(block.attn.num_heads),
        "patch_size": int(trunk.patch_embed.patch_size[0]),
        "hidden_act": act,
        "layer_norm_eps": float(block.norm1.eps),
    }


def _side(trunk: Any) -> int:
    return int(trunk.patch_embed.img_size[0])


def _timm_name(config: Mapping[str, Any]) -> str:
    """timm's name of a SigLIP image tower: open_clip can build it by name only."""
    import timm

    near = None
    for name in timm.list_models("vit_*siglip_*"):
        if "_gap_" in name:
            continue
        with torch.device("meta"):
            trunk: Any = timm.create_model(name, pretrained=False, num_classes=0)
        facts = _facts(trunk)
        if facts is None or any(config[k] != v for k, v in facts.items() if k not in ("hidden_act", "layer_norm_eps")):
            continue
        same = config["hidden_act"] == facts["hidden_act"] and config["layer_norm_eps"] == facts["layer_norm_eps"]
        if same and _side(trunk) == int(config["image_size"]):
            return str(name)
        near = near or (name, facts["hidden_act"])
    if near is None:
        raise NoSuchLayoutError(
            "vision_config: open_clip takes SigLIP's towers from timm, which has none of this shape"
        )
    raise NoSuchLayoutError(
        f"vision_config.hidden_act: {config['hidden_act']!r} at {config['image_size']} px; open_clip builds this tower "
        f"as timm's {near[0]}, which has {near[1]!r} or another size"
    )
