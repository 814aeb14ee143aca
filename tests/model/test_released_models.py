"""Whole CLIP and SigLIP models in the layouts they are released in: features against the libraries' own.

No such weights can be installed here, so the weights are random; architectures, layouts and reference code are real.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from dualenc.errors import CheckpointError, ConfigError
from dualenc.model import Bundle, load_model

Photos = list[tuple[bytes, list[str]]]


def pil(raw: bytes) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(raw)).convert("RGB")


def randomise(model: torch.nn.Module) -> None:
    """Every tensor away from its initial value, so that one left unloaded shows."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=g) * 0.02)


def compare(bundle: Bundle, photos: Photos, images: torch.Tensor, texts: torch.Tensor) -> None:
    embedder = bundle.embedder()
    image = (embedder.embed("image", [x for x, _ in photos]) - normalize(images, dim=-1)).abs().max()
    text = (embedder.embed("text", [t[0] for _, t in photos]) - normalize(texts, dim=-1)).abs().max()
    print(f"largest difference: image {float(image):.1e}, text {float(text):.1e}")
    assert image <= 1e-5
    assert text <= 1e-5


# --- open_clip ---------------------------------------------------------------------------------------------------

SMALL = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
SIGLIP_LIKE = {
    "embed_dim": 64,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {**SMALL["vision_cfg"], "image_size": 32},  # type: ignore[dict-item]
    "text_cfg": {**SMALL["text_cfg"], "context_length": 64, "no_causal_mask": True, "pool_type": "last"},  # type: ignore[dict-item]
}


def write_open_clip(folder: Path, cfg: dict[str, Any], pre: dict[str, Any]) -> Any:
    import open_clip
    from open_clip.push_to_hf_hub import save_config_for_hf
    from safetensors.torch import save_file

    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    seed = folder / "open_clip_config.json"
    seed.write_text(json.dumps({"model_cfg": cfg, "preprocess_cfg": pre}))
    model = open_clip.create_model(f"local-dir:{folder}")
    randomise(model)
    save_config_for_hf(model, seed, cfg)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return model.eval()


@pytest.mark.parametrize(
    ("cfg", "pre"),
    [
        (SMALL, {}),
        ({**SMALL, "quick_gelu": True}, {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "resize_mode": "squash"}),
        (SIGLIP_LIKE, {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "resize_mode": "squash"}),
    ],
    ids=["clip", "quick_gelu", "siglip"],
)
def test_open_clip_folder(tmp_path: Path, coco: Photos, cfg: dict[str, Any], pre: dict[str, Any]) -> None:
    import open_clip

    write_open_clip(tmp_path / "m", cfg, pre)
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'm'}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'm'}")
    model.eval()
    with torch.no_grad():
        images = model.encode_image(torch.stack([preprocess(pil(x)) for x, _ in coco]))
        texts = model.encode_text(tokenizer([t[0] for _, t in coco]))
    bundle = load_model(str(tmp_path / "m"))
    compare(bundle, coco, images, texts)
    embedder = bundle.embedder()
    assert embedder.logit_scale("image-text") == pytest.approx(model.logit_scale.exp().item(), rel=1e-6)
    if "init_logit_bias" in cfg:
        assert embedder.logit_bias("image-text") == pytest.approx(model.logit_bias.item())
    assert embedder.describe()["modalities"]["image"]["activation"] == (
        ["QuickGELU()"] if cfg.get("quick_gelu") else ["GELU(approximate='none')"]
    )
    # and it stays that model as a bundle of ours
    compare(load_model(str(bundle.save(tmp_path / "ours"))), coco, images, texts)


def test_open_clip_by_name_and_file(tmp_path: Path, coco: Photos) -> None:
    """A model of open_clip's list, its weights in a file of its own."""
    import open_clip
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model, _, preprocess = open_clip.create_model_and_transforms("ViT-S-32-alt")
    model.eval()
    file = tmp_path / "w.safetensors"
    save_file(model.state_dict(), file)
    with torch.no_grad():
        images = model.encode_image(torch.stack([preprocess(pil(x)) for x, _ in coco]))
        texts = model.encode_text(open_clip.get_tokenizer("ViT-S-32-alt")([t[0] for _, t in coco]))
    bundle = load_model(f"open_clip:ViT-S-32-alt/{file}")
    compare(bundle, coco, images, texts)
    assert not [k for k, p in bundle.model.named_parameters() if p.ndim == 0]
    with pytest.raises(CheckpointError, match=r"missing|has shape|do not exist"):
        load_model(f"open_clip:ViT-B-32/{file}")


def test_an_open_clip_file_with_a_stray_or_missing_tensor_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    write_open_clip(tmp_path, SMALL, {})
    file = tmp_path / "open_clip_model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "visual_extra": torch.zeros(2)}, file)
    with pytest.raises(CheckpointError, match="visual_extra"):
        load_model(str(tmp_path))
    save_file({k: v for k, v in tensors.items() if k != "ln_final.bias"}, file)
    with pytest.raises(CheckpointError, match=r"ln_final.bias"):
        load_model(str(tmp_path))


def test_the_activation_of_a_saved_clip_cannot_be_swapped(tmp_path: Path) -> None:
    """open_clip#771: QuickGELU weights run with GELU give lower numbers and no error."""
    write_open_clip(tmp_path / "m", {**SMALL, "quick_gelu": True}, {})
    ours = load_model(str(tmp_path / "m")).save(tmp_path / "ours")
    said = json.loads((ours / "dualenc.json").read_text())
    said["modalities"]["image"]["encoder"]["config"]["quick_gelu"] = False
    (ours / "dualenc.json").write_text(json.dumps(said))
    with pytest.raises(CheckpointError, match=r"modalities.image.activation"):
        load_model(str(ours))


# --- transformers ------------------------------------------------------------------------------------------------


def write_tokenizer(folder: Path, context: int) -> Any:
    """CLIP's tokenizer in transformers' layout, from the vocabulary that open_clip ships."""
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizer

    bpe = SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    folder.mkdir(parents=True, exist_ok=True)
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    vocab.write_text(json.dumps({names.get(k, k): v for k, v in bpe.encoder.items()}), encoding="utf-8")
    merges.write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in bpe.bpe_ranks) + "\n", encoding="utf-8")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=context)
    tokenizer.save_pretrained(folder)
    return tokenizer


VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 16,
}
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 49408,
}


def write_hf(folder: Path, kind: str) -> tuple[Any, Any]:
    import transformers as tf

    torch.manual_seed(0)
    if kind == "clip":
        model: Any = tf.CLIPModel(tf.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=24))
        pre: dict[str, Any] = {
            "size": {"shortest_edge": 64},
            "crop_size": {"height": 64, "width": 64},
            "do_center_crop": True,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "resample": 3,
            "image_processor_type": "CLIPImageProcessor",
        }
    else:
        model = tf.SiglipModel(
            tf.SiglipConfig(text_config={**TEXT, "max_position_embeddings": 64}, vision_config=VISION)
        )
        pre = {
            "size": {"height": 64, "width": 64},
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "resample": 3,
            "image_processor_type": "SiglipImageProcessor",
        }
    randomise(model)
    model.eval().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(pre))
    return model, write_tokenizer(folder, 77 if kind == "clip" else 64)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_transformers_folder(tmp_path: Path, coco: Photos, kind: str) -> None:
    model, tokenizer = write_hf(tmp_path / "m", kind)
    bundle = load_model(f"hf:{tmp_path / 'm'}")
    source: Any = bundle.inputs["image"]
    config = source.config
    pixels = torch.stack([source.eval(source.decode(x)) for x, _ in coco]) / 255
    pixels = (pixels - torch.tensor(config.mean).view(3, 1, 1)) / torch.tensor(config.std).view(3, 1, 1)
    words = tokenizer([t[0] for _, t in coco], padding="max_length", return_tensors="pt")
    with torch.no_grad():
        images = model.get_image_features(pixel_values=pixels).pooler_output
        given = {"attention_mask": words["attention_mask"]} if kind == "clip" else {}
        texts = model.get_text_features(input_ids=words["input_ids"], **given).pooler_output
    compare(bundle, coco, images, texts)
    embedder = bundle.embedder()
    assert embedder.logit_scale("image-text") == pytest.approx(model.logit_scale.exp().item(), rel=1e-6)
    assert (embedder.logit_bias("image-text") is None) is (kind == "clip")
    assert config.resize == ("shortest" if kind == "clip" else "squash")
    # the folder without its prefix, and a bundle of ours made of it
    compare(load_model(str(tmp_path / "m")), coco, images, texts)
    compare(load_model(str(bundle.save(tmp_path / "ours"))), coco, images, texts)


def test_transformers_preprocessing_is_ours(tmp_path: Path, coco: Photos) -> None:
    """The library's own image processor on real photos, odd borders included."""
    from transformers import CLIPImageProcessorPil

    write_hf(tmp_path, "clip")
    source: Any = load_model(str(tmp_path)).inputs["image"]
    theirs = CLIPImageProcessorPil.from_pretrained(tmp_path)([pil(x) for x, _ in coco], return_tensors="pt")
    ours = torch.stack([source.eval(source.decode(x)) for x, _ in coco]) / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (source.config.mean, source.config.std))
    longer = [int(64 * max(pil(x).size) / min(pil(x).size)) for x, _ in coco]
    assert any(round((n - 64) / 2) != (n - 64) // 2 for n in longer)
    assert ((ours - mean) / std - theirs["pixel_values"]).abs().max() <= 1e-5


def odd_sizes(photo: bytes) -> list[bytes]:
    """The photo in 60 sizes, landscape and portrait, every remainder of the border by 4 among them."""
    out = []
    for k in range(30):
        for wh in ((80 + 3 * k, 71 + k), (65 + k, 90 + 5 * k)):
            buffer = io.BytesIO()
            pil(photo).resize(wh).save(buffer, "PNG")
            out.append(buffer.getvalue())
    return out


def test_odd_sizes_are_prepared_as_either_library_does(tmp_path: Path, coco: Photos) -> None:
    import open_clip
    from transformers import CLIPImageProcessorPil

    pictures = odd_sizes(coco[0][0])
    write_hf(tmp_path / "hf", "clip")
    write_open_clip(tmp_path / "oc", SMALL, {})
    _, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'oc'}")
    processor = CLIPImageProcessorPil.from_pretrained(tmp_path / "hf")
    both = {
        "hf": processor([pil(x) for x in pictures], return_tensors="pt")["pixel_values"],
        "oc": torch.stack([preprocess(pil(x)) for x in pictures]),
    }
    made = {}
    for name, theirs in both.items():
        source: Any = load_model(str(tmp_path / name)).inputs["image"]
        ours = torch.stack([source.eval(source.decode(x)) for x in pictures]) / 255
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (source.config.mean, source.config.std))
        assert ((ours - mean) / std - theirs).abs().max() <= 1e-5, name
        made[name] = ours
    assert (made["hf"] != made["oc"]).flatten(1).any(1).sum() >= 10  # the border matters


def test_the_crop_is_kept_through_the_other_layout(tmp_path: Path, coco: Photos) -> None:
    """A model made with one library's crop has the same features when it comes back out of the other's folder; a bundle
    of before this setting keeps the crop it had."""
    from dualenc.model.export.export import export

    pictures = odd_sizes(coco[1][0])[:12]
    write_open_clip(tmp_path / "oc", SMALL, {})
    write_hf(tmp_path / "hf", "clip")
    for first, other in (("oc", "hf"), ("hf", "open_clip")):
        bundle = load_model(str(tmp_path / first))
        want = bundle.embedder().embed("image", pictures)
        export(bundle, other, tmp_path / f"{first}-out")
        back = load_model(str(tmp_path / f"{first}-out"))
        assert (back.embedder().embed("image", pictures) - want).abs().max() <= 1e-5
    old = load_model(str(tmp_path / "oc")).save(tmp_path / "old")
    said = json.loads((old / "dualenc.json").read_text())
    for key in ("centre", "shortest_edge"):
        del said["modalities"]["image"]["input"]["config"][key]
    (old / "dualenc.json").write_text(json.dumps(said))
    again: Any = load_model(str(old)).inputs["image"]
    assert again.config.centre == "round"


def test_a_resize_to_more_than_the_crop(tmp_path: Path, coco: Photos) -> None:
    """DINOv2's processor: the shortest edge to 256, then 224."""
    from transformers import CLIPImageProcessorPil

    write_hf(tmp_path, "clip")
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "size": {"shortest_edge": 73}}))
    source: Any = load_model(str(tmp_path)).inputs["image"]
    assert source.config.shortest_edge == 73
    theirs = CLIPImageProcessorPil.from_pretrained(tmp_path)([pil(x) for x, _ in coco], return_tensors="pt")
    ours = torch.stack([source.eval(source.decode(x)) for x, _ in coco]) / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (source.config.mean, source.config.std))
    assert ((ours - mean) / std - theirs["pixel_values"]).abs().max() <= 1e-5


def test_a_transformers_folder_with_missing_tensors_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    write_hf(tmp_path, "clip")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({k: v for k, v in tensors.items() if k != "text_projection.weight"}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"text_projection.weight"):
        load_model(str(tmp_path))


def test_one_tower_is_no_dual_encoder(tmp_path: Path) -> None:
    from transformers import BertConfig

    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"'bert' model.*encoder: \{name: hf/"):
        load_model(str(tmp_path))
