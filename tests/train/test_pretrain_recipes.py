"""recipes/pretrain: every recipe builds the architecture it names and its twin trains on data that ship or are made."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from _runs import environment, losses

from dualenc.config import load_recipe
from dualenc.losses import build_loss
from dualenc.model.bundle import assemble, build_input, resolve_input
from dualenc.shipped import shipped_recipes
from dualenc.train.check import check_recipe

REAL = sorted(n for n in shipped_recipes() if n.startswith("pretrain/") and "/twin/" not in n)
TWINS = sorted(n for n in shipped_recipes() if n.startswith("pretrain/twin/"))

PARAMETERS = {
    "pretrain/clip_vit_b32": 151_277_313,
    "pretrain/clip_vit_b16": 149_620_737,
    "pretrain/clip_vit_l14": 427_616_513,
    "pretrain/clip_vit_l14_fsdp2": 427_616_513,
    "pretrain/clip_vit_l14_zero2": 427_616_513,
    "pretrain/siglip_vit_b32": 376_856_066,
    "pretrain/siglip_vit_b16": 203_155_970,
    "pretrain/siglip_vit_l16": 652_150_786,
    # CLIP's image tower, and the released base models with a projection (ModernBERT linear, the others an MLP)
    "pretrain/vit_modernbert": 86_192_640 + 149_014_272 + 768 * 512 + 1,
    "pretrain/clap_htsat_roberta": 28_518_296 + 124_645_632 + 768 * 256 + 256 * 512 + 65_536 + 1,
    "pretrain/lidarclip": 303_966_208 + 15_468_288 + 1,
}
"""CLIP and SigLIP: the numbers of open_clip's own models (asserted below); RoBERTa and ModernBERT: transformers'."""

OPEN_CLIP = {
    "pretrain/clip_vit_b32": "ViT-B-32",
    "pretrain/clip_vit_b16": "ViT-B-16",
    "pretrain/clip_vit_l14": "ViT-L-14",
    "pretrain/siglip_vit_b32": "ViT-B-32-SigLIP2-256",
    "pretrain/siglip_vit_b16": "ViT-B-16-SigLIP",
    "pretrain/siglip_vit_l16": "ViT-L-16-SigLIP-256",
}

WITHOUT_THE_HUB = {
    "pretrain/vit_modernbert": [
        "modalities.text.encoder.pretrained=false",
        "modalities.text.encoder.config={model_type: modernbert}",
    ],
    "pretrain/clap_htsat_roberta": [
        "modalities.text.encoder.pretrained=false",
        "modalities.text.encoder.config={model_type: roberta, max_position_embeddings: 514, type_vocab_size: 1}",
    ],
    "pretrain/lidarclip": ["modalities.camera.encoder.pretrained=false"],
}
"""The same architectures from transformers' own defaults (a base model each), not from the repository's config.json."""


def test_every_recipe_has_a_twin() -> None:
    assert {n.removeprefix("pretrain/") for n in REAL} == {n.removeprefix("pretrain/twin/") for n in TWINS}
    assert set(PARAMETERS) == set(REAL)


@pytest.mark.parametrize("name", REAL)
def test_a_recipe_builds_what_it_names(name: str) -> None:
    """On the meta device, as no weight matters; tokenizers that only the Hub has are replaced by a smaller one."""
    recipe = load_recipe(name, WITHOUT_THE_HUB.get(name, []))
    assert recipe.name == name
    check_recipe(recipe)
    parts, inputs = {}, {}
    for m, part in recipe.modalities.items():
        if m == "text" and not name.startswith("pretrain/clip"):
            parts[m], inputs[m] = part, build_input("text", {"tokenizer": "clip-bpe:8192", "context_length": 64}, m)
        else:
            parts[m], inputs[m] = resolve_input(m, part)
    with torch.device("meta"):
        built = assemble(name, parts, inputs, recipe.pairs, recipe.logit_scale, recipe.embed_dim, None, name)
    assert sum(p.numel() for p in built.model.parameters()) == PARAMETERS[name]
    assert (recipe.logit_scale.bias is not None) == (recipe.loss.name == "sigmoid")
    build_loss(recipe.loss)


@pytest.mark.parametrize("name", OPEN_CLIP)
def test_the_numbers_are_those_of_open_clip(name: str) -> None:
    import open_clip

    config = open_clip.get_model_config(OPEN_CLIP[name])
    cls: Any = open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
    with torch.device("meta"):
        assert sum(p.numel() for p in cls(**config).parameters()) == PARAMETERS[name]


def packed(out: Path, samples: list[dict[str, bytes]]) -> None:
    out.mkdir()
    with tarfile.open(out / "train-000000.tar", "w") as tar:
        for i, members in enumerate(samples):
            for ending, raw in members.items():
                info = tarfile.TarInfo(f"{i:04d}.{ending}")
                info.size = len(raw)
                tar.addfile(info, io.BytesIO(raw))


def sounds(rng: np.random.Generator) -> list[dict[str, bytes]]:
    """Tones of half a second to two and a half."""
    import soundfile

    out = []
    for i in range(16):
        time = np.arange(int(16_000 * rng.uniform(0.5, 2.5))) / 16_000
        raw = io.BytesIO()
        soundfile.write(raw, 0.3 * np.sin(2 * np.pi * (200 + 50 * i) * time), 16_000, format="WAV")
        out.append({"wav": raw.getvalue(), "txt": f"a tone of {200 + 50 * i} hertz".encode()})
    return out


def frames(rng: np.random.Generator) -> list[dict[str, bytes]]:
    """Noise as images, and points in front of the car."""
    out = []
    for _ in range(16):
        jpeg, npy = io.BytesIO(), io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(jpeg, "JPEG")
        points = rng.uniform((0, -20, -2, 0), (40, 20, 4, 1), (500, 4)).astype(np.float32)
        np.save(npy, points)
        lidar = {"lidar": {"columns": ["x", "y", "z", "intensity"], "to_ego": np.eye(4).tolist()}}
        out.append({"cam.jpg": jpeg.getvalue(), "lidar.npy": npy.getvalue(), "json": json.dumps(lidar).encode()})
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in TWINS if not n.endswith(("_fsdp2", "_zero2"))])
def test_a_twin_trains(name: str, tmp_path: Path) -> None:
    if name.endswith("clap_htsat_roberta"):
        packed(tmp_path / "data", sounds(np.random.default_rng(0)))
    if name.endswith("lidarclip"):
        packed(tmp_path / "data", frames(np.random.default_rng(0)))
    train(["train", name], tmp_path, name)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp2", "zero2"])
def test_a_sharded_twin_trains_on_two_ranks(engine: str, tmp_path: Path) -> None:
    name = f"pretrain/twin/clip_vit_l14_{engine}"
    train(["launch", "--nproc", "2", "train", name], tmp_path, name)
    said = load_recipe(name).engine
    assert {"fsdp2": said.parallel == "fsdp2", "zero2": (said.kind, said.zero_stage) == ("deepspeed", 2)}[engine]


def train(command: list[str], folder: Path, name: str) -> None:
    full = [sys.executable, "-m", "dualenc", *command]
    done = subprocess.run(full, cwd=folder, env=environment(), capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = losses(folder / "runs" / name)
    assert len(found) == 4
    assert all(np.isfinite(found))
