"""Pooling by latents and bidirectional decoders (NV-Embed): against plain formulas, with padding and adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm
from transformers.models.llama import modeling_llama

from dualenc.config import LogitScale, Lora
from dualenc.config.section import Component
from dualenc.encoders import DualEncoder, build_tower
from dualenc.encoders.adapters.hf_towers import HFText
from dualenc.encoders.adapters.latents import LatentPool, LatentPooling
from dualenc.errors import ConfigError

torch.set_num_threads(1)
LLAMA = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
DECODERS: dict[str, dict[str, Any]] = {
    "llama": {**LLAMA, "num_key_value_heads": 1},
    "qwen2": {**LLAMA, "num_key_value_heads": 2},
    "mistral": {**LLAMA, "num_key_value_heads": 2, "sliding_window": 2},
    "gpt2": {"vocab_size": 60, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32},
}
DESCRIBED = {"tokenizer": {"vocab_size": 60, "eot_id": 1, "pad_id": 0}, "config": {"context_length": 16}}


def tower(kind: str = "llama", **said: Any) -> HFText:
    torch.manual_seed(0)
    config = {"model_type": kind, **DECODERS[kind]}
    part = {"name": "hf/decoder", "pretrained": False, "config": config, "pooling": "mean", **said}
    built = build_tower("text", Component.model_validate(part), DESCRIBED, 8)
    assert isinstance(built, HFText)
    return built.eval()


def batch(length: int = 7) -> dict[str, Tensor]:
    torch.manual_seed(1)
    ids, mask = torch.randint(2, 60, (3, length)), torch.ones(3, length, dtype=torch.bool)
    mask[1, 4:], ids[1, 4:] = False, 0
    return {"ids": ids, "mask": mask}


def test_pooling_is_the_formula_in_loops() -> None:
    torch.manual_seed(0)
    pool = LatentPool(12, LatentPooling(latents=5, heads=3, mlp_ratio=2)).double()
    x, mask = torch.randn(2, 4, 12).double(), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    mean = torch.stack([x[0].mean(0), x[1, :2].mean(0)])
    torch.testing.assert_close(pool(x, mask), mean)  # as it starts
    for p in pool.parameters():
        torch.nn.init.normal_(p, std=0.3)

    def norm(y: Tensor, by: torch.nn.LayerNorm) -> Tensor:
        return layer_norm(y, (12,), by.weight, by.bias)

    kv = norm(pool.latent, pool.latent_norm) @ pool.key_value.weight.T
    want = []
    for rows, kept in zip(x, mask, strict=True):
        tokens = []
        for h in rows[kept]:
            q, read = norm(h, pool.norm) @ pool.query.weight.T, []
            for head in range(3):
                of = slice(4 * head, 4 * head + 4)
                weights = torch.softmax(kv[:, :12][:, of] @ q[of] / 2, 0)
                read.append(weights @ kv[:, 12:][:, of])
            h = h + pool.out.weight @ torch.cat(read)
            inner = gelu(pool.mlp[0].weight @ norm(h, pool.mlp_norm) + pool.mlp[0].bias)
            tokens.append(h + pool.mlp[2].weight @ inner + pool.mlp[2].bias)
        want.append(torch.stack(tokens).mean(0))
    torch.testing.assert_close(pool(x, mask), torch.stack(want))


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_bidirectional_tokens_see_later_ones_and_no_padding(kind: str, attention: str) -> None:
    x = batch()
    other = {**x, "ids": x["ids"].clone()}
    other["ids"][0, 6] = 3 + (x["ids"][0, 6] - 2) % 57
    longer = {"ids": torch.nn.functional.pad(x["ids"], (0, 4)), "mask": torch.nn.functional.pad(x["mask"], (0, 4))}
    for both in (False, True):
        built = tower(kind, pooling="cls", bidirectional=both)
        built.net.set_attn_implementation(attention)
        first = built.pooled(x)
        assert torch.isfinite(first).all()
        assert torch.equal(first[0], built.pooled(other)[0]) is not both, "the first token and the last one's change"
        torch.testing.assert_close(built.pooled(longer), first)
        alone = {k: v[1:2, :4] for k, v in x.items()}
        torch.testing.assert_close(built.pooled(alone)[0], first[1], rtol=1e-4, atol=1e-5)


def test_bidirectional_attention_is_the_library_s_without_any_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    built = tower("llama", bidirectional=True)
    ids = batch()["ids"]
    got = built.pooled({"ids": ids, "mask": torch.ones_like(ids, dtype=torch.bool)})
    for layer in built.net.layers:
        layer.self_attn.is_causal = False
    monkeypatch.setattr(modeling_llama, "create_causal_mask", lambda **_: None)
    states = built.net(input_ids=ids).last_hidden_state
    torch.testing.assert_close(got, states.mean(1))


def test_adapters_leave_latents_out_and_train_them_whole(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    text = tower(pooling={"name": "latents", "latents": 6, "heads": 2}, bidirectional=True)
    again = build_tower("text", text.component, DESCRIBED, 8)
    assert again.component == text.component
    again.load_state_dict(text.state_dict())
    torch.testing.assert_close(again.eval()(batch()), text(batch()))
    model = DualEncoder({"text": text, "image": tower("gpt2")}, [("image", "text")], LogitScale())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.add_adapters("text", Lora(rank=2, head=True))
    trained = {n for n, p in model.tower("text").named_parameters() if p.requires_grad}
    assert {n.split(".")[0] for n in trained if ".lora_" not in n} == {"pool", "head"}
    assert "pool.latent" in trained
    assert not any(n.startswith("pool") for n in trained if ".lora_" in n)
    model.train()
    model({"text": batch()})["features"]["text"].square().sum().backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p += 0.1 * torch.randn_like(p)
    plain = model.plain(model.state_dict())
    assert plain.keys() == before.keys()
    again.load_state_dict({k.removeprefix("towers.text."): v for k, v in plain.items() if k.startswith("towers.text.")})
    model.eval()
    torch.testing.assert_close(again(batch()), model.tower("text")(batch()))


@pytest.mark.parametrize(
    ("kind", "said", "message"),
    [
        ("text", {"pooling": {"name": "latents", "heads": 3}}, "pooling.heads: 3 must divide the model's width, 16"),
        ("text", {"pooling": {"name": "latent"}}, "latents"),
        ("image", {"bidirectional": True}, "only a text tower can have it"),
    ],
)
def test_what_cannot_be(kind: str, said: dict[str, Any], message: str) -> None:
    config: dict[str, Any] = {"model_type": "llama", **DECODERS["llama"]}
    described: dict[str, Any] = DESCRIBED
    if kind == "image":
        config = {"model_type": "vit", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        described = {"config": {"size": 32, "mean": [0.5] * 3, "std": [0.5] * 3}}
    part = {"name": "hf/x", "pretrained": False, "config": config, "pooling": "cls", **said}
    with pytest.raises(ConfigError, match=message):
        build_tower(kind, Component.model_validate(part), described, 8)
