"""SigLIP 2 NaFlex: pictures in their own aspect as grids of patches; input and features against transformers' own."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_export import same_model, same_tensors
from test_released_models import TEXT, VISION, compare, pil, randomise
from torch import Tensor

from dualenc.config import Component
from dualenc.data.modalities import modalities
from dualenc.data.modalities.naflex import grid
from dualenc.encoders import build_tower
from dualenc.errors import CheckpointError, ConfigError
from dualenc.model import load_model
from dualenc.model.export.export import export

Photos = list[tuple[bytes, list[str]]]
PATCH, LIMIT = 8, 64


def spelling() -> Any:
    """SigLIP 2's tokenizer class, <eos> after each text as released; Gemma's vocabulary is not at hand: it spells."""
    from tokenizers.processors import TemplateProcessing
    from transformers import Siglip2Tokenizer

    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *"abcdefghijklmnopqrstuvwxyz"]
    tokens += [f"<0x{b:02X}>" for b in range(256)]
    tokenizer = Siglip2Tokenizer({t: k for k, t in enumerate(tokens)}, [], model_max_length=64, padding_side="right")
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    return tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    import transformers as tf

    torch.manual_seed(0)
    tokenizer = spelling()
    words = {**TEXT, "max_position_embeddings": 64, "vocab_size": len(tokenizer), "bos_token_id": 2, "eos_token_id": 1}
    looks = {k: v for k, v in VISION.items() if k != "image_size"} | {"patch_size": PATCH, "num_patches": 36}
    model = tf.Siglip2Model(tf.Siglip2Config(text_config=words, vision_config=looks))
    randomise(model)
    model.eval().save_pretrained(tmp_path / "m")
    pre = {"image_processor_type": "Siglip2ImageProcessor", "patch_size": PATCH, "max_num_patches": LIMIT}
    (tmp_path / "m" / "preprocessor_config.json").write_text(json.dumps({**pre, "resample": 2}))
    tokenizer.save_pretrained(tmp_path / "m")
    return tmp_path / "m"


@pytest.fixture(scope="module")
def turned(coco: Photos) -> Photos:
    """Photos of several aspects: as they are, on their side, and a strip."""
    from PIL import Image

    out = []
    for k, (raw, texts) in enumerate(coco):
        image = pil(raw)
        if k % 3 == 1:
            image = image.transpose(Image.Transpose.ROTATE_90)
        if k % 3 == 2:
            image = image.crop((0, 0, image.width, image.height // 4))
        held = io.BytesIO()
        image.save(held, "PNG")
        out.append((held.getvalue(), texts))
    return out


def by_transformers(folder: Path, photos: Photos) -> tuple[Any, Tensor, Tensor]:
    """The library's own processor, tokenizer and model."""
    from transformers import AutoTokenizer, Siglip2ImageProcessorPil, Siglip2Model

    model = Siglip2Model.from_pretrained(folder, dtype=torch.float32).eval()
    given = Siglip2ImageProcessorPil.from_pretrained(folder)([pil(x) for x, _ in photos], return_tensors="pt")
    texts = [t[0] for _, t in photos]
    words = AutoTokenizer.from_pretrained(folder)(
        texts, padding="max_length", max_length=64, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        image = model.get_image_features(**given).pooler_output
        text = model.get_text_features(input_ids=words["input_ids"]).pooler_output
    return given, image, text


def test_grids_are_transformers_own() -> None:
    from transformers.models.siglip2.image_processing_pil_siglip2 import get_image_size_for_max_num_patches

    rng = np.random.default_rng(0)
    for _ in range(1000):
        width, height = (int(v) for v in np.exp(rng.uniform(0, np.log(6000), 2)))
        patch, limit = int(rng.choice([8, 14, 16])), int(rng.choice([64, 256, 1024]))
        rows, columns = grid(width, height, patch, limit)
        assert (rows * patch, columns * patch) == get_image_size_for_max_num_patches(height, width, patch, limit)
        assert rows * columns <= limit or min(rows, columns) == 1


def test_input_and_features_and_the_way_back(folder: Path, turned: Photos, tmp_path: Path) -> None:
    given, images, texts = by_transformers(folder, turned)
    ours = load_model(f"hf:{folder}")
    source: Any = ours.inputs["image"]
    batch = source.collate([source.eval(source.decode(x)) for x, _ in turned])
    assert len(set(map(tuple, batch["grid"].tolist()))) >= 3, "the photos should differ in aspect"
    assert torch.equal(batch["grid"], given["spatial_shapes"])
    real = torch.arange(LIMIT) < batch["grid"].prod(-1, keepdim=True)
    assert ((batch["patches"] / 255 - 0.5) / 0.5 - given["pixel_values"])[real].abs().max() <= 1e-5
    compare(ours, turned, images, texts)
    compare(load_model(str(ours.save(tmp_path / "ours"))), turned, images, texts)
    export(ours, "hf", tmp_path / "hf")
    same_tensors(folder / "model.safetensors", tmp_path / "hf" / "model.safetensors")
    same_model(ours, load_model(str(tmp_path / "hf")))
    again, image, text = by_transformers(tmp_path / "hf", turned)
    assert torch.equal(again["pixel_values"], given["pixel_values"])
    assert torch.equal(image, images)
    assert torch.equal(text, texts)
    with pytest.raises(ConfigError, match=r"open_clip has no Siglip2Model"):
        export(ours, "open_clip", tmp_path / "oc")
    with pytest.raises(ConfigError, match=r"modalities.image.*NaFlex tower"):
        export(ours, "onnx", tmp_path / "onnx")


def test_padding_changes_nothing_and_gradients_arrive(folder: Path, turned: Photos) -> None:
    ours = load_model(f"hf:{folder}")
    source: Any = ours.inputs["image"]
    tower = ours.model.tower("image")
    rng = np.random.default_rng(0)
    batch = source.collate([source.train(source.decode(x), rng) for x, _ in turned])
    out = tower.encode(batch)
    used = int(batch["grid"].prod(-1).max())
    noise = torch.randint(0, 256, batch["patches"].shape, dtype=torch.uint8)
    real = (torch.arange(LIMIT) < batch["grid"].prod(-1, keepdim=True))[..., None]
    noisy = torch.where(real, batch["patches"], noise)
    assert (tower.encode({"patches": noisy, "grid": batch["grid"]}) - out).abs().max() <= 1e-5
    assert (tower.encode({"patches": batch["patches"][:, :used], "grid": batch["grid"]}) - out).abs().max() <= 1e-5
    out.square().sum().backward()
    assert not [k for k, p in tower.named_parameters() if p.grad is None]


def test_training_crops_keep_the_aspect(turned: Photos) -> None:
    cls = modalities["image"]
    source = cls(
        cls.Config(resize="naflex", patch=4, max_patches=400, augment={"scale": (0.3, 1.0), "ratio": (0.9, 1.1)})
    )  # type: ignore[call-arg]
    rng = np.random.default_rng(0)
    for raw, _ in turned:
        picture = source.decode(raw)
        for _ in range(10):
            row = source.train(picture, rng)
            assert 200 <= row.shape[0] * row.shape[1] <= 400
            assert 0.7 <= (row.shape[1] / row.shape[0]) / (picture.size[0] / picture.size[1]) <= 1.4
    assert source.collate([source.dummy()])["patches"].shape == (1, 400, 48)


def test_a_grid_and_a_tower_that_do_not_fit_are_refused(folder: Path) -> None:
    cls = modalities["image"]
    plain, naflex = (cls(cls.Config(resize=way)).describe() for way in ("squash", "naflex"))  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match=r"input.resize: naflex needs one of"):
        build_tower("image", Component(name="own/vit"), naflex, 32)
    for describe in (plain, naflex):  # patches of 16 px, the tower has 8
        with pytest.raises(ConfigError, match=r"resize: naflex, patch: 8"):
            build_tower("image", Component(name=f"hf/{folder}"), describe, 64)
    file = folder / "preprocessor_config.json"
    file.write_text(file.read_text().replace('"patch_size": 8', '"patch_size": 16'))
    with pytest.raises(CheckpointError, match=r"patch_size.*16 px.*8"):
        load_model(f"hf:{folder}")


def test_padding_on_the_other_side_is_refused(folder: Path) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "padding_side": "left"}))
    with pytest.raises(CheckpointError, match=r"tokenizer_config.json: padding_side: left"):
        load_model(f"hf:{folder}")
