"""The DualEncoder's contract: features, bounded temperature, locked towers, weight-decay groups."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from dualenc.config import Component, LogitScale
from dualenc.data.modalities import modalities
from dualenc.encoders import DualEncoder, build_tower, decay_groups


def build(scale: LogitScale | None = None, **more: Any) -> DualEncoder:
    torch.manual_seed(0)
    image = modalities["image"](modalities["image"].Config(size=32)).describe()
    text = modalities["text"](modalities["text"].Config(tokenizer="clip-bpe:600", context_length=8)).describe()
    towers = {
        "image": build_tower("image", Component.model_validate({"name": "own/convnet", "widths": [8, 16]}), image, 16),
        "text": build_tower(
            "text",
            Component.model_validate({"name": "own/transformer", "width": 16, "layers": 1, "heads": 2}),
            text,
            16,
        ),
    }
    return DualEncoder(towers, [("image", "text")], scale or LogitScale(), **more)


def inputs(n: int = 4) -> dict[str, Any]:
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 500, (n, 6), generator=g)
    ids[:, -1] = 599
    return {
        "image": torch.randint(0, 256, (n, 3, 32, 32), generator=g, dtype=torch.uint8),
        "text": {"ids": ids, "mask": torch.ones_like(ids, dtype=torch.bool)},
    }


def test_features_are_normalised_fp32_also_under_autocast() -> None:
    model = build()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(inputs())
    for x in out["features"].values():
        assert x.dtype == torch.float32
        assert x.shape == (4, 16)
        torch.testing.assert_close(x.norm(dim=1), torch.ones(4))
    assert out["logit_scale"]["image-text"].shape == (1,)
    assert out["logit_scale"]["image-text"].dtype == torch.float32
    assert out["logit_bias"] == {}
    assert set(model({"text": inputs()["text"]})["features"]) == {"text"}


def test_the_scale_is_bounded_in_the_forward_and_can_come_back() -> None:
    model = build(LogitScale(init=10.0, max=100.0, bias=-10.0))
    log = model.logit_scale["image-text"]
    for raw, scale in ((math.log(10), 10.0), (7.0, 100.0), (-3.0, 1.0)):
        log.data.fill_(raw)
        log.grad = None
        got = model({})["logit_scale"]["image-text"]
        assert got.item() == pytest.approx(scale, rel=1e-6)
        got.sum().backward()
        assert log.grad is not None
        assert log.grad.item() == pytest.approx(scale, rel=1e-6)  # d exp(x)/dx, also beyond the bound
        assert log.data.item() == pytest.approx(raw)  # the parameter itself is left alone
    assert model({})["logit_bias"]["image-text"].item() == -10.0


def test_a_start_beyond_the_bound_is_taken_at_its_word() -> None:
    assert build(LogitScale(init=117.0))({})["logit_scale"]["image-text"].item() == pytest.approx(117.0, rel=1e-5)
    assert build(LogitScale(init=0.5))({})["logit_scale"]["image-text"].item() == pytest.approx(0.5, rel=1e-5)


def test_a_locked_trunk_with_a_trained_head_gives_its_own_embedding() -> None:
    model = build(lock=["text"], heads=["text"]).train()
    out = model(inputs())
    assert set(out["frozen"]) == {"text"}
    assert not out["frozen"]["text"].requires_grad
    torch.testing.assert_close(out["frozen"]["text"].norm(dim=1), torch.ones(4))
    head = model.towers["text"].head.weight
    projected = torch.nn.functional.normalize(out["features"]["text"], dim=1)
    text = model.towers["text"]
    torch.testing.assert_close(torch.nn.functional.normalize(text.pooled(inputs()["text"]) @ head.T, dim=1), projected)
    out["features"]["text"].square().sum().backward()
    assert [k for k, p in text.named_parameters() if p.grad is not None] == ["head.weight"]
    assert "frozen" in build()(inputs())
    assert build()(inputs())["frozen"] == {}


def test_locked_towers_keep_still() -> None:
    model = build(lock=["image"]).train()
    assert not model.towers["image"].training
    assert model.towers["text"].training
    out = model(inputs())["features"]
    (out["image"] @ out["text"].T).sum().backward()
    assert all(p.grad is None for p in model.towers["image"].parameters())
    assert all(p.grad is not None for p in model.towers["text"].parameters())
    model.eval().train()
    assert not any(m.training for m in model.towers["image"].modules())


def test_every_parameter_gets_a_gradient_and_none_is_a_scalar() -> None:
    model = build(LogitScale(bias=-10.0))
    out = model(inputs())
    s, b = out["logit_scale"]["image-text"], out["logit_bias"]["image-text"]
    logits = s * (out["features"]["image"] @ out["features"]["text"].T) + b
    logits.logsumexp(1).sum().backward()
    assert [k for k, p in model.named_parameters() if p.grad is None] == []
    assert [k for k, p in model.named_parameters() if p.ndim == 0] == []


def test_weight_decay_is_for_matrices_only() -> None:
    model = build(LogitScale(bias=0.0))
    decay, no_decay, scale = decay_groups(model)
    assert scale == ["logit_scale.image-text", "logit_bias.image-text"]
    everything = [k for k, _ in model.named_parameters()]
    assert sorted(decay + no_decay + scale) == sorted(everything)
    shapes = dict(model.named_parameters())
    assert all(shapes[k].ndim >= 2 for k in decay)
    assert "towers.text.positions" in no_decay
    assert "towers.text.tokens.weight" in decay
    assert "towers.image.head.weight" in decay
    assert not [k for k in decay if "norm" in k or k.endswith("bias")]
    assert decay_groups(build(lock=["image", "text"]))[:2] == ([], [])


def test_weight_decay_of_other_people_s_towers() -> None:
    image = modalities["image"](modalities["image"].Config(size=224)).describe()
    cfg = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 224, "layers": 1, "width": 64, "patch_size": 112},
        "text_cfg": {},
    }
    oc = build_tower("image", Component.model_validate({"name": "open_clip/x", "config": cfg}), image, 16)
    decay, no_decay, _ = decay_groups(oc)
    assert {"trunk.class_embedding", "trunk.positional_embedding"} <= set(no_decay)
    assert {"trunk.proj", "trunk.conv1.weight"} <= set(decay)
    timm = build_tower("image", Component(name="timm/vit_tiny_patch16_224"), image, 16)
    decay, no_decay, _ = decay_groups(timm)
    assert {"trunk.cls_token", "trunk.pos_embed"} <= set(no_decay)
    assert "trunk.patch_embed.proj.weight" in decay


def test_only_the_model_s_own_temperature_is_in_its_group() -> None:
    """Swin v2's attention has a parameter called logit_scale in every block; it is a gain like others."""
    image = modalities["image"](modalities["image"].Config(size=32)).describe()
    small = {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4, "img_size": 32}
    swin = build_tower(
        "image", Component.model_validate({"name": "timm/swinv2_tiny_window8_256", "args": small}), image, 16
    )
    model = DualEncoder({"image": swin, "text": build().tower("text")}, [("image", "text")], LogitScale(bias=0.0))
    _, no_decay, scale = decay_groups(model)
    assert scale == ["logit_scale.image-text", "logit_bias.image-text"]
    assert len([k for k in no_decay if k.endswith("attn.logit_scale")]) == 2


def test_compiled_towers_give_the_same_names_and_numbers() -> None:
    model = build().eval()
    names, before = list(model.state_dict()), model(inputs())["features"]["text"]
    model.towers["text"].compile(backend="eager")
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model(inputs())["features"]["text"], before)


def test_compile_towers_compiles_each(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, *a, **k: compiled.append(self))
    model.compile_towers()
    assert compiled == list(model.towers.values())
    compiled.clear()
    model.compile_towers(blocks=True)
    assert compiled == [part for t in model.towers.values() for part in t.blocks() or [t]]
    assert len(compiled) > len(model.towers)
