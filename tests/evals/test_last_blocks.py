"""The rest of a tower after its last block: what must equal the image's own features, on towers of every family."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from dualenc.config import Recipe
from dualenc.encoders.own.convnet import ConvNet
from dualenc.encoders.own.vit import ViT
from dualenc.errors import ConfigError
from dualenc.model import Embedder, build_bundle
from dualenc_evals.catalog import load_task, parse_task
from dualenc_evals.harness import definition, evaluate
from dualenc_evals.last_blocks import Fused, features_of_places

sys.path.insert(0, str(Path(__file__).parent))
from _pixels import Pixels
from _shared import DATA as SHARED_DATA
from test_eval_tasks import picture

needs_shared = pytest.mark.skipif(not SHARED_DATA.exists(), reason=f"the real data are not below {SHARED_DATA}")
VIT = {"name": "own/vit", "width": 24, "layers": 3, "heads": 2}
HF = {
    "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "image_size": 32, "patch_size": 16, "projection_dim": 16,
}  # fmt: skip
FAMILIES: list[tuple[dict[str, Any], int, int]] = [
    ({"name": "own/convnet", "widths": [8, 16]}, 32, 4),
    ({**VIT}, 32, 4),
    ({"name": "timm/resnet18"}, 64, 2),
    ({"name": "timm/test_vit"}, 160, 10),
    ({"name": "timm/test_convnext"}, 160, 5),
    ({"name": "timm/vit_tiny_patch16_224"}, 32, 2),
    ({"name": "open_clip/ViT-S-16"}, 48, 3),
    ({"name": "timm/test_vit2"}, 160, 10),
    ({"name": "timm/test_vit3"}, 160, 10),
    ({"name": "hf/clip", "pretrained": False, "config": HF}, 32, 2),
]
"""Encoder, size of the image in px, places on a side."""


def model(encoder: dict[str, Any], size: int) -> Embedder:
    torch.manual_seed(0)
    text = {"name": "own/transformer", "width": 32, "layers": 1, "heads": 2}
    recipe = {
        "name": "random",
        "modalities": {
            "image": {"input": {"size": size}, "encoder": encoder},
            "text": {"input": {"tokenizer": "clip-bpe:1024", "context_length": 16}, "encoder": text},
        },
        "embed_dim": 16,
        "data": {"sources": [{"name": "x", "shards": "x.tar"}]},
        "batch": {"size": 8},
        "budget": {"steps": 1},
    }
    return build_bundle(Recipe.model_validate(recipe)).embedder()


def images(n: int, size: int) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, size, size), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("encoder", "size", "side"),
    [*FAMILIES, pytest.param({"name": "open_clip/RN50-quickgelu"}, 64, 2, marks=pytest.mark.slow)],
    ids=lambda v: v["name"] if isinstance(v, dict) else str(v),
)
def test_every_family_says_what_is_at_its_places(encoder: dict[str, Any], size: int, side: int) -> None:
    tower = model(encoder, size).bundle.model.tower("image")
    x = images(2, size)
    with torch.no_grad():
        at, whole = features_of_places(tower, x)
        assert torch.equal(whole, normalize(tower.encode(x), dim=1))
    assert at.shape == (2, side, side, 16)
    assert at.norm(dim=-1) == pytest.approx(np.ones((2, side, side)), abs=1e-5)
    assert at.flatten(0, 2).unique(dim=0).shape[0] > 1  # places differ


def test_places_of_own_towers_by_hand() -> None:
    tower = model({"name": "own/convnet", "widths": [8, 16]}, 32).bundle.model.tower("image")
    assert isinstance(tower, ConvNet)
    x = images(3, 32)
    with torch.no_grad():
        cells = tower.trunk.layers((x / 255 - tower.mean) / tower.std).permute(0, 2, 3, 1)  # type: ignore[operator]
        want = normalize(tower.head(tower.trunk.norm(cells)), dim=-1)  # type: ignore[operator]
        assert torch.allclose(features_of_places(tower, x)[0], want, atol=1e-5)
    vit = model(VIT, 32).bundle.model.tower("image")
    assert isinstance(vit, ViT)
    trunk: Any = vit.trunk
    with torch.no_grad():
        y = trunk.patches((x / 255 - vit.mean) / vit.std).flatten(2).transpose(1, 2) + trunk.positions
        want = normalize(vit.head(trunk.norm(trunk.transformer(y, causal=False))), dim=-1)
        assert torch.allclose(features_of_places(vit, x)[0].flatten(1, 2), want, atol=1e-5)


def test_places_of_released_families_by_hand() -> None:
    """What is known of their code: the class token's norm and projection, applied to the patches."""

    def patches(tower: Any, x: torch.Tensor) -> torch.Tensor:
        said: list[torch.Tensor] = []
        handle = tower.blocks()[-1].register_forward_hook(lambda _m, _given, out: said.append(out))
        tower.encode(x)
        handle.remove()
        return said[0][:, 1:]

    clip: Any = model({"name": "open_clip/ViT-S-16"}, 48).bundle.model.tower("image")
    vit: Any = model({"name": "timm/test_vit"}, 160).bundle.model.tower("image")
    hf: Any = model({"name": "hf/clip", "pretrained": False, "config": HF}, 32).bundle.model.tower("image")
    vision = hf.trunk.net.vision_model if "vision_model" in dict(hf.trunk.net.named_children()) else hf.trunk.net
    project = dict(hf.trunk.net.named_children()).get("visual_projection", torch.nn.Identity())
    for tower, size, rest in (
        (clip, 48, lambda y: clip.trunk.ln_post(y) @ clip.trunk.proj),
        (vit, 160, lambda y: vit.trunk.fc_norm(vit.trunk.norm(y))),
        (hf, 32, lambda y: project(vision.post_layernorm(y))),
    ):
        x = images(2, size)
        with torch.no_grad():
            want = normalize(tower.head(rest(patches(tower, x))), dim=-1)
            assert torch.allclose(features_of_places(tower, x)[0].flatten(1, 2), want, atol=1e-5)


@pytest.mark.parametrize(
    ("encoder", "size"),
    [({"name": "own/convnet", "widths": [8, 16], "stem": 16}, 32), (VIT, 8), ({"name": "timm/resnet18"}, 32)],
)
def test_the_only_place_of_an_image_has_its_features(encoder: dict[str, Any], size: int) -> None:
    tower = model(encoder, size).bundle.model.tower("image")
    with torch.no_grad():
        at, whole = features_of_places(tower, images(4, size))
    assert at.shape[1:3] == (1, 1)
    assert torch.allclose(at[:, 0, 0], whole, atol=1e-5)


# --- depths -------------------------------------------------------------------------------------------------------


def test_the_last_depth_alone_is_the_model_bit_for_bit() -> None:
    embedder = model(VIT, 32)
    items = [picture((10 * i, 200 - 9 * i, i)) for i in range(9)]
    plain = embedder.embed("image", items, 4)
    assert torch.equal(Fused(embedder, [1.0], "image").embed("image", items, 4), plain)
    words = ["a", "two words", "c"]
    assert torch.equal(Fused(embedder, [0.5, 1.0], "image").embed("text", words), embedder.embed("text", words))
    # By hand: the states after each block through the tower's own norm and head.
    tower = embedder.bundle.model.tower("image")
    trunk: Any = tower.trunk
    (x,) = list(embedder.batches("image", items, 9))
    with torch.no_grad():
        y = trunk.patches((x / 255 - tower.mean) / tower.std).flatten(2).transpose(1, 2) + trunk.positions
        want, blocks = [], tower.blocks()
        for block in blocks:
            y = block(y, False)
            want.append(normalize(tower.head(trunk.norm(y.mean(1))), dim=1))
    weights = normalize(torch.randn(5, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    got = Fused(embedder, [2 / 3, 1.0], "image").embed("image", items, 9)
    mean = (want[1] + want[2]) / 2 @ weights.T
    factor = (got @ weights.T) / mean
    assert torch.allclose(factor, factor[:, :1].expand_as(factor), rtol=1e-3)
    assert (factor > 0).all()
    assert Fused(embedder, [1.0, 0.5], "image").describe()["depths"] == {"image": [0.5, 1.0]}


def test_what_cannot_be_fused_is_a_sentence() -> None:
    with pytest.raises(
        ConfigError, match=r"depths: block 1 of 4 gives \[8, 8, 8\] for each item, the last one \[16, 4"
    ):
        Fused(model({"name": "own/convnet", "widths": [8, 16]}, 32), [0.25, 1.0], "image").embed(
            "image", [picture((1, 2, 3))]
        )
    with pytest.raises(ConfigError, match="depths: only a saved model of ours"):
        Fused(Pixels(), [1.0], "image")


@needs_shared
def test_a_task_names_depths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUALENC_DATA", str(SHARED_DATA))
    said = load_task("cifar10").model_dump(exclude_unset=True)
    said["source"] = {**said["source"], "limit": 100}

    def run(**more: Any) -> dict[str, Any]:
        results: dict[str, Any] = evaluate(embedder, [parse_task({**said, **more})], progress=False)["tasks"]["cifar10"]
        return results

    embedder = model(VIT, 32)
    plain, last, both = run(), run(depths=[1.0]), run(depths=[0.3, 1.0])
    assert last["metrics"] == plain["metrics"]
    assert last["details"]["confusion"] == plain["details"]["confusion"]
    assert both["details"]["confusion"] != plain["details"]["confusion"]
    assert both["settings"]["depths"] == [0.3, 1.0]
    assert definition(parse_task(said)) != definition(parse_task({**said, "depths": [1.0]}))
    with pytest.raises(ConfigError, match=r"depths"):
        parse_task({**said, "depths": [0.0]})
