"""dualenc against open_clip in one process, taking turns: text tower, training step from disk, evaluation, embedding.

    python -m benchmarks.versus [text] [step] [evaluation] [embed] [--model ViT-B-32] [--runs 5]
        [--captions 128] [--install] [--json FILE]

Both sides have the same architecture with random weights, one thread, and the same captions and photos, those of
``benchmarks.loader``. CPU seconds; a round is one turn of each side, ratios are taken within a round, medians over
rounds. open_clip's side is its own model, tokenizer, transform, webdataset pipeline and loss, in the order of its
training loop; evaluation is clip-benchmark's, installed into ``build/clip-benchmark`` with ``--install``. dualenc's is
the step, the loader and the embedder of ``dualenc train`` and ``eval``.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
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


def turns(part: str, what: str, items: int, ours: Side | dict[str, Side], theirs: Side, runs: int) -> list[Row]:
    """A row of the results for each of our sides: items per CPU second of either, and the ratio.

    Args:
        ours: one, or several by what tells them apart.
    """
    several = ours if isinstance(ours, dict) else {"": ours}
    sides = {"theirs": theirs, **{f"ours {k}": side for k, side in several.items()}}
    for side in sides.values():
        side()
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(runs):
        for name, side in sides.items():
            begin = time.process_time()
            side()
            rates[name].append(items / (time.process_time() - begin))
    return [row(part, f"{what}, {k}" if k else what, "per CPU s", rates[f"ours {k}"], rates["theirs"]) for k in several]


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


def web_like(count: int, of: int = 4096) -> list[str]:
    """Captions with lengths as alt texts have: log-normal, median 10 words, a tail that the context cuts.

    Every (``of`` / ``count``)-th of ``of`` captions in the order of their lengths: what a batch of ``of`` costs a
    caption, in a batch that fits into memory. Packed, the cost is linear in tokens; padded to 77, in captions.
    """
    words = " ".join(loader.captions()).split()
    rng = np.random.default_rng(0)
    lengths = np.sort(np.clip(np.exp(rng.normal(np.log(10), 0.75, of)), 1, 120).astype(int))[
        of // count // 2 :: of // count
    ]
    return [" ".join(words[(i * 131) % 5000 :][:n]) for i, n in enumerate(lengths)]


def text(pair: Pair, batch: int, runs: int) -> Iterator[Row]:
    """Captions of one batch through the text towers, forward and backward, and forward alone."""
    every = loader.captions()
    sets = {
        f"{batch} captions": [every[i * 11 % len(every)] for i in range(batch)],
        f"{batch} of 4,096 web-like": web_like(batch),
    }
    tower: Any = pair.bundle.model.towers["text"]
    for what, texts in sets.items():
        rows, tokens = pair.text_rows(texts), pair.tokenizer(texts)
        what += f" (mean {rows['mask'].sum(1).float().mean():.1f} tokens)"

        def theirs(tokens: Tensor = tokens) -> Tensor:
            out: Tensor = pair.peer.encode_text(tokens, normalize=True)
            return out

        def ours(rows: Any = rows) -> Tensor:
            out: Tensor = pair.bundle.model({"text": rows})["features"]["text"]
            return out

        pair.mode(training=True)
        yield from turns(
            "text tower, forward and backward", what, batch, _trained(ours, tower), _trained(theirs, pair.peer), runs
        )
    pair.mode(training=False)
    with torch.no_grad():
        yield from turns("text tower, forward", what, batch, _only(ours), _only(theirs), runs)


def _trained(encode: Callable[[], Tensor], module: torch.nn.Module) -> Side:
    def run() -> None:
        module.zero_grad(set_to_none=True)
        encode().square().sum().backward()  # type: ignore[no-untyped-call]

    return run


def _only(make: Callable[[], Tensor]) -> Side:
    def run() -> None:
        make()

    return run


def step(pair: Pair, folder: Path, batch: int, runs: int) -> list[Row]:
    """Training from shards on disk: read, decode, augment, both towers, loss, backward, AdamW."""
    size = int(open_clip.get_model_config(pair.model)["vision_cfg"]["image_size"])
    data, peer_data = loader.ours(folder, batch, "fast", size), loader.theirs(folder, batch, size)
    loss = build_loss(pair.recipe.loss)
    model = pair.bundle.model.train()
    optimizer = torch.optim.AdamW(
        pair.peer.train().parameters(), lr=5e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2
    )
    peer_loss = open_clip.ClipLoss()

    def ours(fused: bool) -> Side:
        optim = pair.recipe.optim.model_copy(update={"fused": fused})
        engine = build_engine(pair.recipe.engine, optim, model, World())

        def run() -> None:
            train_step(engine, next(data), pair.recipe.pairs, loss)

        return run

    def theirs() -> None:
        images, tokens = next(peer_data)
        optimizer.zero_grad()
        features = pair.peer(images, tokens)
        peer_loss(*features[:3]).backward()
        torch.nn.utils.clip_grad_norm_(pair.peer.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            pair.peer.logit_scale.clamp_(0, 4.6052)

    sides = {"": ours(False), "optim.fused=true": ours(True)}
    return turns("training step from disk", f"{pair.model}, batch {batch}", batch, sides, theirs, runs)


def clip_benchmark(venv: Path, make: bool) -> tuple[Any, Any] | None:
    """clip-benchmark's evaluations, from an environment of its own on top of this one's; None where it is not.

    Args:
        make: make the environment if it is not there (needs a package index).
    """
    python = venv / "bin" / "python"
    if make and not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", "--no-deps", "clip-benchmark"], check=True)
    # Only that package is there: the others, such as torch and open_clip, are those of this process.
    found = sorted(venv.glob("lib/python*/site-packages"))
    if not found or not any((f / "clip_benchmark").is_dir() for f in found):
        return None
    sys.path += [str(f) for f in found if str(f) not in sys.path]
    classification: Any = importlib.import_module("clip_benchmark.metrics.zeroshot_classification")
    retrieval: Any = importlib.import_module("clip_benchmark.metrics.zeroshot_retrieval")
    classification.accuracy = _accuracy
    classification.tqdm = retrieval.tqdm = iter  # no progress bars
    return classification, retrieval


def _accuracy(logits: Tensor, target: Tensor, topk: tuple[int, ...] = (1,)) -> list[float]:
    """As clip-benchmark 1.6's, which numpy 2.4 refuses to turn into numbers."""
    best = logits.topk(max(topk), 1).indices == target[:, None]
    return [float(best[:, :k].any(1).float().mean()) for k in topk]


def evaluation(pair: Pair, peers: tuple[Any, Any] | None, quick: bool, runs: int) -> Iterator[Row]:
    """Zero-shot classification and retrieval as clip-benchmark does them, in fp32 on both sides.

    Without clip-benchmark, classification by open_clip's own ``build_zero_shot_classifier``.
    """
    classes, templates, images = (2, 3, 4) if quick else (8, 40, 48)
    names = [f"{a} {b}" for a in ("red", "old", "small", "wooden") for b in loader.captions()[0].split()][:classes]
    forms = open_clip.OPENAI_IMAGENET_TEMPLATES[:templates]
    raw, every = loader.photos(images), loader.captions()
    embedder = Embedder.from_bundle(pair.bundle)
    transform = open_clip.transform.image_transform(224, is_train=False)
    peer = pair.peer.eval()

    def pictures(items: list[bytes], targets: list[Any], classes: list[str] | None = None) -> Any:
        rows: Any = _Rows([(r, t) for r, t in zip(items, targets, strict=True)], transform)
        rows.classes = classes

        def collate(found: list[Any]) -> Any:
            pixels, said = zip(*found, strict=True)
            return torch.stack(pixels), torch.tensor(said) if classes is not None else list(said)

        return torch.utils.data.DataLoader(rows, batch_size=64, collate_fn=collate)

    labels = [i % len(names) for i in range(len(raw))]

    def ours() -> None:
        prompts = [f(n) for n in names for f in forms]
        weights = embedder.embed("text", prompts, 256).view(len(names), len(forms), -1).mean(1)
        (embedder.embed("image", raw, 64) @ torch.nn.functional.normalize(weights, dim=1).T).argmax(1)

    def theirs() -> None:
        if peers is not None:
            said = [f("{c}") for f in forms]
            rows = pictures(raw, labels, names)
            peers[0].evaluate(peer, rows, pair.tokenizer, names, said, "cpu", amp=False)
            return
        with torch.no_grad():
            weights = open_clip.build_zero_shot_classifier(peer, pair.tokenizer, names, forms, num_classes_per_batch=10)
            for rows, _ in pictures(raw, labels, names):
                (peer.encode_image(rows, normalize=True) @ weights).argmax(1)

    by = "clip-benchmark" if peers is not None else "open_clip"
    what = f"{by}: {len(names)} classes × {len(forms)} templates, {len(raw)} photos"
    yield from turns("zero-shot evaluation", what, len(names) * len(forms) + len(raw), ours, theirs, runs)
    if peers is None:
        return
    few = raw[: max(len(raw) // 2, 2)]
    captions = [[every[(i * 5 + k) % len(every)] for k in range(5)] for i in range(len(few))]

    def our_retrieval() -> None:
        texts = embedder.embed("text", [c for own in captions for c in own], 256)
        (texts @ embedder.embed("image", few, 64).T).topk(min(5, len(few)), dim=1)

    def their_retrieval() -> None:
        peers[1].evaluate(
            peer, pictures(few, captions), pair.tokenizer, "cpu", amp=False, recall_k_list=[min(5, len(few))]
        )

    what = f"{by}: retrieval, {len(few)} photos, 5 captions each"
    yield from turns("zero-shot evaluation", what, 6 * len(few), our_retrieval, their_retrieval, runs)


class _Rows(torch.utils.data.Dataset[Any]):
    """Encoded photos as a data set of torchvision's would give them, with what belongs to each."""

    classes: list[str] | None = None

    def __init__(self, items: list[tuple[bytes, Any]], transform: Any) -> None:
        self.items, self.transform = items, transform

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> tuple[Tensor, Any]:
        raw, target = self.items[i]
        return self.transform(Image.open(io.BytesIO(raw))), target


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

        yield from turns("embedding", f"{size} {m}s", size, ours, theirs, runs)


SMALL = {
    "embed_dim": 192,
    "vision_cfg": {"image_size": 64, "patch_size": 16, "layers": 6, "width": 192, "head_width": 64},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 192, "heads": 3, "layers": 6},
}
"""A CLIP of about the quickstart's size."""


def measure(given: argparse.Namespace) -> Iterator[Row]:
    """The rows of some parts."""
    torch.set_num_threads(1)
    parts, quick, runs = given.parts, given.quick, given.runs
    with tempfile.TemporaryDirectory() as folder:
        small = Path(folder) / "small.json"
        small.write_text(json.dumps(SMALL), "utf-8")
        open_clip.add_model_config(small)
        batch = given.batch or (4 if quick else 16)
        pair = Pair(given.model, batch)
        if "text" in parts:
            for size in [8] if quick else given.captions:
                yield from text(pair, size, runs)
        if "evaluation" in parts:
            yield from evaluation(pair, clip_benchmark(given.clip_benchmark, given.install), quick, runs)
        if "embed" in parts:
            yield from embed(pair, *((4, 8) if quick else (16, 128)), runs)
        if "step" in parts:
            loader.write_shards(Path(folder), 128 if quick else 1024)
            yield from step(pair, Path(folder), batch, runs)


def main(arguments: list[str]) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.versus")
    parser.add_argument("parts", nargs="*", default=["text", "step", "evaluation", "embed"])
    parser.add_argument("--model", default="ViT-B-32", help="of open_clip, or small")
    parser.add_argument("--runs", type=int, default=5, help="rounds")
    parser.add_argument("--captions", type=int, nargs="+", default=[128], help="batches of the text part")
    parser.add_argument("--batch", type=int, help="of the step part")
    venv = Path(__file__).parents[1] / "build" / "clip-benchmark"
    parser.add_argument("--clip-benchmark", type=Path, default=venv, help="its environment")
    parser.add_argument("--install", action="store_true", help="make that environment if it is not there")
    parser.add_argument("--quick", action="store_true", help="few items: to see that it runs")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    given = parser.parse_args(arguments)
    rows = []
    for r in measure(given):
        rows.append(r)
        print(
            f"{r['part']:>38}  {r['what']:<40} {r['ours']:9.1f} {r['theirs']:9.1f} {r['unit']}  "
            f"{r['ratio']:5.2f} ×  ({r['low']:.2f}–{r['high']:.2f})",
            flush=True,
        )
    print(f"median of {given.runs} rounds, one thread, load {os.getloadavg()[0]:.1f}")
    if given.json is not None:
        given.json.write_text(json.dumps({"rows": rows}, indent=1), "utf-8")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except DualencError as e:
        raise SystemExit(f"error: {e}") from None
