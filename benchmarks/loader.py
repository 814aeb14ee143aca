"""Training rows per core: dualenc's loader against open_clip's own webdataset pipeline, in one process.

    python -m benchmarks.loader [--samples 2048] [--batch 64] [--batches 4] [--runs 5] [--json FILE] [--shards FOLDER]

Both read the same shards of 500×375 JPEGs with a caption each and end with a batch of 224 px training rows and token
ids: random resized crops (scale 0.9 … 1), CLIP's tokenizer. open_clip's side is its ``get_wds_dataset`` with its own
transform, which ends in normalised fp32; dualenc's ends in uint8, as workers ship it (the device normalises). No worker
processes: CPU seconds of this process (``time.process_time``), one thread, the sides taking turns; medians, and the
median of the ratios within a round. The photos come from ../shared/data (1600×900 driving scenes scaled down, so that
they are as sharp as photos are) or, where that is absent, are made by code.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import mean, median
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image
from webdataset import tariterators

from dualenc.config import Data, settings_as
from dualenc.data.loader import Loader
from dualenc.data.modalities.modality import modalities
from dualenc.errors import DualencError
from dualenc_data_tools.writer import ShardWriter

WIDTH, HEIGHT, SIZE = 500, 375, 224
QUALITY = 90
DATA = Path(os.environ.get("DUALENC_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
_CAPTIONS = (
    "A black dog is running after a white dog in the snow .",
    "Two children play in the fountain while a woman in a red dress takes a photograph of them",
    "a family is sitting down at a table to have cake",
    "Café terrace at night – watercolour, 30 × 40 cm, signed & dated 1998",
    "Cars and a bus wait at a crossing in the rain; the traffic light is red",
)


# --- the shards ----------------------------------------------------------------------------------------------------


def photos(count: int = 256) -> list[bytes]:
    """Distinct JPEGs of 500×375: crops of real photos where they are, else 1/f noise."""
    found = sorted((DATA / "camera_lidar").rglob("CAM_*/*.jpg"))
    out: list[bytes] = []
    for i in range(count):
        image = _crop(found[i % len(found)], i // len(found)) if found else _noise(i)
        raw = io.BytesIO()
        image.save(raw, "JPEG", quality=QUALITY)
        out.append(raw.getvalue())
    return out


def _crop(path: Path, which: int) -> Image.Image:
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    scale = HEIGHT * (1.0 + 0.25 * (which % 4)) / image.height
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    left, top = (image.width - WIDTH) * (which % 3) // 2, (image.height - HEIGHT) // 2
    return image.crop((left, top, left + WIDTH, top + HEIGHT))


def _noise(seed: int) -> Image.Image:
    """Noise whose amplitude falls with frequency, as that of photos does."""
    rng = np.random.default_rng(seed)
    fy, fx = np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)[None]
    falls = 1 / np.maximum(np.hypot(fy, fx), 1 / WIDTH)
    grey = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(HEIGHT, WIDTH))) * falls, (HEIGHT, WIDTH))
    tint = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(3, HEIGHT, WIDTH))) * falls**1.5, (HEIGHT, WIDTH))
    x = grey[..., None] / grey.std() + 0.3 * np.moveaxis(tint / tint.std(), 0, -1)
    return Image.fromarray(np.clip(128 + 50 * x, 0, 255).astype(np.uint8))


def captions() -> list[str]:
    """Sentences people wrote, where they are."""
    path = DATA / "image_text" / "flickr8k" / "captions.jsonl"
    if not path.is_file():
        return list(_CAPTIONS)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [c for r in rows for c in r["captions"]] + list(_CAPTIONS)


def write_shards(folder: Path, samples: int, shards: int = 8) -> None:
    """``samples`` photos with a caption each; photos repeat, captions do not: tokenizers remember them."""
    texts, images = captions(), photos()
    with ShardWriter(folder, max_samples=-(-samples // shards)) as writer:
        for i in range(samples):
            text = texts[i * 7 % len(texts)]
            writer.write(f"{i:06d}", {"jpg": images[i % len(images)], "txt": text.encode()})


# --- the two sides -------------------------------------------------------------------------------------------------


def ours(folder: Path, batch: int, decode: str, size: int = SIZE) -> Iterator[Any]:
    """dualenc's batches, endlessly."""
    urls = str(folder / "train-*.tar")
    data = Data.model_validate({"sources": [{"name": "bench", "shards": urls}], "workers": 0})
    augment = {"scale": [0.9, 1.0]}
    settings: dict[str, dict[str, Any]] = {"image": {"size": size, "augment": augment, "decode": decode}, "text": {}}
    inputs = {m: modalities[m](settings_as(modalities[m].Config, s, m)) for m, s in settings.items()}
    return iter(Loader(data, inputs, [("image", "text")], seed=0, batch_size=batch))


def theirs(folder: Path, batch: int, size: int = SIZE) -> Iterator[Any]:
    """open_clip's batches, endlessly: shards drawn with replacement, its tokenizer, transform and shuffle."""
    import open_clip
    from open_clip.transform import AugmentationCfg, image_transform
    from open_clip_train import data as open_clip_data

    # webdataset 1.0 ends every shard with an empty record, which open_clip 3.3 does not expect.
    open_clip_data.tar_file_expander = partial(tariterators.tar_file_expander, eof_value=None)
    cut = AugmentationCfg(scale=(0.9, 1.0))
    transform = image_transform(size, is_train=True, aug_cfg=cut)
    urls = sorted(str(p) for p in folder.glob("train-*.tar"))
    args = SimpleNamespace(
        train_data="::".join(urls),
        train_data_upsampling_factors=None,
        dataset_resampled=True,
        train_num_samples=1 << 20,
        batch_size=batch,
        workers=0,
        world_size=1,
        seed=0,
    )
    info = open_clip_data.get_wds_dataset(args, transform, is_train=True, tokenizer=open_clip.get_tokenizer("ViT-B-32"))
    return iter(info.dataloader)


# --- measuring -----------------------------------------------------------------------------------------------------


def measure(sides: dict[str, Iterator[Any]], batches: int, batch: int, runs: int) -> dict[str, list[float]]:
    """Side → samples per CPU second of each round; the sides take turns within a round."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():  # shuffle buffers fill, files open, libraries load
        next(side)
    for _ in range(runs):
        for name, side in sides.items():
            start = time.process_time()
            for _ in range(batches):
                next(side)
            found[name].append(batches * batch / (time.process_time() - start))
    return found


def report(found: dict[str, list[float]], reference: str) -> list[dict[str, Any]]:
    """A row a side: samples per CPU second, and the ratio to ``reference`` round by round."""
    rows = []
    for name, speeds in found.items():
        ratios = [a / b for a, b in zip(speeds, found[reference], strict=True)]
        rows.append(
            {
                "side": name,
                "samples_per_cpu_s": round(median(speeds), 1),
                "ratio": round(median(ratios), 2),
                "ratio_range": [round(min(ratios), 2), round(max(ratios), 2)],
            }
        )
    return rows


def main(arguments: list[str]) -> None:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loader")
    parser.add_argument("--samples", type=int, default=2048, help="samples in the shards")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--batches", type=int, default=4, help="batches of each side in a round")
    parser.add_argument("--runs", type=int, default=5, help="rounds")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--shards", type=Path, help="keep the shards here, or read those that are here")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.shards or Path(temporary)
        if not any(folder.glob("train-*.tar")):
            write_shards(folder, given.samples)
        sizes = [p.stat().st_size for p in folder.glob("train-*.tar")]
        sides = {
            "open_clip + webdataset": theirs(folder, given.batch),
            "dualenc, decode: reference": ours(folder, given.batch, "reference"),
            "dualenc, decode: fast": ours(folder, given.batch, "fast"),
        }
        found = measure(sides, given.batches, given.batch, given.runs)
    rows = report(found, "open_clip + webdataset")
    print(
        f"{WIDTH}×{HEIGHT} JPEG, {mean(sizes) * len(sizes) / given.samples / 1e3:.0f} kB a sample → {SIZE} px row, ",
        end="",
    )
    print(f"one core, median of {given.runs} rounds, load {os.getloadavg()[0]:.1f}")
    for row in rows:
        low, high = row["ratio_range"]
        print(
            f"{row['side']:>28}  {row['samples_per_cpu_s']:7.1f} samples/s  "
            f"{row['ratio']:5.2f} ×  ({low:.2f}–{high:.2f})"
        )
    if given.json is not None:
        versions = {"torch": torch.__version__, "pillow": PIL.__version__}
        given.json.write_text(json.dumps({"rows": rows, "rounds": found, "versions": versions}, indent=1), "utf-8")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except DualencError as e:
        raise SystemExit(f"error: {e}") from None
