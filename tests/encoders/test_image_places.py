"""Features of places: by the libraries' own layers, what must be the feature of the image, beside prompts, refusals."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from test_prompts import IMAGES, bundle, shaken

from dualenc.config import Component
from dualenc.encoders import build_tower
from dualenc.encoders.places import at_centres, features_of_places, heard
from dualenc.errors import ConfigError

torch.set_num_threads(1)


def tower(name: str, **part: Any) -> Any:
    return shaken(bundle((name, "own/transformer"), image={"prompts": None, **part})).model.tower("image")


def places_of(net: Any, x: torch.Tensor) -> torch.Tensor:
    with heard(net, "e") as said:
        net.encode(x)
    return features_of_places(net, x, said).flatten(1, 2)


def images(size: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_clip_scores_tokens_through_its_last_norm_and_projection() -> None:
    for name in ("hf clip", "open_clip"):
        net, x = tower(name), images()
        places = places_of(net, x)
        pixels = net.pixels(x)
        if name == "hf clip":
            vision = net.trunk.net
            inner = vision.vision_model if hasattr(vision, "vision_model") else vision
            states = inner.post_layernorm(inner.encoder(inner.pre_layrnorm(inner.embeddings(pixels)))[0])
        else:
            v = net.trunk
            y = v.conv1(pixels).flatten(2).transpose(1, 2)
            y = torch.cat([v.class_embedding.expand(2, 1, -1), y], 1) + v.positional_embedding
            states = v.ln_post(v.transformer(v.ln_pre(y))) @ v.proj
        torch.testing.assert_close(places, net.head(states[:, 1:]), rtol=1e-4, atol=1e-5)
        assert places.shape == (2, 4, 16)


@torch.no_grad()
def test_the_mean_over_places_is_the_feature_of_a_tower_that_averages_and_maps_linearly() -> None:
    described = {"config": {"size": 64, "mean": [0.5] * 3, "std": [0.5] * 3}}
    conv = build_tower("image", Component.model_validate({"name": "timm/efficientnet_lite0"}), described, 16).eval()
    places = places_of(conv, images(64))
    torch.testing.assert_close(places.mean(1), conv.encode(images(64)), rtol=1e-4, atol=1e-5)
    own = build_tower(
        "image", Component.model_validate({"name": "own/convnet", "widths": [8, 16]}), described, 16
    ).eval()
    assert places_of(own, images(64)).shape[2] == 16


@torch.no_grad()
def test_an_image_of_one_place_is_its_own() -> None:
    for name in ("own/vit", "hf siglip"):
        patch = {"own/vit": {"patch": 32}, "hf siglip": {}}[name]
        encoder = {**IMAGES[name], **patch}
        if name == "hf siglip":
            encoder["config"] = {**encoder["config"], "patch_size": 32}
        net, x = tower(name, encoder=encoder), images()
        places = places_of(net, x)
        assert places.shape == (2, 1, 16)
        torch.testing.assert_close(places[:, 0], net.encode(x), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_learned_prompts_count_once_and_the_tower_is_left_as_it_was() -> None:
    net, x = tower("hf clip", prompts={"tokens": 3}), images()
    before = net.encode(x)
    places = places_of(net, x)
    assert torch.equal(net.encode(x), before)
    without = tower("hf clip")
    without.load_state_dict({k: v for k, v in net.state_dict().items() if "prompt" not in k})
    assert places.shape == (2, 4, 16)
    assert not torch.allclose(places, places_of(without, x), atol=1e-3)
    net.get_submodule("prompts").prompt_tokens.zero_()
    moved = places_of(net, x)
    assert not torch.allclose(moved, places, atol=1e-3)


def test_cells_are_scored_by_the_place_under_their_centre() -> None:
    assert at_centres(4, 4).tolist() == [0, 1, 2, 3]
    assert at_centres(1, 9).tolist() == [0] * 9
    assert at_centres(4, 16).tolist() == [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]
    assert at_centres(9, 4).tolist() == [0, 2, 6, 8]
    with pytest.raises(ConfigError, match="5 and 4 must both be the cells of a square"):
        at_centres(5, 4)


def test_towers_without_places_are_refused() -> None:
    with pytest.raises(ConfigError, match="takes an image tower"):
        places_of(bundle().model.tower("text"), images())
