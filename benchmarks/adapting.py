"""Adapting trained models with little: replayed classes, labels a model gave itself, heads trained on text alone.

    python -m benchmarks.adapting {replay,pseudo,close} [--data DATA] [--seeds 0 1 2] [--out build/adapting]

DATA holds ``audio_text/esc10_folds123`` and ``image_text/fashion``. Each part prints a table, mean ± standard deviation
over seeds, and leaves ``OUT/PART.json``:

- replay (COCONUT, S16): five classes of ESC-10, then the other five, from the model of the first: alone, with four
  clips of each old class (drawn; by herding), anchored to the old model, and both. Accuracy on old and new classes of
  fold 3, among all ten;
- pseudo (S08, S47): a model trained on fold 1 labels fold 2, and is trained on with fold 1 and those labels. Accuracy
  on fold 3, which neither sees;
- close (CLOSE, S30): a small model of fashion photos and titles, frozen; a head on its *text* features learns the types
  of article from titles, and is tested on features of held-out photos, with noise of several lengths.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from dualenc.api.model import Model, load_model
from dualenc.api.runs import train
from dualenc.features.exemplars import keep_exemplars
from dualenc.features.mining import gap_of
from dualenc.features.of_shards import embed_shards
from dualenc.files import write_atomically
from dualenc_data_tools.build import build
from dualenc_data_tools.choose.filter import run_filters
from dualenc_data_tools.choose.select import select

OLD = ["baby cry", "chainsaw", "clock tick", "dog bark", "fire crackling"]
NEW = ["helicopter", "person sneeze", "rain", "rooster", "sea waves"]
PROMPTS = ["This is a sound of {}.", "{}"]
MEMBERS = {"audio": ["flac", "ogg"], "text": ["json:captions"]}
SMALLER = [
    "modalities.audio.encoder.widths=[12,24,48]",
    "modalities.audio.input.features.hop=1024",
    "modalities.audio.input.max_s=2.0",
]
"""Of the recipe's towers and clips: a run takes seconds on an idle core."""
LABEL = {"label": {"member": "json:label", "type": "id"}}
Numbers = dict[str, float]


def rows_of(folder: Path, **where: Any) -> list[dict[str, Any]]:
    """Rows of a captions.jsonl with these values."""
    lines = map(json.loads, (folder / "captions.jsonl").read_text(encoding="utf-8").splitlines())
    return [row for row in lines if all(row[k] == v for k, v in where.items())]


def sounds(data: Path, out: Path, folds: Sequence[int], labels: Sequence[str]) -> str:
    """Shards of some folds and classes of ESC-10; their pattern."""
    if not (out / "index.json").is_file():
        where = {"fold": list(folds), "label": list(labels)}
        given = {"path": str(data / "captions.jsonl"), "where": where, "rate": 16000}
        build("jsonl", out, {**given, "template": ["{label}", "{freesound_title}"]}, progress=False)
    return f"{out}/train-*.tar"


def source(name: str, shards: str, **more: Any) -> dict[str, Any]:
    """A source of labelled sounds."""
    return {"name": name, "shards": shards, "members": MEMBERS, "values": LABEL, **more}


def run(out: Path, seed: int, sources: list[dict[str, Any]], steps: int, start: Path | None, anchor: bool) -> Model:
    """Train the class-incremental recipe on these sources, or take the model that is there."""
    given = [f"out={out}", f"seed={seed}", f"data.sources={json.dumps(sources)}", f"budget.steps={steps}"]
    given += [
        "engine.threads=1",
        "data.workers=0",
        "eval.tasks=[]",
        "optim.lr=2e-3" if start is None else "optim.lr=1e-3",
    ]
    given += [f"checkpoint.init_from={start or 'null'}", *([] if anchor else ["anchor=null"])]
    return load_model(train("finetune/class_incremental", given), "cpu")


def accuracy(model: Model, data: Path, names: list[str], wanted: Sequence[str]) -> float:
    """Percent right of the clips of fold 3 that are of the classes ``wanted``, among all of ``names``."""
    rows = [r for r in rows_of(data, fold=3) if r["label"] in wanted]
    said = model.classify([data / r["audio"] for r in rows], names, PROMPTS, modality="audio").best
    return 100.0 * mean(int(a == r["label"]) for a, r in zip(said, rows, strict=True))


def replay(data: Path, out: Path, seed: int) -> dict[str, Numbers]:
    """Old and new classes after the second group, by arm."""
    data, names = data / "audio_text" / "esc10_folds123", OLD + NEW
    old, new = sounds(data, out / "old", (1, 2), OLD), sounds(data, out / "new", (1, 2), NEW)
    first = run(out / f"first-{seed}", seed, [source("old", old)], 70, None, anchor=False)
    embed_shards(first.bundle, old, out / f"features-{seed}", ["audio"], overwrite=True)
    keep_exemplars(old, "json:label", 4, f"drawn-{seed}", seed=seed)
    keep_exemplars(old, "json:label", 4, f"herded-{seed}", [out / f"features-{seed}"])
    arms = {
        "new classes alone": (None, False),
        "anchor": (None, True),
        "4 drawn": ("drawn", False),
        "4 by herding": ("herded", False),
        "4 drawn + anchor": ("drawn", True),
    }
    found = {"before": {"old": accuracy(first, data, names, OLD), "new": accuracy(first, data, names, NEW)}}
    for arm, (memory, anchored) in arms.items():
        sources = [source("new", new)]
        if memory is not None:
            sources.append(source("memory", old, selection=f"{memory}-{seed}"))
        model = run(out / f"{arm.replace(' ', '_')}-{seed}", seed, sources, 30, out / f"first-{seed}", anchored)
        found[arm] = {"old": accuracy(model, data, names, OLD), "new": accuracy(model, data, names, NEW)}
    return found


def pseudo(data: Path, out: Path, seed: int) -> dict[str, Numbers]:
    """Accuracy on fold 3 by what was trained on after fold 1, and how many labels were right."""
    data, names = data / "audio_text" / "esc10_folds123", OLD + NEW
    known = sounds(data, out / "fold1", (1,), names)
    unlabelled = sounds(data, out / f"fold2-{seed}", (2,), names)  # each seed's scores are beside its own
    run(out / f"first-{seed}", seed, [source("known", known)], 70, None, anchor=False)
    settings = {"model": str(out / f"first-{seed}"), "classes": names, "templates": PROMPTS}
    scores = run_filters(unlabelled, ["pseudo_labels"], {"pseudo_labels": settings})
    truth = {r["audio"]: r["label"] for r in rows_of(data, fold=2)}
    right = np.array([a == b for a, b in zip(scores["pseudo_label"][1], truth.values(), strict=True)])
    place = scores["pseudo_place"][1]
    select(unlabelled, "pseudo_place <= 0.5", "half")
    given = {"members": {"audio": ["flac", "ogg"], "text": ["scores:pseudo_label"]}}
    given["values"] = {"label": {"member": "scores:pseudo_label", "type": "id"}}  # type: ignore[dict-item]
    arms: dict[str, list[dict[str, Any]]] = {
        "fold 1 alone": [],
        "+ surest half": [source("guessed", unlabelled) | given | {"selection": "half"}],
        "+ all guesses": [source("guessed", unlabelled) | given],
        "+ true labels": [source("true", unlabelled)],
    }
    found = {"labels right": {"all": 100 * right.mean(), "surest half": 100 * right[place <= 0.5].mean()}}
    for arm, more in arms.items():
        folder = out / f"{arm.replace(' ', '_')}-{seed}"
        model = run(folder, seed, [source("known", known), *more], 30, out / f"first-{seed}", anchor=False)
        found[arm] = {"fold 3": accuracy(model, data, names, names)}
    return found


def close(data: Path, out: Path, seed: int) -> dict[str, Numbers]:
    """Types of article of held-out photos, by the length of the noise on the titles that the head was trained on."""
    data = data / "image_text" / "fashion"
    rows = rows_of(data)
    held = [r for i, r in enumerate(rows) if i % 6 == 0]
    kept = [r for i, r in enumerate(rows) if i % 6]
    if not (out / "shards" / "index.json").is_file():
        options = {"path": str(data / "captions.jsonl"), "hold_out": 6, "keep": "none"}
        build("jsonl", out / "shards", options, progress=False)
    sources = json.dumps([{"name": "fashion", "shards": f"{out}/shards/train-*.tar"}])
    given = [f"out={out}/towers", f"data.sources={sources}", "budget.steps=150", "data.workers=0", "engine.threads=1"]
    given += [
        "batch.size=64",
        "modalities.image.input.size=32",
        "modalities.image.encoder.grid=1",
        "schedule.warmup_samples=640",
    ]
    towers = load_model(train("image_text/fashion", [*given, "eval.tasks=[]"]), "cpu")
    types = sorted({r["type"] for r in kept})
    held = [r for r in held if r["type"] in types]
    title = np.asarray(towers.encode(text=[r["caption"] for r in kept]))
    photo, test = (np.asarray(towers.encode(image=[data / r["image"] for r in some])) for some in (kept, held))
    gap = gap_of(*(towers_unit(x) for x in (title, photo)))
    said = towers.classify(
        [data / r["image"] for r in held], types, ["{}", "men {}", "women {}"], modality="image"
    ).best
    found = {
        "gap": {"cosine": gap.cosine, "distance": gap.distance, "noise": gap.noise, "w": gap.w},
        "zero-shot": {"photos": 100.0 * mean(int(a == r["type"]) for a, r in zip(said, held, strict=True))},
    }
    arms = {
        f"titles, {n}": (title, gap.noise * f)
        for n, f in [("no noise", 0), ("half", 0.5), ("measured", 1), ("twice", 2)]
    }
    for arm, (x, noise) in {**arms, "photos": (photo, 0.0)}.items():
        shards = vectors(out / f"vectors-{'photo' if x is photo else 'title'}", x, [r["type"] for r in kept])
        head = train_head(out / f"{arm.replace(', ', '_').replace(' ', '_')}-{seed}", seed, shards, x.shape[1], noise)
        found[arm] = {}
        for name, y, of in (("photos", test, held), ("titles", title, kept)):
            best = head.classify(list(y), types, ["{}"], modality="image").best
            found[arm][name] = 100.0 * mean(int(a == r["type"]) for a, r in zip(best, of, strict=True))
    return found


def towers_unit(x: np.ndarray) -> Any:
    """Rows as float64 tensors of length 1."""
    import torch

    return torch.nn.functional.normalize(torch.from_numpy(x).double(), dim=1)


def vectors(folder: Path, x: np.ndarray, labels: list[str]) -> str:
    """Shards of one vector and the name of its class a sample; their pattern."""
    if not (folder / "shards" / "index.json").is_file():
        files = folder / "files"
        files.mkdir(parents=True, exist_ok=True)
        for i, (row, label) in enumerate(zip(x, labels, strict=True)):
            np.save(files / f"{i:06d}.npy", row)
            (files / f"{i:06d}.txt").write_text(label, encoding="utf-8")
        build("folder", folder / "shards", {"path": str(files), "members": {"vector": ["npy"]}}, progress=False)
    return f"{folder}/shards/train-*.tar"


def train_head(out: Path, seed: int, shards: str, dim: int, noise: float) -> Model:
    """A residual block on vectors against the names of their classes."""
    sources = [{"name": "v", "shards": shards, "values": {"type": {"member": "txt", "type": "id"}}}]
    given = [f"out={out}", f"seed={seed}", f"data.sources={json.dumps(sources)}", "loss={name: supcon, label: type}"]
    given += [f"modalities.image.input={{dim: {dim}, noise: {noise}}}", "data.workers=0", "engine.threads=1"]
    given += ["modalities.text.input.context_length=16", "modalities.text.encoder.width=64", "batch.size=128"]
    return load_model(train("image_text/features", [*given, "budget.steps=150", "embed_dim=64"]), "cpu")


PARTS = {"replay": replay, "pseudo": pseudo, "close": close}


def told(found: dict[str, dict[str, Numbers]]) -> str:
    """A line for each arm, mean ± standard deviation over seeds."""
    lines, first = [], next(iter(found.values()))
    for arm, numbers in first.items():
        cells = []
        for name in numbers:
            values = [of[arm][name] for of in found.values()]
            spread = f" ± {stdev(values):.1f}" if len(values) > 1 and max(values) > 2 else ""
            cells.append(f"{name} {mean(values):.1f}{spread}" if max(values) > 2 else f"{name} {mean(values):.3f}")
        lines.append(f"{arm:20} " + ", ".join(cells))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("build/adapting"))
    given = parser.parse_args(arguments)
    kept = given.out / f"{given.part}.json"
    found: dict[str, dict[str, Numbers]] = json.loads(kept.read_text("utf-8")) if kept.is_file() else {}
    for seed in given.seeds:
        if str(seed) not in found:
            found[str(seed)] = PARTS[given.part](given.data.resolve(), (given.out / given.part).resolve(), seed)
            write_atomically(kept, json.dumps(found, indent=1))
            print(f"seed {seed} is done", file=sys.stderr)
    print(told(found))


if __name__ == "__main__":
    main()
