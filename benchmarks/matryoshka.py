"""Matryoshka against plain InfoNCE cut to the same widths, at every precision: recall, bytes, the index's recall.

    python -m benchmarks.matryoshka [--steps 300] [--seeds 3] [--out runs/matryoshka]

Both are trained on the quickstart's data with the same recipe, steps, batches and seeds; only the loss differs. A run
is a process of its own, ``OUT/NAME-SEED``, and is not run again once it has ended. Then ``dualenc compress`` measures
R@10 on held-out emoji of another style. Markdown: the mean over seeds (lowest to highest) of R@10, which is the mean of
both directions.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

TASK = "quickstart_val_style"
SMALL = [
    "modalities.image.encoder.widths=[24,48,96]",
    "modalities.image.encoder.grid=2",
    "modalities.text.encoder.width=96",
    "batch.size=128",
    "schedule.warmup_samples=1280",
    f"eval.tasks=[{TASK}]",
    "eval.every_steps=null",
    "eval.at_start=false",
    "checkpoint.every_steps=null",
    "tracking.log_every=5",
]
DIMS = (32, 64, 128, 192)
LOSSES: dict[str, dict[str, Any]] = {"info_nce": {"name": "info_nce"}, "matryoshka": {"name": "matryoshka"}}
LOSSES["matryoshka"]["dims"] = list(DIMS)


def run(*command: str) -> None:
    """A command of dualenc.

    Raises:
        RuntimeError: it failed; with the last line of its output.
    """
    env = os.environ | {"COLUMNS": "200"}
    done = subprocess.run([sys.executable, "-m", "dualenc", *command], text=True, capture_output=True, env=env)
    if done.returncode:
        raise RuntimeError(f"dualenc {command[0]}: {done.stderr.strip()[-500:]}")


def measured(out: Path, name: str, seed: int, steps: int) -> dict[str, Any]:
    """compression.json of one training, which is trained and measured first where that is missing."""
    folder = out / f"{name}-{seed}"
    found = folder / "compressed" / "compression.json"
    if not found.is_file():
        given = [*SMALL, f"embed_dim={DIMS[-1]}", f"budget.steps={steps}", f"seed={seed}", f"out={folder}"]
        run("train", "quickstart", *given, f"loss={json.dumps(LOSSES[name])}", "modalities.image.input.size=64")
        dims = ",".join(map(str, DIMS[:-1]))
        run("compress", str(folder), "--task", TASK, "--dims", dims, "--out", str(found.parent), "--no-cache")
    said: dict[str, Any] = json.loads(found.read_text(encoding="utf-8"))
    return said


def recalls(said: dict[str, Any]) -> dict[tuple[int, str], float]:
    """(width, way) → R@10 in percent, the mean of both directions."""
    out = {}
    for point in said["points"]:
        values = [v for k, v in point["metrics"].items() if k.endswith("R@10")]
        out[point["dim"], point["way"]] = 100 * mean(values)
    return out


def spread(values: Sequence[float]) -> str:
    """Mean (lowest to highest)."""
    return f"{mean(values):.1f} ({min(values):.1f}–{max(values):.1f})"


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """Rows of width and way, a column for each loss."""
    lines = ["| width | gallery | bytes per item | " + " | ".join(found) + " |", "|---" * (3 + len(found)) + "|"]
    each = {name: [recalls(x) for x in said] for name, said in found.items()}
    for point in next(iter(found.values()))[0]["points"]:
        at = point["dim"], point["way"]
        cells = [spread([r[at] for r in each[name]]) for name in found]
        lines.append(f"| {at[0]} | {at[1]} | {point['bytes_per_item']:,} | " + " | ".join(cells) + " |")
    for name, said in found.items():
        index = [x["index"] for x in said if x["index"]]
        if index:
            per = "; ".join(f"{k}: {spread([100 * x[k] for x in index])} %" for k in index[0])
            lines.append(f"\nRecall@10 of usearch's index against exact search, {name}: {per}")
    return "\n".join(lines)


def main() -> None:
    """Train what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/matryoshka"))
    args = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in LOSSES}
    for seed in range(args.seeds):
        for name in LOSSES:
            found[name].append(measured(args.out, name, seed, args.steps))
            print(f"{name}, seed {seed}: done", file=sys.stderr, flush=True)
    print(f"Quickstart, {args.steps} steps of each loss, R@10 in %, chance 2 %:\n\n{table(found)}")


if __name__ == "__main__":
    main()
