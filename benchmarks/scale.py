"""The index, the plan and a seek of a data set that nobody has: seconds and memory by number of samples.

    python -m benchmarks.scale [--shards 1000000] [--samples 10000] [--ranks 4096] [--batch 131072] [--runs 1]

Writes an ``index.json`` as ``dualenc shards index`` does, for shards behind https (nothing is fetched). A fresh process
then does what a run does with it before its first batch: open the source, build the plan, say how it is read; and goes
to steps far into the run, as resuming does. Default: 10^10 samples in a million shards. Shards have ``samples`` ± 10 %
samples each. CPU and wall-clock seconds; memory is the most the process had (VmHWM), Python and numpy included, and by
how much that exceeds what it had before the index was opened. Linux only.
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

from dualenc.config import Data
from dualenc.data.shards.index import build_plan, how_read, open_sources
from dualenc.data.shards.listing import ShardIndex, ShardTable
from dualenc.errors import DualencError


def write_index(path: Path, shards: int, samples: int) -> None:
    """An index of ``shards`` shards that do not exist."""
    counts = np.random.default_rng(0).integers(samples * 9 // 10, samples * 11 // 10 + 1, shards)
    rows = (
        {"url": f"train-{i:07d}.tar", "samples": n, "bytes": n * 40_000, "headers": f"{i:064x}"}
        for i, n in enumerate(counts.tolist())
    )
    ShardIndex(ShardTable(rows)).write(path)


def settings(path: Path, shards: int) -> Data:
    """The ``data`` section of a recipe that reads them."""
    urls = f"https://data.example/web/train-{{0000000..{shards - 1:07d}}}.tar"
    return Data.model_validate({"sources": [{"name": "web", "shards": urls, "index": str(path)}], "cache_gb": 50})


def measure(path: Path, shards: int, ranks: int, batch: int) -> dict[str, Any]:
    """Open the index, plan, seek: in this process, which should be a fresh one."""
    before = _peak()
    data = settings(path, shards)
    out: dict[str, Any] = {}
    begin, cpu = time.perf_counter(), time.process_time()
    sets = open_sources(data)
    plan = build_plan(data, sets, 0)
    how_read(data, sets)
    out["open_s"], out["open_cpu_s"] = time.perf_counter() - begin, time.process_time() - cpu
    out["samples"], out["shards"] = plan.total, shards
    last = plan.total // batch  # the step in which an epoch ends: two epochs' orders are needed
    seeks = []
    for step in (last // 2, last, 3 * last):
        begin = time.perf_counter()
        refs = plan.local(step, ranks - 1, ranks, batch)
        seeks.append(time.perf_counter() - begin)
    out["seek_s"], out["digest"] = max(seeks), plan.digest()
    out["checksum"] = int((refs.shard * 31 + refs.sample).sum() % (1 << 31))
    out["peak_mib"], out["more_mib"] = _peak(), _peak() - before
    return out


def _peak() -> float:
    """The most memory this process has had, in MiB; a parent's does not count."""
    return int(Path("/proc/self/status").read_text(encoding="ascii").split("VmHWM:")[1].split()[0]) / 1024


def in_process(path: Path, shards: int, ranks: int, batch: int) -> dict[str, Any]:
    """:func:`measure` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.scale", "--of", str(path)]
    command += ["--shards", str(shards), "--ranks", str(ranks), "--batch", str(batch)]
    text = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    found: dict[str, Any] = json.loads(text)
    return found


def main(arguments: list[str]) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale")
    parser.add_argument("--shards", type=int, default=1_000_000)
    parser.add_argument("--samples", type=int, default=10_000, help="samples of a shard")
    parser.add_argument("--ranks", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=131_072)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--of", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.of is not None:
        print(json.dumps(measure(given.of, given.shards, given.ranks, given.batch)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "index.json")
        write_index(path, given.shards, given.samples)
        runs = [in_process(path, given.shards, given.ranks, given.batch) for _ in range(given.runs)]
        size = path.stat().st_size
    row = {k: (float(np.median([r[k] for r in runs])) if isinstance(v, float) else v) for k, v in runs[0].items()}
    print(f"{row['samples']:,} samples in {row['shards']:,} shards (index.json: {size / 1e6:.0f} MB)")
    print(f"index and plan   {row['open_s']:.2f} s, {row['open_cpu_s']:.2f} CPU s")
    print(f"seek             {row['seek_s']:.3f} s (the slowest of three)")
    print(f"memory           {row['peak_mib']:.0f} MiB at most, {row['more_mib']:.0f} of them for this")
    print(f"median of {given.runs} run(s), load {os.getloadavg()[0]:.1f}")
    if given.json is not None:
        given.json.write_text(json.dumps({"row": row, "runs": runs, "index_bytes": size}, indent=1), "utf-8")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except DualencError as e:
        raise SystemExit(f"error: {e}") from None
