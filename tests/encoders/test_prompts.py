"""Learned prompts: against a loop over the layers of real towers, as a start that changes nothing, in a saved model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dualenc.config import Recipe
from dualenc.data.modalities.text import TextConfig, TextInput
from dualenc.encoders.decay import decay_groups
from dualenc.encoders.trainable.prompts import PromptTokens
from dualenc.errors import CheckpointError, ConfigError
from dualenc.model import Bundle, build_bundle, load_model
from dualenc.model.export.export import export
from dualenc.train.build import init_weights

torch.set_num_threads(1)

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
VISION = {**SMALL, "image_size": 32, "patch_size": 16, "projection_dim": 16}
WORDS = {**SMALL, "vocab_size": 1024, "max_position_embeddings": 16, "projection_dim": 16, "eos_token_id": 1023}
OPEN_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 16, "head_width": 8, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 1024, "width": 16, "heads": 2, "layers": 3},
}
IMAGES: dict[str, dict[str, Any]] = {
    "own/vit": {"name": "own/vit", "width": 24, "layers": 3, "heads": 2},
    "timm": {"name": "timm/test_vit"},
    "timm registers": {"name": "timm/test_vit2"},
    "open_clip": {"name": "open_clip/t", "config": OPEN_CLIP},
    "hf clip": {"name": "hf/t", "pretrained": False, "config": {"model_type": "clip_vision_model", **VISION}},
    "hf siglip": {"name": "hf/t", "pretrained": False, "config": {"model_type": "siglip_vision_model", **VISION}},
}
TEXTS: dict[str, dict[str, Any]] = {
    "own/transformer": {"name": "own/transformer", "width": 16, "layers": 3, "heads": 2},
    "open_clip": {"name": "open_clip/t", "config": OPEN_CLIP},
    "hf clip": {"name": "hf/t", "pretrained": False, "config": {"model_type": "clip_text_model", **WORDS}},
    "hf bert": {"name": "hf/t", "pretrained": False, "pooling": "mean", "config": {"model_type": "bert", **WORDS}},
}
PREFIX = "a photo of a"


def bundle(towers: tuple[str, str] = ("own/vit", "own/transformer"), **said: Any) -> Bundle:
    """Towers with prompts in both, unless ``said`` has something else for one of them."""
    image, text = towers
    words = {"tokenizer": "clip-bpe:1024", "context_length": 16, "prefix": PREFIX}
    tokens = TextInput(TextConfig.model_validate(words)).prefix_places()[1]
    raw = {
        "name": "t",
        "modalities": {
            "image": {"input": {"size": 32}, "encoder": IMAGES[image], "prompts": {"tokens": 3}}
            | said.get("image", {}),
            "text": {"input": words, "encoder": TEXTS[text], "prompts": {"tokens": tokens}} | said.get("text", {}),
        },
        "embed_dim": 16,
        "data": {"sources": [{"name": "x", "shards": "x.tar"}]},
        "batch": {"size": 8},
        "budget": {"steps": 1},
    }
    return build_bundle(Recipe.model_validate(raw))


def shaken(b: Bundle) -> Bundle:
    """With prompts as training might leave them."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, p in b.model.named_parameters():
            if name.endswith("prompt_tokens"):
                p.normal_()
    b.model.eval()
    return b


def rows(b: Bundle) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    x = b.inputs["text"]
    return {
        "image": torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=generator),
        "text": x.collate([x.eval([t]) for t in ("a dog", "two cats on a mat", "rain")]),
    }


def prompts_of(b: Bundle, m: str) -> PromptTokens:
    part = b.model.tower(m).get_submodule("prompts")
    assert isinstance(part, PromptTokens)
    return part


def plain(b: Bundle) -> Bundle:
    """The same weights without prompts."""
    parts = {m: p.model_copy(update={"prompts": None}) for m, p in b.parts.items()}
    raw = {
        "name": "t",
        "modalities": {m: p.model_dump(mode="json") for m, p in parts.items()},
        "embed_dim": 16,
        "data": {"sources": [{"name": "x", "shards": "x.tar"}]},
        "batch": {"size": 8},
        "budget": {"steps": 1},
    }
    other = build_bundle(Recipe.model_validate(raw))
    own = other.model.state_dict()
    other.model.load_state_dict({k: v for k, v in b.model.state_dict().items() if k in own})
    other.model.eval().requires_grad_(False)  # torch's attention takes another kernel for weights that are trained
    other.model.tower("text").length_groups = False  # packed texts give other last bits
    return other


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_tower_sees_the_tokens_beside_its_patches(image: str) -> None:
    b = shaken(bundle((image, "own/transformer"), image={"prompts": {"tokens": 3, "layers": 2}}))
    x, p = rows(b)["image"], prompts_of(b, "image").prompt_tokens.detach()
    without = plain(b).model.tower("image")
    blocks, state = without.blocks(), {}

    def loop(k: int) -> Any:
        original = blocks[k].forward

        def run(s: Tensor, *args: Any, **kwargs: Any) -> Any:
            n, length = s.shape[0], state.setdefault("length", s.shape[1])
            patches = s[:, :length]
            tokens = p[k].expand(n, -1, -1) if k < 2 else state["tokens"]
            out = original(torch.cat([patches, tokens], 1), *args, **kwargs)
            y = out[0] if isinstance(out, tuple) else out
            state["tokens"] = y[:, length:]
            return (y[:, :length], *out[1:]) if isinstance(out, tuple) else y[:, :length]

        return run

    for k, block in enumerate(blocks):
        block.forward = loop(k)  # type: ignore[method-assign]
    with torch.no_grad():
        torch.testing.assert_close(b.model.tower("image").encode(x), without.encode(x), rtol=1e-5, atol=1e-6)
        assert not torch.equal(b.model.tower("image").encode(x), plain(b).model.tower("image").encode(x))


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_tower_sees_the_tokens_in_place_of_the_prefix(text: str) -> None:
    b = shaken(bundle(("own/vit", text)))
    x, p = rows(b)["text"], prompts_of(b, "text").prompt_tokens.detach()
    at, tokens = b.inputs["text"].prefix_places()  # type: ignore[attr-defined]
    assert (at, tokens, p.shape[:2]) == (1, p.shape[1], (3, tokens))
    without = plain(b).model.tower("text")
    for k, block in enumerate(without.blocks()):
        original = block.forward

        def run(s: Tensor, *args: Any, k: int = k, original: Any = original, **kwargs: Any) -> Any:
            s = s.clone()
            for j in range(tokens):
                s[:, at + j] = s[:, at + j] + p[0, j] if k == 0 else p[k, j]
            return original(s, *args, **kwargs)

        block.forward = run  # type: ignore[method-assign]
    with torch.no_grad():
        torch.testing.assert_close(b.model.tower("text").encode(x), without.encode(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("text", TEXTS)
def test_with_one_layer_a_text_begins_as_the_released_tower_with_the_words(text: str) -> None:
    b = bundle(("own/vit", text), text={"prompts": {"tokens": prompts_of(bundle(), "text").tokens, "layers": 1}})
    b.model.eval()
    x = rows(b)["text"]
    assert torch.equal(b.model.encode("text", x), plain(b).model.encode("text", x))


def test_only_prompts_are_trained_without_weight_decay() -> None:
    b = bundle(image={"prompts": {"tokens": 2, "head": True}})
    decay, no_decay, _ = decay_groups(b.model)
    assert no_decay == ["towers.image.prompts.prompt_tokens", "towers.text.prompts.prompt_tokens"]
    assert decay == ["towers.image.head.weight"]
    b.model.train()
    b.model(rows(b))["features"]["text"].sum().backward()
    assert prompts_of(b, "text").prompt_tokens.grad is not None


def test_a_saved_model_keeps_its_prompts_and_other_libraries_are_refused(tmp_path: Path) -> None:
    b = shaken(bundle(("hf clip", "hf clip")))
    x = rows(b)
    b.save(tmp_path / "saved")
    again = load_model(str(tmp_path / "saved"))
    with torch.no_grad():
        for m in x:
            assert torch.equal(again.model.eval().encode(m, x[m]), b.model.encode(m, x[m]))
            copied = copy.deepcopy(b.model)
            prompts_of(b, m).prompt_tokens.zero_()
            assert torch.equal(copied.encode(m, x[m]), again.model.encode(m, x[m])), "a copy has prompts of its own"
            assert not torch.equal(b.model.encode(m, x[m]), again.model.encode(m, x[m]))
    for layout in ("hf", "open_clip", "sentence-transformers"):
        with pytest.raises(
            ConfigError,
            match=r"prompts of the image tower \(modalities\.image\.prompts\)\. Use --format onnx or safetensors\.$",
        ):
            export(again, layout, tmp_path / layout)
    only_words = bundle(("hf clip", "hf clip"), image={"prompts": None}, text={"prompts": None})
    with pytest.raises(ConfigError, match=r"'a photo of a' before every text"):
        export(only_words, "hf", tmp_path / "hf")
    # A run begins from it with its prompts, or is refused; and from a model without any, with its own.
    fresh = bundle(("hf clip", "hf clip"))
    init_weights(fresh, str(tmp_path / "saved"))
    assert torch.equal(fresh.model.eval().encode("text", x["text"]), again.model.encode("text", x["text"]))
    with pytest.raises(CheckpointError, match="has learned prompts"):
        init_weights(only_words, str(tmp_path / "saved"))
    only_words.save(tmp_path / "plain")
    init_weights(fresh, str(tmp_path / "plain"))
    assert torch.equal(prompts_of(fresh, "text").prompt_tokens, prompts_of(again, "text").prompt_tokens)


def test_what_cannot_have_them_is_refused() -> None:
    for name, part in {
        "own/convnet": {"name": "own/convnet", "widths": [8, 16]},
        "swin": {"name": "timm/swin_tiny_patch4_window7_224"},
        "eva": {"name": "timm/eva02_tiny_patch14_224"},
    }.items():
        IMAGES[name] = part
        with pytest.raises(ConfigError, match=r"modalities\.image\.prompts: .*(not a transformer|one sequence)"):
            bundle((name, "own/transformer"))
        del IMAGES[name]
    with pytest.raises(ConfigError, match=r"text\.prompts\.tokens: 2 learned tokens replace .*, but .* has \d"):
        bundle(text={"prompts": {"tokens": 2}})
    with pytest.raises(ConfigError, match=r"modalities\.image\.prompts\.layers: 5 is more than the tower's 3 blocks"):
        bundle(image={"prompts": {"layers": 5}})
    with pytest.raises(ValueError, match="prompts already freeze the tower's own weights; leave lock out"):
        bundle(image={"prompts": {"tokens": 3}, "lock": True})


def test_a_prefix_stands_before_every_text_and_is_remembered() -> None:
    plain_input, prefixed = (
        TextInput(TextConfig(tokenizer="clip-bpe:1024", context_length=16, prefix=p)) for p in (None, " query: ")
    )
    assert "prefix" not in plain_input.describe()["config"]
    assert prefixed.describe()["config"]["prefix"] == "query:"
    assert torch.equal(prefixed.eval(["a cat"]), plain_input.eval(["query: a cat"]))
    assert torch.equal(prefixed.train(["a cat"], np.random.default_rng(0)), plain_input.eval(["query: a cat"]))
    with pytest.raises(ValueError, match="prefix: it has no words"):
        TextConfig(prefix=" ")


@pytest.mark.slow
def test_graphs_hold_the_prompts_for_any_batch(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    b = shaken(bundle(("hf clip", "open_clip")))
    export(b, "onnx", tmp_path / "graphs")
    x = rows(b)
    ids = torch.nn.functional.pad(x["text"]["ids"], (0, 16 - x["text"]["ids"].shape[1]))
    for m, given in {"image": {"pixels": x["image"].float() / 255}, "text": {"ids": ids}}.items():
        session = runtime.InferenceSession(str(tmp_path / "graphs" / f"{m}.onnx"))
        (got,) = session.run(None, {k: v.numpy() for k, v in given.items()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(got), b.model.encode(m, x[m]), rtol=0, atol=2e-6)
