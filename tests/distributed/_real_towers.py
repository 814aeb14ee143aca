"""Small dual encoders of real towers (own, open_clip, timm, transformers), batches with absent rows, and the reference.

The reference is one process that has never heard of ranks: the whole batch through the model at once, the loss of the
whole batch, torch's SGD.
"""

from __future__ import annotations

import functools
import io
import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from _tiny import naive_info_nce, naive_sigmoid

from dualenc.config import Component, EngineConfig, LogitScale, Optim
from dualenc.data.batch import Batch
from dualenc.data.modalities import ModalityInput, modalities
from dualenc.distributed.world import World
from dualenc.encoders import DualEncoder, build_tower
from dualenc.engine import build_engine
from dualenc.losses import build_loss, objective
from dualenc.train.step import train_step

SIZE, STEPS, DIM, CLIP, LR, MOMENTUM = 8, 2, 16, 0.5, 0.2, 0.9
OPTIM = Optim(name="sgd", lr=LR, momentum=MOMENTUM, weight_decay=0.0, clip_grad_norm=CLIP)
LOSSES = ("info_nce", "sigmoid", "mse", "cwcl")
"""Losses on features; those on regions (prc, point_contrast, rad) have towers and a table of their own."""

WORDS = ["a", "photo", "of", "two", "small", "red", "dogs", "and", "one", "old", "cat", "near", "water"]
_IMAGE: dict[str, Any] = {"size": 32}
_TEXT: dict[str, Any] = {"tokenizer": "clip-bpe:600", "context_length": 8}
_HF: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": DIM,
    "dualenc_projection": True,
}
_PICTURES = {"image_size": 32, "patch_size": 16}
_SIGLIP = {k: v for k, v in _HF.items() if not k.endswith("projection") and k != "projection_dim"}
_CLIP_TEXT = {
    "vocab_size": 600,
    "max_position_embeddings": 8,
    "eos_token_id": 599,
    "bos_token_id": 598,
    "pad_token_id": 0,
}
_CLAP = {
    "patch_embeds_hidden_size": 8,
    "depths": [1, 1],
    "num_attention_heads": [2, 2],
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "num_mel_bins": 32,
    "spec_size": 64,
    "window_size": 4,
    "projection_dim": DIM,
    "dualenc_projection": True,
    "drop_path_rate": 0.0,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_DRY = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_OPEN_CLIP: dict[str, Any] = {
    "embed_dim": DIM,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 16, "head_width": 8, "patch_size": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 600, "width": 16, "heads": 2, "layers": 2},
}
_RN50 = {**_OPEN_CLIP, "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}}
_TRANSFORMER = {"name": "own/transformer", "width": 16, "layers": 2, "heads": 2}
_BOX = [-20.0, -20.0, -5.0, 20.0, 20.0, 3.0]
_MAP = {"name": "own/convnet", "widths": [8, 16]}
_LIFT = {
    "name": "own/lift_splat",
    "image": _MAP,
    "cell": 4.0,
    "channels": 8,
    "widths": [8, 16],
    "depth_bins": 6,
    "range": _BOX,
}


def _hf(model_type: str, base: dict[str, Any], **more: Any) -> dict[str, Any]:
    config = {**base, **more, "model_type": model_type}
    return {"name": "hf/small", "pretrained": False, "pooling": "model", "head": "none", "config": config}


MODELS: dict[str, dict[str, tuple[dict[str, Any], dict[str, Any]]]] = {
    "own vit": {
        "image": ({"name": "own/vit", "width": 16, "layers": 2, "heads": 2, "regions": [1, 2]}, _IMAGE),
        "text": (_TRANSFORMER, _TEXT),
    },
    "own convnet": {"image": (_MAP, _IMAGE), "text": (_TRANSFORMER, _TEXT)},
    "own scatter": {
        "image": ({"name": "own/scatter", "angles": 2, "widths": [8, 16]}, _IMAGE),
        "text": (_TRANSFORMER, _TEXT),
    },
    "own audio_cnn": {
        "audio": ({"name": "own/audio_cnn", "widths": [8, 16]}, {"rate": 8000, "max_s": 1.0}),
        "text": (_TRANSFORMER, _TEXT),
    },
    "own lidar, camera": {
        "lidar": ({"name": "own/pillars", "cell": 4.0, "pillar_width": 8, "widths": [8, 16]}, {"range": _BOX}),
        "camera": (_LIFT, {"size": [32, 64]}),
    },
    "open_clip ViT": {
        "image": ({"name": "open_clip/small", "config": _OPEN_CLIP}, _IMAGE),
        "text": ({"name": "open_clip/small", "config": _OPEN_CLIP}, _TEXT),
    },
    "open_clip RN50": {"image": ({"name": "open_clip/small", "config": _RN50}, _IMAGE), "text": (_TRANSFORMER, _TEXT)},
    "timm ViT": {
        "image": (
            {"name": "timm/vit_tiny_patch16_224", "args": {"depth": 2, "embed_dim": 16, "num_heads": 2}},
            _IMAGE,
        ),
        "text": (_TRANSFORMER, _TEXT),
    },
    "timm ResNet": {"image": ({"name": "timm/test_resnet"}, _IMAGE), "text": (_TRANSFORMER, _TEXT)},
    "HF CLIP": {
        "image": (_hf("clip_vision_model", _HF, **_PICTURES), _IMAGE),
        "text": (_hf("clip_text_model", _HF, **_CLIP_TEXT), _TEXT),
    },
    "HF SigLIP": {
        "image": (_hf("siglip_vision_model", _SIGLIP, **_PICTURES), _IMAGE),
        "text": (_hf("siglip_text_model", _SIGLIP, **_CLIP_TEXT, projection_size=DIM), {**_TEXT, "pad": "context"}),
    },
    "HF CLAP": {
        "audio": (_hf("clap_audio_model", _CLAP), {"max_s": 1.0}),
        "text": (_hf("clap_text_model", {**_HF, **_DRY}, vocab_size=600, max_position_embeddings=20), _TEXT),
    },
}  # fmt: skip


@functools.cache
def inputs_of(name: str) -> dict[str, ModalityInput]:
    """Modality → its input, filled from what the encoder was made with."""
    from dualenc.encoders import input_defaults

    out = {}
    for m, (encoder, settings) in MODELS[name].items():
        defaults = input_defaults(m, Component.model_validate(encoder)) if encoder["name"].startswith("hf/") else {}
        cls = modalities[m]
        out[m] = cls(cls.Config.model_validate({**defaults, **settings}))
    return out


def build(name: str, loss: str) -> DualEncoder:
    """The model, alike in every process. Vectors that start at zero are moved: a relative difference of a bias whose
    gradient is zero but for rounding (keys of an attention) would say nothing. No dropout: the reference encodes the
    whole batch at once."""
    torch.manual_seed(0)
    towers = {
        m: build_tower(m, Component.model_validate(MODELS[name][m][0]), source.describe(), DIM)
        for m, source in inputs_of(name).items()
    }
    first, second = towers
    lock = [second] if loss == "cwcl" else []
    model = DualEncoder(towers, [(first, second)], LogitScale(init=7.0, bias=-1.0), lock, lock)
    with torch.no_grad():
        for p in model.towers.parameters():
            if p.ndim == 1 and not p.any():
                p.add_(0.05 * torch.randn_like(p))
    return model


@functools.cache
def make_rows(name: str, step: int) -> dict[str, list[Any]]:
    """Modality → SIZE rows."""
    rng = np.random.default_rng(100 + step)
    made = {"image": _png, "camera": _rig, "text": _caption, "audio": _wav, "lidar": _npy}
    sources = inputs_of(name)
    return {m: [x.eval(x.decode(made[m](rng))) for _ in range(SIZE)] for m, x in sources.items()}


def _png(rng: np.random.Generator) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    small = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    small.resize((96, 64)).save(out, "PNG")
    return out.getvalue()


def _rig(rng: np.random.Generator) -> dict[str, Any]:
    """One camera that looks ahead."""
    view = {
        "name": "front",
        "member": "cam_front.png",
        "size": [96, 64],
        "drive": "d",
        "intrinsics": [[48.0, 0, 48], [0, 48.0, 32], [0, 0, 1]],
        "to_ego": [[0, 0, 1.0, 0], [-1, 0, 0, 0], [0, -1, 0, 1], [0, 0, 0, 1]],
    }
    return {"json:cameras": {"drive": "d", "views": [view]}, "cam_front.png": _png(rng)}


def _caption(rng: np.random.Generator) -> str:
    return " ".join(rng.choice(WORDS, int(rng.integers(1, 5))))


def _wav(rng: np.random.Generator) -> bytes:
    import soundfile

    out = io.BytesIO()
    soundfile.write(out, 0.2 * rng.standard_normal(int(rng.integers(3000, 9000))), 8000, format="WAV")
    return out.getvalue()


def _npy(rng: np.random.Generator) -> bytes:
    out = io.BytesIO()
    np.save(out, rng.uniform([-19, -19, -4, 0], [19, 19, 2, 1], (int(rng.integers(50, 90)), 4)).astype(np.float32))
    return out.getvalue()


def batch_of(name: str, step: int, rank: int = 0, world_size: int = 1) -> Batch:
    """The slots j with j % world_size == rank of a batch in which slots 5 and 2 lack one modality, slot 3 is lost, and
    slots 1 and 6 are one pair id."""
    ids = torch.arange(SIZE) + 1000 * step
    ids[6], ids[3] = ids[1].item(), -1
    (first, a), (second, b) = make_rows(name, step).items()
    sources, mine = inputs_of(name), range(rank, SIZE, world_size)
    inputs, rows = {}, {}
    for m, made, absent in ((first, a, 5), (second, b, 2)):
        there = [j for j in mine if j != absent]
        inputs[m] = sources[m].collate([made[j] for j in there])
        rows[m] = torch.tensor([mine.index(j) for j in there])
    return Batch(len(mine), inputs, rows, ids[rank::world_size], [f"s/{j}" for j in mine], step)


def reference(name: str, loss: str) -> dict[str, Tensor]:
    """Trained parameters after STEPS steps of one process on whole batches."""
    model = build(name, loss).train()
    trained = {k: p for k, p in model.named_parameters() if p.requires_grad}
    sgd = torch.optim.SGD(trained.values(), lr=LR, momentum=MOMENTUM)
    for step in range(STEPS):
        batch = batch_of(name, step)
        sgd.zero_grad()
        _whole_loss(model, batch, loss).backward()
        for p in trained.values():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        nn.utils.clip_grad_norm_(trained.values(), CLIP)
        sgd.step()
    return {k: p.detach().clone() for k, p in trained.items()}


def _whole_loss(model: DualEncoder, batch: Batch, loss: str) -> Tensor:
    out = model(batch.inputs)
    if loss not in ("info_nce", "sigmoid"):
        return objective(out, batch, model.pairs, build_loss(Component(name=loss))).value
    ((m1, m2),) = model.pairs
    at = [{int(s): k for k, s in enumerate(batch.rows[m])} for m in (m1, m2)]
    slots = [s for s in range(batch.size) if s in at[0] and s in at[1] and int(batch.ids[s]) >= 0]
    a, b = (
        torch.stack([out["features"][m][where[s]] for s in slots]).double()
        for m, where in zip((m1, m2), at, strict=True)
    )
    ids = [int(batch.ids[s]) for s in slots]
    scale, bias = (out[k][f"{m1}-{m2}"].double() for k in ("logit_scale", "logit_bias"))
    return naive_info_nce(a, b, ids, scale) if loss == "info_nce" else naive_sigmoid(a, b, ids, scale, bias)


def run(world: World, engine: dict[str, Any], name: str, loss: str, chunks: int) -> dict[str, Tensor]:
    """The same by the real step; whole on rank 0."""
    built = build_engine(EngineConfig(**engine), OPTIM, build(name, loss), world)
    ((m1, m2),) = built.module.pairs
    objective_ = build_loss(Component(name=loss))
    for step in range(STEPS):
        batch = batch_of(name, step, world.rank, world.world_size)
        micro = None if chunks == 1 else -(-batch.size // chunks)
        train_step(built, batch, [(m1, m2)], objective_, micro=micro)
    return built.model_state()


def cases(engines: list[str], every: bool, models: list[str] | None = None) -> list[tuple[str, str, str, int]]:
    """(model, engine, loss, chunks). ``every``: all combinations; else every model with every engine, the losses in
    turn, half of them in micro-batches."""
    names = models or list(MODELS)
    if every:
        return list(itertools.product(names, engines, LOSSES, (1, 2)))
    pairs = itertools.product(enumerate(names), enumerate(engines))
    return [(name, e, LOSSES[(i + k) % len(LOSSES)], 1 + (i + k // 2) % 2) for (i, name), (k, e) in pairs]


def sweep(
    world: World, engines: dict[str, dict[str, Any]], every: bool = False, models: list[str] | None = None
) -> dict[str, Any]:
    """Rank 0: case → the trained parameters."""
    out: dict[str, Any] = {}
    for name, engine, loss, chunks in cases(list(engines), every, models):
        got = run(world, engines[engine], name, loss, chunks)
        out["/".join((name, engine, loss, str(chunks)))] = got if world.rank == 0 else {}
    return out


def differences(found: dict[str, Any]) -> dict[str, list[Any]]:
    """Case → largest relative difference from the reference of any trained parameter, and its name."""
    wants: dict[tuple[str, str], dict[str, Tensor]] = {}
    out: dict[str, list[Any]] = {}
    for case, got in found.items():
        name, _, loss, _ = case.split("/")
        want = wants.setdefault((name, loss), {}) or reference(name, loss)
        wants[name, loss] = want
        off = {k: float((got[k] - p).abs().max() / p.abs().max().clamp(min=1e-12)) for k, p in want.items()}
        worst = max(off, key=lambda k: off[k])
        out[case] = [off[worst], worst]
    return out
