"""The folders of other libraries: transformers' and open_clip's, written from a bundle.

Both are plain json, safetensors and a tokenizer's files, so neither library is needed to write them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dualenc.config import pair_name
from dualenc.data.modalities.text import TextConfig, TextInput
from dualenc.encoders import Tower
from dualenc.encoders.adapters.hf import arch_of
from dualenc.encoders.adapters.hf_audio import audio_defaults
from dualenc.encoders.released.convert import (
    Half,
    NoSuchLayoutError,
    to_open_clip,
    to_transformers,
    to_vision_text,
)
from dualenc.encoders.released.whole_models import FAMILIES
from dualenc.model.bundle import Bundle
from dualenc.model.record import record

_RESAMPLE = {"lanczos": 1, "bilinear": 2, "bicubic": 3}
_PROCESSORS = {
    "siglip": "SiglipImageProcessor",
    "siglip2": "Siglip2ImageProcessor",
    "chinese_clip": "ChineseCLIPImageProcessor",
    "align": "EfficientNetImageProcessor",
    "tipsv2": "Tipsv2ImageProcessor",
}
_DIVIDES = ("align", "tipsv2")
"""Families that divide by a temperature where others multiply by the exponential of a logit scale."""


def write_transformers(bundle: Bundle, folder: Path) -> None:
    """config.json, model.safetensors, preprocessor_config.json and the tokenizer, as ``from_pretrained`` reads them.

    Raises:
        NoSuchLayoutError: naming the setting that transformers cannot express; nothing is written then.
    """
    kinds, halves = _transformers_halves(bundle)
    family = next(iter(halves.values())).family
    other = "audio" if family == "clap" else "image"
    if set(halves) != {other, "text"}:
        raise NoSuchLayoutError(
            f"{FAMILIES[family]} pairs {other} and text, but this model pairs {' and '.join(halves)}"
        )
    text = bundle.inputs[kinds["text"]]
    assert isinstance(text, TextInput)
    inputs = {kind: bundle.inputs[m].describe()["config"] for kind, m in kinds.items()}
    if other == "image":
        pre = _image_processor(inputs["image"], family)
    else:
        pre = _clap_extractor(inputs["audio"], halves["audio"].config)
    config = _whole_config(family, halves, other, text)
    tensors = {**halves[other].tensors, **halves["text"].tensors, **_temperatures(bundle, family)}
    if family in _DIVIDES:
        config["temperature_init_value"] = float(torch.exp(-_log_scale(bundle)))
    else:
        config["logit_scale_init_value"] = float(_log_scale(bundle))
    folder.mkdir(parents=True, exist_ok=True)
    text.export_tokenizer(folder, padding_is_seen=family.startswith("siglip"))
    save_tensors(tensors, folder / "model.safetensors", record(bundle))
    write_json(folder / "config.json", config)
    write_json(folder / "preprocessor_config.json", pre)


def write_open_clip(bundle: Bundle, folder: Path) -> None:
    """open_clip_config.json, open_clip_model.safetensors, and the tokenizer where it is not CLIP's.

    Raises:
        NoSuchLayoutError: naming the setting that open_clip cannot express; nothing is written then.
    """
    kinds, halves = _halves(bundle, to_open_clip)
    if set(halves) != {"image", "text"}:
        raise NoSuchLayoutError(f"open_clip pairs image and text, but this model pairs {' and '.join(halves)}")
    image, text = halves["image"], halves["text"]
    source = bundle.inputs[kinds["text"]]
    assert isinstance(source, TextInput)
    vision, words = dict(image.config["vision_cfg"]), dict(text.config["text_cfg"])
    quick = {bool(h.config.get("quick_gelu")) for k, h in halves.items() if not (k == "image" and _of_timm(vision))}
    if len(quick) > 1:
        raise NoSuchLayoutError("quick_gelu: open_clip has one setting for both towers, but only one of these uses it")
    own_file = source.config.tokenizer != "clip" or source.config.lower is not None
    if own_file and not _is_clips(source):
        words |= {"hf_tokenizer_name": words.get("hf_tokenizer_name") or bundle.name}
    else:
        words.pop("hf_tokenizer_name", None)
    tensors = _fit_context({**image.tensors, **text.tensors}, words, source.context_length)
    custom = _is_custom(words)
    if not custom:
        tensors = {k.removeprefix("text."): v for k, v in tensors.items()}
    cfg: dict[str, Any] = {"embed_dim": bundle.embed_dim, "quick_gelu": quick.pop(), "vision_cfg": vision}
    cfg |= {"text_cfg": words, **({"custom_text": True} if custom else {})}
    tensors["logit_scale"] = _log_scale(bundle).reshape(())
    bias = _bias(bundle)
    if bias is not None:
        tensors["logit_bias"], cfg["init_logit_bias"] = bias.reshape(()), float(bias)
    pre = _preprocess_cfg(bundle.inputs[kinds["image"]].describe()["config"])
    folder.mkdir(parents=True, exist_ok=True)
    if "hf_tokenizer_name" in words:
        source.export_tokenizer(folder, padding_is_seen=_is_custom(words))
    save_tensors(tensors, folder / "open_clip_model.safetensors", record(bundle))
    write_json(folder / "open_clip_config.json", {"model_cfg": cfg, "preprocess_cfg": pre})


def _transformers_halves(bundle: Bundle) -> tuple[dict[str, str], dict[str, Half]]:
    """Halves of one family; towers of two families are a VisionTextDualEncoderModel where they fit."""
    try:
        kinds, halves = _halves(bundle, to_transformers)
        families = sorted({h.family for h in halves.values()})
        if len(families) == 1:
            return kinds, halves
        why = NoSuchLayoutError(f"its towers are of two architectures ({' and '.join(families)})")
    except NoSuchLayoutError as e:
        why = e
    try:
        return _halves(bundle, to_vision_text)
    except NoSuchLayoutError as e:
        if str(e) == str(why):
            raise
        raise NoSuchLayoutError(f"{str(why).rstrip('.')}; {e}") from e


# --- both --------------------------------------------------------------------------------------------------------


def _halves(bundle: Bundle, convert: Any) -> tuple[dict[str, str], dict[str, Half]]:
    """Kind → modality, kind → half."""
    if len(bundle.model.pairs) != 1 or len(bundle.parts) != 2:
        raise NoSuchLayoutError(f"it has {len(bundle.parts)} modalities, but this layout has one pair of two")
    kinds: dict[str, str] = {}
    halves: dict[str, Half] = {}
    for m, part in bundle.parts.items():
        kind, tower = part.kind or m, bundle.model.tower(m)
        assert isinstance(tower, Tower)
        if kind not in ("image", "text", "audio"):
            raise NoSuchLayoutError(f"this layout has no {kind} modality")
        kinds[kind], halves[kind] = m, convert(tower, kind)
    return kinds, halves


def _log_scale(bundle: Bundle) -> Tensor:
    """The log of the logit scale, clamped here because other libraries do not clamp it in their forward."""
    log: Tensor = bundle.model.logit_scale[pair_name(bundle.model.pairs[0])].detach().float().cpu()
    return log.clamp(*bundle.model.bounds)


def _bias(bundle: Bundle) -> Tensor | None:
    name = pair_name(bundle.model.pairs[0])
    return bundle.model.logit_bias[name].detach().float().cpu() if name in bundle.model.logit_bias else None


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file as transformers reads it; its folder is made."""
    from safetensors.torch import save_file

    flat = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(flat, str(path), metadata={"format": "pt", **(metadata or {})})  # transformers asks for the format


def write_json(path: Path, content: Any) -> None:
    """A JSON file, indented; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# --- transformers ------------------------------------------------------------------------------------------------


def _whole_config(family: str, halves: Mapping[str, Half], other: str, text: TextInput) -> dict[str, Any]:
    words = dict(halves["text"].config)
    ids: dict[str, Any] = {"eos_token_id": text.eot_id, "pad_token_id": text.pad_id}
    words = {**ids, **words}
    if family == "clip" and "bos_token_id" not in words:
        words["bos_token_id"] = text.eot_id - 1
    sections = {("vision" if other == "image" else "audio") + "_config": halves[other].config, "text_config": words}
    config: dict[str, Any] = {"architectures": [FAMILIES[family]], "model_type": family, "dtype": "float32", **sections}
    if not family.startswith("siglip"):
        config["projection_dim"] = halves["text"].embed_dim
    return config


def _temperatures(bundle: Bundle, family: str) -> dict[str, Tensor]:
    log = _log_scale(bundle)
    if family == "clap":
        two = bundle.provenance.get("clap_logit_scales")
        kept = two if two and torch.tensor(two[0], dtype=torch.float32) == log else [log, log]
        return {
            f"logit_scale_{side}": torch.as_tensor(v).float().reshape(()) for side, v in zip("at", kept, strict=True)
        }
    bias = _bias(bundle)
    if not family.startswith("siglip"):
        name, value = ("temperature", (-log).exp()) if family in _DIVIDES else ("logit_scale", log)
        if bias is not None:
            raise NoSuchLayoutError(
                f"logit_scale.bias: {FAMILIES[family]} has no logit bias (cosines do not depend on it)"
            )
        return {name: value.reshape(())}
    return {"logit_scale": log, "logit_bias": torch.zeros(1) if bias is None else bias}


def _image_processor(config: Mapping[str, Any], family: str) -> dict[str, Any]:
    size = int(config["size"])
    out: dict[str, Any] = {
        "image_processor_type": _PROCESSORS.get(family, "CLIPImageProcessor"),
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_convert_rgb": True,
        "image_mean": list(config["mean"]),
        "image_std": list(config["std"]),
        "resample": _RESAMPLE[config["interpolation"]],
    }
    if config["resize"] == "naflex":
        return out | {"patch_size": int(config["patch"]), "max_num_patches": int(config["max_patches"])}
    if family == "align":
        out |= {"include_top": False, "rescale_offset": False}
    if config["resize"] == "squash" and config["shortest_edge"] not in (None, size):
        edge = int(config["shortest_edge"])
        crop = {"do_center_crop": True, "crop_size": {"height": size, "width": size}}
        return out | {"size": {"height": edge, "width": edge}, **crop}
    if config["resize"] == "squash":
        return out | {"size": {"height": size, "width": size}, "do_center_crop": False}
    if config["resize"] != "shortest" or family == "siglip":
        raise NoSuchLayoutError(f"input.resize: {out['image_processor_type']} does not support {config['resize']!r}")
    return out | {
        "size": {"shortest_edge": int(config["shortest_edge"] or size)},
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
    }


def _clap_extractor(config: Mapping[str, Any], half: Mapping[str, Any]) -> dict[str, Any]:
    """ClapFeatureExtractor's settings; refused if reading them back would give another input."""
    features, rate = config["features"], int(config["rate"])
    samples = round(config["max_s"] * rate)
    pre = {
        "feature_extractor_type": "ClapFeatureExtractor",
        "processor_class": "ClapProcessor",
        "sampling_rate": rate,
        "hop_length": features["hop"],
        "fft_window_size": features["n_fft"],
        "nb_frequency_bins": features["n_fft"] // 2 + 1,
        "feature_size": features["mels"],
        "frequency_min": features["f_min"],
        "frequency_max": features["f_max"],
        "max_length_s": config["max_s"] if config["max_s"] % 1 else int(config["max_s"]),
        "nb_max_samples": samples,
        "nb_max_frames": samples // features["hop"],
        "padding": config["pad"],
        "padding_value": 0.0,
        "padding_side": "right",
        "return_attention_mask": False,
        "truncation": "fusion" if config["long"] == "fusion" else "rand_trunc",
        "top_db": None,
    }
    read = audio_defaults(arch_of(half), pre)
    wrong = [k for k in ("rate", "max_s", "pad", "long") if read[k] != config[k]]
    wrong += [f"features.{k}" for k, v in read["features"].items() if features.get(k) != v]
    if wrong:
        raise NoSuchLayoutError(f"input.{wrong[0]}: ClapFeatureExtractor cannot express it")
    return pre


# --- open_clip ---------------------------------------------------------------------------------------------------


def _of_timm(vision: Mapping[str, Any]) -> bool:
    return bool(vision.get("timm_model_name"))


def _is_clips(source: TextInput) -> bool:
    """An open_clip model's name whose tokenizer is CLIP's own."""
    return source.config.lower is None and source.tokenizer.digest() == TextInput(TextConfig()).tokenizer.digest()


def _is_custom(words: Mapping[str, Any]) -> bool:
    """open_clip's plain CLIP takes a causal text tower that pools its last token; others are its CustomTextCLIP."""
    plain = words.get("pool_type", "argmax") == "argmax" and not words.get("proj_bias") and not words.get("embed_cls")
    return not plain or bool(words.get("no_causal_mask")) or bool(words.get("hf_model_name"))


def _fit_context(tensors: dict[str, Tensor], words: dict[str, Any], context: int) -> dict[str, Tensor]:
    """A recipe may use less than the tower's context; open_clip cuts texts at the tower's, so positions are dropped."""
    key = "text.positional_embedding"
    places = int(words.get("context_length", 77))
    if context == places or key not in tensors:
        return tensors
    if words.get("no_causal_mask") or words.get("embed_cls") or words.get("pool_type") == "last":
        raise NoSuchLayoutError(f"input.context_length: {context}, but this tower needs all of its {places} positions")
    words["context_length"] = context
    return {**tensors, key: tensors[key][:context]}


def _preprocess_cfg(config: Mapping[str, Any]) -> dict[str, Any]:
    if config["resize"] == "longest" and len(set(config["pad"])) > 1:
        raise NoSuchLayoutError(f"input.pad: open_clip pads with a grey value, not with {config['pad']}")
    if config["shortest_edge"] not in (None, config["size"]):
        raise NoSuchLayoutError(
            f"input.shortest_edge: open_clip resizes to input.size, not to {config['shortest_edge']}"
        )
    if config["interpolation"] not in ("bicubic", "bilinear"):
        raise NoSuchLayoutError(f"input.interpolation: open_clip does not support {config['interpolation']!r}")
    return {
        "size": int(config["size"]),
        "mode": "RGB",
        "mean": list(config["mean"]),
        "std": list(config["std"]),
        "interpolation": config["interpolation"],
        "resize_mode": config["resize"],
        "fill_color": int(config["pad"][0]),  # open_clip fills with a grey
    }
