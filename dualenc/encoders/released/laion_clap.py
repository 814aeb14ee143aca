"""LAION's own CLAP files (``630k-audioset-best.pt`` …; Wu et al. 2023): HTSAT and RoBERTa in laion_clap's names.

The same computation is transformers' ClapModel, whose names and settings they are brought to. A file says no setting in
words; widths, depths, heads and fusion are read from the shapes, and the front-end's own filters, which lie in the file
too, are compared with those that ours will use.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dualenc.errors import CheckpointError

# (pattern, replacement), in this order, on every name.
RENAMED: tuple[tuple[str, str], ...] = (
    (r"^audio_branch\.bn0\.", "audio_model.audio_encoder.batch_norm."),
    (r"^audio_branch\.", "audio_model.audio_encoder."),
    (r"(blocks\.\d+)\.norm1\.", r"\1.layernorm_before."),
    (r"(blocks\.\d+)\.norm2\.", r"\1.layernorm_after."),
    (r"(blocks\.\d+)\.attn\.proj\.", r"\1.attention.output.dense."),
    (r"(blocks\.\d+)\.attn\.", r"\1.attention.self."),
    (r"(blocks\.\d+)\.mlp\.fc1\.", r"\1.intermediate.dense."),
    (r"(blocks\.\d+)\.mlp\.fc2\.", r"\1.output.dense."),
    (r"^text_branch\.", "text_model."),
    (r"^(audio|text)_projection\.0\.", r"\1_projection.linear1."),
    (r"^(audio|text)_projection\.2\.", r"\1_projection.linear2."),
)
# No part of an embedding: the AudioSet classifier, the heads of another loss, tables that are computed.
DROPPED = re.compile(
    r"^(audio_branch\.(spectrogram_extractor|logmel_extractor|tscam_conv|head)\.|(text|audio)_transform\.)|\.attn_mask$"
)
PREPROCESSING: dict[str, Any] = {
    "sampling_rate": 48_000,
    "fft_window_size": 1024,
    "hop_length": 480,
    "feature_size": 64,
    "frequency_min": 50,
    "frequency_max": 14_000,
    "max_length_s": 10,
    "padding": "repeatpad",
}
"""Of every model that laion_clap has released, in the words of transformers' ClapFeatureExtractor."""
CONTEXT = 77
TOKENIZER = "FacebookAI/roberta-base"
_FILTERS = "audio_branch.logmel_extractor.melW"


def as_transformers(raw: Mapping[str, Tensor], where: str) -> tuple[Any, dict[str, Tensor]]:
    """The ClapConfig and the ClapModel's tensors.

    Args:
        raw: the file's tensors, without wrappers' prefixes (:func:`dualenc.encoders.released.migrations.migrate`).

    Raises:
        CheckpointError: if the towers are not HTSAT and RoBERTa, or the filters are of another front-end.
    """
    towers = {"audio_branch.patch_embed.proj.weight": "HTSAT", "text_branch.pooler.dense.weight": "RoBERTa"}
    for name, what in towers.items():
        if name not in raw:
            near = [k for k in raw if k.startswith(name.split(".")[0])] or list(raw) or ["nothing"]
            raise CheckpointError(
                f"{where}: laion_clap files must have HTSAT and RoBERTa towers; {what} has {name!r}, but this "
                f"file has {near[0]!r}."
            )
    _check_filters(raw, where)
    from transformers import ClapConfig, ClapModel

    text, width = _text(raw, where), len(raw["text_projection.2.weight"])
    halves = [{**half, "projection_dim": width} for half in (text, _audio(raw))]
    config = ClapConfig(text_config=halves[0], audio_config=halves[1], projection_dim=width)
    state: dict[str, Tensor] = {}
    for name, value in raw.items():
        if DROPPED.search(name):
            continue
        new = name
        for pattern, replacement in RENAMED:
            new = re.sub(pattern, replacement, new)
        if ".attention.self.qkv." in new:
            for part, rows in zip(("query", "key", "value"), value.chunk(3), strict=True):
                state[new.replace("qkv", part)] = rows
        else:
            state[new] = value
    # Tables of places and token types are no weights, and files of some versions lack them.
    with torch.device("meta"):
        own = ClapModel(config).state_dict()
    places = text["max_position_embeddings"]
    tables = {"position_ids": torch.arange(places)[None], "token_type_ids": torch.zeros(1, places, dtype=torch.long)}
    state |= {k: tables[k.rpartition(".")[2]] for k in own if k.rpartition(".")[2] in tables}
    return config, state


def _audio(raw: Mapping[str, Tensor]) -> dict[str, Any]:
    width = len(raw["audio_branch.patch_embed.proj.weight"])
    depths: list[int] = []
    heads: list[int] = []
    for stage in range(64):
        blocks = {m[1] for k in raw if (m := re.match(rf"audio_branch\.layers\.{stage}\.blocks\.(\d+)\.", k))}
        if not blocks:
            break
        depths.append(len(blocks))
        heads.append(raw[f"audio_branch.layers.{stage}.blocks.0.attn.relative_position_bias_table"].shape[1])
    fused = "audio_branch.patch_embed.mel_conv2d.weight" in raw
    first = "audio_branch.layers.0.blocks.0."
    return {
        "patch_embeds_hidden_size": width,
        "hidden_size": width * 2 ** (len(depths) - 1),
        "depths": depths,
        "num_attention_heads": heads,
        "num_hidden_layers": len(depths),
        "num_mel_bins": len(raw["audio_branch.bn0.weight"]),
        "window_size": math.isqrt(len(raw[f"{first}attn.relative_position_index"])),
        "mlp_ratio": len(raw[f"{first}mlp.fc1.bias"]) / width,
        "spec_size": 256,
        "enable_fusion": fused,
        **({"fusion_type": "aff_2d"} if fused else {}),
    }


def _text(raw: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    words = raw["text_branch.embeddings.word_embeddings.weight"]
    types = len(raw["text_branch.embeddings.token_type_embeddings.weight"])
    if types != 1:
        raise CheckpointError(
            f"{where}: text_branch has {types} token types; RoBERTa, the only supported text tower, has 1."
        )
    layers = {m[1] for k in raw if (m := re.match(r"text_branch\.encoder\.layer\.(\d+)\.", k))}
    return {
        "vocab_size": words.shape[0],
        "hidden_size": words.shape[1],
        "num_hidden_layers": len(layers),
        "num_attention_heads": max(words.shape[1] // 64, 1),  # of every RoBERTa
        "intermediate_size": len(raw["text_branch.encoder.layer.0.intermediate.dense.bias"]),
        "max_position_embeddings": len(raw["text_branch.embeddings.position_embeddings.weight"]),
        "layer_norm_eps": 1e-5,  # RoBERTa's; ClapTextConfig has BERT's as its default
    }


def _check_filters(raw: Mapping[str, Tensor], where: str) -> None:
    """The file's mel filters must be those of :data:`PREPROCESSING`: nothing else tells the sample rate."""
    from dualenc.encoders.audio_front import mel_filters

    if _FILTERS not in raw:
        return
    p = PREPROCESSING
    rate, bins, low, high = (p[k] for k in ("sampling_rate", "feature_size", "frequency_min", "frequency_max"))
    ours = torch.from_numpy(mel_filters(rate, p["fft_window_size"], bins, low, high, "slaney", True)).float()
    theirs = raw[_FILTERS].float()
    if theirs.shape != ours.shape or not torch.allclose(theirs, ours, rtol=0, atol=1e-6):
        raise CheckpointError(
            f"{where}: {_FILTERS}: these are not the filters of {rate} Hz, {bins} bins from {low} to {high} Hz that "
            "laion_clap's models were trained on; the sample rate or the mel scale differs."
        )
