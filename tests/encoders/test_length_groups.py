"""Captions of like length are encoded together: the same features and gradients from fewer token positions."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dualenc.config import Component, load_recipe
from dualenc.data.modalities import modalities
from dualenc.encoders import build_tower
from dualenc.encoders.length_groups import cuts, in_length_groups
from dualenc.encoders.tower import Tower
from dualenc.errors import ConfigError
from dualenc.model import build_bundle
from dualenc.shipped import find_recipe

HF = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 600}
CLIP = {"max_position_embeddings": 77, "eos_token_id": 599, "bos_token_id": 598, "pad_token_id": 0}
OPEN_CLIP = {"embed_dim": 16, "vision_cfg": {"image_size": 32, "patch_size": 16, "layers": 1, "width": 16},
             "text_cfg": {"context_length": 77, "vocab_size": 600, "width": 16, "heads": 2, "layers": 2}}  # fmt: skip
TOWERS: dict[str, dict[str, Any]] = {
    "own/transformer": {"width": 16, "layers": 2, "heads": 2},
    "open_clip/ViT": {"config": OPEN_CLIP},
    "hf/clip": {"config": {**HF, **CLIP, "model_type": "clip_text_model"}},
    "hf/bert": {"config": {**HF, "model_type": "bert", "max_position_embeddings": 77}, "pooling": "mean"},
}


def tower(name: str) -> Tower:
    source = modalities["text"](modalities["text"].Config(tokenizer="clip-bpe:600", context_length=77))
    torch.manual_seed(0)
    return build_tower("text", Component.model_validate({"name": name, **TOWERS[name]}), source.describe(), 16)


def batch() -> dict[str, Tensor]:
    source = modalities["text"](modalities["text"].Config(tokenizer="clip-bpe:600", context_length=77))
    rng = np.random.default_rng(0)
    texts = [" ".join(["dog"] * int(n)) for n in [60, *rng.integers(1, 9, 63)]]
    out: dict[str, Tensor] = source.collate([source.eval(source.decode(t)) for t in texts])
    return out


@pytest.mark.parametrize("name", sorted(TOWERS))
def test_grouped_rows_have_the_same_features_and_gradients(name: str) -> None:
    x, net = batch(), tower(name).double().eval()  # in float64 rounding does not hide a mistake
    found = {}
    for grouped in (False, True):
        net.length_groups = grouped
        net.zero_grad()
        y = net.encode(x)
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        grads = {k: p.grad.clone() for k, p in net.named_parameters() if p.grad is not None}
        found[grouped] = (y.detach(), grads)
    (plain, grads), (y, got) = found[False], found[True]
    assert (y - plain).abs().max() <= 1e-12 * plain.abs().max()
    assert got.keys() == grads.keys()
    for k, g in grads.items():
        assert (got[k] - g).abs().max() <= 1e-10 * g.abs().max().clamp(min=1e-3), k


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (["modalities.image.length_groups=true"], "modalities.image.length_groups: only captions"),
        (["modalities.text.length_groups=true", "engine.parallel=fsdp2"], "engine.parallel=fsdp2 gathers weights"),
        (["modalities.text.length_groups=true", "engine.kind=deepspeed"], "engine.kind=deepspeed gathers weights"),
    ],
)
def test_groups_in_training_are_refused_where_they_cannot_be(said: list[str], message: str) -> None:
    recipe = load_recipe(find_recipe("quickstart"), said)
    with pytest.raises(ConfigError, match=message):
        build_bundle(recipe)
    plain = build_bundle(load_recipe(find_recipe("quickstart"), []))
    grouped = build_bundle(load_recipe(find_recipe("quickstart"), ["modalities.text.length_groups=true"]))
    assert [m.model.tower("text").length_groups for m in (plain, grouped)] == [False, True]


def test_one_long_caption_costs_one_row() -> None:
    x, seen = batch(), []

    def encode(part: Mapping[str, Tensor]) -> Tensor:
        seen.append(tuple(part["ids"].shape))
        return part["ids"][:, 1:2].float() + torch.arange(1)

    y = in_length_groups(encode, x)
    assert torch.equal(y, x["ids"][:, 1:2].float())
    assert sum(n for n, _ in seen) == 64
    assert (1, x["ids"].shape[1]) in seen
    assert sum(n * length for n, length in seen) < 0.4 * x["ids"].numel()


def test_cuts_are_the_cheapest() -> None:
    rng = np.random.default_rng(1)

    def price(runs: list[tuple[int, int]], lengths: np.ndarray) -> int:
        return sum((end - start) * int(lengths[end - 1]) + 20 for start, end in runs)

    for n in range(1, 9):
        lengths = np.sort(rng.integers(1, 40, n))
        every = [
            list(itertools.pairwise((0, *inner, n)))
            for k in range(n)
            for inner in itertools.combinations(range(1, n), k)
        ]
        assert price(cuts(lengths, 20), lengths) == min(price(runs, lengths) for runs in every)
