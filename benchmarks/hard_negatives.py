"""Captions with two words swapped as hard negatives: does the model then tell who does what to whom?

    python -m benchmarks.hard_negatives FLICKR8K [--recipe finetune/released_full] [--seeds 0 1 2] [--out OUT] [--table]

FLICKR8K is a folder with ``captions.jsonl`` (rows {image, split, captions}) and the photos it names. Two arms share
recipe, data order and number of steps: info_nce, and info_nce with the swapped captions of the training photos as
further columns (``input.negatives: json:negatives``, one of a photo's drawn a step). Prints, for dev photos in percent,
mean ± standard deviation over seeds:

- swap: how often a photo scores its caption above the same caption with two words swapped (chance 50), for all captions
  and for those in which both words are of one class (:data:`CLASSES`), which are still grammatical;
- blind: the same with the mean of all dev photos in place of the photo. What is above 50 there is language alone: such
  swaps can be told without looking (which Hsieh et al. 2023, arXiv 2306.14610, found of older test sets);
- R@1 and R@10 of the task ``flickr8k``.

Each run is a process of its own, ``OUT/ARM-SEED``, and is not run again once it has ended; ``--table`` only prints what
is there.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from dualenc.api.model import load_model
from dualenc.files import write_atomically

ARMS: dict[str, list[str]] = {
    "info_nce": [],
    "info_nce + swapped": ["modalities.text.input.negatives=json:negatives", "modalities.text.input.max_negatives=1"],
}
CLASSES = {
    "colour": "black white brown red blue green yellow orange pink purple grey gray tan blond blonde golden",
    "person": "man woman boy girl child person baby lady guy kid toddler player rider skier snowboarder biker surfer "
    "skateboarder cyclist bicyclist climber hiker dog horse bird cat puppy",
    "people": "men women boys girls children people dogs kids players horses",
    "thing": "shirt hat jacket dress coat helmet cap suit uniform vest sweater skirt jersey scarf glasses sunglasses "
    "collar shorts pants jeans water grass snow field street beach pool park ocean hill sand road river lake forest "
    "mountain sidewalk yard ground wall building fountain ramp ball bike stick toy frisbee car rope bench boat "
    "skateboard bicycle motorcycle truck table chair rock tree fence guitar bag sign umbrella camera cellphone",
    "doing": "running playing standing jumping sitting walking riding holding looking climbing swimming smiling "
    "carrying",
    "does": "runs jumps stands sits plays walks looks rides holds watches climbs smiles catches",
    "size": "young little small large big older old tall long huge",
}
"""Words that stand in for each other and leave a sentence grammatical: the most frequent ones of Flickr8k. Animals
count as persons, and clothes and places as things."""
CLASS_OF = {word: name for name, words in CLASSES.items() for word in words.split()}
JOINING = {"and", ",", "or", "a", "an", "the"}
FUNCTION = frozenset(
    word
    for words in (
        "a an the and or of in on at to is are was be being has have with by for from as into onto over under up down",
        "off out near next through while its his her their this that it he she they who another other some one two",
        "three four five around behind along across front there them him each against above during after",
    )
    for word in words.split()
)
"""Words that are never swapped."""


def swapped(caption: str, seed: int = 0) -> tuple[str, bool] | None:
    """The caption with two words swapped, and whether they are of one class; None if it has no two to swap.

    A pair of one class is drawn if there is one, else any two words that are not in :data:`FUNCTION`. The draw
    depends on the caption and the seed alone. Neighbours in a list ("black and white") are left where they are, since
    the caption would still be right.
    """
    words = caption.split()
    low = [w.lower() for w in words]
    content = [i for i, w in enumerate(low) if w.replace("-", "").isalpha() and w not in FUNCTION]
    pairs = [(i, j) for i, j in combinations(content, 2) if low[i] != low[j] and not _listed(low[i : j + 1])]
    alike = [(i, j) for i, j in pairs if _one_class(low[i], low[j])]
    if not pairs:
        return None
    i, j = random.Random(f"{seed}:{caption}").choice(alike or pairs)
    words[i], words[j] = low[j], low[i]
    text = " ".join(words)
    return text[:1].upper() + text[1:] if caption[:1].isupper() else text, bool(alike)


def _one_class(a: str, b: str) -> bool:
    return a in CLASS_OF and CLASS_OF[a] == CLASS_OF.get(b)


def _listed(words: list[str]) -> bool:
    """Whether the first and last word are items of one list: all between them joins, or is of their class."""
    first, *between, last = words
    joins = [w in JOINING or (_one_class(w, first) and _one_class(w, last)) for w in between]
    return any(w in ("and", ",", "or") for w in between) and all(joins)


def prepare(flickr: Path, out: Path) -> str:
    """Shards of the training photos with their swapped captions, written once; the shards' pattern."""
    pattern = str(out / "data" / "train-*.tar")
    if (out / "data" / "index.json").is_file():
        return pattern
    lines = []
    for row in _rows(flickr, "train"):
        wrong = [found[0] for text in row["captions"] if (found := swapped(text))]
        lines.append(json.dumps(row | ({"negatives": wrong} if wrong else {})))
    captions = out / "captions.jsonl"
    write_atomically(captions, "\n".join(lines) + "\n")
    settings = [f"path={captions}", f"root={flickr}", "split=train"]
    build = [sys.executable, "-m", "dualenc", "shards", "build", "jsonl", *settings, "--out", str(out / "data")]
    subprocess.run(build, check=True, stdout=sys.stderr)
    return pattern


def _rows(flickr: Path, split: str) -> list[dict[str, Any]]:
    lines = (flickr / "captions.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row["split"] == split]


def train(folder: Path, recipe: str, flickr: Path, shards: str, seed: int, overrides: list[str]) -> dict[str, Any]:
    """Train an arm in a process of its own and measure it."""
    sources = json.dumps(
        [{"name": "flickr8k", "shards": shards, "members": {"image": ["jpg"], "text": ["json:captions"]}}]
    )
    given = [f"data.sources={sources}", f"out={folder}", f"seed={seed}", "engine.threads=1", *overrides]
    env = os.environ | {"COLUMNS": "200", "DUALENC_DATA": str(flickr.parents[1])}
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "dualenc", "train", recipe, *given], check=True, stdout=sys.stderr, env=env)
    seconds = time.monotonic() - began
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    recall = {
        k.removeprefix("eval/flickr8k/"): v for x in logged for k, v in x.items() if k.startswith("eval/flickr8k/")
    }
    loss = [x["loss"] for x in logged if "loss" in x]
    return {"seconds": round(seconds), "loss": [loss[0], loss[-1]], "recall": recall, **swap_accuracy(folder, flickr)}


def swap_accuracy(run: Path, flickr: Path) -> dict[str, float]:
    """Shares of dev captions that score above their swapped ones, of all and of those within a class."""
    model = load_model(run)
    rows = _rows(flickr, "dev")
    tried = [(k, text, found) for k, row in enumerate(rows) for text in row["captions"] if (found := swapped(text))]
    images = torch.as_tensor(model.encode(image=[flickr / row["image"] for row in rows]))
    right = torch.as_tensor(model.encode(text=[text for _, text, _ in tried]))
    wrong = torch.as_tensor(model.encode(text=[found[0] for *_, found in tried]))
    alike = torch.tensor([found[1] for *_, found in tried])
    better = right - wrong
    seen = (images[[k for k, *_ in tried]] * better).sum(1) > 0
    blind = better @ images.mean(0) > 0
    out = {"swap": seen, "swap_class": seen[alike], "blind": blind, "blind_class": blind[alike]}
    return {k: float(x.double().mean()) for k, x in out.items()} | {
        "captions": len(tried),
        "in_class": int(alike.sum()),
    }


def table(found: dict[str, dict[str, Any]]) -> str:
    """The arms as Markdown."""
    directions = sorted({k for x in found.values() for k in x["recall"] if k.endswith(("R@1", "R@10"))})
    columns = ["swap", "swap_class", "blind", "blind_class", *directions]
    lines = [f"| trained with | seeds | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    for arm in ARMS:
        runs = [x for name, x in found.items() if name.rpartition(" ")[0] == arm]
        if runs:
            cells = [_spread([100 * {**x, **x["recall"]}[c] for x in runs]) for c in columns]
            lines.append(f"| {arm} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    return f"{mean(values):.1f} ± {stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description="Captions with two words swapped as hard negatives, on Flickr8k.")
    parser.add_argument("flickr8k", type=Path)
    parser.add_argument("--recipe", default="finetune/released_full")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="instead of the recipe's")
    parser.add_argument("--out", type=Path, default=Path("runs/hard_negatives"))
    parser.add_argument("--table", action="store_true", help="print what is there, run nothing")
    arguments = parser.parse_args()
    out, flickr = arguments.out.resolve(), arguments.flickr8k.resolve()
    out.mkdir(parents=True, exist_ok=True)
    ledger = out / "runs.json"
    found: dict[str, dict[str, Any]] = json.loads(ledger.read_text()) if ledger.is_file() else {}
    if not arguments.table:
        shards = prepare(flickr, out)
        steps = [f"budget.steps={arguments.steps}", f"eval.every_steps={arguments.steps}"] if arguments.steps else []
        for seed in arguments.seeds:
            for k, (arm, overrides) in enumerate(ARMS.items()):
                if (name := f"{arm} {seed}") not in found:
                    folder = out / f"arm{k}-{seed}"
                    found[name] = train(folder, arguments.recipe, flickr, shards, seed, [*steps, *overrides])
                    write_atomically(ledger, json.dumps(found, indent=1))
                    print(name, found[name], file=sys.stderr, flush=True)
    print(table(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
