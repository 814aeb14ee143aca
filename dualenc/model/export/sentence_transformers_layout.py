"""The folder of sentence-transformers: its own modules where it has them, else ours (dualenc.sentence_transformers).

A model that transformers has as a whole (CLIP, SigLIP, CLAP …) is one ``Transformer``. Any other is a ``Router`` with a
route for each modality: texts of a transformers model are ``Transformer``, ``Pooling`` and ``Dense``, timm's images a
``Transformer`` around transformers' timm wrapper, everything else the towers as a bundle.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dualenc.config import pair_name
from dualenc.data.modalities.text import TextInput
from dualenc.encoders import Tower
from dualenc.encoders.adapters.hf_towers import HFText
from dualenc.encoders.dual_encoder import DualEncoder
from dualenc.encoders.released.convert import NoSuchLayoutError
from dualenc.encoders.tower import ImageTower
from dualenc.errors import ConfigError
from dualenc.model.bundle import Bundle, kind_of
from dualenc.model.export.layouts import save_tensors, write_json, write_transformers
from dualenc.versions import versions

MODALITIES = ("text", "image", "audio")
"""What sentence-transformers can encode and dualenc has towers for."""
OURS = "dualenc.sentence_transformers.Towers"
TOWERS = "towers"
"""The folder of the towers that are ours."""
CONFIG = "config_sentence_transformers.json"
_BASE = "sentence_transformers.base.modules"
_TRANSFORMER = f"{_BASE}.transformer.Transformer"
_NORMALIZE = f"{_BASE}.normalize.Normalize"
_DENSE = f"{_BASE}.dense.Dense"
_ROUTER = f"{_BASE}.router.Router"
_POOLING = "sentence_transformers.sentence_transformer.modules.pooling.Pooling"
_IDENTITY, _GELU = "torch.nn.modules.linear.Identity", "torch.nn.modules.activation.GELU"


def write_sentence_transformers(bundle: Bundle, folder: Path) -> None:
    """modules.json and what it names.

    Raises:
        NoSuchLayoutError: a modality that sentence-transformers does not know.
    """
    other = [m for m, part in bundle.parts.items() if kind_of(m, part) not in MODALITIES]
    if other:
        raise NoSuchLayoutError(f"sentence-transformers has no modality {kind_of(other[0], bundle.parts[other[0]])!r}")
    if not _crops_like_transformers(bundle) or not _whole(bundle, folder):
        _routes(bundle, folder)
    model = {
        "pairs": [list(p) for p in bundle.model.pairs],
        "logit_scale": bundle.scale.model_dump(mode="json"),
        "log_scale": {p: float(v.detach()) for p, v in bundle.model.logit_scale.items()},
        "logit_bias": {p: float(v.detach()) for p, v in bundle.model.logit_bias.items()},
    }
    about = {
        "model_type": "SentenceTransformer",
        "__version__": {k.replace("-", "_"): v for k, v in versions(("sentence-transformers", "transformers")).items()},
        "prompts": {},
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
        "dualenc": model,  # not sentence-transformers': the temperature of a model whose modules have none
    }
    write_json(folder / CONFIG, about)


def _crops_like_transformers(bundle: Bundle) -> bool:
    """transformers cuts an odd border at its floor; open_clip rounds it. A crop of other pixels is another feature."""
    for x in bundle.inputs.values():
        config = x.describe()["config"]
        if config.get("resize") == "shortest" and config.get("centre") != "floor":
            return False
        if config.get("resize") == "naflex":  # sentence-transformers reads the processor with another size of patch
            return False
    return True


def _whole(bundle: Bundle, folder: Path) -> bool:
    """As one transformers model, if it is one whose images are resized by Pillow there too."""
    if any("tipsv2" in str(t.component.settings.get("config", "")) for t in bundle.model.trained_towers().values()):
        return False
    try:
        write_transformers(bundle, folder)
    except ConfigError:
        return False
    kinds = [kind_of(m, part) for m, part in bundle.parts.items()]
    how = {k: {"method": f"get_{k}_features", "method_output_name": "pooler_output"} for k in sorted(kinds)}
    settings = _transformer_settings(how, "sentence_embedding")
    family = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    if family.startswith("siglip"):  # trained without a mask on texts padded to the context
        settings["processing_kwargs"] = {"text": {"padding": "max_length", "return_attention_mask": False}}
    write_json(folder / "sentence_bert_config.json", settings)
    write_json(folder / "1_Normalize" / "config.json", {})
    _modules(folder, [("", _TRANSFORMER), ("1_Normalize", _NORMALIZE)])
    return True


def _routes(bundle: Bundle, folder: Path) -> None:
    structure: dict[str, list[str]] = {}
    types: dict[str, str] = {}
    left = []
    for m, part in bundle.parts.items():
        kind, tower = kind_of(m, part), bundle.model.tower(m)
        names: dict[str, str] | None = None
        if kind == "text" and isinstance(tower, HFText):
            names = _text(bundle, m, tower, folder)
        elif kind == "image" and isinstance(tower, ImageTower) and tower.component.name.startswith("timm/"):
            names = _timm(bundle, m, tower, folder)
        if names is None:
            left.append(m)
            names = {TOWERS: OURS}
        types |= names
        structure.setdefault(kind, list(names))
    if left:
        part_of_bundle(bundle, left).save(folder / TOWERS)
    if len(left) == len(bundle.parts):
        _modules(folder, [(TOWERS, OURS)])
        return
    if "text" in structure:  # sentence-transformers takes the first route for what it cannot tell
        structure = {"text": structure.pop("text"), **structure}
    parameters = {"default_route": next(iter(structure)), "allow_empty_key": True, "route_mappings": {}}
    write_json(folder / "router_config.json", {"types": types, "structure": structure, "parameters": parameters})
    _modules(folder, [("", _ROUTER)])


def part_of_bundle(bundle: Bundle, names: list[str]) -> Bundle:
    """The model with some of its modalities only; pairs and temperatures stay."""
    shared = {m: o for m, o in bundle.model.shared.items() if m in names and o in names}
    towers = {m: bundle.model.tower(m) for m in names}
    model = DualEncoder(towers, bundle.model.pairs, bundle.scale, shared=shared)
    model.logit_scale.load_state_dict(bundle.model.logit_scale.state_dict())
    model.logit_bias.load_state_dict(bundle.model.logit_bias.state_dict())
    inputs = {m: bundle.inputs[m] for m in names}
    alone = {m: bundle.parts[m].model_copy(update={"shares": None}) for m in names}
    parts = {m: bundle.parts[m] if m in shared else part for m, part in alone.items()}
    return Bundle(bundle.name, model.eval(), inputs, parts, bundle.scale, bundle.embed_dim, dict(bundle.provenance))


# --- routes ------------------------------------------------------------------------------------------------------


def _text(bundle: Bundle, m: str, tower: HFText, folder: Path) -> dict[str, str] | None:
    """A transformers text model; None where its pooling or its tokenizer is not one of sentence-transformers'."""
    source = bundle.inputs[m]
    assert isinstance(source, TextInput)
    config = dict(tower.component.settings["config"])
    if (
        tower.pooling not in ("mean", "cls")
        or tower.bidirectional
        or tower.pad_to
        or config.pop("dualenc_projection", False)
    ):
        return None
    place = folder / f"{m}_transformer"
    try:
        source.export_tokenizer(place)
    except ConfigError:
        return None
    save_tensors(tower.net.state_dict(), place / "model.safetensors")
    write_json(place / "config.json", {**config, "dtype": "float32"})
    how = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
    settings = _transformer_settings(how, "token_embeddings") | {"max_seq_length": source.context_length}
    settings.pop("processor_kwargs")
    if source.config.lower:
        settings["do_lower_case"] = True
    write_json(place / "sentence_bert_config.json", settings)
    width = int(config["hidden_size"])
    pooling = {"embedding_dimension": width, "pooling_mode": tower.pooling, "include_prompt": True}
    write_json(folder / f"{m}_pooling" / "config.json", pooling)
    return {f"{m}_transformer": _TRANSFORMER, f"{m}_pooling": _POOLING, **_head(tower, m, folder)}


def _timm(bundle: Bundle, m: str, tower: ImageTower, folder: Path) -> dict[str, str] | None:
    """A timm trunk in transformers' wrapper; None for an input that timm's own transforms do not give, and for a tower
    that pools over boxes."""
    if "regions" in tower.component.settings:
        return None
    config = bundle.inputs[m].describe()["config"]
    if config["resize"] not in ("shortest", "squash") or config["shortest_edge"] not in (None, config["size"]):
        return None
    if config["interpolation"] not in ("bicubic", "bilinear") or config["centre"] == "floor":
        return None
    size = int(config["size"])
    pre = {
        "input_size": [3, size, size],
        "fixed_input_size": True,
        "interpolation": config["interpolation"],
        "crop_pct": 1.0,
        "crop_mode": "squash" if config["resize"] == "squash" else "center",
        "mean": list(config["mean"]),
        "std": list(config["std"]),
    }
    name = tower.component.name.removeprefix("timm/").partition(".")[0]
    args = dict(tower.component.settings.get("args") or {})
    if "img_size" in dict(vars(tower.trunk)) or any(
        n.startswith("patch_embed") for n, _ in tower.trunk.named_modules()
    ):
        args["img_size"] = size
    about: dict[str, Any] = {"architecture": name, "model_type": "timm_wrapper", "num_classes": 0}
    about |= {"num_features": tower.trunk.num_features, "pretrained_cfg": pre, "dtype": "float32"}
    about |= {"architectures": ["TimmWrapperModel"], **({"model_args": args} if args else {})}
    place = folder / f"{m}_transformer"
    write_json(place / "config.json", about)
    tensors = {f"timm_model.{k}": v for k, v in tower.trunk.state_dict().items()}
    save_tensors(tensors, place / "model.safetensors")
    how = {"image": {"method": "forward", "method_output_name": "pooler_output"}}
    settings = _transformer_settings(how, "sentence_embedding")
    settings.pop("processor_kwargs")
    write_json(place / "sentence_bert_config.json", settings)
    return {f"{m}_transformer": _TRANSFORMER, **_head(tower, m, folder)}


def _head(tower: Tower, m: str, folder: Path) -> dict[str, str]:
    """The tower's head as ``Dense`` modules, and ``Normalize``."""
    names = {}
    layers = [x for x in tower.head.modules() if isinstance(x, nn.Linear)]
    for i, layer in enumerate(layers):
        name = f"{m}_dense_{i}"
        config = {
            "in_features": layer.in_features,
            "out_features": layer.out_features,
            "bias": layer.bias is not None,
            "activation_function": _IDENTITY if i == len(layers) - 1 else _GELU,
        }
        write_json(folder / name / "config.json", config)
        tensors = {f"linear.{k}": v for k, v in layer.state_dict().items()}
        save_tensors(tensors, folder / name / "model.safetensors")
        names[name] = _DENSE
    write_json(folder / f"{m}_normalize" / "config.json", {})
    return {**names, f"{m}_normalize": _NORMALIZE}


# --- files -------------------------------------------------------------------------------------------------------


def _transformer_settings(how: Mapping[str, Any], output: str) -> dict[str, Any]:
    return {
        "transformer_task": "feature-extraction",
        "modality_config": dict(how),
        "module_output_name": output,
        # Pillow's resize, as in training: torchvision's gives other pixels (features move by 1e-4).
        "processor_kwargs": {"backend": "pil"},
    }


def _modules(folder: Path, listed: list[tuple[str, str]]) -> None:
    rows = [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (path, kind) in enumerate(listed)]
    write_json(folder / "modules.json", rows)


def stored_scales(folder: Path) -> dict[str, Any]:
    """What :func:`write_sentence_transformers` wrote of pairs and temperatures; empty for other folders."""
    path = folder / CONFIG
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    found = said.get("dualenc") if isinstance(said, dict) else None
    return dict(found) if isinstance(found, dict) else {}


def log_scales(said: Mapping[str, Any], pair: tuple[str, str]) -> tuple[Tensor | None, Tensor | None]:
    """(logarithm of the scale, bias) of a pair, [1] each, where they are known."""
    out = [said.get(key, {}).get(pair_name(pair)) for key in ("log_scale", "logit_bias")]
    a, b = (None if x is None else torch.tensor([float(x)]) for x in out)
    return a, b
