"""Old names, wrapped names, other resolutions: the values arrive where open_clip and timm put them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dualenc.config import Component
from dualenc.encoders import build_tower
from dualenc.encoders.released.migrations import migrate, migrate_open_clip, resize_positions
from dualenc.errors import CheckpointError, ConfigError

VIT = {"image_size": 64, "layers": 1, "width": 64, "patch_size": 16}
CFG: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": VIT,
    "text_cfg": {"context_length": 20, "vocab_size": 600, "width": 64, "heads": 2, "layers": 1},
}


def test_names_of_wrappers_and_old_versions() -> None:
    one = torch.zeros(1)
    old = {
        "module._orig_mod.visual.proj": one,
        "module.text.transformer.embeddings.position_ids": one,
        "text._orig_mod.ln_final.weight": one,
        "encoder.LayerNorm.gamma": one,
        "logit_scale": one,
    }
    assert list(migrate(old)) == ["visual.proj", "text.ln_final.weight", "encoder.LayerNorm.weight", "logit_scale"]


def clip(**vision: Any) -> Any:
    from open_clip.model import CLIP

    torch.manual_seed(0)
    return CLIP(16, {**VIT, **vision}, dict(CFG["text_cfg"]))


def test_picture_positions_are_resized_as_open_clip_does() -> None:
    from open_clip.model import resize_pos_embed, resize_text_pos_embed

    small, large = clip(), clip(image_size=96)
    theirs = dict(small.state_dict())
    resize_pos_embed(theirs, large)
    ours = resize_positions({k.removeprefix("visual."): v for k, v in small.state_dict().items()}, large.visual)
    assert torch.equal(ours["positional_embedding"], theirs["visual.positional_embedding"])
    assert ours["positional_embedding"].shape == (37, 64)

    from open_clip.model import CLIP

    longer = CLIP(16, VIT, {**CFG["text_cfg"], "context_length": 33})
    theirs = dict(small.state_dict())
    resize_text_pos_embed(theirs, longer)
    text = {k: v for k, v in small.state_dict().items() if k == "positional_embedding"}
    host = torch.nn.Module()
    host.positional_embedding = longer.positional_embedding
    assert torch.equal(resize_positions(text, host)["positional_embedding"], theirs["positional_embedding"])


def test_a_recipe_may_ask_for_another_size_and_length(tmp_path: Path) -> None:
    """Refused unless it says that it is meant; then the tower computes what open_clip's own resized model does."""
    import open_clip
    from open_clip.factory import load_checkpoint
    from safetensors.torch import save_file

    torch.manual_seed(0)
    source = open_clip.create_model("ViT-S-32-alt")
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    theirs = open_clip.create_model("ViT-S-32-alt", force_image_size=96)
    load_checkpoint(theirs, str(tmp_path / "w.safetensors"))
    part = {"name": "open_clip/ViT-S-32-alt", "pretrained": str(tmp_path / "w.safetensors")}
    describe = {"kind": "image", "config": {"size": 96, "mean": [0.5] * 3, "std": [0.5] * 3}}
    from dualenc.encoders import check_input

    with pytest.raises(ConfigError, match=r"input.size.*resize_positions: true"):
        check_input("image", Component.model_validate(part), describe)
    meant = Component.model_validate({**part, "resize_positions": True})
    check_input("image", meant, {**describe, "config": {**describe["config"], "mean": _mean(), "std": _std()}})
    tower = build_tower("image", meant, describe, 256).eval()
    x = torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8)
    with torch.no_grad():
        want = theirs.eval().encode_image((x / 255 - 0.5) / 0.5)
        assert (tower.encode(x) - want).abs().max() <= 1e-5
    # the architecture that a bundle keeps builds the resized tower again
    again = build_tower("image", tower.component, describe, 256)
    again.load_state_dict(tower.state_dict())


def _mean() -> tuple[float, ...]:
    from dualenc.encoders.adapters.open_clip import OPENAI_MEAN

    return OPENAI_MEAN


def _std() -> tuple[float, ...]:
    from dualenc.encoders.adapters.open_clip import OPENAI_STD

    return OPENAI_STD


@pytest.mark.slow
def test_apple_s_mobileclip_files() -> None:
    """MobileCLIP-S1 in the names of Apple's own file, written by undoing what Apple's names are known by."""
    import open_clip
    from open_clip.model import CustomTextCLIP

    cfg = open_clip.get_model_config("MobileCLIP-S1")
    torch.manual_seed(0)
    model = CustomTextCLIP(cfg["embed_dim"], dict(cfg["vision_cfg"]), dict(cfg["text_cfg"]))
    state = model.state_dict()
    apple = {"logit_scale": state["logit_scale"]}
    names = [
        ("transformer.resblocks.", "transformer."),
        ("ln_1.", "pre_norm_mha.0."),
        ("attn.in_proj_", "pre_norm_mha.1.qkv_proj."),
        ("attn.", "pre_norm_mha.1."),
        ("ln_2.", "pre_norm_ffn.0."),
        ("mlp.c_fc.", "pre_norm_ffn.1."),
        ("mlp.c_proj.", "pre_norm_ffn.4."),
        ("ln_final.", "final_layer_norm."),
        ("token_embedding.", "embedding_layer."),
        ("text_projection", "projection_layer"),
    ]
    for k, v in state.items():
        if not k.startswith("text."):
            continue
        name = k.removeprefix("text.")
        if name == "positional_embedding":
            name, v = "positional_embedding.pos_embed.pos_embed", v[None, None]
        for ours, theirs in names:
            name = name.replace(ours, theirs)
        apple[f"text_encoder.{name}"] = v
    apple["image_encoder.model.patch_embed.0.rbr_conv.0.conv.weight"] = state[
        "visual.trunk.stem.0.conv_kxk.0.conv.weight"
    ]
    moved = migrate_open_clip(cfg, apple)
    text = {k: v for k, v in state.items() if k.startswith("text.")}
    assert {k for k in moved if k.startswith("text.")} == set(text)
    assert all(torch.equal(moved[k], v) for k, v in text.items())
    stem = "visual.trunk.stem.0.conv_kxk.0.conv.weight"
    assert torch.equal(moved[stem], state[stem])


# --- wrappers, containers, numbers -------------------------------------------------------------------------------


def _net() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 2))


_WRAPPERS = ("module.", "_orig_mod.", "model.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def test_wrappers_in_any_order_and_depth() -> None:
    """Every sequence of up to three of the five, before the name and (where they stand there) within it."""
    import itertools

    from dualenc.encoders.released.migrations import migrate

    state = _net().state_dict()
    for depth in range(4):
        for chain in itertools.product(_WRAPPERS, repeat=depth):
            front = "".join(chain)
            inner = "".join(w for w in chain if w.startswith("_"))
            wrapped = {f"{front}{k.split('.')[0]}.{inner}{k.split('.')[1]}": v for k, v in state.items()}
            wrapped[f"{front}n_averaged"] = torch.tensor(3)
            assert migrate(wrapped).keys() == state.keys(), chain
    with pytest.raises(CheckpointError, match=r"'module.0.bias' and another one are both '0.bias' once wrapper names"):
        migrate({"0.bias": torch.zeros(1), "module.0.bias": torch.zeros(1)})
    part = {"model.a.weight": torch.zeros(1), "head.weight": torch.zeros(1)}  # a model that has a part of that name
    assert migrate(part).keys() == part.keys()


def test_real_wrappers() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.optim.swa_utils import AveragedModel

    from dualenc.encoders.released.migrations import migrate

    state = _net().state_dict()
    net: Any = _net()
    net[0] = checkpoint_wrapper(net[0])
    wrapped = AveragedModel(torch.compile(net, backend="eager"))  # type: ignore[arg-type]
    assert "n_averaged" in wrapped.state_dict()
    got = migrate(wrapped.state_dict())
    assert got.keys() == state.keys()
    assert all(torch.equal(got[k], v) for k, v in state.items())


@pytest.mark.parametrize("containers", [(), ("state_dict",), ("model_state_dict",), ("model",), ("state_dict_ema",),
                                        ("model", "state_dict"), ("module", "model_state_dict")])  # fmt: skip
def test_containers_and_numbers_beside_the_tensors(tmp_path: Path, containers: tuple[str, ...]) -> None:
    import numpy as np

    from dualenc.encoders.released.weights import read_weights

    state = _net().state_dict()
    numbers = {"epoch": 3, "best": np.float64(0.5), "f": np.float32(1), "i": np.int64(2), "name": "x", "none": None}
    raw: dict[str, Any] = {**{f"module.{k}": v for k, v in state.items()}, **numbers}
    for key in reversed(containers):
        raw = {key: raw, **numbers, "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "lr": np.float64(0.1)}}
    torch.save(raw, tmp_path / "w.pt")
    got = read_weights(tmp_path / "w.pt")
    assert got.keys() == state.keys()
    assert all(torch.equal(got[k], v) for k, v in state.items())


def test_nothing_is_executed_for_numbers_sake(tmp_path: Path) -> None:
    import argparse

    from dualenc.encoders.released.weights import read_weights

    torch.save({"state_dict": _net().state_dict(), "args": argparse.Namespace(lr=1)}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="would run code"):
        read_weights(tmp_path / "w.pt")
    torch.save({"state_dict": {**_net().state_dict(), "odd": [1, 2]}}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"'odd' is a list"):
        read_weights(tmp_path / "w.pt")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    from dualenc.encoders.released.weights import load_by_order, load_exactly

    state = _net().state_dict()
    state["1.weight"][0, 1] = value
    for load in (load_exactly, load_by_order):
        with pytest.raises(CheckpointError, match=r"here: '1.weight' has 1 of 6 values that are NaN or infinite"):
            load(_net(), state, "here")
