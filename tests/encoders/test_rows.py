"""Rows of a batch stay apart: batch norms are frozen in every family, what else mixes rows is found and named."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dualenc.config import Component, Recipe
from dualenc.data.modalities import modalities
from dualenc.encoders import batch_norm_notes, build_tower
from dualenc.encoders.families import own_towers
from dualenc.encoders.tower import ImageTower, Tower, batch_norms, build_head
from dualenc.errors import ConfigError
from dualenc.model import build_bundle

RESNET = {"embed_dim": 16, "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}, "text_cfg": {}}
TEXT = {"encoder": {"name": "own/transformer", "width": 16, "layers": 1, "heads": 2},
        "input": {"tokenizer": "clip-bpe:600", "context_length": 8}}  # fmt: skip


def recipe(image: dict[str, Any], size: int = 32, **more: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "t",
            "embed_dim": 16,
            "modalities": {"image": {"encoder": image, "input": {"size": size}, **more}, "text": TEXT},
            "data": {"sources": [{"name": "s", "shards": "x.tar"}]},
            "batch": {"size": 4},
            "budget": {"steps": 1},
        }
    )


def image_tower(name: str, **settings: Any) -> Tower:
    source = modalities["image"](modalities["image"].Config(size=32))
    torch.manual_seed(0)
    return build_tower("image", Component.model_validate({"name": name, **settings}), source.describe(), 16)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("open_clip/rn", {"config": RESNET}),
        ("open_clip/timm", {"config": {**RESNET, "vision_cfg": {"timm_model_name": "test_resnet", "image_size": 32}}}),
        ("timm/test_resnet", {}),
    ],
)
def test_batch_norms_are_frozen_in_every_family(name: str, settings: dict[str, Any]) -> None:
    x = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    tower = image_tower(name, **settings).train()
    assert batch_norms(tower)
    assert not any(m.training for m in batch_norms(tower))
    before = {k: v.clone() for k, v in tower.named_buffers()}
    with torch.no_grad():
        assert (tower.encode(x)[:1] - tower.encode(x[:1])).abs().max() <= 1e-5
        assert all(torch.equal(v, before[k]) for k, v in tower.named_buffers())
        free = image_tower(name, **settings, freeze_bn=False).train()
        assert (free.encode(x)[:2] - free.encode(x[:2])).abs().max() > 1e-2
    assert not any(m.training for m in batch_norms(free.eval()))
    again = image_tower(free.component.name, **free.component.settings)
    assert again.freeze_bn is False
    assert image_tower(tower.component.name, **tower.component.settings).freeze_bn is True
    assert "keep their running statistics" in batch_norm_notes({"image": tower})[0]
    assert "freeze_bn: false" in batch_norm_notes({"image": free})[0]


def test_a_module_that_mixes_rows_is_refused_by_name(caplog: pytest.LogCaptureFixture) -> None:
    """timm's EvoNorm-S0a is fine; its B0 takes the variance of the batch and is no subclass of torch's batch norm."""
    evo = {"name": "timm/test_efficientnet", "args": {"norm_layer": "evonormb0", "act_layer": None}}
    with pytest.raises(ConfigError, match=r"modalities.image.encoder: in timm/test_efficientnet .*EvoNorm2dB0.*lock"):
        build_bundle(recipe(evo))
    build_bundle(recipe(evo, lock=True))
    build_bundle(recipe({**evo, "freeze_bn": False}))
    build_bundle(recipe({"name": "timm/test_efficientnet_evos"}))
    assert not [r for r in caplog.records if "random weights" in r.message]
    with caplog.at_level(logging.WARNING):
        build_bundle(recipe({"name": "timm/test_resnet"}))
    assert any("starts from random weights with frozen batch norms" in r.message for r in caplog.records)


class Centred(ImageTower):
    """What a stranger may write: it subtracts the mean of the batch, also in eval mode."""

    kinds = ("image",)
    Config = modalities["image"].Config

    def __init__(self, config: Any, describe: Any, embed_dim: int) -> None:
        trunk = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
        super().__init__(trunk, build_head("linear", 12, embed_dim), describe, False)
        self.component, self.embed_dim = Component(name="own/centred"), embed_dim

    def pooled(self, x: Tensor) -> Tensor:
        y = super().pooled(x)
        return y - y.mean(0)


def test_a_forward_that_mixes_rows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(own_towers._entries, "centred", Centred)
    with pytest.raises(ConfigError, match=r"own/centred .*through its forward\)"):
        build_bundle(recipe({"name": "own/centred"}))


def test_the_trial_changes_nothing() -> None:
    torch.manual_seed(3)
    build_bundle(recipe({"name": "timm/test_resnet", "args": {"drop_rate": 0.5}}))
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), drawn)
