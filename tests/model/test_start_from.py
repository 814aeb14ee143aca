"""Fine-tuning a released model by naming it: recipes/finetune/{clip,siglip,clap}.yaml need a MODEL and shards only."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from test_released_clap import clips, wave_of, write_clap  # noqa: F401  (clips is a fixture)
from test_released_models import SMALL, Photos, compare, pil, write_hf, write_open_clip
from torch.nn.functional import normalize
from typer.testing import CliRunner

from dualenc.cli import app
from dualenc.config import Recipe, load_recipe
from dualenc.errors import ConfigError
from dualenc.model import Bundle, build_bundle, load_model
from dualenc.model.export.export import export
from dualenc.model.start_from import completed
from dualenc.train.build import init_weights

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes" / "finetune"
SHARD = ROOT / "recipes" / "quickstart" / "data" / "train-000000.tar"
torch.set_num_threads(1)


def recipe(kind: str, model: str, *more: str) -> Recipe:
    given = [f"checkpoint.init_from={model}", f"data.sources.0.shards={SHARD}", *more]
    return load_recipe(RECIPES / f"{kind}.yaml", given, completed)


def start(kind: str, model: str, *more: str) -> Bundle:
    """The model before step 1, as a run builds it."""
    made = recipe(kind, model, *more)
    bundle = build_bundle(made)
    init_weights(bundle, model)
    return bundle


def by_transformers(folder: Path, model: Any, tokenizer: Any, photos: Photos, masked: bool) -> tuple[Any, Any]:
    from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

    processor: Any = (CLIPImageProcessorPil if masked else SiglipImageProcessorPil).from_pretrained(folder)
    pixels = processor([pil(x) for x, _ in photos], return_tensors="pt")["pixel_values"]
    words = tokenizer([t[0] for _, t in photos], padding="max_length", return_tensors="pt")
    given = {"attention_mask": words["attention_mask"]} if masked else {}
    with torch.no_grad():
        images = model.get_image_features(pixel_values=pixels).pooler_output
        return images, model.get_text_features(input_ids=words["input_ids"], **given).pooler_output


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_transformers_folder_alone_is_the_whole_model(tmp_path: Path, coco: Photos, kind: str) -> None:
    model, tokenizer = write_hf(tmp_path / "m", kind)
    for spec in (f"hf:{tmp_path / 'm'}", str(tmp_path / "m")):
        bundle = start(kind, spec)
        compare(bundle, coco, *by_transformers(tmp_path / "m", model, tokenizer, coco, kind == "clip"))
        embedder = bundle.embedder()
        assert embedder.logit_scale("image-text") == pytest.approx(model.logit_scale.exp().item(), rel=1e-6)
        assert (embedder.logit_bias("image-text") is None) is (kind == "clip")
    same(bundle, load_model(spec))


def same(a: Bundle, b: Bundle) -> None:
    one, two = a.model.state_dict(), b.model.state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(v, two[k]) for k, v in one.items())
    assert [settings(x) for x in a.inputs.values()] == [settings(x) for x in b.inputs.values()]


def settings(x: Any) -> Any:
    """An input's settings; the name of its tokenizer's folder replaced by what is in it."""
    said = x.describe()
    config = {**said["config"], "augment": None}
    return {**config, "tokenizer": said["tokenizer"]["sha256"]} if "tokenizer" in said else config


def test_an_open_clip_folder_alone_is_the_whole_model(tmp_path: Path, coco: Photos) -> None:
    import open_clip

    write_open_clip(tmp_path / "m", {**SMALL, "quick_gelu": True}, {"mean": [0.5] * 3, "std": [0.5] * 3})
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'm'}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'm'}")
    with torch.no_grad():
        images = model.eval().encode_image(torch.stack([preprocess(pil(x)) for x, _ in coco]))
        texts = model.encode_text(tokenizer([t[0] for _, t in coco]))
    bundle = start("clip", str(tmp_path / "m"))
    compare(bundle, coco, images, texts)
    same(bundle, load_model(str(tmp_path / "m")))


def test_a_clap_folder_alone_is_the_whole_model(tmp_path: Path, clips: list[tuple[bytes, str]]) -> None:  # noqa: F811
    model, extractor, tokenizer = write_clap(tmp_path / "m", fused=False)
    bundle = start("clap", f"hf:{tmp_path / 'm'}")
    heard = extractor([wave_of(x, 48_000) for x, _ in clips], sampling_rate=48_000, return_tensors="pt")
    words = tokenizer([t for _, t in clips], padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        sounds = normalize(model.get_audio_features(**heard).pooler_output, dim=-1)
        texts = normalize(model.get_text_features(**words).pooler_output, dim=-1)
    embedder = bundle.embedder()
    assert (embedder.embed("audio", [x for x, _ in clips], 4) - sounds).abs().max() <= 1e-5
    assert (embedder.embed("text", [t for _, t in clips]) - texts).abs().max() <= 1e-5
    same(bundle, load_model(f"hf:{tmp_path / 'm'}"))


def test_the_recipe_has_the_last_word(tmp_path: Path) -> None:
    write_hf(tmp_path / "m", "clip")
    spec = f"hf:{tmp_path / 'm'}"
    made = recipe("clip", spec, "modalities.image.lock=true", "modalities.image.input.augment.flip=true",
                  "logit_scale.learnable=false")  # fmt: skip
    plain = recipe("clip", spec)
    assert made.modalities["image"].lock is True
    assert made.modalities["image"].input == {
        **plain.modalities["image"].input,
        "augment": {**plain.modalities["image"].input["augment"], "flip": True},
    }
    assert made.modalities["text"] == plain.modalities["text"]
    assert (made.logit_scale.learnable, made.logit_scale.init) == (False, plain.logit_scale.init)
    other = recipe("clip", spec, "modalities.text.encoder={name: own/transformer}", "modalities.text.input={}")
    assert other.modalities["text"].encoder.name == "own/transformer"
    with pytest.raises(ConfigError, match=r"modalities.imgae: hf:.* has no modality .*Did you mean 'image'"):
        recipe("clip", spec, "modalities.imgae.lock=true")
    with pytest.raises(ConfigError, match=r"does not name a model to fine-tune; add checkpoint.init_from=hf:openai"):
        load_recipe(RECIPES / "clip.yaml", ["data.sources.0.shards=x.tar"], completed)
    whole = ROOT / "recipes" / "quickstart" / "quickstart.yaml"
    assert load_recipe(whole, complete=completed) == load_recipe(whole)


def test_train_lora_and_export(tmp_path: Path, coco: Photos) -> None:
    """The command of docs/finetune.md: two steps of adapters on both towers, out in transformers' layout and back."""
    write_hf(tmp_path / "m", "clip")
    run = tmp_path / "run"
    small = ["batch.size=8", "budget={steps: 2}", "data.workers=0", "engine.threads=1", f"out={run}", "optim.lr=1e-2",
             "schedule.warmup_samples=0", "modalities.image.lora.rank=2", "modalities.text.lora.rank=2"]  # fmt: skip
    given = [f"checkpoint.init_from=hf:{tmp_path / 'm'}", f"data.sources.0.shards={SHARD}", *small]
    dry = CliRunner().invoke(app, ["train", str(RECIPES / "clip.yaml"), *given, "--dry-run"])
    assert dry.exit_code == 0, dry.output
    done = CliRunner().invoke(app, ["train", str(RECIPES / "clip.yaml"), *given])
    assert done.exit_code == 0, done.output
    tuned, before = load_model(str(run)), load_model(f"hf:{tmp_path / 'm'}")
    again = start("clip", str(run))  # a run holds its tokenizer's files: the next one starts from it as from a folder
    same(again, load_model(str(run)))
    photos = [x for x, _ in coco]
    want = tuned.embedder().embed("image", photos)
    assert (want - before.embedder().embed("image", photos)).abs().max() > 1e-4
    export(tuned, "hf", tmp_path / "out")
    back = load_model(f"hf:{tmp_path / 'out'}")
    assert (back.embedder().embed("image", photos) - want).abs().max() <= 1e-6
    import transformers

    theirs = transformers.CLIPModel.from_pretrained(tmp_path / "out").eval()
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(tmp_path / "out")
    compare(tuned, coco, *by_transformers(tmp_path / "out", theirs, words, coco, True))


def test_one_tower_of_a_clip_says_what_it_leaves_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_hf(tmp_path / "m", "clip")
    raw: dict[str, Any] = {
        "name": "t",
        "embed_dim": 24,
        "modalities": {
            "image": {"encoder": {"name": f"hf/{tmp_path / 'm'}"}},
            "text": {"encoder": {"name": "own/transformer", "width": 16, "layers": 1, "heads": 2}},
        },
        "data": {"sources": [{"name": "x", "shards": "x.tar"}]},
        "batch": {"size": 8},
        "budget": {"steps": 1},
    }
    for settings, said in (({}, True), ({"projection": False}, False), ({"projection": True, "head": "none"}, False)):
        caplog.clear()
        raw["modalities"]["image"]["encoder"] = {"name": f"hf/{tmp_path / 'm'}", **settings}
        with caplog.at_level(logging.WARNING):
            build_bundle(Recipe.model_validate(raw))
        found = [r.getMessage() for r in caplog.records if "without projection and logit scale" in r.getMessage()]
        assert bool(found) is said
    assert json.loads((tmp_path / "m" / "config.json").read_text())["model_type"] == "clip"
