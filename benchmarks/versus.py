"""dualenc against open_clip in one process, taking turns: text tower, training step from disk, evaluation, embedding.

    python -m benchmarks.versus [text] [step] [evaluation] [embed] [--model ViT-B-32] [--runs 5]
        [--captions 128 1024] [--json FILE]

Both sides have the same architecture with random weights, one thread, and the same captions and photos, those of
``benchmarks.loader``. CPU seconds; a round is one turn of each side, ratios are taken within a round, medians over
rounds. open_clip's side is its own model, tokenizer, transform, webdataset pipeline, loss and classifier builder, in
the order of its training loop; dualenc's is the step, the loader and the embedder of ``dualenc train`` and ``eval``.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import open_clip
import torch
from PIL import Image
from torch import Tensor

from benchmarks import loader
from dualenc.config import Recipe, load_recipe
from dualenc.distributed.world import World
from dualenc.engine import build_engine
from dualenc.errors import DualencError
from dualenc.losses import build_loss
from dualenc.model import Bundle, build_bundle
from dualenc.model.embedder import Embedder
from dualenc.shipped import find_recipe
from dualenc.train.step import train_step

Row = dict[str, Any]
Side = Callable[[], None]


def turns(part: str, what: str, items: int, ours: Side, theirs: Side, runs: int) -> Row:
    """A row of the results: items per CPU second of either side, and the ratio."""
    for side in (theirs, ours):
        side()
    rates: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(runs):
        for name, side in (("theirs", theirs), ("ours", ours)):
            begin = time.process_time()
            side()
            rates[name].append(items / (time.process_time() - begin))
    return row(part, what, "per CPU s", rates["ours"], rates["theirs"])


def row(part: str, what: str, unit: str, ours: list[float], theirs: list[float], more_is_better: bool = True) -> Row:
    """Medians, and how many times as fast (or small) dualenc is, round by round."""
    pairs = zip(ours, theirs, strict=True)
    ratios = [a / b if more_is_better else b / a for a, b in pairs]
    return {
        "part": part,
        "what": what,
        "unit": unit,
        "ours": median(ours),
        "theirs": median(theirs),
        "ratio": median(ratios),
        "low": min(ratios),
        "high": max(ratios),
        "rounds": len(ratios),
    }


class Pair:
    """The same architecture on both sides, random weights."""

    def __init__(self, model: str, batch: int) -> None:
        dim = open_clip.get_model_config(model)["embed_dim"]
        names = [f"modalities.{m}.encoder.name=open_clip/{model}" for m in ("image", "text")]
        more = ["engine.precision=fp32", "engine.compile=false", "engine.device=cpu", "engine.parallel=ddp"]
        path = find_recipe("pretrain/clip_vit_b32")
        sizes = [f"embed_dim={dim}", f"batch.size={batch}", "batch.micro=null", "budget.samples=1000000"]
        self.recipe: Recipe = load_recipe(path, [*names, *more, *sizes, "schedule.warmup_samples=0"])
        self.bundle: Bundle = build_bundle(self.recipe)
        self.peer: Any = open_clip.create_model(model)
        self.tokenizer: Any = open_clip.get_tokenizer(model)
        self.model = model

    def mode(self, training: bool) -> None:
        """Both sides in training or in evaluation."""
        self.peer.train(training)
        self.bundle.model.train(training)

    def text_rows(self, texts: list[str]) -> Any:
        """Captions as dualenc's text tower takes them."""
        of = self.bundle.inputs["text"]
        return of.collate([of.eval(of.decode(t.encode())) for t in texts])


def text(pair: Pair, batch: int, runs: int) -> Iterator[Row]:
    """Captions of one batch through the text towers, forward and backward, and forward alone."""
    every = loader.captions()
    texts = [every[i * 11 % len(every)] for i in range(batch)]
    rows, tokens = pair.text_rows(texts), pair.tokenizer(texts)
    tower: Any = pair.bundle.model.towers["text"]

    def trained(encode: Callable[[], Tensor], module: torch.nn.Module) -> Side:
        def run() -> None:
            module.zero_grad(set_to_none=True)
            encode().square().sum().backward()  # type: ignore[no-untyped-call]

        return run

    def theirs() -> Tensor:
        out: Tensor = pair.peer.encode_text(tokens, normalize=True)
        return out

    def ours() -> Tensor:
        out: Tensor = pair.bundle.model({"text": rows})["features"]["text"]
        return out

    pair.mode(training=True)
    what, sides = f"{batch} captions", (trained(ours, tower), trained(theirs, pair.peer))
    yield turns("text tower, forward and backward", what, batch, *sides, runs)
    pair.bundle.model.group_lengths()
    yield turns("text tower, forward and backward (length groups)", what, batch, *sides, runs)
    pair.mode(training=False)
    with torch.no_grad():
        yield turns("text tower, forward (length groups)", what, batch, _only(ours), _only(theirs), runs)
    tower.length_groups = False


def _only(make: Callable[[], Tensor]) -> Side:
    def run() -> None:
        make()

    return run


def step(pair: Pair, folder: Path, batch: int, runs: int) -> Iterator[Row]:
    """Training from shards on disk: read, decode, augment, both towers, loss, backward, AdamW."""
    data, peer_data = loader.ours(folder, batch, "fast"), loader.theirs(folder, batch)
    engine = build_engine(pair.recipe.engine, pair.recipe.optim, pair.bundle.model.train(), World())
    loss = build_loss(pair.recipe.loss)
    optimizer = torch.optim.AdamW(
        pair.peer.train().parameters(), lr=5e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2
    )
    peer_loss = open_clip.ClipLoss()

    def ours() -> None:
        train_step(engine, next(data), pair.recipe.pairs, loss)

    def theirs() -> None:
        images, tokens = next(peer_data)
        optimizer.zero_grad()
        features = pair.peer(images, tokens)
        peer_loss(*features[:3]).backward()
        torch.nn.utils.clip_grad_norm_(pair.peer.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            pair.peer.logit_scale.clamp_(0, 4.6052)

    yield turns("training step from disk", f"{pair.model}, batch {batch}", batch, ours, theirs, runs)


def evaluation(pair: Pair, classes: int, templates: int, images: int, runs: int) -> Iterator[Row]:
    """Zero-shot classification: class weights from templates, and photos scored against them."""
    names = [f"{a} {b}" for a in ("red", "old", "small", "wooden") for b in loader.captions()[0].split()][:classes]
    forms = open_clip.OPENAI_IMAGENET_TEMPLATES[:templates]
    raw = loader.photos(images)
    embedder = Embedder.from_bundle(pair.bundle)
    transform = open_clip.transform.image_transform(224, is_train=False)
    peer = pair.peer.eval()

    def ours() -> None:
        prompts = [f(n) for n in names for f in forms]
        weights = embedder.embed("text", prompts, 256).view(len(names), len(forms), -1).mean(1)
        (embedder.embed("image", raw, 64) @ torch.nn.functional.normalize(weights, dim=1).T).argmax(1)

    def theirs() -> None:
        with torch.no_grad():
            weights = open_clip.build_zero_shot_classifier(peer, pair.tokenizer, names, forms, num_classes_per_batch=10)
            for i in range(0, len(raw), 64):
                rows = torch.stack([transform(Image.open(io.BytesIO(r))) for r in raw[i : i + 64]])
                (peer.encode_image(rows, normalize=True) @ weights).argmax(1)

    items = len(names) * len(forms) + len(raw)
    what = f"{len(names)} classes × {len(forms)} templates, {len(raw)} photos"
    yield turns("zero-shot evaluation", what, items, ours, theirs, runs)


def embed(pair: Pair, images: int, texts: int, runs: int) -> Iterator[Row]:
    """Features of photos and of captions, from encoded bytes and strings."""
    raw, every = loader.photos(images), loader.captions()
    said = [every[i * 7 % len(every)] for i in range(texts)]
    embedder = Embedder.from_bundle(pair.bundle)
    transform = open_clip.transform.image_transform(224, is_train=False)
    peer = pair.peer.eval()

    def photos() -> None:
        with torch.no_grad():
            peer.encode_image(torch.stack([transform(Image.open(io.BytesIO(r))) for r in raw]), normalize=True)

    def captions() -> None:
        with torch.no_grad():
            peer.encode_text(pair.tokenizer(said), normalize=True)

    for m, items, theirs in (("image", raw, photos), ("text", said, captions)):
        size = len(items)

        def ours(m: str = m, items: Any = items, size: int = size) -> None:
            embedder.embed(m, items, size)

        yield turns("embedding", f"{size} {m}s", size, ours, theirs, runs)


def measure(parts: list[str], model: str, runs: int, quick: bool, captions: list[int]) -> list[Row]:
    """The rows of some parts."""
    torch.set_num_threads(1)
    batch = 4 if quick else 16
    out: list[Row] = []
    if {"text", "evaluation", "embed"} & set(parts):
        pair = Pair(model, batch)
        if "text" in parts:
            for size in [8] if quick else captions:
                out += text(pair, size, runs)
        if "evaluation" in parts:
            out += evaluation(pair, *((2, 3, 4) if quick else (8, 40, 64)), runs)
        if "embed" in parts:
            out += embed(pair, *((4, 8) if quick else (32, 256)), runs)
    if "step" in parts:
        with tempfile.TemporaryDirectory() as folder:
            loader.write_shards(Path(folder), 128 if quick else 2048)
            out += step(Pair(model, batch), Path(folder), batch, runs)
    return out


def main(arguments: list[str]) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.versus")
    parser.add_argument("parts", nargs="*", default=["text", "step", "evaluation", "embed"])
    parser.add_argument("--model", default="ViT-B-32", help="of open_clip")
    parser.add_argument("--runs", type=int, default=5, help="rounds")
    parser.add_argument("--captions", type=int, nargs="+", default=[128, 1024], help="batches of the text part")
    parser.add_argument("--quick", action="store_true", help="few items: to see that it runs")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    given = parser.parse_args(arguments)
    rows = measure(given.parts, given.model, given.runs, given.quick, given.captions)
    for r in rows:
        print(
            f"{r['part']:>38}  {r['what']:<40} {r['ours']:9.1f} {r['theirs']:9.1f} {r['unit']}  "
            f"{r['ratio']:5.2f} ×  ({r['low']:.2f}–{r['high']:.2f})"
        )
    print(f"median of {given.runs} rounds, one thread, load {os.getloadavg()[0]:.1f}")
    if given.json is not None:
        given.json.write_text(json.dumps({"rows": rows}, indent=1), "utf-8")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except DualencError as e:
        raise SystemExit(f"error: {e}") from None
