"""Towers by name: their settings, their errors, cut batches, gradients, weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dualenc.config import Component
from dualenc.data.modalities import modalities
from dualenc.encoders import Tower, activations, build_tower, check_input, input_defaults, list_encoders
from dualenc.errors import CheckpointError, ConfigError

CAPTIONS = ["a dog", "two people ride horses along a beach at sunset while a third one watches", "cake"]


def make_input(kind: str, **settings: Any) -> Any:
    return modalities[kind](modalities[kind].Config(**settings))


def collate(source: Any, items: list[Any]) -> Any:
    return source.collate([source.eval(source.decode(x)) for x in items])


def padded(x: dict[str, Tensor], length: int, pad_id: int) -> dict[str, Tensor]:
    more = length - x["ids"].shape[1]
    pad = nn.functional.pad
    return {"ids": pad(x["ids"], (0, more), value=pad_id), "mask": pad(x["mask"], (0, more), value=False)}


def component(name: str, **settings: Any) -> Component:
    return Component.model_validate({"name": name, **settings})


def small_open_clip(**text: Any) -> dict[str, Any]:
    """An open_clip architecture small enough for a test; the classes are the real ones."""
    return {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2, **text},
    }


# --- names and settings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name", "settings", "words"),
    [
        ("image", "open_clip/ViT-B-33", {}, "There is no open_clip model 'ViT-B-33'. Did you mean 'ViT-B-32'?"),
        ("image", "timm/efficientnet_light0", {}, "Did you mean 'efficientnet_lite0'?"),
        ("image", "timm/resnet18.a1_in1", {}, "Did you mean 'a1_in1k'?"),
        ("image", "own/convnett", {}, "Did you mean 'own/convnet'?"),
        ("text", "own/convnet", {}, "Use own/moe_transformer or own/transformer"),
        ("image", "convnet", {}, "Did you mean 'own/convnet'?"),
        ("image", "tim/resnet18", {}, "Did you mean 'timm'?"),
        ("image", "own/vit", {"widht": 3}, "enc.widht: unknown key (in enc). Did you mean 'width'?"),
        ("audio", "timm/resnet18", {}, "timm has no towers for 'audio'"),
        ("image", "open_clip/ViT-B-32", {"pretrained": "openia"}, "Did you mean 'openai'?"),
        ("image", "open_clip/ViT-B-32", {"pretrained": "openai", "quick_gelu": False}, "quick_gelu: True"),
        ("image", "own/vit", {"patch": 7}, "patch (7) must divide"),
        ("text", "own/transformer", {"width": 130}, "multiple of heads"),
        ("image", "timm/resnet18", {"pretrained": "package:efficientnet_lite0"}, "belongs to timm/efficientnet_lite0"),
        ("text", "hf/package:no_such_package", {}, "not installed"),
        ("text", "hf/nowhere/at-all", {}, "no such repository"),
    ],
)
def test_what_is_wrong_is_named_with_the_remedy(kind: str, name: str, settings: dict[str, Any], words: str) -> None:
    source = make_input("image", size=64) if kind != "text" else make_input("text", context_length=16)
    with pytest.raises(ConfigError) as e:
        build_tower(kind, component(name, **settings), source.describe(), 32, "enc")
    assert words in str(e.value)


def test_every_family_lists_its_towers() -> None:
    listed = list_encoders()
    assert {"convnet", "vit", "scatter", "transformer"} <= set(listed["own"])
    assert "ViT-B-32" in listed["open_clip"]
    assert "efficientnet_lite0" in listed["timm"]


def test_a_tower_s_component_builds_the_same_architecture() -> None:
    text = make_input("text", tokenizer="clip-bpe:1024", context_length=16).describe()
    image = make_input("image", size=32).describe()
    cases = [
        ("image", image, component("own/convnet", widths=[16, 32])),
        ("image", image, component("own/vit", width=32, layers=2, heads=2)),
        ("image", image, component("own/scatter", angles=2, widths=[8, 16])),
        ("text", text, component("own/transformer", width=32, layers=2, heads=2)),
        ("image", image, component("timm/resnet10t", freeze_bn=False)),
        ("image", image, component("open_clip/x", config=small_open_clip())),
    ]
    for kind, describe, part in cases:
        tower = build_tower(kind, part, describe, 24)
        again = build_tower(kind, tower.component, describe, 24)
        assert {k: v.shape for k, v in tower.state_dict().items()} == {
            k: v.shape for k, v in again.state_dict().items()
        }
        assert activations(tower) == activations(again) != []
        assert again.component == tower.component


# --- text is never padded to the full context --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "fixed"),
    [
        ("own/transformer", {"width": 64, "layers": 2, "heads": 2}, False),
        ("open_clip/causal", {"config": small_open_clip()}, False),
        ("open_clip/custom-causal", {"config": {**small_open_clip(), "custom_text": True}}, False),
        ("open_clip/eos", {"config": small_open_clip(pool_type="eos", eos_id=49407)}, False),
        ("open_clip/first", {"config": small_open_clip(pool_type="first", no_causal_mask=True)}, True),
        ("open_clip/siglip", {"config": small_open_clip(pool_type="last", no_causal_mask=True)}, True),
        ("open_clip/mobileclip", {"config": small_open_clip(no_causal_mask=True)}, True),
        ("open_clip/coca", {"config": small_open_clip(embed_cls=True, context_length=76)}, True),
    ],
)
def test_a_cut_batch_gives_the_features_of_full_padding(name: str, settings: dict[str, Any], fixed: bool) -> None:
    torch.manual_seed(0)
    context = 76 if "coca" in name else 77
    source = make_input("text", context_length=context)
    tower = build_tower("text", component(name, **settings), source.describe(), 32).eval()
    cut = collate(source, CAPTIONS)
    assert cut["ids"].shape[1] < context
    with torch.no_grad():
        a, b = tower.encode(cut), tower.encode(padded(cut, context, source.pad_id))
        alone = torch.cat([tower.encode(collate(source, [c])) for c in CAPTIONS])
    assert a.std() > 0.01
    assert (a - b).abs().max() <= 1e-5
    assert (a - alone).abs().max() <= 1e-5
    assert bool(getattr(tower, "fixed", False)) is fixed


def test_open_clip_text_is_upstream_s() -> None:
    """The cut tower against open_clip's own class on its own full padding."""
    import open_clip
    from open_clip.model import CLIP

    torch.manual_seed(0)
    cfg = small_open_clip()
    model = CLIP(**cfg).eval()
    source = make_input("text", tokenizer="clip")
    tower: Any = build_tower("text", component("open_clip/x", config=cfg), source.describe(), 32).eval()
    parts = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")
    tower.net.load_state_dict({k: v for k, v in model.state_dict().items() if k.startswith(parts)})
    with torch.no_grad():
        want = model.encode_text(open_clip.tokenize(CAPTIONS))
        assert (tower.encode(collate(source, CAPTIONS)) - want).abs().max() <= 1e-5


# --- images ------------------------------------------------------------------------------------------------------


def test_pictures_are_normalised_as_the_input_says() -> None:
    source = make_input("image", size=32, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    tower: Any = build_tower("image", component("own/vit", width=32, layers=1, heads=2), source.describe(), 8)
    seen = []
    tower.trunk.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    tower.encode(x)
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1), torch.tensor([0.5, 0.6, 0.7]).view(1, 3, 1, 1)
    torch.testing.assert_close(seen[0], (x.float() / 255 - mean) / std)
    assert not [k for k in tower.state_dict() if k in ("mean", "std")]


@pytest.mark.parametrize("name", ["own/convnet", "own/vit", "own/scatter"])
def test_a_row_s_features_do_not_depend_on_its_batch(name: str) -> None:
    """No layer couples rows, so cutting the batch into ranks and micro-batches leaves every gradient as it is."""
    torch.manual_seed(0)
    tower = build_tower("image", component(name), make_input("image", size=64).describe(), 16).train()
    x = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    whole = tower.encode(x)
    weights = torch.randn_like(whole)
    (whole * weights).sum().backward()
    want = {k: p.grad.clone() for k, p in tower.named_parameters() if p.grad is not None}
    tower.zero_grad()
    for half in (slice(0, 2), slice(2, 4)):
        (tower.encode(x[half]) * weights[half]).sum().backward()
    for k, p in tower.named_parameters():
        assert p.grad is not None, f"{k} got no gradient"
        assert (p.grad - want[k]).abs().max() <= 1e-4 * (1 + want[k].abs().max()), k


def test_patch_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    part = component("own/vit", width=32, layers=1, heads=2, patch_dropout=0.5)
    tower: Any = build_tower("image", part, make_input("image", size=32).describe(), 8)
    lengths = []
    tower.trunk.transformer.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    x = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    tower.train().encode(x)
    tower.eval().encode(x)
    assert lengths == [8, 16]


def test_frozen_batch_norm_stays_frozen() -> None:
    describe = make_input("image", size=32).describe()
    x = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    for freeze in (True, False):
        tower = build_tower("image", component("timm/resnet10t", freeze_bn=freeze), describe, 8).train()
        before = {k: v.clone() for k, v in tower.state_dict().items() if "running" in k}
        tower.encode(x)
        same = all(torch.equal(v, tower.state_dict()[k]) for k, v in before.items())
        assert same is freeze
        assert tower.training


@pytest.mark.parametrize(
    ("kind", "name", "settings"),
    [
        ("image", "own/vit", {"width": 32, "layers": 2, "heads": 2}),
        ("text", "own/transformer", {"width": 32, "layers": 2, "heads": 2}),
        ("image", "open_clip/x", {"config": small_open_clip()}),
        ("text", "open_clip/x", {"config": small_open_clip()}),
    ],
)
def test_gradient_checkpointing_changes_no_gradient(kind: str, name: str, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    source = make_input("text") if kind == "text" else make_input("image", size=32)
    tower = build_tower(kind, component(name, **settings), source.describe(), 16).train()
    x = collate(source, CAPTIONS) if kind == "text" else torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    grads = []
    for on in (False, True):
        tower.set_grad_checkpointing(on)
        tower.zero_grad()
        tower.encode(x).square().sum().backward()
        grads.append({k: p.grad.clone() for k, p in tower.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert len(grads[0]) == len(list(tower.parameters()))
    for k, g in grads[0].items():
        torch.testing.assert_close(g, grads[1][k])


def test_no_tower_has_a_scalar_parameter() -> None:
    """DeepSpeed and FSDP2 cannot hold 0-D parameters."""
    image, text = make_input("image", size=224).describe(), make_input("text").describe()
    towers: list[Tower] = [
        build_tower("image", component("open_clip/RN50"), image, 512),
        build_tower("text", component("open_clip/ViT-B-32"), text, 512),
        build_tower("image", component("timm/convnext_atto"), image, 512),
        build_tower(
            "image", component("open_clip/x", config=small_open_clip()), make_input("image", size=32).describe(), 32
        ),
    ]
    for tower in towers:
        assert not [k for k, p in tower.named_parameters() if p.ndim == 0]


# --- what pretrained weights demand ------------------------------------------------------------------------------


def test_input_defaults_are_the_checkpoint_s() -> None:
    siglip = component("open_clip/ViT-B-16-SigLIP")
    assert input_defaults("image", siglip) == {
        "size": 224,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "interpolation": "bicubic",
        "resize": "squash",
    }
    assert input_defaults("text", siglip) == {"tokenizer": "open_clip:ViT-B-16-SigLIP", "context_length": 64}
    assert input_defaults("image", component("own/convnet")) == {}


def test_another_normalisation_tokenizer_or_context_is_refused() -> None:
    part = component("open_clip/ViT-B-32", pretrained="laion2b_s34b_b79k")
    good = make_input("image", **input_defaults("image", part)).describe()
    check_input("image", part, good)
    bad = make_input("image", **input_defaults("image", part) | {"mean": (0.5, 0.5, 0.5)}).describe()
    with pytest.raises(ConfigError, match=r"input.mean: .*\[0.481455, 0.457827, 0.408211\], got \[0.5, 0.5, 0.5\]"):
        check_input("image", part, bad)
    with pytest.raises(ConfigError, match=r"input.size"):
        check_input("image", part, make_input("image", size=256).describe())
    reference = make_input("text", **input_defaults("text", part)).describe()
    check_input("text", part, make_input("text", tokenizer="clip").describe(), reference)  # another name, same ids
    check_input("text", part, make_input("text", tokenizer="clip", context_length=32).describe(), reference)
    with pytest.raises(ConfigError, match=r"input.tokenizer"):
        check_input("text", part, make_input("text", tokenizer="clip-bpe:8192").describe(), reference)
    with pytest.raises(ConfigError, match=r"input.context_length"):
        check_input("text", part, make_input("text", tokenizer="clip", context_length=99).describe(), reference)
    check_input("image", component("open_clip/ViT-B-32"), bad)  # random weights take any


def test_weights_that_do_not_fit_are_refused(tmp_path: Any) -> None:
    from safetensors.torch import save_file

    describe = make_input("image", size=32).describe()
    part = component("open_clip/x", config=small_open_clip())
    tower: Any = build_tower("image", part, describe, 32)
    file = tmp_path / "w.safetensors"
    state = {f"visual.{k}": v for k, v in tower.trunk.state_dict().items()}
    save_file(state, file)
    again: Any = build_tower(
        "image", component("open_clip/x", config=small_open_clip(), pretrained=str(file)), describe, 32
    )
    assert all(torch.equal(v, again.trunk.state_dict()[k]) for k, v in tower.trunk.state_dict().items())
    first = next(iter(state))
    save_file({k: v for k, v in state.items() if k != first}, file)
    with pytest.raises(CheckpointError, match=first.removeprefix("visual.")):
        build_tower("image", component("open_clip/x", config=small_open_clip(), pretrained=str(file)), describe, 32)


def test_a_file_that_runs_code_is_refused(tmp_path: Any) -> None:
    from dualenc.encoders.released.weights import read_weights

    file = tmp_path / "w.pt"
    torch.save(nn.Linear(2, 2), file)
    with pytest.raises(CheckpointError, match="would run code"):
        read_weights(file)
