"""Benchmarks that print the numbers quoted elsewhere.

    python -m benchmarks.losses loss [N …] [--max-gib 12] [--runs 3] [--threads T]
    python -m benchmarks.losses ranks [--size 100000] [--dim 256]

``loss``: time and peak memory of one forward and backward of each loss, plain and tiled, D = 512. Every run is a
process of its own (a peak cannot be taken back), plain and tiled take turns, and medians are shown; nan: left out for
its memory. ``ranks``: exact retrieval ranks of as many queries as candidates. Linux only.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from math import log
from pathlib import Path
from statistics import median

import torch
from torch.nn.functional import normalize

from dualenc.errors import DualencError
from dualenc.losses.info_nce import info_nce
from dualenc.losses.loss import TiledConfig
from dualenc.losses.sigmoid import sigmoid_loss

DIM = 512
SIZES = (2048, 4096, 8192, 16384, 32768)
PLAIN_BYTES = {"info_nce": 40, "sigmoid": 30}
"""Per logit, a little more than measured: tells beforehand what would not fit."""

Cell = tuple[float, float]


def loss_cell(kind: str, size: int, impl: str) -> Cell:
    """Seconds and peak MiB (beyond the features) of one forward and backward in this process, which must be fresh."""
    g = torch.Generator().manual_seed(0)
    how = TiledConfig.model_validate({"impl": impl}).choose(size, torch.device("cpu"))
    for n in (256, size):  # the small one first: threads and libraries start
        a, b = (normalize(torch.randn(n, DIM, generator=g), dim=-1).requires_grad_() for _ in "ab")
        scale, bias = torch.tensor([20.0], requires_grad=True), torch.tensor([-10.0], requires_grad=True)
        ids = torch.arange(n)
        before, start = _mib("/proc/self/status", "VmRSS"), time.perf_counter()
        loss = info_nce(a, b, ids, scale, 0.0, how) if kind == "info_nce" else sigmoid_loss(a, b, ids, scale, bias, how)
        loss.value.backward()  # type: ignore[no-untyped-call]
        seconds = time.perf_counter() - start
    # Not getrusage, whose peak starts at the parent's.
    return seconds, _mib("/proc/self/status", "VmHWM") - before


def _mib(path: str, field: str) -> float:
    """A field of a file in /proc that is given in kB."""
    return int(Path(path).read_text(encoding="ascii").split(f"{field}:")[1].split()[0]) / 1024


def measure(kind: str, size: int, impls: list[str], runs: int, threads: int) -> dict[str, Cell]:
    """Medians by implementation; they take turns, so that a slow minute of the machine affects all alike."""
    found: dict[str, list[Cell]] = {impl: [] for impl in impls}
    for _ in range(runs):
        for impl in impls:
            command = [sys.executable, "-m", "benchmarks.losses", "loss-cell", kind, str(size), impl, str(threads)]
            text = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            seconds, mib = map(float, text.split())
            found[impl].append((seconds, mib))
    return {k: (median(s for s, _ in cells), median(m for _, m in cells)) for k, cells in found.items()}


def slope(sizes: list[int], values: list[float]) -> float:
    """Of the least-squares line through (log size, log value); NaN below two points."""
    if len(sizes) < 2:
        return float("nan")
    xs, ys = [log(n) for n in sizes], [log(max(v, 1e-9)) for v in values]
    mx, my = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - mx) * (y - my) for x, y in zip(xs, ys, strict=True)) / sum((x - mx) ** 2 for x in xs)


def loss_table(sizes: list[int], max_gib: float, runs: int, threads: int) -> None:
    """Print the table and, under each loss, how memory grows with N."""
    print(f"one forward and backward, D = {DIM}, {threads} thread(s), median of {runs}, load {os.getloadavg()[0]:.1f}")
    print(f"{'loss':>9} {'N':>6}  {'plain s':>8} {'tiled s':>8} {'ratio':>6}  {'plain MiB':>9} {'tiled MiB':>9}")
    for kind in ("info_nce", "sigmoid"):
        memory: dict[str, dict[int, float]] = {"plain": {}, "tiled": {}}
        for size in sizes:
            limit = min(max_gib * 1024, 0.8 * _mib("/proc/meminfo", "MemAvailable"))
            fits = PLAIN_BYTES[kind] * size**2 / 2**20 <= limit
            cells = measure(kind, size, ["plain", "tiled"] if fits else ["tiled"], runs, threads)
            for impl, (_, mib) in cells.items():
                memory[impl][size] = mib
            (plain_s, plain_mib), (tiled_s, tiled_mib) = cells.get("plain", (float("nan"),) * 2), cells["tiled"]
            times = f"{plain_s:8.2f} {tiled_s:8.2f} {plain_s / tiled_s:6.2f}"
            print(f"{kind:>9} {size:>6}  {times}  {plain_mib:9.0f} {tiled_mib:9.0f}", flush=True)
        slopes = ", ".join(f"{impl} {slope(list(m), list(m.values())):.2f}" for impl, m in memory.items())
        print(f"{kind:>9} slope of log memory over log N: {slopes}")


def ranks(size: int, dim: int) -> None:
    """Exact ranks of ``size`` queries among as many candidates in one process: seconds and peak memory of it all."""
    from dualenc_evals.metrics.scores import Positives, best_ranks

    g = torch.Generator().manual_seed(0)
    a = normalize(torch.randn(size, dim, generator=g), dim=1)
    b = normalize(a + 2 / dim**0.5 * torch.randn(size, dim, generator=g), dim=1)
    pairs = Positives([[i] for i in range(size)], size)
    wall, cpu = time.perf_counter(), time.process_time()
    found = best_ranks(a, b, pairs)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = _mib("/proc/self/status", "VmHWM")
    threads = torch.get_num_threads()
    print(f"N = {size}, D = {dim}, {threads} thread(s): {wall:.1f} s, {cpu:.1f} CPU s, peak {peak:.0f} MiB", end="")
    print(f", R@1 {float((found == 1).mean()):.4f}, mean rank {float(found.mean()):.2f}")


def main(arguments: list[str]) -> None:
    """Run the named benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.losses")
    commands = parser.add_subparsers(dest="command", required=True)
    table = commands.add_parser("loss", help="time and memory of the losses, plain and tiled")
    table.add_argument("sizes", type=int, nargs="*", default=list(SIZES), metavar="N")
    table.add_argument(
        "--max-gib",
        type=float,
        default=12.0,
        help="skip plain runs that need more than this, or than 80 %% of the free memory",
    )
    table.add_argument("--runs", type=int, default=3)
    table.add_argument("--threads", type=int, default=torch.get_num_threads())
    cell = commands.add_parser("loss-cell", help="one run of the table, in a fresh process")
    cell.add_argument("kind", choices=["info_nce", "sigmoid"])
    cell.add_argument("size", type=int)
    cell.add_argument("impl", choices=["plain", "tiled"])
    cell.add_argument("threads", type=int)
    exact = commands.add_parser("ranks", help="exact retrieval ranks: time, and peak memory of the process")
    exact.add_argument("--size", type=int, default=100_000)
    exact.add_argument("--dim", type=int, default=256)
    given = parser.parse_args(arguments)
    if given.command == "loss":
        loss_table(given.sizes, given.max_gib, given.runs, given.threads)
    elif given.command == "ranks":
        ranks(given.size, given.dim)
    else:
        torch.set_num_threads(given.threads)
        print(*loss_cell(given.kind, given.size, given.impl))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except DualencError as e:
        raise SystemExit(f"error: {e}") from None
