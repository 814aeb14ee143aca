"""Every registered loss and distillation term on the quickstart's data for a few steps: does it train?

    python -m benchmarks.methods [--steps 100] [--only NAME …] [--out runs/methods] [--table]

Prints a table in Markdown: the loss at the first and the last log line, and R@10 of held-out emoji in another style.
Each row is a run of its own process, ``OUT/NAME``, and is not run again once it has ended, so the command can be
stopped and given again; ``--table`` only prints what is there. One seed, a small model: it tells a loss that falls
from one that diverges, not which is better. A loss that adds to another is trained beside info_nce, as its row says;
one that needs a trained tower or a teacher takes the info_nce row's model, and so do those that collapse from random
weights; info_nce trained on from there is a row, to compare them with.

The quickstart's samples are written again with what its metadata file says of them (group, tags, source) as json, for
the losses that need labels.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from dualenc.data.shards.reader import SampleError, iter_samples
from dualenc.distill import terms
from dualenc.files import write_atomically
from dualenc.losses import losses
from dualenc.shipped import recipes_folder
from dualenc_data_tools.writer import ShardWriter

BASE = "info_nce"
TASK = "quickstart_val_style"
SMALL = [
    "modalities.image.input.size=32",
    "modalities.image.encoder.widths=[24,48,96]",
    "modalities.image.encoder.grid=2",
    "modalities.text.encoder.width=96",
    "embed_dim=96",
    "batch.size=128",
    "schedule.warmup_samples=1280",
    f"eval.tasks=[{TASK}]",
    "eval.every_steps=null",
    "eval.at_start=false",
    "checkpoint.every_steps=null",
    "tracking.log_every=5",
]
VALUES = {
    "label": {"member": "json:group", "type": "id"},
    "group": {"member": "json:source", "type": "id"},
    "tags": {"member": "json:tags", "type": "ids", "width": 48},
    "clusters": {"member": "json:clusters", "type": "ids", "width": 2},
    "tree": {"member": "json:path", "type": "tree", "width": 2},
    "length": {"member": "json:length", "type": "float"},
}
BESIDE: dict[str, dict[str, Any]] = {
    "koleo": {"weight": 0.1},
    "uniformity": {"weight": 0.1},
    "barlip": {"project": 256, "hidden": 256},
    "siamlip": {"weight": 0.5, "project": 96, "hidden": 192},
    "swalip": {"weight": 0.2, "prototypes": 64},
    "supremix": {"weight": 0.5, "label": "length", "window": 8},
    "private_space": {"weight": 0.1},
    "layers": {"weight": 0.1},
    "entity_classifier": {"weight": 0.2, "classes": 4096},
    "byolip": {"weight": 0.2, "project": 96, "hidden": 192, "decay": 0.95},
    "beclr": {"weight": 0.2, "project": 96, "hidden": 192, "decay": 0.95, "clusters": 32, "warmup_samples": 3840},
}
"""Losses that are trained beside info_nce, and their settings."""
ALONE: dict[str, dict[str, Any]] = {
    "matryoshka": {"dims": [24, 48, 96]},
    "whitened": {"groups": 24},
    "sum": {"terms": ["info_nce", {"name": "sigmoid", "weight": 0.05}]},
    "false_negatives": {"label": "tags"},
    "moco": {"queue": 1024, "decay": 0.95},
    "cocosoda": {"queue": 1024, "decay": 0.95},
    "isogclr": {"tau": 0.07, "tau_min": 0.03, "rho": 3.0, "tau_lr": 0.003},
    "fastclip": {"rho": 3.0, "gamma": 0.4},
}
"""Settings of losses that are trained by themselves; any other is trained with its defaults."""
LOCKED = ("mse", "cwcl", "relational")
"""Losses that need a trained tower: the image tower of the info_nce row, locked."""
WARM = ("groco", "mochi")
"""Losses of the hardest negatives, alone or mixed, which are for trained towers: they start from the info_nce row's
model."""
NO_DATA = dict.fromkeys(("prc", "point_contrast", "rad", "local_contrast"), "needs maps of places")


@dataclass
class MethodRun:
    """One run: what it is called, and the recipe with its overrides."""

    name: str
    what: str
    overrides: list[str] = field(default_factory=list)
    recipe: str = "quickstart"


def rows(out: Path) -> Iterator[MethodRun]:
    """The info_nce row, on which others stand, then every registered loss and term."""
    yield MethodRun(BASE, BASE, ["loss=info_nce"])
    start = f"checkpoint.init_from={out / BASE}"
    yield MethodRun(f"{BASE}-continued", f"{BASE}, from the {BASE} row's model", [f"loss={BASE}", start])
    teacher = f"{{model: {out / BASE}}}"
    for name in losses:
        if name == BASE or name in NO_DATA:
            continue
        if name in BESIDE:
            weight = BESIDE[name].get("weight", 1.0)
            loss = [BASE, {"name": name, **BESIDE[name]}]
            yield MethodRun(name, f"info_nce + {weight:g} {name}", [f"loss={json.dumps(loss)}"])
            continue
        settings = [f"loss={json.dumps({'name': name, **ALONE.get(name, {})})}"]
        if name in WARM:
            yield MethodRun(name, f"{name}, from the {BASE} row's model", [*settings, start])
            continue
        if name == "sigmoid":
            settings.append("logit_scale={init: 10, bias: -10}")
        if name in LOCKED:
            settings += ["modalities.image.lock=true", f"modalities.image.init_from={out / BASE}#image"]
        yield MethodRun(name, f"{name}{', image tower locked' if name in LOCKED else ''}", settings)
    view = ["modalities.view.input.size=32"]
    yield MethodRun("slip", "info_nce + 0.3 info_nce of two crops (SLIP)", view, "quickstart/slip")
    for name in terms:
        term = json.dumps({"name": name, **({"feature": {"image": 1.0, "text": 1.0}} if name == "anchor" else {})})
        extra = [start] if name == "anchor" else []
        settings = ["loss=info_nce", f"distill={{teachers: [{teacher}], terms: [{term}]}}", *extra]
        yield MethodRun(f"term-{name}", f"info_nce + {name}, taught by the info_nce row", settings)


def labelled(folder: Path) -> str:
    """The quickstart's training samples with their metadata as json, written once; the pattern of the shards."""
    pattern = str(folder / "train-{000000..000003}.tar")
    if (folder / "index.json").is_file():
        return pattern
    data = recipes_folder() / "quickstart" / "data"
    with gzip.open(data / "metadata.jsonl.gz", "rt", encoding="utf-8") as f:
        about = {row["key"]: row for row in map(json.loads, f)}
    wanted = {"image": ["webp"], "text": ["txt"]}
    with ShardWriter(folder, max_samples=978, overwrite=True) as writer:
        for key, found in iter_samples(str(data / "train-{000000..000003}.tar"), wanted):
            if isinstance(found, SampleError):
                raise found
            name = key.rsplit("/", 1)[1]
            doc = about[name]
            group = doc.get("group", "")
            # Emoji: group, then the emoji, which both styles share; clip art: its folder, then the drawing.
            path = [group, doc["codepoints"]] if group else [doc["file"].rpartition("/")[0], name]
            doc |= {"length": len(doc["caption"]), "clusters": [group, doc["source"]], "path": path}
            image, text = found.values["image"], found.values["text"]
            writer.write(name, {"webp": image, "txt": text, "json": json.dumps(doc).encode()})
    return pattern


def run_row(row: MethodRun, out: Path, shards: str, steps: int) -> dict[str, Any]:
    """Train a row in a process of its own; what its metrics say."""
    folder = out / row.name
    values = json.dumps([{"name": "quickstart", "shards": shards, "values": VALUES}])
    given = [*SMALL, f"budget.steps={steps}", f"data.sources={values}", f"out={folder}", *row.overrides]
    began = time.monotonic()
    command = [sys.executable, "-m", "dualenc", "train", row.recipe, *given]
    done = subprocess.run(command, text=True, capture_output=True, env=os.environ | {"COLUMNS": "200"})
    if done.returncode:
        lines = [x for x in done.stderr.strip().splitlines() if x.strip()]
        return {"error": lines[-1] if lines else f"exit code {done.returncode}"}
    return {**numbers(folder), "seconds": round(time.monotonic() - began), "steps": steps, "what": row.what}


def numbers(folder: Path) -> dict[str, Any]:
    """First and last loss, and R@10 of the held-out task in its first direction."""
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    curve = [x["loss"] for x in logged if "loss" in x]
    measured = {k: v for x in logged for k, v in x.items() if k.startswith(f"eval/{TASK}/") and k.endswith("R@10")}
    return {"first": curve[0], "last": curve[-1], "finite": all(map(isfinite, curve)), "recall": measured}


def table(found: dict[str, dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| trained with | loss, first → last | R@10 image → text, text → image | steps |", "|---|---|---|---|"]
    for name, x in found.items():
        if "error" in x:
            lines.append(f"| {name} | failed: {x['error']} | | |")
            continue
        recall = ", ".join(f"{100 * v:.1f} %" for _, v in sorted(x["recall"].items()))
        state = "" if x["finite"] else " (not finite)"
        lines.append(f"| {x['what']} | {x['first']:.3f} → {x['last']:.3f}{state} | {recall} | {x['steps']} |")
    lines += [f"| {name} | not run: {why} | | |" for name, why in NO_DATA.items()]
    return "\n".join(lines)


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description="Every registered loss and term on the quickstart, for a few steps.")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--only", nargs="*", help="names of rows")
    parser.add_argument("--out", type=Path, default=Path("runs/methods"))
    parser.add_argument("--table", action="store_true", help="print what is there, run nothing")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    ledger = out / "rows.json"
    found: dict[str, dict[str, Any]] = json.loads(ledger.read_text()) if ledger.is_file() else {}
    if not arguments.table:
        shards = labelled(out / "data")
        for row in rows(out):
            if (arguments.only and row.name not in arguments.only) or "seconds" in found.get(row.name, {}):
                continue
            found[row.name] = run_row(row, out, shards, arguments.steps)
            write_atomically(ledger, json.dumps(found, indent=1))
            print(row.name, found[row.name], file=sys.stderr, flush=True)
    print(table(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
