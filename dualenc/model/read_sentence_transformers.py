"""A folder of sentence-transformers → a bundle: its modules are read as data, none of its classes is imported.

What can be read: a whole CLIP, SigLIP or CLAP (``Transformer``, or the older ``CLIPModel``), a text model
(``Transformer``, ``Pooling``, ``Dense``), our towers, and a ``Router`` with one of these for each modality.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dualenc.config import Component, LogitScale, Modality, pair_name
from dualenc.data.modalities import ModalityInput
from dualenc.encoders import build_tower
from dualenc.encoders.adapters import hf
from dualenc.encoders.released.load_released import from_hf
from dualenc.encoders.released.weights import load_exactly, read_weights, strip_prefix
from dualenc.encoders.released.whole_models import FAMILIES
from dualenc.errors import CheckpointError, ConfigError
from dualenc.model.bundle import Bundle, assemble, build_input, part_of, state_digest
from dualenc.model.export.sentence_transformers_layout import MODALITIES, OURS, log_scales, stored_scales
from dualenc.model.load import load_bundle, released_bundle

_IDENTITY, _GELU = ("torch.nn.modules.linear.Identity", None), ("torch.nn.modules.activation.GELU",)
_POOLINGS = ("mean", "cls", "lasttoken")


@dataclass
class _Parts:
    """Towers as they are found."""

    parts: dict[str, Modality] = field(default_factory=dict)
    inputs: dict[str, ModalityInput] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    width: int = 0

    def add(self, m: str, part: Modality, source: ModalityInput, tensors: Mapping[str, Tensor], width: int) -> None:
        if self.width not in (0, width):
            raise ConfigError(f"its routes give features of {self.width} and {width} dimensions")
        self.parts[m], self.inputs[m], self.width = part, source, width
        self.tensors |= {f"towers.{m}.{k}": v for k, v in tensors.items()}


def load_sentence_transformers(folder: Path) -> Bundle:
    """Read such a folder. A model of texts alone is one modality, ``text``, paired with itself.

    Raises:
        ConfigError: naming the module that has no counterpart here.
        CheckpointError: a file is missing, damaged, or does not fit the others.
    """
    try:
        return _load(folder)
    except ConfigError as e:
        raise type(e)(f"{folder}: this sentence-transformers model cannot be read: {e}") from e


def _load(folder: Path) -> Bundle:
    listed = [(str(m["type"]), folder / str(m["path"])) for m in _json(folder / "modules.json")]
    kind, place = listed[0]
    if kind == OURS:
        return load_bundle(place)
    if _short(kind) == "CLIPModel" or (_short(kind) == "Transformer" and _family(place) in FAMILIES):
        return released_bundle(from_hf(str(place)), str(folder))
    found = _Parts()
    if _short(kind) == "Router":
        config = _json(place / "router_config.json")
        types, structure = dict(config["types"]), dict(config["structure"])
        for route, names in structure.items():
            if route not in MODALITIES:
                raise ConfigError(
                    f"its Router has the route {route!r}; only routes named text, image or audio are read"
                )
            _route(found, route, [(str(types[n]), place / str(n)) for n in names])
    else:
        _route(found, "text", listed)
    said = stored_scales(folder)
    others = [m for m in found.parts if m != "text"]
    pairs = [(str(a), str(b)) for a, b in said.get("pairs", [])] or [(m, "text") for m in others] or [("text", "text")]
    scale = LogitScale.model_validate(said["logit_scale"]) if "logit_scale" in said else LogitScale()
    for pair in pairs:
        log, bias = log_scales(said, pair)
        found.tensors[f"logit_scale.{pair_name(pair)}"] = torch.tensor([math.log(scale.init)]) if log is None else log
        if scale.bias is not None:
            found.tensors[f"logit_bias.{pair_name(pair)}"] = torch.tensor([scale.bias]) if bias is None else bias
    name = str(folder)
    bundle = assemble(folder.name, found.parts, found.inputs, pairs, scale, found.width, found.tensors, name)
    bundle.provenance = {"source": name, "weights": name}
    bundle.weights_hash = state_digest(bundle.model.state_dict())
    return bundle


def _route(found: _Parts, m: str, listed: Sequence[tuple[str, Path]]) -> None:
    """The modules of one modality."""
    (kind, place), rest = listed[0], listed[1:]
    if kind == OURS:
        ours = load_bundle(place)
        state = ours.model.state_dict()
        names = [n for n, p in ours.parts.items() if (p.kind or n) == m]
        for n in names:
            found.add(n, ours.parts[n], ours.inputs[n], strip_prefix(state, f"towers.{n}."), ours.embed_dim)
        return
    if _short(kind) != "Transformer":
        raise ConfigError(f"its module {kind} has no counterpart in dualenc")
    pooling, denses = "model", []
    for name, where in rest:
        short = _short(name)
        if short == "Pooling":
            pooling = _pooling(_json(where / "config.json"))
        elif short == "Dense":
            denses.append(where)
        elif short != "Normalize":
            raise ConfigError(f"its module {name} has no counterpart in dualenc")
    head, tensors = _head(denses)
    if m == "text" and pooling != "model":
        _add_text(found, place, pooling, head, tensors)
    elif m == "image" and _family(place) == "timm_wrapper" and pooling == "model":
        _add_timm(found, place, head, tensors)
    else:
        raise ConfigError(f"its {m} route is a {_family(place)!r} model, which is not read there")


def _pooling(config: Mapping[str, Any]) -> str:
    old = [k.removeprefix("pooling_mode_") for k, v in config.items() if k.startswith("pooling_mode_") and v is True]
    mode = config.get("pooling_mode") or [{"cls_token": "cls", "mean_tokens": "mean"}.get(k, k) for k in old]
    mode = mode[0] if isinstance(mode, list) and len(mode) == 1 else mode
    if mode not in _POOLINGS:
        raise ConfigError(f"pooling_mode {mode!r}: only {', '.join(_POOLINGS)} are read")
    return "eot" if mode == "lasttoken" else str(mode)


def _head(places: Sequence[Path]) -> tuple[str, dict[str, Tensor]]:
    """Dense modules as a head: none, one linear map without bias, or GELU and then that."""
    configs = [_json(p / "config.json") for p in places]
    weights = [strip_prefix(read_weights(p / "model.safetensors", renamed=False), "linear.") for p in places]
    acts = [c.get("activation_function") for c in configs]
    if not places:
        return "none", {}
    plain = acts[-1] in _IDENTITY and "bias" not in weights[-1] and not any(c.get("use_residual") for c in configs)
    if plain and len(places) == 1:
        return "linear", {"head.weight": weights[0]["weight"]}
    if plain and len(places) == 2 and acts[0] in _GELU:
        first = {f"head.0.{k}": v for k, v in weights[0].items()}
        return "mlp", {**first, "head.2.weight": weights[1]["weight"]}
    raise ConfigError(
        f"its Dense modules (activations {acts}, biases {['bias' in w for w in weights]}) are not a head of dualenc: "
        "one Dense without bias and activation, or one with GELU before it"
    )


def _add_text(found: _Parts, place: Path, pooling: str, head: str, head_tensors: Mapping[str, Tensor]) -> None:
    settings = hf.HF().input_defaults("text", str(place), hf.HFConfig())
    if _json(place / "sentence_bert_config.json", {}).get("do_lower_case"):
        settings["lower"] = True
    source = build_input("text", settings, f"{place}: input")
    width = int(head_tensors["head.weight" if head == "linear" else "head.2.weight"].shape[0]) if head != "none" else 0
    width = width or int(hf.load_config(str(place)).hidden_size)
    encoder = Component.model_validate({"name": f"hf/{place}", "pooling": pooling, "head": head})
    tower = build_tower("text", encoder, source.describe(), width, f"{place}: text")
    state = {**tower.state_dict(), **head_tensors}
    load_exactly(tower, state, str(place))
    part = part_of("text", source.describe()["config"], tower.component)
    found.add("text", part, source, tower.state_dict(), width)


def _add_timm(found: _Parts, place: Path, head: str, head_tensors: Mapping[str, Tensor]) -> None:
    config = _json(place / "config.json")
    pre = config.get("pretrained_cfg", {})
    if float(pre.get("crop_pct", 1.0)) != 1.0:
        raise ConfigError(f"crop_pct {pre['crop_pct']}: only images that are not cropped further (1.0) are read")
    settings = {
        "size": int(pre["input_size"][-1]),
        "mean": tuple(pre["mean"]),
        "std": tuple(pre["std"]),
        "interpolation": pre.get("interpolation", "bicubic"),
        "resize": "squash" if pre.get("crop_mode") == "squash" else "shortest",
    }
    source = build_input("image", settings, f"{place}: input")
    args = {k: v for k, v in (config.get("model_args") or {}).items() if k != "img_size"}
    encoder = Component.model_validate({"name": f"timm/{config['architecture']}", "args": args, "head": head})
    trunk = strip_prefix(read_weights(place / "model.safetensors", renamed=False), "timm_model.")
    state = {**{f"trunk.{k}": v for k, v in trunk.items()}, **head_tensors}
    width = int(head_tensors["head.weight" if head == "linear" else "head.2.weight"].shape[0]) if head != "none" else 0
    width = width or int(config["num_features"])
    found.add("image", part_of("image", source.describe()["config"], encoder), source, state, width)


def _family(place: Path) -> str:
    return str(hf.load_config(str(place)).model_type)


def _short(kind: str) -> str:
    return kind.rpartition(".")[2] if kind.startswith("sentence_transformers.") else kind


def _json(path: Path, default: Any = None) -> Any:
    if default is not None and not path.is_file():
        return default
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{path} cannot be read ({e})") from e
