"""Planted faults: how many each tool finds, and how many samples of a clean set it wrongly names.

    python -m benchmarks.planted FLICKR8K [--samples 2000] [--model MODEL] [--out runs/planted]
    python -m benchmarks.planted --million

FLICKR8K is the folder with captions.jsonl. The clean set is the first training photos as they are; the planted set has
these faults in it, repeats at the end: 1 % corrupt images (cut in half), 1 % without a caption, 1 % repeated (the same
pixels as PNG, another key and caption), 1 % repeated as a smaller JPEG of quality 60, 0.5 % dev photos (the task
flickr8k; half as they are, half re-encoded), and, with a model to score them, 5 % whose captions were swapped. Swapped
captions are those among the lowest 5 % of clip_score. ``--million`` times the search for near images among a million
random hashes of which one in a hundred was planted near another.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dualenc.api.contamination import items_of
from dualenc.data.shards.index import build_index
from dualenc.data.shards.selection import read_scores
from dualenc_data_tools.choose.duplicates import contamination, duplicates
from dualenc_data_tools.choose.filter import Opened, run_filters
from dualenc_data_tools.choose.fingerprints import NEAR_BITS, EqualGroups, Prints
from dualenc_data_tools.writer import ShardWriter

SHARES = {"corrupt": 0.01, "no caption": 0.01, "repeated": 0.01, "re-encoded": 0.01, "in an evaluation": 0.005}
SWAPPED, LOWEST = 0.05, 0.05


@dataclass
class PlantedSample:
    """One sample to be written, and what was done to it."""

    key: str
    image: bytes
    ending: str
    captions: list[str]
    faults: set[str] = field(default_factory=set)


def read(folder: Path, split: str, count: int | None) -> list[PlantedSample]:
    """Samples of a split."""
    rows = [json.loads(line) for line in (folder / "captions.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [r for r in rows if r["split"] == split][:count]
    return [
        PlantedSample(Path(r["image"]).stem, (folder / r["image"]).read_bytes(), "jpg", r["captions"]) for r in rows
    ]


def plant(clean: list[PlantedSample], dev: list[PlantedSample], swap: bool, seed: int = 0) -> list[PlantedSample]:
    """The clean samples with faults in them."""
    rng = np.random.default_rng(seed)
    counts = {name: max(2, round(share * len(clean))) for name, share in SHARES.items()}
    swapped = max(3, round(SWAPPED * len(clean))) if swap else 0
    places = iter(rng.permutation(len(clean)).tolist())
    out = [PlantedSample(s.key, s.image, s.ending, s.captions) for s in clean]
    for _ in range(counts["corrupt"]):
        s = out[next(places)]
        s.image, s.faults = s.image[: len(s.image) // 2], {"corrupt"}
    for _ in range(counts["no caption"]):
        s = out[next(places)]
        s.captions, s.faults = [], {"no caption"}
    chosen = [next(places) for _ in range(swapped)]
    taken = [out[i].captions for i in chosen]
    for k, i in enumerate(chosen):
        out[i].captions, out[i].faults = taken[(k + 1) % len(taken)], {"swapped"}
    more: list[PlantedSample] = []
    for fault, encode in (("repeated", as_png), ("re-encoded", smaller_jpeg)):
        for k in range(counts[fault]):
            s = clean[next(places)]
            ending, raw = encode(s.image)
            more.append(PlantedSample(f"{fault}{k}", raw, ending, s.captions[1:] or s.captions, {fault}))
    for k in range(counts["in an evaluation"]):
        s = dev[k]
        ending, raw = ("jpg", s.image) if k % 2 else smaller_jpeg(s.image)
        more.append(PlantedSample(f"dev{k}", raw, ending, s.captions, {"in an evaluation"}))
    # Repeats come behind what they repeat: the first of a group is the one that is kept.
    return out + [more[i] for i in rng.permutation(len(more)).tolist()]


def as_png(raw: bytes) -> tuple[str, bytes]:
    out = io.BytesIO()
    Image.open(io.BytesIO(raw)).convert("RGB").save(out, "PNG")
    return "png", out.getvalue()


def smaller_jpeg(raw: bytes) -> tuple[str, bytes]:
    image, out = Image.open(io.BytesIO(raw)).convert("RGB"), io.BytesIO()
    image.resize((image.width * 4 // 5, image.height * 4 // 5), Image.Resampling.LANCZOS).save(out, "JPEG", quality=60)
    return "jpg", out.getvalue()


def write(samples: list[PlantedSample], folder: Path) -> str:
    """Shards of them; returns their pattern."""
    writer = ShardWriter(folder, overwrite=True)
    for s in samples:
        text = json.dumps({"captions": s.captions}, ensure_ascii=False).encode()
        writer.write(s.key, {s.ending: s.image, "json": text})
    paths = writer.close(index=False)
    build_index([str(p) for p in paths], folder)
    return f"{folder}/train-*.tar"


def found(pattern: str, tasks: list[str], model: str | None) -> dict[str, np.ndarray[Any, Any]]:
    """Fault → which samples the tool for it names."""
    named = ["usable", *(["clip_score"] if model else [])]
    run_filters(pattern, named, {"clip_score": {"model": model}} if model else None)
    duplicates(pattern)
    contamination(pattern, items_of(tasks))
    shards = Opened.of(pattern).shards
    usable, repeat, in_task = (read_scores(n, shards) for n in ("usable", "duplicate", "contaminated"))
    out = {
        "corrupt": usable == "broken image",
        "no caption": usable == "no caption",
        "repeated": repeat == "exact",
        "re-encoded": repeat == "near",
        "in an evaluation": in_task != "ok",
    }
    if model:
        score = read_scores("clip_score", shards)
        out["swapped"] = score <= np.nanquantile(score, LOWEST)
    return out


def table(
    folder: Path, out: Path, samples: int, model: str | None, tasks: list[str]
) -> list[tuple[str, int, int, int, int]]:
    """(fault, planted, found, false alarms in the planted set, alarms in the clean set)."""
    clean, dev = read(folder, "train", samples), read(folder, "dev", None)
    faulty = plant(clean, dev, model is not None)
    in_planted = found(write(faulty, out / "planted"), tasks, model)
    in_clean = found(write(clean, out / "clean"), tasks, model)
    rows = []
    for fault, named in in_planted.items():
        there = np.array([fault in s.faults for s in faulty])
        rows.append((fault, int(there.sum()), int((named & there).sum()), int((named & ~there).sum()),
                     int(in_clean[fault].sum())))  # fmt: skip
    return rows


def million(n: int = 1_000_000) -> Iterator[str]:
    """Time and memory of the search among random hashes."""
    rng = np.random.default_rng(0)
    prints = Prints(n)
    prints.exact = rng.integers(0, 2**64, n, np.uint64)
    prints.fine = rng.integers(0, 2**64, (n, 5), np.uint64)
    prints.there[:] = prints.near[:] = True
    near = rng.permutation(n)[: n // 50].reshape(2, -1)
    flips = np.zeros(near.shape[1], np.uint64)
    for _ in range(NEAR_BITS):
        flips |= np.uint64(1) << rng.integers(0, 64, len(flips)).astype(np.uint64)
    prints.fine[near[1]] = prints.fine[near[0]]
    prints.fine[near[1], 0] ^= flips
    begin, groups = time.perf_counter(), EqualGroups(n)
    groups.join(prints.near_pairs())
    first = groups.first()
    took = time.perf_counter() - begin
    right = int((first[near[0]] == first[near[1]]).sum())
    other = int((first != np.arange(n)).sum()) - right
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    yield f"{n:,} images: {right:,} of {near.shape[1]:,} planted pairs found, {other:,} others"
    yield f"{took:.1f} s, {time.process_time():.1f} s of CPU with imports, peak {peak:,.0f} MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("flickr8k", type=Path, nargs="?")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--model", default=None, help="what scores captions; without it none are swapped")
    parser.add_argument("--tasks", default="flickr8k")
    parser.add_argument("--out", type=Path, default=Path("runs/planted"))
    parser.add_argument("--million", action="store_true")
    given = parser.parse_args()
    if given.million:
        print("\n".join(million()))
        return
    if given.flickr8k is None:
        parser.error("give the folder of Flickr8k, or --million")
    print("| fault | planted | found | false alarms | alarms in the clean set |\n|---|---|---|---|---|")
    for row in table(given.flickr8k, given.out, given.samples, given.model, given.tasks.split(",")):
        print("| " + " | ".join(map(str, row)) + " |")


if __name__ == "__main__":
    main()
