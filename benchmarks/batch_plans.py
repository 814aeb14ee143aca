"""Batch plans against a plain order on the quickstart's data: R@10 of held-out emoji, as it comes out.

    python -m benchmarks.batch_plans [--steps 100] [--seeds 0 1] [--only WORD …] [--out FOLDER] [--table]
    python -m benchmarks.batch_plans --arrange 1000000

A model is trained for ``steps`` steps in the plain order; its features give the clusters and the neighbours. Every row
goes on from its weights for ``steps`` more, with one plan each, once a seed. Rows are run as ``benchmarks.methods``
runs its own (same model, same data): small and short, so a difference of a few points is noise.

``--arrange N`` trains nothing: it times how long N samples in made-up groups and neighbours take to arrange, to reach a
batch far in the run, and to go on from there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.methods import MethodRun, labelled, run_row
from dualenc.config import Data
from dualenc.data.batches import compose
from dualenc.data.batches.mined_files import write_mined
from dualenc.data.order import Plan
from dualenc.files import write_atomically

START = "start"
SOURCES = {"first": "000000..000001", "second": "000002..000003"}
"""Halves of the training shards, as two sources."""


def plans(out: Path) -> dict[str, list[str]]:
    """Row → what it changes of the recipe."""
    near, clusters = json.dumps(str(out / "neighbors.safetensors")), json.dumps(str(out / "clusters.safetensors"))
    halves = [{"name": n, "shards": str(out / "data" / f"train-{{{s}}}.tar")} for n, s in SOURCES.items()]
    batches = {
        "by_value (group)": "{name: by_value, value: label}",
        "groups (group, 8 each)": "{name: groups, value: label, per_group: 8}",
        "clusters (10)": f"{{name: clusters, files: {clusters}}}",
        "hard_negatives": f"{{name: hard_negatives, files: {near}}}",
        "bags (2, 4, 8)": f"{{name: bags, files: {near}, sizes: {{0: 2, 1: 4, 2: 8}}}}",
    }
    two = f"data.sources={json.dumps(halves)}"
    rows: dict[str, list[str]] = {"plain order": [], **{k: [f"data.batches={v}"] for k, v in batches.items()}}
    return {**rows, "by_source (2 sources)": [two, "data.batches=by_source"]}


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description="Batch plans on the quickstart, for a few steps.")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--only", nargs="*", default=[""], help="rows that begin with one of these words")
    parser.add_argument("--out", type=Path, default=Path("runs/batch_plans"))
    parser.add_argument("--table", action="store_true", help="print what is there, run nothing")
    parser.add_argument("--arrange", type=int, metavar="N", help="only time the arithmetic, on N made-up samples")
    arguments = parser.parse_args()
    if arguments.arrange:
        arrange(arguments.arrange)
        return 0
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    ledger = out / "rows.json"
    found: dict[str, Any] = json.loads(ledger.read_text()) if ledger.is_file() else {}

    def run(name: str, overrides: list[str]) -> None:
        if "seconds" not in found.get(name, {}):
            row = MethodRun("".join(c if c.isalnum() else "-" for c in name), name, ["loss=info_nce", *overrides])
            found[name] = run_row(row, out, shards, arguments.steps)
            write_atomically(ledger, json.dumps(found, indent=1))
            print(name, found[name], file=sys.stderr, flush=True)

    if not arguments.table:
        shards = labelled(out / "data")
        run(START, [])
        if not (out / "neighbors.safetensors").is_file():
            mine(out, shards)
        for seed in arguments.seeds:
            for name, more in plans(out).items():
                if name.startswith(tuple(arguments.only)):
                    run(f"{name}, seed {seed}", [f"seed={seed}", f"checkpoint.init_from={out / START}", *more])
    print(table(found, list(plans(out)), arguments.seeds))
    return 0


def arrange(n: int, size: int = 4096, k: int = 16) -> None:
    """Print what each plan takes in one process: to build, to reach step 10^6 first, and for every later batch."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, max(n // 100, 1), n)
    near = ((np.arange(n)[:, None] + rng.integers(-50, 50, (n, k))) % n).astype(np.int32)

    class Made:
        def values(self, source: int, name: str) -> NDArray[np.int64]:
            return labels

        def ids(self, source: int) -> NDArray[np.int64]:
            return np.arange(n)

    print("| plan | build, s | first batch, s | next batches, ms each | \n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        file = str(write_mined(f"{folder}/near.safetensors", {"ids": np.arange(n), "neighbors": near}, {}))
        for name, settings in (
            ("by_source", {}),
            ("by_value", {"value": "v"}),
            ("groups", {"value": "v", "per_group": 4}),
            ("hard_negatives", {"files": file}),
            ("bags", {"files": file, "sizes": {0: 8}}),
        ):
            raw = {"sources": [{"name": "a", "shards": "a.tar"}], "batches": {"name": name, **settings}}
            began = time.perf_counter()
            plan = compose(Plan(["a"], [[n]], 0), Data.model_validate(raw), size, Made())
            built = time.perf_counter() - began
            plan.local(1_000_000, 0, 1, size)
            first = time.perf_counter() - began - built
            began = time.perf_counter()
            for step in range(1_000_001, 1_000_011):
                plan.local(step, 0, 1, size)
            print(f"| {name} | {built:.2f} | {first:.2f} | {100 * (time.perf_counter() - began):.1f} |", flush=True)


def mine(out: Path, shards: str) -> None:
    """Features of the start's model, their clusters and neighbours."""
    features = str(out / "features")
    for command in (
        ["embed", str(out / START), shards, "--out", features],
        ["mine", "clusters", features, "--clusters", "10", "--out", str(out / "clusters.safetensors")],
        ["mine", "neighbors", features, "-k", "32", "--out", str(out / "neighbors.safetensors")],
    ):
        subprocess.run([sys.executable, "-m", "dualenc", *command], check=True, env=os.environ | {"COLUMNS": "200"})


def table(found: dict[str, Any], names: list[str], seeds: list[int]) -> str:
    """The rows as Markdown: both directions, a number for each seed."""
    lines = [f"| batches | last loss | R@10 image → text, text → image ({len(seeds)} seeds) |", "|---|---|---|"]

    def cells(runs: list[dict[str, Any]]) -> str:
        loss = " / ".join(f"{x['last']:.3f}" for x in runs)
        ways = [" / ".join(f"{100 * x['recall'][k]:.1f}" for x in runs) for k in sorted(runs[0]["recall"])]
        return f"{loss} | {', '.join(ways)} |"

    if "recall" in found.get(START, {}):
        lines.append(f"| (the start) | {cells([found[START]])}")
    for name in names:
        runs = [found[f"{name}, seed {s}"] for s in seeds if "recall" in found.get(f"{name}, seed {s}", {})]
        if runs:
            lines.append(f"| {name} | {cells(runs)}")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
