"""``python -m benchmarks.families``: which dual encoders of the installed transformers and open_clip load, and leave.

Small models of the real architectures with random weights are written by their library, loaded here, and compared with
the library's own features; each is then exported to every layout. Markdown on stdout.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import normalize

from dualenc.encoders.released.whole_models import REFUSED
from dualenc.errors import DualencError
from dualenc.model import Bundle, load_model
from dualenc.model.export.export import export

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
PICTURE = {"image_size": 64, "patch_size": 16}
WORDS = {"vocab_size": 1000, "max_position_embeddings": 32}
EXPORTS = ("hf", "open_clip", "sentence-transformers", "onnx", "safetensors")
TEXTS = ["a cat", "two dogs on a sofa", "a red bicycle leaning on a wall in the rain"]


@dataclass
class FamilyRow:
    """One family: how it loads, the largest difference of features, and which exports are possible."""

    name: str
    loads: str
    difference: float = math.nan
    exports: tuple[str, ...] = ()


def architectures() -> dict[str, Callable[[], Any]]:
    """model_type → a small random model of it."""
    import transformers as tf

    def two(name: str, words: dict[str, Any], picture: dict[str, Any], **whole: Any) -> Callable[[], Any]:
        def build() -> Any:
            config = getattr(tf, f"{name}Config")(text_config=words, vision_config=picture, **whole)
            return getattr(tf, f"{name}Model")(config)

        return build

    ends = {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    words, picture = {**SMALL, **WORDS, **ends}, {**SMALL, **PICTURE}
    align: dict[str, Any] = {"image_size": 64, "width_coefficient": 1.0, "depth_coefficient": 0.2, "hidden_dim": 64}
    align |= {"in_channels": [32, 16], "out_channels": [16, 24], "kernel_sizes": [3, 3], "strides": [1, 2]}
    align |= {"num_block_repeats": [1, 1], "expand_ratios": [1, 6], "depthwise_padding": []}
    tips: dict[str, Any] = {"text_config": words, "vision_config": {**picture, "mlp_ratio": 2}}
    grid = {**SMALL, "patch_size": 8, "num_patches": 36}
    sound: dict[str, Any] = {"spec_size": 256, "patch_embeds_hidden_size": 16, "hidden_size": 64, "depths": [1, 1, 2]}
    sound |= {"num_attention_heads": [2, 2, 2], "num_hidden_layers": 3}
    heard = tf.ClapConfig(text_config={**words, "hidden_size": 32}, audio_config=sound, projection_dim=24)
    return {
        "clip": two("CLIP", words, picture, projection_dim=48),
        "siglip": two("Siglip", words, picture),
        "siglip2": two("Siglip2", {**words, "bos_token_id": 2, "eos_token_id": 1}, grid),
        "clap": lambda: tf.ClapModel(heard),
        "metaclip_2": two("MetaClip2", words, picture, projection_dim=48),
        "aimv2": two("Aimv2", words, picture, projection_dim=48),
        "align": two("Align", {**words, "pad_token_id": 0}, align, projection_dim=64),
        "altclip": two("AltCLIP", {**words, "project_dim": 64}, picture, projection_dim=48),
        "chinese_clip": two("ChineseCLIP", words, picture, projection_dim=48),
        "tipsv2": lambda: tf.Tipsv2Model(tf.Tipsv2Config(**tips)),
        "vision-text-dual-encoder": lambda: tf.VisionTextDualEncoderModel(
            tf.VisionTextDualEncoderConfig(
                vision_config={**picture, "model_type": "vit"},
                text_config={**words, "model_type": "bert"},
                projection_dim=48,
            )
        ),
    }


def write(folder: Path, model: Any) -> None:
    """The model with a tokenizer of 1,000 words and its family's image processor."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim:
                p.add_(torch.randn(p.shape, generator=g) * 0.02)
    if model.config.model_type == "clap":  # statistics of log-mel in decibels
        norm = model.audio_model.audio_encoder.batch_norm
        norm.running_mean.fill_(-40)
        norm.running_var.fill_(500)
    model.eval().save_pretrained(folder)
    (write_letters if model.config.model_type == "siglip2" else write_words)(folder)
    if model.config.model_type == "clap":
        from transformers import ClapFeatureExtractor

        extractor: Any = ClapFeatureExtractor
        extractor(truncation="rand_trunc").save_pretrained(folder)
        return
    pre: dict[str, Any] = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"height": 64, "width": 64},
        "do_center_crop": False,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.25, 0.25, 0.25],
        "resample": 3,
    }
    if model.config.model_type == "align":  # as released: squashed, then the centre, pixels in -1…1
        pre |= {"image_processor_type": "EfficientNetImageProcessor", "size": {"height": 76, "width": 76}}
        pre |= {"crop_size": {"height": 64, "width": 64}, "do_center_crop": True, "include_top": False}
        pre |= {"rescale_factor": 1 / 127.5, "rescale_offset": True}
    if model.config.model_type == "siglip2":
        pre = {"image_processor_type": "Siglip2ImageProcessor", "patch_size": 8, "max_num_patches": 64, "resample": 2}
    if model.config.model_type == "tipsv2":
        pre |= {"image_processor_type": "Tipsv2ImageProcessor", "do_normalize": False}
    (folder / "preprocessor_config.json").write_text(json.dumps(pre))


def write_words(folder: Path) -> None:
    """A word-level tokenizer in transformers' layout: <pad> 0, <s> 1, </s> 2, then 997 words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    known = sorted({w for t in TEXTS for w in t.split()})
    names = ["<pad>", "<s>", "</s>", "<unk>", *known]
    names += [f"word{i}" for i in range(1000 - len(names))]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [("<s>", 1), ("</s>", 2)]
    raw.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    names_of = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    fast: Any = PreTrainedTokenizerFast
    fast(tokenizer_object=raw, model_max_length=32, **names_of).save_pretrained(folder)


def write_letters(folder: Path) -> None:
    """SigLIP 2's tokenizer class with a vocabulary of letters and bytes, <eos> after each text as released."""
    from tokenizers.processors import TemplateProcessing
    from transformers import Siglip2Tokenizer

    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *"abcdefghijklmnopqrstuvwxyz"]
    tokens += [f"<0x{b:02X}>" for b in range(256)]
    made: Any = Siglip2Tokenizer
    tokenizer = made({t: k for k, t in enumerate(tokens)}, [], model_max_length=32, padding_side="right")
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    tokenizer.save_pretrained(folder)


def pictures() -> list[bytes]:
    """Three drawings of odd sizes as PNG."""
    import io

    from PIL import Image

    out = []
    for i, (w, h) in enumerate([(97, 64), (64, 83), (120, 121)]):
        g = torch.Generator().manual_seed(i)
        small = torch.randint(0, 256, (8, 8, 3), generator=g, dtype=torch.uint8).numpy()
        file = io.BytesIO()
        Image.fromarray(small).resize((w, h), Image.Resampling.BICUBIC).save(file, "PNG")
        out.append(file.getvalue())
    return out


RATE = 48_000


def waves() -> list[Any]:
    """Two clips of noise that swells, mono at :data:`RATE`."""
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(n, generator=g) * torch.linspace(0.01, 0.3, n)).numpy() for n in (RATE, RATE * 9 // 16)]


def clips() -> list[bytes]:
    """:func:`waves` as files."""
    from dualenc.data.modalities.sound_file import wav_of

    return [wav_of(x, RATE) or b"" for x in waves()]


def items_of(bundle: Bundle) -> dict[str, list[Any]]:
    """What a model encodes here, as raw items."""
    whole: dict[str, list[Any]] = {"image": list(pictures()), "text": TEXTS, "audio": list(clips())}
    return {m: whole[m] for m in bundle.modalities}


def pixels_of(folder: Path) -> dict[str, torch.Tensor]:
    """:func:`pictures` through the processor of a folder, Pillow's where there are several."""
    import io

    from PIL import Image
    from transformers import AutoImageProcessor

    images_of: Any = AutoImageProcessor
    seen = [Image.open(io.BytesIO(x)) for x in pictures()]
    return dict(images_of.from_pretrained(folder, backend="pil")(seen, return_tensors="pt"))


def by_library(
    folder: Path, model: Any, modalities: Sequence[str], pixels: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """The library's own features, from its own processor and tokenizer; or from ``pixels``."""
    from transformers import AutoFeatureExtractor, AutoTokenizer

    logging.getLogger("transformers").setLevel(logging.ERROR)
    siglip = model.config.model_type.startswith("siglip")
    how: dict[str, Any] = (
        {"padding": "max_length", "max_length": 32, "truncation": True} if siglip else {"padding": True}
    )
    words = AutoTokenizer.from_pretrained(folder)(TEXTS, return_tensors="pt", return_token_type_ids=False, **how)
    given = {k: v for k, v in words.items() if not (siglip and k == "attention_mask")}
    out = {}
    with torch.no_grad():
        if "image" in modalities:
            out["image"] = model.get_image_features(**(pixels or pixels_of(folder)))
        if "audio" in modalities:
            extractor: Any = AutoFeatureExtractor.from_pretrained(folder)  # type: ignore[no-untyped-call]
            heard = extractor(waves(), sampling_rate=RATE, return_tensors="pt")
            out["audio"] = model.get_audio_features(**heard)
        out["text"] = model.get_text_features(**given)
    return {m: normalize(x.pooler_output, dim=-1) for m, x in out.items()}


def exports_of(bundle: Bundle, folder: Path) -> tuple[str, ...]:
    """The layouts the model can be written in."""
    done = []
    for layout in EXPORTS:
        with contextlib.suppress(DualencError):
            export(bundle, layout, folder / layout)
            done.append(layout)
    return tuple(done)


def measure(name: str, build: Callable[[], Any], folder: Path) -> FamilyRow:
    """One family of transformers."""
    torch.manual_seed(0)
    model = build()
    write(folder / "m", model)
    try:
        bundle = load_model(f"hf:{folder / 'm'}")
    except DualencError as e:
        return FamilyRow(name, str(e).partition(": ")[2] or str(e))
    items, embedder = items_of(bundle), bundle.embedder()
    expected = by_library(folder / "m", model, list(items))
    got = {m: embedder.embed(m, x) for m, x in items.items()}
    worst = max(float((got[m] - expected[m]).abs().max()) for m in expected)
    exports = exports_of(bundle, folder / "out")
    if "hf" in exports:
        again = load_model(str(folder / "out" / "hf")).embedder()
        worst = max([worst, *(float((again.embed(m, x) - got[m]).abs().max()) for m, x in items.items())])
    return FamilyRow(name, "whole", worst, exports)


def open_clip_rows(names: list[str] | None = None) -> list[FamilyRow]:
    """open_clip's configurations by the kinds of their towers: one of each is built on no device and read."""
    import open_clip

    from dualenc.encoders.adapters import open_clip as oc

    kinds: dict[str, tuple[str, list[str]]] = {}
    for name in names or open_clip.list_models():
        cfg = open_clip.get_model_config(name) or {}
        vision, text = cfg.get("vision_cfg", {}), cfg.get("text_cfg", {})
        image = (
            "timm" if vision.get("timm_model_name") else "ResNet" if isinstance(vision.get("layers"), list) else "ViT"
        )
        words = "transformers' " if text.get("hf_model_name") else ""
        coca = ", CoCa" if "multimodal_cfg" in cfg else ""
        kind = f"open_clip {image} + {words}text{coca}"
        kinds.setdefault(kind, (name, []))[1].append(name)
    rows = []
    for kind, (first, members) in sorted(kinds.items()):
        try:
            oc.architecture(first, oc.OpenClipConfig(pretrained=False))
            says = "whole"
        except DualencError as e:
            says = str(e)
        rows.append(FamilyRow(f"{kind} ({len(members)}, as {first})", says))
    return rows


def table(rows: list[FamilyRow]) -> str:
    """Markdown."""
    head = "| family | loads | largest difference | exports |\n|---|---|---|---|\n"
    lines = []
    for r in rows:
        difference = "" if math.isnan(r.difference) else f"{r.difference:.1e}"
        lines.append(f"| {r.name} | {r.loads} | {difference} | {', '.join(r.exports)} |")
    return head + "\n".join(lines)


def rows_of_transformers(only: str = "") -> list[FamilyRow]:
    """Every family with a small model here, then those that are refused by name."""
    built = architectures()
    rows = []
    for name, build in built.items():
        if only in ("", name):
            with tempfile.TemporaryDirectory() as folder:
                rows.append(measure(name, build, Path(folder)))
    others = {name: f"refused: {why}" for name, why in sorted(REFUSED.items())}
    return rows + [FamilyRow(name, says) for name, says in others.items() if only in ("", name)]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="one model_type")
    args = parser.parse_args()
    rows = rows_of_transformers(args.only)
    print(table(rows if args.only else rows + open_clip_rows()))


if __name__ == "__main__":
    main()
