"""Hidden states of a tower's blocks: which they are, pooled without padding, with recomputation, and shared towers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
import _real_towers

from dualenc.config import Component, LogitScale
from dualenc.encoders import DualEncoder, build_tower
from dualenc.encoders.dual_encoder import hidden_group
from dualenc.encoders.hidden import Hidden, pooled
from dualenc.errors import ConfigError

torch.set_num_threads(1)


def rows(name: str) -> dict[str, Any]:
    return _real_towers.batch_of(name, 0).inputs


@pytest.mark.parametrize("name", ["own vit", "own convnet", "open_clip ViT", "timm ViT", "HF CLIP", "HF SigLIP"])
def test_towers_give_the_states_of_their_blocks(name: str) -> None:
    model, inputs = _real_towers.build(name, "info_nce").eval(), rows(name)
    before = model(inputs)
    model.keep_hidden([0.5, 1.0], 4, inputs)
    with torch.no_grad():
        out = model(inputs)
    for m, x in before["features"].items():
        torch.testing.assert_close(out["features"][m], x.detach())
        assert out[hidden_group(0.5)][m].shape == (len(x), 4)
        assert not torch.equal(out[hidden_group(0.5)][m], out[hidden_group(1.0)][m])
    # Row by row: a state depends on its own row only, whatever padding its batch has.
    for m, x in inputs.items():
        one = {k: v[:1] for k, v in x.items()} if isinstance(x, dict) else x[:1]
        if isinstance(x, dict):
            length = max(int(one["mask"].sum()), 1)
            one = {k: v[:, :length] if "SigLIP" not in name else v for k, v in one.items()}
        with torch.no_grad():
            alone = model({m: one})[hidden_group(1.0)][m]
        torch.testing.assert_close(alone, out[hidden_group(1.0)][m][:1], rtol=1e-4, atol=1e-5)


def test_recomputed_blocks_give_the_same_states_and_gradients() -> None:
    found = []
    for again in (False, True):
        model, inputs = _real_towers.build("own vit", "info_nce").train(), rows("own vit")
        torch.manual_seed(1)
        model.keep_hidden([0.5], 4, inputs)
        model.set_grad_checkpointing(again)
        for _ in range(2):  # what the backward ran again is not taken for the next forward's
            model.zero_grad()
            out = model(inputs)[hidden_group(0.5)]
            sum(x.square().sum() for x in out.values()).backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) > 4
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y)


def test_two_views_of_one_tower_have_states_and_one_map() -> None:
    made = _real_towers.build("own vit", "info_nce")
    towers = {"image": made.tower("image"), "view": made.tower("image")}
    model = DualEncoder(towers, [("image", "view")], LogitScale(), shared={"view": "image"})
    x = rows("own vit")["image"]
    model.keep_hidden([1.0], 4, {"image": x, "view": x})
    assert [k for k in model.state_dict() if k.startswith("heads.")] == [
        "heads.hidden1000.image.weight",
        "heads.hidden1000.image.bias",
    ]
    out = model({"image": x, "view": x.flip(0)})[hidden_group(1.0)]
    torch.testing.assert_close(out["image"], out["view"].flip(0))


def test_padding_is_no_part_of_a_mean() -> None:
    y = torch.tensor([[[1.0], [3.0], [float("nan")]], [[2.0], [4.0], [6.0]]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    assert pooled(y, mask).tolist() == [[2.0], [4.0]]
    assert pooled(torch.ones(2, 5, 3, 3), None).shape == (2, 5)


def test_a_tower_without_blocks_is_named() -> None:
    tower = _real_towers.build("own vit", "info_nce").tower("image")
    tower.trunk = torch.nn.Linear(2, 2)  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"modalities\.image\.encoder has no repeated blocks"):
        Hidden(tower, [0.5], "image")


@torch.no_grad()
def test_maps_with_channels_last_are_pooled_over_their_places() -> None:
    """timm's Swin says [n, h, w, C]."""
    args = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
    component = Component(name="timm/swin_tiny_patch4_window7_224", args=args)
    described = {"config": {"size": 64, "mean": [0.5] * 3, "std": [0.5] * 3}}
    tower = build_tower("image", component, described, 4).eval()
    said: list[torch.Tensor] = []
    tower.blocks()[-1].register_forward_hook(lambda _, __, out: said.append(out))
    kept = Hidden(tower, [1.0], "image")
    kept.keep_places()
    x = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    tower(x)
    assert said[0].shape == (2, 8, 8, 16)
    torch.testing.assert_close(kept.take(x)[1.0], said[0].mean((1, 2)))
    places = kept.take_places()
    assert places is not None
    assert torch.equal(places.states, said[0].flatten(1, 2))
