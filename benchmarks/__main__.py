"""Every comparison with open_clip, one after another: ``make bench``.

    python -m benchmarks [PART …] [--model ViT-B-32] [--runs 5] [--quick] [--out build/bench] [--write]

Parts: loader, text, step, evaluation, embed, loss, start, seek, remote. Each runs in a process of its own and leaves
``OUT/PART.json``; parts that are there already are kept, so a stopped run goes on. ``OUT/benchmarks.json`` has all
rows and the machine; ``--write`` makes docs/benchmarks.md, its plot and docs/benchmarks.json of it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from html import escape
from importlib.metadata import version
from math import log
from pathlib import Path
from typing import Any

from benchmarks.pages import put_block
from dualenc.errors import DualencError
from dualenc.files import write_atomically

ROOT = Path(__file__).parents[1]
PARTS = ("loader", "text", "step", "evaluation", "embed", "loss", "start", "seek", "remote")
VERSUS = ("text", "step", "evaluation", "embed")
Row = dict[str, Any]


def _module(name: str, *arguments: str, out: Path | None = None) -> Any:
    """Run a benchmark in a process of its own; what it wrote as JSON, if it does."""
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments, *(["--json", str(out)] if out else [])]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return json.loads(out.read_text("utf-8")) if out else None


# --- the parts -----------------------------------------------------------------------------------------------------


def of_loader(given: argparse.Namespace, out: Path) -> list[Row]:
    """Training rows per core."""
    small = ["--samples", "64", "--batch", "8", "--batches", "1"] if given.quick else []
    rounds = _module("loader", "--runs", str(given.runs), *small, out=out)["rounds"]
    from benchmarks.versus import row

    theirs = rounds.pop("open_clip + webdataset")
    return [row("loader", name.removeprefix("dualenc, "), "samples per CPU s", r, theirs) for name, r in rounds.items()]


def of_versus(part: str, given: argparse.Namespace, out: Path) -> list[Row]:
    """Parts that need models on both sides."""
    quick = ["--quick"] if given.quick else ["--install", "--captions", *map(str, given.captions)]
    models = [[given.model], *([["small", "--batch", "64"]] if part == "step" and not given.quick else [])]
    return [
        r
        for model in models
        for r in _module("versus", part, "--model", *model, "--runs", str(given.runs), *quick, out=out)["rows"]
    ]


def of_loss(given: argparse.Namespace) -> list[Row]:
    """Forward and backward of the losses, and the memory that they take beyond the features."""
    from benchmarks.losses import PEERS, cell
    from benchmarks.versus import row

    rows = []
    for kind, peer in PEERS.items():
        for size in [256] if given.quick else [2048, 16384]:
            found = [(cell(kind, size, "default", 1), cell(kind, size, "peer", 1)) for _ in range(given.runs)]
            what = f"{kind} and {peer}, N = {size:,}"
            rows.append(row("loss", what, "CPU s", [a[2] for a, _ in found], [b[2] for _, b in found], False))
            ours, theirs = ([max(c[1], 1.0) for c in side] for side in zip(*found, strict=True))
            rows.append(row("loss memory", what, "MiB", ours, theirs, False))
    return rows


def of_start(given: argparse.Namespace) -> list[Row]:
    """CPU seconds and resident memory until a run of small towers is known to be right, against a model's creation."""
    from benchmarks.versus import row

    ours = [sys.executable, "-m", "dualenc", "train", "quickstart", "--dry-run"]
    made = "import open_clip, open_clip_train.main; open_clip.create_model('ViT-S-32-alt')"
    found = [(_child(ours), _child([sys.executable, "-c", made])) for _ in range(given.runs)]
    what = "train quickstart --dry-run; open_clip: imports and a model"
    rows = []
    for k, (part, unit) in enumerate((("start", "CPU s"), ("start, resident", "MiB"))):
        rows.append(row(part, what, unit, [a[k] for a, _ in found], [b[k] for _, b in found], False))
    return rows


def _child(command: list[str]) -> tuple[float, float]:
    """CPU seconds and peak MiB of a process."""
    done = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(done.pid, 0)
    done.returncode = os.waitstatus_to_exitcode(status)
    if done.returncode:
        raise DualencError(f"{' '.join(command)} ended with exit code {done.returncode}")
    return used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def of_seek(given: argparse.Namespace, out: Path) -> list[Row]:
    """A million shards: nothing to compare with, as webdataset replays what it skips."""
    found = _module("scale", "--shards", "1000" if given.quick else "1000000", out=out)["row"]
    what = f"{found['samples']:,} samples in {found['shards']:,} shards"
    pairs = (("index and plan", "open_cpu_s", "CPU s"), ("seek", "seek_s", "s"), ("index and plan", "peak_mib", "MiB"))
    return [{"part": part, "what": what, "unit": unit, "ours": found[key]} for part, key, unit in pairs]


def of_remote(given: argparse.Namespace, out: Path) -> list[Row]:
    """Shards behind a slow server, against webdataset's streaming."""
    small = ["--batches", "2", "--samples", "200", "--kb", "2", "--latency-ms", "1"] if given.quick else []
    workers = ["1"] if given.quick else ["1", "2", "4", "8"]
    rows = []
    for found in _module("remote", "--workers", *workers, "--runs", str(given.runs), *small, out=out)["rows"]:
        for name in ("whole shards", "whole shards, full shuffle", "byte ranges"):
            ours, theirs = found[name], found["webdataset"]
            ratio = {"ours": ours, "theirs": theirs, "ratio": ours / theirs, "rounds": given.runs}
            what = f"{name}, {found['workers']} worker(s)"
            rows.append({"part": "remote", "what": what, "unit": "samples/s (wall clock)", **ratio})
    return rows


def of_part(part: str, given: argparse.Namespace) -> list[Row]:
    """The rows of a part, measured now."""
    out = given.out / f"{part}.raw.json"
    if part in VERSUS:
        return of_versus(part, given, out)
    if part in ("loss", "start"):
        return {"loss": of_loss, "start": of_start}[part](given)
    return {"loader": of_loader, "seek": of_seek, "remote": of_remote}[part](given, out)


# --- the page ------------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    cpu = next((x.split(":")[1].strip() for x in _lines("/proc/cpuinfo") if x.startswith("model name")), "")
    packages = ("torch", "open_clip_torch", "webdataset", "pillow", "simplejpeg")
    versions = {p: version(p) for p in packages}
    load = os.getloadavg()[0]
    return {"cpu": cpu, "cores": os.cpu_count(), "python": platform.python_version(), "load": load, **versions}


def _lines(path: str) -> list[str]:
    return Path(path).read_text("utf-8").splitlines() if Path(path).is_file() else []


def table(rows: list[Row]) -> str:
    """A line a row."""
    lines = ["| | | unit | dualenc | open_clip | ratio (range) |", "|---|---|---|---|---|---|"]
    for r in rows:
        spread = f" ({r['low']:.2f}–{r['high']:.2f})" if "low" in r else ""
        compared = f"{_short(r['theirs'])} | {r['ratio']:.2f}{spread}" if "ratio" in r else "– | –"
        lines.append(f"| {r['part']} | {r['what']} | {r['unit']} | {_short(r['ours'])} | {compared} |")
    return "\n".join(lines)


def _short(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def plot(rows: list[Row]) -> str:
    """The ratios on a logarithmic axis: a dot each, a line over the rounds' range; an SVG that stands alone."""
    rows = [r for r in rows if "ratio" in r]
    left, width, line, top = 440, 880, 20, 34
    low, high = 0.25, max(4.0, *(r["ratio"] for r in rows)) * 1.3
    height = top + line * len(rows) + 16

    def x(ratio: float) -> float:
        return left + (width - left - 60) * log(max(low, min(high, ratio)) / low) / log(high / low)

    marks = [m for m in (0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256) if m <= high]
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="11"><rect width="100%" height="100%" fill="#fff"/>',
        f'<text x="{left}" y="12" fill="#333">times as fast (or as small) as open_clip, logarithmic</text>',
    ]
    for m in marks:
        colour = "#333" if m == 1 else "#ddd"
        out.append(f'<line x1="{x(m):.1f}" x2="{x(m):.1f}" y1="{top - 6}" y2="{height - 8}" stroke="{colour}"/>')
        out.append(f'<text x="{x(m):.1f}" y="{top - 9}" text-anchor="middle" fill="#555">{m:g}</text>')
    for i, r in enumerate(rows):
        y = top + line * i + 10
        colour = "#1f6fb4" if r["ratio"] >= 1 else "#c0392b"
        out.append(f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{escape(r["part"] + ": " + r["what"])}</text>')
        if "low" in r:
            ends = f'x1="{x(r["low"]):.1f}" x2="{x(r["high"]):.1f}" y1="{y}" y2="{y}"'
            out.append(f'<line {ends} stroke="{colour}" stroke-width="2"/>')
        out.append(f'<circle cx="{x(r["ratio"]):.1f}" cy="{y}" r="4" fill="{colour}"/>')
        out.append(f'<text x="{width - 4}" y="{y + 4}" text-anchor="end">{r["ratio"]:.2f}</text>')
    return "\n".join([*out, "</svg>\n"])


def write_page(found: dict[str, Any], docs: Path) -> None:
    """The page's blocks, its plot and its numbers."""
    m = found["machine"]
    rounds = max((r.get("rounds", 1) for r in found["rows"]), default=0)
    versions = f"torch {m['torch']}, open_clip {m['open_clip_torch']}, webdataset {m['webdataset']}"
    fewer = {r["part"]: r["rounds"] for r in found["rows"] if r.get("rounds", rounds) < rounds}
    those = "".join(f", of {part} {n}" for part, n in fewer.items())
    about = (
        f"{m['cpu']}, {m['cores']} cores shared with other jobs (load {m['load']:.0f}), Python {m['python']}, "
        f"{versions}; medians of {rounds} rounds{those}.\n"
    )
    not_run = [p for p in PARTS if p not in found["parts"]]
    about += f"\nNot measured: {', '.join(not_run)}.\n" if not_run else ""
    put_block(docs / "benchmarks.md", "numbers", f"{about}\n\n{table(found['rows'])}")
    write_atomically(docs / "benchmarks.svg", plot(found["rows"]))
    write_atomically(docs / "benchmarks.json", json.dumps(found, indent=1) + "\n")


def main(arguments: list[str]) -> None:
    """Measure what is not there yet, and write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--model", default="ViT-B-32", help="of open_clip")
    parser.add_argument("--runs", type=int, default=5, help="rounds")
    parser.add_argument("--captions", type=int, nargs="+", default=[128], help="batches of the text part")
    parser.add_argument("--quick", action="store_true", help="few and small items: to see that it runs")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help="make docs/benchmarks.md of the results")
    given = parser.parse_args(arguments)
    unknown = [p for p in given.parts if p not in PARTS]
    if unknown:
        raise DualencError(f"unknown part {unknown[0]!r}; use {', '.join(PARTS)}")
    given.out = given.out.resolve()
    given.out.mkdir(parents=True, exist_ok=True)
    for part in given.parts or PARTS:
        kept = given.out / f"{part}.json"
        if kept.is_file():
            continue
        print(f"--- {part}", flush=True)
        begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        rows = of_part(part, given)
        cpu_s = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
        used = {"wall_s": time.perf_counter() - begin, "cpu_s": cpu_s}
        write_atomically(kept, json.dumps({"rows": rows, "used": used, "load": os.getloadavg()[0]}, indent=1))
    parts = [p for p in PARTS if (given.out / f"{p}.json").is_file()]
    rows = [r for p in parts for r in json.loads((given.out / f"{p}.json").read_text("utf-8"))["rows"]]
    found = {"machine": machine(), "parts": parts, "rows": rows}
    write_atomically(given.out / "benchmarks.json", json.dumps(found, indent=1))
    print(table(rows))
    if given.write:
        write_page(found, given.docs)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (DualencError, subprocess.CalledProcessError) as e:
        raise SystemExit(f"error: {e}") from None
