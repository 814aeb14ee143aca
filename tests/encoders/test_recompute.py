"""Every N-th block recomputed, conv towers in channels-last layout, float8: what changes and what does not."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import pytest
import torch
from torch import nn

from dualenc.config import Component, EngineConfig, Recipe
from dualenc.data.modalities import modalities
from dualenc.encoders import build_tower
from dualenc.encoders.tower import Tower
from dualenc.encoders.trainable.recompute import recompute_every
from dualenc.engine.float8 import check_float8, convert_to_float8
from dualenc.engine.protocol import apply_memory_and_compile
from dualenc.errors import ConfigError
from dualenc.model import build_bundle

torch.set_num_threads(1)

RECIPE: dict[str, Any] = {
    "name": "tiny",
    "modalities": {
        "image": {"input": {"size": 32}, "encoder": {"name": "own/convnet", "widths": [8, 16], "channels_last": False}},
        "text": {
            "input": {"tokenizer": "clip-bpe:1024", "context_length": 16},
            "encoder": {"name": "own/transformer", "width": 32, "layers": 5, "heads": 2},
        },
    },
    "embed_dim": 16,
    "data": {"sources": [{"name": "x", "shards": "x.tar"}]},
    "batch": {"size": 8},
    "budget": {"steps": 1},
}
CPU = torch.device("cpu")


def model() -> Any:
    torch.manual_seed(0)
    return build_bundle(Recipe.model_validate(RECIPE)).model


def rows() -> dict[str, Any]:
    bundle = build_bundle(Recipe.model_validate(RECIPE))
    source = bundle.inputs["text"]
    texts = source.collate([source.eval(source.decode(t)) for t in ("a dog", "two black cats on a mat")])
    return {"image": torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8), "text": texts}


def gradients(net: nn.Module, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    net.zero_grad()
    torch.manual_seed(1)
    features = net.train()(inputs)["features"]
    torch.stack(
        [x.square().mul(torch.linspace(0, 1, x.numel()).view_as(x)).sum() for x in features.values()]
    ).sum().backward()
    return {k: p.grad.clone() for k, p in net.named_parameters() if p.grad is not None}


def test_every_nth_block_runs_again_and_no_gradient_changes() -> None:
    net, inputs = model(), rows()
    before, names = gradients(net, inputs), list(net.state_dict())
    apply_memory_and_compile(net, EngineConfig(grad_checkpointing=2), CPU)
    tower = net.tower("text")
    calls = [0] * len(tower.blocks())
    for k, block in enumerate(tower.blocks()):
        first = next(m for m in block.modules() if isinstance(m, nn.LayerNorm))
        first.register_forward_hook(lambda *_, k=k: calls.__setitem__(k, calls[k] + 1))
    after = gradients(net, inputs)
    assert calls == [1, 2, 1, 2, 1]
    assert list(net.state_dict()) == names
    assert before.keys() == after.keys()
    assert all(torch.equal(g, after[k]) for k, g in before.items())
    with torch.no_grad():
        want = net.eval()(inputs)["features"]["text"]
    twin = copy.deepcopy(net)  # a copy's blocks recompute the copy's weights
    for p in twin.parameters():
        p.data.zero_()
    gradients(twin, inputs)
    assert twin.tower("text").blocks()[1].forward.block is not tower.blocks()[1]
    with torch.no_grad():
        assert torch.equal(net.eval()(inputs)["features"]["text"], want)
    assert calls == [4, 6, 4, 6, 4]  # the copy shares the counters; nothing runs again in evaluation


def test_a_tower_without_blocks_recomputes_nothing() -> None:
    class Plain(Tower):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 4)

    assert recompute_every(Plain(), 2) == 0


def test_channels_last_is_for_convolutional_towers() -> None:
    net, inputs = model(), rows()
    before = gradients(net, inputs)
    apply_memory_and_compile(net, EngineConfig(), CPU)  # auto: not on the CPU
    assert not net.tower("image").channels_last
    apply_memory_and_compile(net, EngineConfig(channels_last=True), CPU)
    image = net.tower("image")
    convolutions = [m.weight for m in image.modules() if isinstance(m, nn.Conv2d) and m.weight.shape[1] > 1]
    assert image.channels_last
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in convolutions)
    for k, g in gradients(net, inputs).items():
        torch.testing.assert_close(g, before[k], rtol=1e-4, atol=1e-6)
    vit = Component.model_validate({"name": "own/vit", "width": 32, "layers": 1, "heads": 2})
    source = modalities["image"](modalities["image"].Config(size=32), None)
    tower: Any = build_tower("image", vit, source.describe(), 16, "x")
    tower.set_channels_last()
    assert not tower.channels_last


@pytest.mark.parametrize(
    ("settings", "there", "message"),
    [
        (
            {"precision": "fp32"},
            True,
            r"engine\.float8: true needs engine\.kind: accelerate and engine\.precision: bf16",
        ),
        ({"precision": "bf16"}, False, r"engine\.float8: true needs torchao \(pip install torchao\)"),
        ({"precision": "bf16"}, True, r"needs an NVIDIA GPU of compute capability 8\.9 or newer .*computes on cpu"),
    ],
)
def test_float8_is_refused_in_one_sentence(
    settings: dict[str, Any], there: bool, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if there else None)
    with pytest.raises(ConfigError, match=message):
        check_float8(EngineConfig(float8=True, **settings), CPU)


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
def test_float8_takes_the_linear_layers_of_the_towers_but_not_the_heads() -> None:
    net, inputs = model(), rows()
    plain = net.eval()(inputs)["features"]["text"]
    names, parameters = list(net.state_dict()), {k: id(p) for k, p in net.named_parameters()}
    found = convert_to_float8(net)
    assert len(found) >= 10
    assert all(n.startswith("text.") and ".head" not in n for n in found), found
    assert list(net.state_dict()) == names
    assert {k: id(p) for k, p in net.named_parameters()} == parameters
    low = net(inputs)["features"]["text"]
    assert 0 < float((low - plain).detach().abs().max()) < 0.1
