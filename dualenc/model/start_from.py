"""``checkpoint.init_from: MODEL`` alone: whatever a recipe leaves out of its model is taken from MODEL.

A recipe may then say nothing of its towers, or only what is done to them (``lock``, ``lora``, ``input.augment`` …): the
architectures, projections, inputs, temperature and bias are those of MODEL, so that the features before the first step
are MODEL's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dualenc.data.modalities.text import TextInput
from dualenc.errors import ConfigError, DualencError, did_you_mean
from dualenc.model.bundle import Bundle
from dualenc.model.load import load_model

_EXAMPLE = "checkpoint.init_from=hf:openai/clip-vit-base-patch32"


def completed(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe as read (bases merged, overrides applied) → the same with its model filled in from MODEL.

    A recipe with two or more modalities that all have an encoder (or share one) is left as it is: MODEL then gives
    weights only.

    Raises:
        ConfigError: if the recipe lacks a model and names none to start from, or has a modality that MODEL lacks.
        CheckpointError: if MODEL cannot be loaded.
    """
    parts = raw.get("modalities") or {}
    if not isinstance(parts, Mapping) or (len(parts) > 1 and all(map(_is_whole, parts.values()))):
        return dict(raw)
    checkpoint = raw.get("checkpoint")
    spec = checkpoint.get("init_from") if isinstance(checkpoint, Mapping) else None
    if not isinstance(spec, str):
        if parts:
            return dict(raw)  # the recipe's own check names the key that is missing
        raise ConfigError(
            f"modalities: this recipe has no modalities and does not name a model to fine-tune; add {_EXAMPLE}"
        )
    try:
        model = load_model(spec)
    except DualencError as e:
        raise type(e)(f"checkpoint.init_from: {e}") from e
    for m, part in parts.items():
        if m not in model.modalities and not _is_whole(part):
            raise ConfigError(
                f"modalities.{m}: {spec} has no modality of that name, so this one needs an encoder. "
                f"{did_you_mean(m, model.modalities)}"
            )
    found = {m: _merged(_part(model, m), parts.get(m) or {}) for m in model.modalities}
    found |= {m: part for m, part in parts.items() if m not in found}
    scale = raw.get("logit_scale") or {}
    return {
        "pairs": [list(p) for p in model.model.pairs],
        "embed_dim": model.embed_dim,
        **raw,
        "modalities": found,
        "logit_scale": {**model.scale.model_dump(mode="json"), **scale},
    }


def _is_whole(part: Any) -> bool:
    return not isinstance(part, Mapping) or part.get("encoder") is not None or part.get("shares") is not None


def _part(model: Bundle, m: str) -> dict[str, Any]:
    """A modality of MODEL as it is written in a recipe."""
    part, shares = model.parts[m], model.parts[m].shares
    described = {"kind": part.kind, "input": _input(model, m)}
    if shares is not None:
        stream = part.model_dump(mode="json").get("stream")
        return {**described, "shares": shares, **({"stream": stream} if stream is not None else {})}
    prompts = {} if part.prompts is None else {"prompts": part.prompts.model_dump(mode="json")}
    return {**described, "encoder": model.model.tower(m).component.model_dump(mode="json"), **prompts}


def _input(model: Bundle, m: str) -> dict[str, Any]:
    """MODEL's input settings, its own tokenizer files by their folder: a recipe knows of no MODEL."""
    settings, x = dict(model.parts[m].input), model.inputs[m]
    if isinstance(x, TextInput) and x.base_dir is not None and x.config.tokenizer.startswith("hf:./"):
        settings["tokenizer"] = f"hf:{Path(x.base_dir) / x.config.tokenizer.removeprefix('hf:./')}"
    return settings


def _merged(base: Mapping[str, Any], said: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's values over MODEL's, section by section; a part with its own encoder replaces MODEL's."""
    if said.get("encoder") is not None:
        return dict(said)
    out = dict(base)
    for key, value in said.items():
        both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = _merged(out[key], value) if both else value
    return out
