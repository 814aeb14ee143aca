"""Exports: written by us, read by the other library: the same tensors, the same features on real photos and texts."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from _shared import PYTHONPATH
from safetensors.torch import load_file, save_file
from test_bundle import recipe
from test_released_models import SMALL, TEXT, VISION, compare, pil, randomise, write_hf, write_open_clip
from torch.nn.functional import normalize

from dualenc.errors import CheckpointError, ConfigError
from dualenc.model import Bundle, build_bundle, load_model
from dualenc.model.export.export import export

Photos = list[tuple[bytes, list[str]]]
TANH = {"act_kwargs": {"approximate": "tanh"}}
SIGLIP = {
    "embed_dim": 64,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {
        "image_size": 32,
        "timm_model_name": "vit_test_siglip_32",
        "timm_model_pretrained": False,
        "timm_pool": "map",
        "timm_proj": "none",
    },
    "text_cfg": {
        **SMALL["text_cfg"],  # type: ignore[dict-item]
        "context_length": 64,
        "vocab_size": 400,
        "hf_tokenizer_name": "timm/ViT-B-16-SigLIP",
        "tokenizer_kwargs": {"clean": "canonicalize"},
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
        "norm_kwargs": {"eps": 1e-6},
    },
}
SQUASH = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "resize_mode": "squash"}


@pytest.fixture(scope="module", autouse=True)
def siglip_in_timm() -> None:
    """SigLIP's image tower by timm's real classes, small: open_clip takes these towers by name only."""
    import timm
    from timm.models import register_model
    from timm.models.vision_transformer import VisionTransformer

    def vit_test_siglip_32(pretrained: bool = False, **more: Any) -> Any:
        more = {k: v for k, v in more.items() if not k.startswith(("pretrained", "cache_dir", "dynamic"))}
        settings = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "class_token": False}
        model = VisionTransformer(**{**settings, "global_pool": "map", **more})
        model.default_cfg = {"pool_size": None}
        return model

    vit_test_siglip_32.__module__ = "timm.models.vision_transformer"
    if "vit_test_siglip_32" not in timm.list_models():
        register_model(vit_test_siglip_32)


def write_sentencepiece(folder: Path, captions: list[str]) -> None:
    """A tokenizer like SigLIP's (unigram pieces, "</s>" ends and pads), its pieces learned from real captions."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.Unigram())
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    raw.train_from_iterator([c.lower() for c in captions], trainer)
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="</s>", pad_token="</s>", unk_token="<unk>", model_max_length=64
    )
    wrapped.save_pretrained(folder)


def texts_of(photos: Photos) -> list[str]:
    return [t[0] for _, t in photos]


def by_open_clip(folder: Path, photos: Photos) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of photos and captions, all of it by open_clip."""
    import open_clip

    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()
    with torch.no_grad():
        images = model.encode_image(torch.stack([preprocess(pil(x)) for x, _ in photos]))
        return images, model.encode_text(tokenizer(texts_of(photos)))


def by_transformers(folder: Path, photos: Photos, bundle: Bundle) -> tuple[torch.Tensor, torch.Tensor]:
    """Features by transformers' model and tokenizer. Its centre crop rounds an odd border the other way (see
    test_released_models), so pixels come from our input with the processor's own numbers."""
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(folder).eval()
    pre = json.loads((folder / "preprocessor_config.json").read_text())
    source: Any = bundle.inputs["image"]
    mean, std = (torch.tensor(pre[k]).view(3, 1, 1) for k in ("image_mean", "image_std"))
    pixels = torch.stack([(source.eval(source.decode(x)) * pre["rescale_factor"] - mean) / std for x, _ in photos])
    padding = "max_length" if model.config.model_type == "siglip" else True
    words = AutoTokenizer.from_pretrained(folder)(
        texts_of(photos), padding=padding, truncation=True, return_tensors="pt"
    )
    given = {"input_ids": words["input_ids"]}
    if model.config.model_type != "siglip":
        given["attention_mask"] = words["attention_mask"]
    with torch.no_grad():
        images = model.get_image_features(pixel_values=pixels).pooler_output
        return images, model.get_text_features(**given).pooler_output


def same_tensors(a: Path, b: Path) -> None:
    # transformers 5 writes AltCLIP's image blocks as encoder.layer, earlier versions and the released file: layers
    one, two = ({k.replace("encoder.layer.", "encoder.layers."): v for k, v in load_file(f).items()} for f in (a, b))
    assert one.keys() == two.keys()
    assert all(torch.equal(v, two[k]) and v.shape == two[k].shape for k, v in one.items())


def same_model(a: Bundle, b: Bundle) -> None:
    """Both in the same layout: bit for bit."""
    one, two = a.model.state_dict(), b.model.state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(v, two[k]) for k, v in one.items())


CASES = {
    "clip": (SMALL, {}),
    "clip-quick": ({**SMALL, "quick_gelu": True}, SQUASH),
    "siglip": (SIGLIP, SQUASH),
    "siglip2-text": ({**SIGLIP, "text_cfg": {**SIGLIP["text_cfg"], **TANH}}, SQUASH),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("case", CASES)
def test_open_clip_to_transformers_and_back(tmp_path: Path, coco: Photos, case: str) -> None:
    if case.startswith("siglip"):
        write_sentencepiece(tmp_path / "m", [t for _, ts in coco for t in ts])
    write_open_clip(tmp_path / "m", *CASES[case])
    theirs = by_open_clip(tmp_path / "m", coco)
    ours = load_model(str(tmp_path / "m"))
    export(ours, "open_clip", tmp_path / "oc")
    same_tensors(tmp_path / "m" / "open_clip_model.safetensors", tmp_path / "oc" / "open_clip_model.safetensors")
    same_model(ours, load_model(str(tmp_path / "oc")))
    assert all(torch.equal(x, y) for x, y in zip(by_open_clip(tmp_path / "oc", coco), theirs, strict=True))

    export(ours, "hf", tmp_path / "hf")
    images, texts = by_transformers(tmp_path / "hf", coco, ours)
    compare(ours, coco, images, texts)
    there = load_model(str(tmp_path / "hf"))
    compare(there, coco, *theirs)
    assert there.embedder().logit_scale("image-text") == ours.embedder().logit_scale("image-text")
    assert there.embedder().logit_bias("image-text") == ours.embedder().logit_bias("image-text")
    export(there, "open_clip", tmp_path / "back")
    same_tensors(tmp_path / "m" / "open_clip_model.safetensors", tmp_path / "back" / "open_clip_model.safetensors")
    for x, y in zip(by_open_clip(tmp_path / "back", coco), theirs, strict=True):
        assert (normalize(x, dim=-1) - normalize(y, dim=-1)).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_transformers_to_ours_and_back(tmp_path: Path, coco: Photos, kind: str) -> None:
    write_hf(tmp_path / "m", kind)
    ours = load_model(str(tmp_path / "m"))
    export(ours, "hf", tmp_path / "hf")
    same_tensors(tmp_path / "m" / "model.safetensors", tmp_path / "hf" / "model.safetensors")
    same_model(ours, load_model(str(tmp_path / "hf")))
    for folder in ("m", "hf"):
        pre = json.loads((tmp_path / folder / "preprocessor_config.json").read_text())
        pre.setdefault("rescale_factor", 1 / 255)
        (tmp_path / folder / "preprocessor_config.json").write_text(json.dumps(pre))
    images, texts = by_transformers(tmp_path / "m", coco, ours)
    for got in (by_transformers(tmp_path / "hf", coco, ours),):
        assert torch.equal(got[0], images)
        assert torch.equal(got[1], texts)
    if kind == "clip":
        export(ours, "open_clip", tmp_path / "oc")
        # open_clip has its own crop of odd borders, whoever wrote the folder
        even = [x for x in coco if _border(x[0]) % 4 != 3]
        assert len(even) >= 3
        compare(load_model(str(tmp_path / "oc")), even, *by_open_clip(tmp_path / "oc", even))
        compare(ours, even, *by_open_clip(tmp_path / "oc", even))
    else:  # SigLIP of transformers has the tanh GELU, timm's towers of this shape have not
        with pytest.raises(ConfigError, match=r"vision_config.*onnx or safetensors"):
            export(ours, "open_clip", tmp_path / "oc")


def _border(raw: bytes) -> int:
    """Pixels of the longer edge that a crop of 64 cuts away; where it is odd, half of it is rounded either way."""
    width, height = pil(raw).size
    return int(64 * max(width, height) / min(width, height)) - 64


@pytest.mark.parametrize("kind", ["altclip", "chinese_clip"])
def test_altclip_and_chinese_clip(tmp_path: Path, coco: Photos, kind: str) -> None:
    import transformers as tf

    torch.manual_seed(0)
    symbols = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *map(chr, range(97, 123)), *(f"##{chr(c)}" for c in range(97, 123))]
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "vocab.txt").write_text("\n".join(symbols))
    tokenizer = tf.BertTokenizerFast(str(tmp_path / "m" / "vocab.txt"), model_max_length=40)
    words = {**TEXT, "vocab_size": 57, "max_position_embeddings": 80, "pad_token_id": 0}
    if kind == "altclip":
        words |= {"project_dim": 48, "bos_token_id": 2, "eos_token_id": 3}
        model: Any = tf.AltCLIPModel(tf.AltCLIPConfig(text_config=words, vision_config=VISION, projection_dim=24))
    else:
        model = tf.ChineseCLIPModel(tf.ChineseCLIPConfig(text_config=words, vision_config=VISION, projection_dim=24))
    randomise(model)
    for m in model.modules():  # reading a file, transformers sets the padding's row to zero, whatever it holds
        if isinstance(m, torch.nn.Embedding) and m.padding_idx is not None:
            m.weight.data[m.padding_idx] = 0
    model.eval().save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    pre = {"size": {"height": 64, "width": 64}, "image_mean": [0.4] * 3, "image_std": [0.3] * 3, "resample": 3}
    (tmp_path / "m" / "preprocessor_config.json").write_text(json.dumps({**pre, "rescale_factor": 1 / 255}))
    ours = load_model(f"hf:{tmp_path / 'm'}")
    images, texts = by_transformers(tmp_path / "m", coco, ours)
    compare(ours, coco, images, texts)
    export(ours, "hf", tmp_path / "hf")
    same_tensors(tmp_path / "m" / "model.safetensors", tmp_path / "hf" / "model.safetensors")
    again = by_transformers(tmp_path / "hf", coco, ours)
    assert torch.equal(again[0], images)
    assert torch.equal(again[1], texts)
    compare(load_model(str(ours.save(tmp_path / "ours"))), coco, images, texts)
    with pytest.raises(ConfigError, match=r"open_clip has no (AltCLIP|ChineseCLIP)Model.*onnx or safetensors"):
        export(ours, "open_clip", tmp_path / "oc")


def test_a_trained_clip_with_heads_of_ours(tmp_path: Path, coco: Photos) -> None:
    """Two towers of a recipe: transformers' CLIP halves under linear heads are what CLIP calls its projections."""
    words = {**TEXT, "model_type": "clip_text_model", "vocab_size": 1024, "eos_token_id": 1023, "bos_token_id": 1022}
    image = {
        "encoder": {"name": "hf/clip", "pooling": "model", "config": {**VISION, "model_type": "clip_vision_model"}},
        "input": {"size": 64, "mean": [0.5] * 3},
    }
    text = {
        "encoder": {"name": "hf/clip", "pooling": "model", "config": words},
        "input": {"tokenizer": "clip-bpe:1024", "context_length": 32},
    }
    built = build_bundle(recipe(image=image, text=text))
    built.model.eval()
    for layout, read in (("hf", None), ("open_clip", by_open_clip)):
        out = export(built, layout, tmp_path / layout)
        images, texts = read(out, coco) if read else by_transformers(out, coco, built)
        compare(built, coco, images, texts)
        compare(load_model(str(out)), coco, images, texts)


def test_own_towers_go_to_onnx_and_safetensors_only(tmp_path: Path, coco: Photos) -> None:
    built = build_bundle(recipe())
    for layout, name in (("hf", "transformers"), ("open_clip", "open_clip")):
        with pytest.raises(
            ConfigError, match=rf"tiny cannot be exported to {name}: .*own/convnet.*onnx or safetensors"
        ):
            export(built, layout, tmp_path / layout)
        assert not (tmp_path / layout).exists()
    out = export(built, "safetensors", tmp_path / "st")
    photos = [x for x, _ in coco]
    assert torch.equal(load_model(str(out)).embedder().embed("image", photos), built.embedder().embed("image", photos))
    with pytest.raises(ConfigError, match="already exists and is not empty"):
        export(built, "safetensors", out)
    with pytest.raises(ConfigError, match=r"unknown --format 'onxx'.*onnx"):
        export(built, "onxx", tmp_path / "x")


# --- what was edited is refused ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model in three layouts, each of which loads as it is."""
    tmp_path = tmp_path_factory.mktemp("exported")
    write_open_clip(tmp_path / "m", SMALL, {})
    model = load_model(str(tmp_path / "m"))
    for layout in ("hf", "open_clip", "safetensors"):
        load_model(str(export(model, layout, tmp_path / layout)))
    return tmp_path


def change(path: Path, keys: tuple[str, ...], value: Any) -> None:
    said = json.loads(path.read_text())
    at = said
    for k in keys[:-1]:
        at = at[k]
    at[keys[-1]] = value
    path.write_text(json.dumps(said))


@pytest.mark.parametrize(
    ("layout", "file", "keys", "value", "field"),
    [
        ("hf", "preprocessor_config.json", ("crop_size",), {"height": 48, "width": 48}, "size.*48.*image_size"),
        ("hf", "preprocessor_config.json", ("image_mean",), [0.5] * 3, r"modalities.image.input.config.mean"),
        ("hf", "preprocessor_config.json", ("resample",), 2, r"modalities.image.input.config.interpolation"),
        ("hf", "config.json", ("vision_config", "hidden_act"), "quick_gelu", r"modalities.image.activation"),
        ("hf", "config.json", ("text_config", "hidden_act"), "gelu_pytorch_tanh", r"modalities.text.activation"),
        ("open_clip", "open_clip_config.json", ("model_cfg", "quick_gelu"), True, r"modalities.image.activation"),
        ("open_clip", "open_clip_config.json", ("preprocess_cfg", "size"), 48, "preprocess_cfg.size.*48.*image_size"),
        ("open_clip", "open_clip_config.json", ("preprocess_cfg", "std"), [0.5] * 3, r"image.input.config.std"),
        ("safetensors", "dualenc.json", ("modalities", "image", "input", "config", "size"), 48, r"input.config.size"),
        ("safetensors", "dualenc.json", ("modalities", "image", "input", "config", "std"), [1] * 3, r"config.std"),
        ("safetensors", "dualenc.json", ("modalities", "text", "input", "config", "context_length"), 20, "context_len"),
    ],
)
def test_an_edited_export_is_refused(
    exported: Path, tmp_path: Path, layout: str, file: str, keys: tuple[str, ...], value: Any, field: str
) -> None:
    out = shutil.copytree(exported / layout, tmp_path / layout)
    change(out / file, keys, value)
    with pytest.raises(CheckpointError, match=field):
        load_model(str(out))


def test_another_tokenizer_in_an_export_is_refused(exported: Path, tmp_path: Path) -> None:
    out = shutil.copytree(exported / "hf", tmp_path / "out")
    said = json.loads((out / "tokenizer.json").read_text())
    vocab = said["model"]["vocab"]
    vocab["photo</w>"], vocab["cat</w>"] = vocab["cat</w>"], vocab["photo</w>"]
    (out / "tokenizer.json").write_text(json.dumps(said))
    with pytest.raises(CheckpointError, match=r"modalities.text.input.tokenizer"):
        load_model(str(out))


class Payload:
    def __reduce__(self) -> Any:
        return os.mkdir, (os.environ["PAYLOAD"],)


@pytest.mark.parametrize("layout", ["open_clip", "open_clip file", "hf", "hf tower"])
def test_a_pickle_with_a_payload_is_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    monkeypatch.setenv("PAYLOAD", str(tmp_path / "executed"))
    if layout.startswith("hf"):
        write_hf(tmp_path / "m", "clip")
        (tmp_path / "m" / "model.safetensors").unlink()
        file = tmp_path / "m" / "pytorch_model.bin"
    else:
        write_open_clip(tmp_path / "m", SMALL, {})
        (tmp_path / "m" / "open_clip_model.safetensors").unlink()
        file = tmp_path / "m" / "open_clip_pytorch_model.bin"
    torch.save({"visual.proj": Payload()}, file)
    with pytest.raises((CheckpointError, ConfigError), match="refused"):
        if layout == "hf tower":
            build_bundle(recipe(image={"encoder": {"name": f"hf/{tmp_path / 'm'}"}, "input": {"size": 64}}))
        elif layout == "open_clip file":
            load_model(f"open_clip:ViT-S-32-alt/{file}")
        else:
            load_model(str(tmp_path / "m"))
    assert not (tmp_path / "executed").exists()
    torch.load(file, weights_only=False)  # the payload does work
    assert (tmp_path / "executed").exists()


def test_another_tokenizer_in_open_clip_s_layout_is_refused(tmp_path: Path, coco: Photos) -> None:
    write_sentencepiece(tmp_path / "m", [t for _, ts in coco for t in ts])
    write_open_clip(tmp_path / "m", *CASES["siglip"])
    out = export(load_model(str(tmp_path / "m")), "open_clip", tmp_path / "oc")
    said = json.loads((out / "tokenizer.json").read_text())
    pieces = said["model"]["vocab"]
    said["model"]["vocab"] = [*pieces[:3], *reversed(pieces[3:])]
    (out / "tokenizer.json").write_text(json.dumps(said))
    with pytest.raises(CheckpointError, match=r"modalities.text.input.tokenizer"):
        load_model(str(out))


@pytest.mark.slow
@pytest.mark.extra
def test_vit_b_32_in_openai_s_format_goes_to_transformers(tmp_path: Path, coco: Photos) -> None:
    """The real size: OpenAI's names, half precision and the three numbers its archives hold; random weights."""
    import open_clip

    torch.manual_seed(0)
    theirs = open_clip.create_model("ViT-B-32-quickgelu").eval()
    state = {k: v.half() if v.is_floating_point() else v for k, v in theirs.state_dict().items()}
    theirs.load_state_dict(state)
    numbers = {"input_resolution": 224, "context_length": 77, "vocab_size": 49408}
    torch.save({**state, **{k: torch.tensor(v) for k, v in numbers.items()}}, tmp_path / "ViT-B-32.pt")
    ours = load_model(f"open_clip:ViT-B-32-quickgelu/{tmp_path / 'ViT-B-32.pt'}")
    few = coco[:2]
    images, texts = by_transformers(export(ours, "hf", tmp_path / "hf"), few, ours)
    compare(ours, few, images, texts)
    source: Any = ours.inputs["image"]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (source.config.mean, source.config.std))
    pixels = torch.stack([(source.eval(source.decode(x)) / 255 - mean) / std for x, _ in few])
    with torch.no_grad():
        words = open_clip.get_tokenizer("ViT-B-32-quickgelu")(texts_of(few))
        compare(ours, few, theirs.encode_image(pixels), theirs.encode_text(words))


def test_a_torchscript_archive_is_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "ViT-B-32.pt")
    with pytest.raises(CheckpointError, match=r"TorchScript.*open_clip:NAME/openai"):
        load_model(f"open_clip:ViT-B-32/{tmp_path / 'ViT-B-32.pt'}")


# --- ONNX --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("towers", ["own", "open_clip"])
def test_onnx_gives_our_features(tmp_path: Path, coco: Photos, towers: str) -> None:
    """The graphs by onnxruntime, fed as preprocess.json says, on batches of other sizes than they were written with."""
    ort = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from transformers import AutoTokenizer

    if towers == "own":
        built = build_bundle(recipe())
    else:
        write_open_clip(tmp_path / "m", {**SMALL, "quick_gelu": True}, {})
        built = load_model(str(tmp_path / "m"))
    randomise(built.model)
    out = export(built, "onnx", tmp_path / "onnx")
    sheet = json.loads((out / "preprocess.json").read_text())
    wanted = built.embedder()
    assert sheet["logit_scale"]["image-text"] == pytest.approx(wanted.logit_scale("image-text"))

    source: Any = built.inputs["image"]
    size = sheet["modalities"]["image"]["inputs"]["pixels"]["shape"][-1]
    assert size == sheet["modalities"]["image"]["preprocessing"]["size"] == source.config.size
    pixels = torch.stack([source.eval(source.decode(x)) for x, _ in coco]).float() / 255
    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    words = sheet["modalities"]["text"]
    length, pad = words["inputs"]["ids"]["shape"][1], words["preprocessing"]["pad_id"]
    rows = [tokenizer(t, truncation=True, max_length=length)["input_ids"] for t in texts_of(coco)]
    ids = torch.tensor([r + [pad] * (length - len(r)) for r in rows])
    mask = torch.tensor([[i < len(r) for i in range(length)] for r in rows])
    feed = {"ids": ids.numpy(), "mask": mask.numpy()}
    feed = {k: v for k, v in feed.items() if k in words["inputs"]}
    for n in (len(coco), 1):
        image = ort.InferenceSession(out / "image.onnx").run(None, {"pixels": pixels[:n].numpy()})[0]
        text = ort.InferenceSession(out / "text.onnx").run(None, {k: v[:n] for k, v in feed.items()})[0]
        off = abs(torch.tensor(image) - wanted.embed("image", [x for x, _ in coco[:n]])).max()
        off_text = abs(torch.tensor(text) - wanted.embed("text", texts_of(coco)[:n])).max()
        print(towers, n, float(off), float(off_text))
        assert max(off, off_text) <= 1e-4


# --- the model card ----------------------------------------------------------------------------------------------


def test_the_card_has_recipe_counts_and_numbers(tmp_path: Path) -> None:
    from dualenc.config import dump_yaml

    run = tmp_path / "run"
    conf = recipe(data={"sources": [{"name": "pairs", "shards": str(tmp_path / "x-{000..001}.tar")}]})
    (tmp_path / "index.json").write_text(
        json.dumps({"version": 1, "shards": [{"url": "x-000.tar", "samples": 1234, "bytes": 10}]})
    )
    build_bundle(conf).save(run / "checkpoints" / "00000007" / "model", provenance={"step": 7, "samples_seen": 56})
    (run / "checkpoints" / "00000007" / "manifest.json").write_text("{}")
    (run / "recipe.yaml").write_text(dump_yaml(conf))
    results = {"tasks": {"flowers": {"metrics": {"top1": 0.4321}}}}
    (run / "results.json").write_text(json.dumps(results))
    card = (export(load_model(str(run)), "safetensors", tmp_path / "out", run) / "README.md").read_text()
    for part in (
        "| pairs | 1,234 |",
        "samples_seen: 56",
        "| flowers | top1 | 0.4321 |",
        "own/convnet",
        "embed_dim: 16",
    ):
        assert part in card, part
    results["tasks"]["flowers"]["metrics"]["top1"] = 0.5
    (tmp_path / "other.json").write_text(json.dumps(results))
    export(load_model(str(run)), "safetensors", tmp_path / "out2", run, tmp_path / "other.json")
    assert "| flowers | top1 | 0.5 |" in (tmp_path / "out2" / "README.md").read_text()
    save_file({}, tmp_path / "no.json")
    with pytest.raises(ConfigError, match="--results"):
        export(load_model(str(run)), "safetensors", tmp_path / "out3", run, tmp_path / "no.json")


def test_the_command(tmp_path: Path) -> None:
    """``dualenc export``: a folder that loads; what a layout cannot express is one sentence and exit code 2."""
    import subprocess
    import sys

    build_bundle(recipe()).save(tmp_path / "m")
    env = {**os.environ, "PYTHONPATH": PYTHONPATH, "COLUMNS": "300"}

    def run(layout: str) -> Any:
        cmd = [sys.executable, "-m", "dualenc", "export", "m", "--format", layout, "--out", layout]
        return subprocess.run(cmd, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False)

    good = run("safetensors")
    assert good.returncode == 0, good.stderr
    assert (tmp_path / "safetensors" / "README.md").is_file()
    load_model(str(tmp_path / "safetensors"))
    bad = run("hf")
    assert bad.returncode == 2
    assert "cannot be exported to transformers" in bad.stderr
    assert "--format onnx or safetensors" in bad.stderr
    assert "Traceback" not in bad.stderr
