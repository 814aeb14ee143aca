"""Parts of a tower that are trained: unlocked groups, learning rates by layer, adapters and their merging."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dualenc.config import Lora, Optim, Recipe
from dualenc.engine.optim import build_optimizers, lr_factors, set_lr_factor
from dualenc.errors import ConfigError
from dualenc.model import Bundle, build_bundle, load_model

torch.set_num_threads(1)

TEXT = {"name": "own/transformer", "width": 16, "layers": 3, "heads": 2}
TOWERS: dict[str, dict[str, Any]] = {
    "own/vit": {"name": "own/vit", "width": 24, "layers": 3, "heads": 2},
    "own/convnet": {"name": "own/convnet", "widths": [8, 16]},
    "timm": {"name": "timm/vit_tiny_patch16_224"},
    "timm convolutional": {"name": "timm/efficientnet_lite0"},
    "open_clip": {
        "name": "open_clip/ViT-B-32",
        "config": {
            "embed_dim": 16,
            "vision_cfg": {"image_size": 32, "layers": 3, "width": 16, "head_width": 8, "patch_size": 16},
            "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
        },
    },
}


def bundle(image: dict[str, Any], text: dict[str, Any] | None = None, **part: Any) -> Bundle:
    raw = {
        "name": "t",
        "modalities": {
            "image": {"input": {"size": 32}, "encoder": image, **part},
            "text": {"input": {"tokenizer": "clip-bpe:1024", "context_length": 12}, "encoder": text or TEXT},
        },
        "embed_dim": 16,
        "data": {"sources": [{"name": "x", "shards": "x.tar"}]},
        "batch": {"size": 8},
        "budget": {"steps": 1},
    }
    return build_bundle(Recipe.model_validate(raw))


def pictures(n: int = 4) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", TOWERS)
def test_unlocked_groups_train_the_end_and_keep_the_rest(name: str) -> None:
    model = bundle(TOWERS[name], lock={"unlocked_groups": 1}).model
    tower = model.towers["image"]
    levels, n = tower.levels(), len(tower.blocks())
    assert n >= 2
    for key, p in tower.named_parameters():
        assert p.requires_grad == (levels[key] >= n), key
    assert {levels["head.weight"]} == {n + 1} if "head.weight" in levels else True
    assert min(levels.values()) == 0
    model.train()
    assert not any(m.training for m in tower.blocks()[0].modules())
    assert tower.blocks()[-1].training
    assert model.towers["text"].training
    frozen = {k: v.clone() for k, v in tower.state_dict().items() if levels.get(k, n) < n}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model({"image": pictures()})["features"]["image"].square().mul(torch.randn(16)).sum().backward()
    optimizer.step()
    assert all(torch.equal(tower.state_dict()[k], v) for k, v in frozen.items())


def test_too_many_groups_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"modalities\.image\.lock\.unlocked_groups: 9 is more than the tower's 3"):
        bundle(TOWERS["own/vit"], lock={"unlocked_groups": 9})


def test_a_bundle_remembers_the_unlocked_groups(tmp_path: Path) -> None:
    bundle(TOWERS["own/vit"], lock={"unlocked_groups": 2}).save(tmp_path)
    assert load_model(str(tmp_path)).model.unlocked == {"image": 2}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_learning_rates_fall_with_depth(name: str) -> None:
    model = bundle(TOWERS["own/vit"]).model
    optim = Optim(name=name, lr=1e-3, muon_lr=0.02, layer_decay=0.5, lr_scale={"image": 0.1})
    factors = lr_factors(model, optim)
    assert factors["towers.image.head.weight"] == pytest.approx(0.1)
    assert factors["towers.image.trunk.norm.weight"] == pytest.approx(0.1)
    assert factors["towers.image.trunk.transformer.blocks.2.mlp.0.weight"] == pytest.approx(0.1 / 2)
    assert factors["towers.image.trunk.positions"] == pytest.approx(0.1 / 16)
    assert factors["towers.text.tokens.weight"] == pytest.approx(1 / 16)
    assert factors["logit_scale.image-text"] == 1
    groups = [g for o in build_optimizers(model, optim) for g in o.param_groups]
    at = {id(p): g for g in groups for p in g["params"]}
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert at.keys() == {id(p) for p in trained.values()}
    set_lr_factor(groups, 0.25)
    for key, p in trained.items():
        peak = 0.02 if name == "muon" and at[id(p)]["role"] == "matrix" else 1e-3
        assert at[id(p)]["lr"] == pytest.approx(0.25 * peak * factors[key]), key


@pytest.mark.parametrize("name", TOWERS)
def test_adapters_change_nothing_at_first_and_merge_exactly(name: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    b = bundle(TOWERS[name])
    b.model.eval()
    before = b.model({"image": pictures()})["features"]["image"]
    names = set(b.model.state_dict())
    b.model.add_adapters("image", Lora(rank=3, alpha=5))
    # Not bit for bit: another kernel may do the same sum where a layer is wrapped.
    assert (b.model({"image": pictures()})["features"]["image"] - before).abs().max() <= 1e-6
    trained = {n for n, p in b.model.towers["image"].named_parameters() if p.requires_grad}
    assert trained
    assert all(".lora_" in n for n in trained)
    with torch.no_grad():
        for n, p in b.model.named_parameters():
            if ".lora_B" in n:
                p.normal_(std=0.05)
    adapted = b.model({"image": pictures()})["features"]["image"]
    assert (adapted - before).abs().max() > 1e-3
    b.save(tmp_path)
    again = load_model(str(tmp_path))
    assert set(again.model.state_dict()) == names
    assert (again.model({"image": pictures()})["features"]["image"] - adapted).abs().max() <= 1e-6


def test_a_layer_that_is_not_there_is_refused() -> None:
    pytest.importorskip("peft")
    model = bundle(TOWERS["own/vit"]).model
    with pytest.raises(ConfigError, match=r"modalities\.image\.lora\.targets: no layer .* is called 'qvk'.*'qkv'"):
        model.add_adapters("image", Lora(targets=["qvk"]))
    model.add_adapters("image", Lora(targets=["qkv"], head=True))
    trained = [n for n, p in model.towers["image"].named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 3 + 1
