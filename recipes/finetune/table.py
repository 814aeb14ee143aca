"""Mean and spread over seeds of what the runs of series.sh wrote, as a Markdown table: target gain and source loss."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

METRICS = {
    "fashion t→i R@1": ("fashion_retrieval", "text_to_image_R@1"),
    "fashion types top-1": ("fashion_types", "top1"),
    "flickr8k t→i R@1": ("flickr8k", "text_to_image_R@1"),
    "flickr8k t→i R@10": ("flickr8k", "text_to_image_R@10"),
}


def evaluations(run: Path) -> list[dict[str, float]]:
    """The rows of metrics.jsonl that hold an evaluation, oldest first."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [r for r in rows if any(k.startswith("eval/") for k in r)]


def cell(rows: list[dict[str, float]], task: str, metric: str) -> str:
    """Percent: mean ± standard deviation over seeds."""
    values = [100 * r[f"eval/{task}/{metric}"] for r in rows]
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def main(folder: Path) -> None:
    """Print the table of all runs NAME_SEED in ``folder``."""
    variants: dict[str, list[Path]] = {}
    for run in sorted(folder.glob("fashion_*_[0-9]*")):
        if (run / "metrics.jsonl").is_file() and len(evaluations(run)) > 1:
            variants.setdefault(run.name.rpartition("_")[0].removeprefix("fashion_"), []).append(run)
    rows = {}
    if "full" in variants:
        rows["source (before)"] = [evaluations(r)[0] for r in variants["full"]]
    rows |= {v: [evaluations(r)[-1] for r in found] for v, found in variants.items()}
    print(f"| variant | seeds | {' | '.join(METRICS)} |\n|{'---|' * (2 + len(METRICS))}")
    for name, found in rows.items():
        print(f"| {name} | {len(found)} | {' | '.join(cell(found, *m) for m in METRICS.values())} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
