"""Does a filter earn its place? Flickr8k with 30 % swapped captions, with and without a selection by CLIP-score.

    python -m benchmarks.filtering FLICKR8K [--out runs/filtering] [--swapped 0.3] [--seeds 3] [--epochs 20]

FLICKR8K is the folder with captions.jsonl. Released towers score and are trained: EfficientNet-Lite0 and MiniLM-L6,
both frozen, each under a linear head of its own, so everything is embedded once and a run takes seconds. The scorer has
seen none of the samples it scores, and no clean label: heads trained on one half of the noisy set score the other half.
The scores are written beside the shards, ``top 70% by clip_score`` is the selection, and the order of every run is the
trainer's own plan for these shards with that selection. Arms: all samples; the selection; as many samples drawn at
random; the samples that were not swapped. Recall on the 500 dev photos and their captions, which are clean.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dualenc.config import Data, load_recipe
from dualenc.data.shards.index import build_plan, open_sources
from dualenc.data.shards.selection import SCORES, file_of, read_weights, write_scores
from dualenc.losses.functional import info_nce
from dualenc.model import build_bundle
from dualenc.model.start_from import completed
from dualenc_data_tools.build import build
from dualenc_data_tools.choose.filter import IMAGE, Opened
from dualenc_data_tools.choose.select import keep, select

ARMS = {
    "all samples": None,
    "top 70 % by CLIP-score": "best",
    "70 % at random": "random",
    "only the right ones": "right",
}
SCALE, BATCH, DIM = 20.0, 256, 256


def swapped_set(folder: Path, out: Path, share: float) -> str:
    """Shards of the training photos, a share of which have the captions of another; returns their pattern."""
    rows = [json.loads(line) for line in (folder / "captions.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [r for r in rows if r["split"] == "train"]
    picked = np.random.default_rng(0).permutation(len(rows))[: round(share * len(rows))].tolist()
    captions = [rows[i]["captions"] for i in picked]
    for k, i in enumerate(picked):
        rows[i] = {**rows[i], "captions": captions[(k + 1) % len(picked)], "swapped": "yes"}
    rows = [{"swapped": "no", **r, "image": str((folder / r["image"]).resolve())} for r in rows]
    out.mkdir(parents=True, exist_ok=True)
    (out / "noisy.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    build("jsonl", out, {"path": str(out / "noisy.jsonl"), "overwrite": True}, progress=False)
    return f"{out}/train-*.tar"


class Frozen:
    """The released towers' own features of images [n, 1280] and captions [n, 384]."""

    def __init__(self) -> None:
        recipe = load_recipe("finetune/released_lit", ["modalities.image.lock=trunk"], completed)
        self.bundle = build_bundle(recipe)
        self.embedder = self.bundle.embedder()

    @torch.no_grad()
    def of(self, modality: str, items: Sequence[Any]) -> Tensor:
        """Frozen features, L2-normalised, of raw items."""
        batches = self.embedder.batches(modality, items, 64)
        return torch.cat([self.bundle.model({modality: x})["frozen"][modality] for x in batches])


def read(opened: Opened) -> tuple[list[bytes], list[list[str]], np.ndarray[Any, Any]]:
    """Images, captions and whether each sample was swapped, in stored order."""
    reads = {"image": IMAGE, "text": ["json:captions"], "swapped": ["json:swapped"]}
    rows = [r for s in range(len(opened.shards.names)) for chunk in opened.rows(s, reads) for r in chunk]
    return [r.values["image"] for r in rows], [r.captions for r in rows], np.array([r.values["swapped"] for r in rows])


class Heads(torch.nn.Module):
    """A linear head for each side."""

    def __init__(self, widths: tuple[int, int], seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.image, self.text = (torch.nn.Linear(w, DIM) for w in widths)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        sides = self.image(image), self.text(text)
        return torch.nn.functional.normalize(sides[0], dim=-1), torch.nn.functional.normalize(sides[1], dim=-1)


def train(image: Tensor, text: Tensor, batches: Sequence[np.ndarray[Any, Any]], seed: int) -> Heads:
    """Train heads on batches of sample numbers, one of the captions ``text`` [n, 5, W] drawn each time."""
    heads = Heads((image.shape[1], text.shape[2]), seed)
    steps = len(batches)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 0.5 * (1 + np.cos(np.pi * s / steps)))
    draw = np.random.default_rng(seed)
    for at in batches:
        a, b = heads(image[at], text[at, draw.integers(0, text.shape[1], len(at))])
        loss = info_nce(a, b, SCALE)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return heads.eval()


def planned(pattern: str, selection: str | None, seed: int, steps: int, starts: np.ndarray[Any, Any]) -> list[Any]:
    """Sample numbers of each step, from the trainer's own plan."""
    source = {"name": "flickr8k", "shards": pattern, "members": {"image": ["jpg"], "text": ["json:captions"]}}
    data = Data.model_validate({"sources": [source | ({"selection": selection} if selection else {})]})
    plan = build_plan(data, open_sources(data), seed)
    refs = [plan.local(step, 0, 1, BATCH) for step in range(steps)]
    return [starts[r.shard] + r.sample for r in refs]


def recalls(heads: Heads, image: Tensor, text: Tensor) -> dict[str, float]:
    """Recall in percent among n images and their 5 n captions."""
    with torch.no_grad():
        a, b = heads(image, text.flatten(0, 1))
    scores, n, k = a @ b.T, len(image), text.shape[1]
    of = torch.arange(n).repeat_interleave(k)
    best = scores.masked_fill(of[None] != torch.arange(n)[:, None], -2).max(1).values
    to_text = (scores > best[:, None]).sum(1)
    to_image = (scores.T.gather(1, of[:, None]) < scores.T).sum(1)
    sides = {"image→text": to_text, "text→image": to_image}
    return {f"{s} R@{at}": 100 * float((r < at).float().mean()) for s, r in sides.items() for at in (1, 10)}


def score(pattern: str, image: Tensor, text: Tensor, epochs: int) -> np.ndarray[Any, Any]:
    """The cosine of each sample, mean over its captions, by heads that were trained on the other half."""
    half = np.random.default_rng(1).permutation(len(image)) % 2
    out = np.zeros(len(image))
    for side in (0, 1):
        seen, unseen = np.flatnonzero(half != side), np.flatnonzero(half == side)
        draw = np.random.default_rng(side)
        batches = [b for _ in range(epochs) for b in np.array_split(draw.permutation(seen), len(seen) // BATCH)]
        heads = train(image, text, batches, seed=100 + side)
        with torch.no_grad():
            a, b = heads(image[unseen], text[unseen])
        out[unseen] = (a[:, None] * b).sum(-1).mean(1).double().numpy()
    return out


def study(folder: Path, out: Path, share: float, seeds: int, epochs: int) -> None:
    """Run it and print the table."""
    pattern = swapped_set(folder, out, share)
    opened = Opened.of(pattern)
    pictures, captions, swapped = read(opened)
    dev = [json.loads(x) for x in (folder / "captions.jsonl").read_text(encoding="utf-8").splitlines()]
    dev = [r for r in dev if r["split"] == "dev"]
    frozen = Frozen()
    image, text = frozen.of("image", pictures), frozen.of("text", [c for cs in captions for c in cs])
    dev_image = frozen.of("image", [(folder / r["image"]).read_bytes() for r in dev])
    dev_text = frozen.of("text", [c for r in dev for c in r["captions"]])
    dev_text = dev_text.reshape(len(dev), -1, dev_text.shape[1])
    text = text.reshape(len(image), -1, text.shape[1])
    scores, wrong = score(pattern, image, text, epochs), swapped == "yes"
    write_scores(file_of("clip_score", opened.shards, SCORES), opened.shards, opened.index_of, scores)
    select(pattern, f"top {100 * (1 - share):g}% by clip_score", "best")
    kept = read_weights("best", opened.shards) > 0
    drawn = np.zeros(len(image))
    drawn[np.random.default_rng(2).permutation(len(image))[: int(kept.sum())]] = 1
    keep(opened, drawn, "drawn at random", "random")
    keep(opened, (~wrong).astype(np.float64), "not swapped", "right")
    order = np.argsort(np.argsort(scores))
    below = (order[~wrong].sum() - (~wrong).sum() * ((~wrong).sum() - 1) / 2) / ((~wrong).sum() * wrong.sum())
    both = int((kept & wrong).sum())
    print(f"{len(image):,} samples, {wrong.sum():,} swapped; a right one scores above a swapped one in {below:.1%}")
    print(f"selected: {kept.sum():,}, of them swapped {both:,} ({both / kept.sum():.1%})\n")
    begin = np.concatenate([[0], np.cumsum(opened.shards.counts)])
    steps, names = epochs * len(image) // BATCH, ["image→text R@1", "R@10", "text→image R@1", "R@10"]
    print("| trained on | " + " | ".join(names) + " |\n|---|" + "---|" * len(names))
    for arm, selection in ARMS.items():
        rows = []
        for seed in range(seeds):
            heads = train(image, text, planned(pattern, selection, seed, steps, begin), seed)
            rows.append(list(recalls(heads, dev_image, dev_text).values()))
        table = np.array(rows)
        spread = table.std(0, ddof=1) if seeds > 1 else np.zeros(table.shape[1])
        cells = [f"{m:.1f} ± {s:.1f}" for m, s in zip(table.mean(0), spread, strict=True)]
        print(f"| {arm} | " + " | ".join(cells) + " |", flush=True)
    opened.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("flickr8k", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/filtering"))
    parser.add_argument("--swapped", type=float, default=0.3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    given = parser.parse_args()
    study(given.flickr8k, given.out, given.swapped, given.seeds, given.epochs)


if __name__ == "__main__":
    main()
