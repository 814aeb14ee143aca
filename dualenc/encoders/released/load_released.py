"""Released dual encoders, loaded whole: CLIP and SigLIP in the layouts of open_clip and transformers, CLAP
in those of transformers and laion_clap.

They become the parts a bundle is made of: input settings, towers with their own projections, temperature, tensors.
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dualenc.config import Component, LogitScale
from dualenc.encoders.adapters import hf
from dualenc.encoders.adapters import open_clip as oc
from dualenc.encoders.adapters.hf_audio import audio_defaults
from dualenc.encoders.adapters.hf_halves import VISION_TEXT, WHOLE
from dualenc.encoders.released import laion_clap
from dualenc.encoders.released.migrations import migrate_open_clip
from dualenc.encoders.released.weights import read_weights, refusing_code
from dualenc.encoders.released.whole_models import FAMILIES, REFUSED
from dualenc.errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)

PAIR = ("image", "text")
_KEY = "-".join(PAIR)
# Of an OpenAI archive; a CoCa's caption decoder is no part of the dual encoder.
_IGNORED = ("input_resolution", "context_length", "vocab_size", "attn_mask", "text_decoder.")
OPEN_CLIP_CONFIG = "open_clip_config.json"
_TABLES = ("position_ids", "token_type_ids")
OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")


@dataclass
class Released:
    """What is needed to build a released model.

    Attributes:
        name: for people.
        embed_dim: D.
        inputs: modality (= kind) → settings of its input; their order is the pair.
        encoders: modality → component that builds its architecture without weights.
        scale: temperature and bias as released; the exact values are in ``tensors``.
        tensors: the DualEncoder's state dict; None where the model is to start from random weights.
        source: the file or repository the tensors came from.
        file: the one file of weights, where there is one on this machine.
        clap_scales: CLAP's two temperatures (logarithms, from audio and from text) where they differ.
    """

    name: str
    embed_dim: int
    inputs: dict[str, dict[str, Any]]
    encoders: dict[str, Component]
    scale: LogitScale
    tensors: dict[str, Tensor] | None
    source: str
    file: Path | None = None
    clap_scales: tuple[float, float] | None = None


# --- open_clip ---------------------------------------------------------------------------------------------------


def from_open_clip(spec: str) -> Released:
    """``NAME``, ``NAME/TAG`` or ``NAME/FILE``. Without tag or file the weights are random, and a warning says so.

    Raises:
        ConfigError: if the name, tag or file is unknown (the nearest is named).
        CheckpointError: if the tensors are not this model's.
    """
    name, _, weights = spec.partition("/")
    config = oc.OpenClipConfig(pretrained=weights or False)
    cfg = oc.architecture(name, config)
    inputs = {
        "image": oc.image_defaults(cfg, oc.preprocessing(name, config)),
        "text": oc.text_defaults(cfg, f"open_clip:{name}"),
    }
    file = oc.pretrained_file(name, weights, f"open_clip:{spec}") if weights else None
    if file is None:
        logger.warning("open_clip:%s has no weight tag, so its weights are random; write open_clip:%s/TAG.", name, name)
    return _open_clip(name, cfg, inputs, file)


def from_open_clip_folder(folder: Path) -> Released:
    """A folder with open_clip_config.json and its weights.

    Raises:
        CheckpointError: if a file is missing or the tensors are not this model's.
    """
    raw = json.loads((folder / OPEN_CLIP_CONFIG).read_text(encoding="utf-8"))
    cfg = raw.get("model_cfg")
    if not isinstance(cfg, dict):
        raise CheckpointError(f"{folder}/open_clip_config.json has no model_cfg")
    file = next((folder / f for f in OPEN_CLIP_FILES if (folder / f).is_file()), None)
    if file is None:
        raise CheckpointError(f"{folder} has none of {', '.join(OPEN_CLIP_FILES)}")
    cfg = oc.architecture(folder.name, oc.OpenClipConfig(config=cfg))
    own_vocabulary = "hf_tokenizer_name" in cfg["text_cfg"]
    tokenizer = f"open_clip:local-dir:{folder.resolve()}" if own_vocabulary else "clip"
    inputs = {
        "image": oc.image_defaults(cfg, raw.get("preprocess_cfg", {})),
        "text": oc.text_defaults(cfg, tokenizer),
    }
    said = inputs["image"]["size"]
    built = oc.image_defaults(cfg, {})["size"]
    if said != built:
        raise CheckpointError(
            f"{folder}: preprocess_cfg.size: images of {said} px, but model_cfg.vision_cfg.image_size is {built}; "
            "one of them was changed."
        )
    return _open_clip(folder.name, cfg, inputs, file)


def _open_clip(name: str, cfg: dict[str, Any], inputs: dict[str, dict[str, Any]], file: Path | None) -> Released:
    encoders = {
        kind: Component.model_validate({"name": f"open_clip/{name}", "config": cfg, "head": "none"}) for kind in PAIR
    }
    log = torch.tensor([float(cfg.get("init_logit_scale", math.log(1 / 0.07)))])
    bias = cfg.get("init_logit_bias")
    bias = None if bias is None else torch.tensor([float(bias)])
    tensors = None
    if file is not None:
        raw = migrate_open_clip(cfg, read_weights(file))
        log = raw.pop("logit_scale", log).float().reshape(1)
        if "logit_bias" in raw:
            bias = raw.pop("logit_bias").float().reshape(1)
        image, text = oc.image_tensors(raw), oc.text_tensors(raw)
        used = {f"visual.{k}" for k in image} | set(text) | {f"text.{k}" for k in text}
        left = [k for k in raw if k not in used and not k.startswith(_IGNORED) and not k.endswith("position_ids")]
        if left:
            raise CheckpointError(f"{file}: {len(left)} tensors do not exist in {name}, first {left[0]!r}")
        tensors = _tensors({"image": ("trunk.", image), "text": ("net.", text)}, log, bias)
    source = f"open_clip:{name}" if file is None else str(file)
    return Released(name, int(cfg["embed_dim"]), inputs, encoders, _scale(log, bias), tensors, source, file)


# --- transformers ------------------------------------------------------------------------------------------------


def from_hf(where: str) -> Released:
    """A folder or repository with a CLIPModel, SiglipModel, ClapModel … (:data:`FAMILIES`), its preprocessor and
    tokenizer; or one in open_clip's layout.

    SigLIP 2 of a fixed resolution is a SiglipModel; its NaFlex variant, which keeps each picture's own aspect in a grid
    of patches, a Siglip2Model.

    Raises:
        ConfigError: if it cannot be found, or is another kind of model.
        CheckpointError: if a tensor is missing, or size and architecture contradict each other.
    """
    folder = hf.snapshot_with(where, OPEN_CLIP_CONFIG, OPEN_CLIP_FILES)
    if folder is not None and not hf.read_json(where, "config.json"):
        return from_open_clip_folder(folder)
    config = hf.load_config(where)
    if config.model_type not in FAMILIES:
        if config.model_type in REFUSED:
            raise ConfigError(f"hf:{where} is a {config.model_type!r} model: {REFUSED[config.model_type]}")
        raise ConfigError(
            f"hf:{where} is a {config.model_type!r} model; {', '.join(FAMILIES)} are dual encoders that can be loaded "
            f"whole. To use it as one tower, write encoder: {{name: hf/{where}}} in a recipe."
        )
    inputs: dict[str, dict[str, Any]] = {}
    if config.model_type == "clap":
        pre = hf.preprocessor(where, "feature_extractor")
        inputs["audio"] = audio_defaults(config.audio_config, pre)
        seconds, samples = inputs["audio"]["max_s"], pre.get("nb_max_samples")
        if samples is not None and round(seconds * inputs["audio"]["rate"]) != int(samples):
            raise CheckpointError(
                f"hf:{where}: preprocessor_config.json: sampling_rate: {seconds:g} s at {inputs['audio']['rate']} Hz "
                f"do not give nb_max_samples ({samples}); one of them was changed."
            )
    else:
        inputs["image"] = hf.image_defaults(hf.preprocessor(where), where)
        naflex = config.model_type == "siglip2"
        ours, theirs, key = ("patch", "patch_size", "patch_size") if naflex else ("size", "image_size", "size")
        # ALIGN's towers are convolutions: their image_size binds nothing
        size = None if config.model_type == "align" else hf.setting(config.vision_config, theirs)
        said, built = inputs["image"].get(ours), None if size is None else int(size)
        if built is not None and said != built:
            raise CheckpointError(
                f"hf:{where}: preprocessor_config.json: {key}: {'patches' if naflex else 'images'} of {said} px, but "
                f"config.json: vision_config.{theirs} is {built}; one of them was changed."
            )
    inputs["text"] = hf.text_defaults(config.text_config, f"hf:{where}", _context(where, config.text_config))
    side = hf.read_json(where, "tokenizer_config.json").get("padding_side", "right")
    if inputs["text"].get("pad") == "context" and side != "right":
        raise CheckpointError(
            f"hf:{where}: tokenizer_config.json: padding_side: {side}; {FAMILIES[config.model_type]} sees its padding, "
            "which was on the right in training."
        )
    file = hf.file_of(where, "model.safetensors")
    return _from_hf_model(where, config, inputs, _whole(where), f"hf:{where}", file)


def from_laion_clap(spec: str) -> Released:
    """A file of the laion_clap package: ``FILE.pt``. Its tokenizer is RoBERTa's: the one in the file's folder, or else
    the Hub's.

    Raises:
        ConfigError: if there is no such file, or its tokenizer cannot be loaded.
        CheckpointError: if it holds anything but tensors and numbers, towers other than HTSAT and RoBERTa, or filters
            of another sample rate.
    """
    path = Path(spec).expanduser()
    if not path.is_file():
        raise ConfigError(
            f"laion_clap:{spec}: there is no such file; give for example laion_clap:FOLDER/630k-audioset-best.pt"
        )
    config, state = laion_clap.as_transformers(read_weights(path), str(path))
    beside = any((path.parent / f).is_file() for f in ("tokenizer.json", "vocab.json"))
    tokenizer = str(path.parent.resolve()) if beside else laion_clap.TOKENIZER
    if not beside and hf.file_of(tokenizer, "vocab.json") is None:
        raise ConfigError(
            f"laion_clap:{spec}: its tokenizer, {tokenizer}, cannot be loaded; put its vocab.json, merges.txt and "
            "tokenizer_config.json beside the file."
        )
    context = min(laion_clap.CONTEXT, hf.places(config.text_config))
    inputs = {
        "audio": audio_defaults(config.audio_config, laion_clap.PREPROCESSING),
        "text": hf.text_defaults(config.text_config, f"hf:{tokenizer}", context),
    }
    return _from_hf_model(path.stem, config, inputs, state, str(path), path)


def _context(where: str, text: Any) -> int:
    """The longest text: the tokenizer's own length where that is shorter than the tower's places (AltCLIP)."""
    said = hf.read_json(where, "tokenizer_config.json").get("model_max_length")
    return min(hf.places(text), int(said)) if isinstance(said, int) and said > 1 else hf.places(text)


def _whole(where: str) -> dict[str, Tensor]:
    """Every tensor of a transformers model: safetensors, or a torch file under ``weights_only``."""
    from transformers import AutoModel

    try:
        with refusing_code(f"hf:{where}"):
            model, info = AutoModel.from_pretrained(
                where, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
            )
    except (OSError, ValueError) as e:
        raise ConfigError(f"the weights of hf:{where} cannot be loaded ({str(e).splitlines()[0]})") from e
    # Tables of places are not weights: files of other versions lack them, and the model has made them itself.
    missing = sorted(k for k in info["missing_keys"] if not k.endswith(_TABLES))
    if missing:
        raise CheckpointError(f"hf:{where}: {len(missing)} tensors are missing, first {missing[0]!r}")
    return {k: v.detach() for k, v in model.state_dict().items()}


def _from_hf_model(
    where: str,
    config: Any,
    inputs: dict[str, dict[str, Any]],
    state: dict[str, Tensor],
    source: str,
    file: Path | None,
) -> Released:
    """The parts of a model that is read."""
    other = next(iter(inputs))
    projects = not config.model_type.startswith(("siglip", "tipsv2"))
    whole = config.model_type == VISION_TEXT
    two = tuple(float(state[f"logit_scale_{side}"]) for side in "at") if "logit_scale_a" in state else (0.0, 0.0)
    scales = (two[0], two[1]) if two[0] != two[1] else None
    log = _temperature(state, where)
    bias = state.pop("logit_bias").reshape(1) if "logit_bias" in state else None
    embed_dim = int(config.projection_dim) if projects else int(config.vision_config.hidden_size)
    encoders, parts = {}, {}
    halves = {"image": ("vision", "visual", "trunk.net."), "audio": ("audio", "audio", "net.")}
    for kind, (prefix, projection, place) in {other: halves[other], "text": ("text", "text", "net.")}.items():
        arch = getattr(config, f"{prefix}_config")
        if whole:
            setattr(arch, WHOLE, prefix)
        if projects:
            arch.projection_dim = embed_dim  # the halves' own configs keep a default that the whole overrides
        own = {k: v for k, v in state.items() if k.startswith((f"{prefix}_model.", f"{projection}_projection."))}
        if config.model_type.startswith("siglip"):
            own = _as_named(own, f"{prefix}_model.", hf.random_model(arch).state_dict())
        # CLIP's position_ids are no tensor of its halves; CLAP's are.
        own = own if other == "audio" else {k: v for k, v in own.items() if not k.endswith(_TABLES)}
        if config.model_type == "align":
            own = {k: v for k, v in own.items() if not k.startswith("text_model.pooler.")}
        parts[kind] = (place, own)
        projected = not config.model_type.startswith("siglip")
        kept = {**hf.kept_config(arch), **({"dualenc_projection": True} if projected else {})}
        encoders[kind] = Component.model_validate(
            {"name": f"hf/{where}", "pretrained": False, "pooling": "model", "head": "none", "config": kept}
        )
    tensors = _tensors(parts, log, bias, f"{other}-text")
    return Released(where, embed_dim, inputs, encoders, _scale(log, bias), tensors, source, file, scales)


def _temperature(state: dict[str, Tensor], where: str) -> Tensor:
    """The logarithm of the scale, [1], taken out of ``state``. CLAP has one for each direction."""
    if "temperature" in state:  # ALIGN, TIPS: cosines are divided by it
        return -state.pop("temperature").reshape(1).log()
    if "logit_scale" in state:
        return state.pop("logit_scale").reshape(1)
    audio, text = (state.pop(f"logit_scale_{side}").reshape(1) for side in "at")
    if not torch.allclose(audio, text, rtol=1e-3):
        logger.info(
            "%s has two logit scales, %.2f from audio and %.2f from text; the first is used for both.",
            where,
            math.exp(float(audio)),
            math.exp(float(text)),
        )
    return audio


def _as_named(tensors: dict[str, Tensor], prefix: str, names: dict[str, Tensor]) -> dict[str, Tensor]:
    """SigLIP's half on its own keeps or drops the whole's prefix, depending on transformers' version."""
    return tensors if all(k in tensors for k in names) else {k.removeprefix(prefix): v for k, v in tensors.items()}


# --- both --------------------------------------------------------------------------------------------------------


def _tensors(
    parts: dict[str, tuple[str, dict[str, Tensor]]], log: Tensor, bias: Tensor | None, pair: str = _KEY
) -> dict[str, Tensor]:
    out = {
        f"towers.{m}.{prefix}{k}": v.float() if v.is_floating_point() else v
        for m, (prefix, part) in parts.items()
        for k, v in part.items()
    }
    out[f"logit_scale.{pair}"] = log
    if bias is not None:
        out[f"logit_bias.{pair}"] = bias
    return out


def _scale(log: Tensor, bias: Tensor | None) -> LogitScale:
    init = math.exp(float(log))
    # SigLIP's temperatures lie above CLIP's bound of 100; a hair of room keeps rounding from moving the value itself.
    return LogitScale(init=init, max=max(100.0, init * 1.001), bias=None if bias is None else float(bias))
