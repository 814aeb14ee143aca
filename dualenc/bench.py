"""Benchmarks that print the numbers claimed elsewhere: ``python -m dualenc.bench loss [N …]`` and ``ranks [N [D]]``."""

from __future__ import annotations

import resource
import subprocess
import sys
import time

import torch
from torch.nn.functional import normalize

from dualenc.errors import ConfigError, DualencError
from dualenc.losses.info_nce import info_nce
from dualenc.losses.sigmoid import sigmoid_loss

DIM = 512
SIZES = (2048, 4096, 8192, 16384, 32768)
PLAIN_LIMIT = 16384
"""Largest batch for the plain matrices: InfoNCE would take about 36 GiB at 32768."""


def loss_cell(kind: str, size: int, impl: str) -> tuple[float, float]:
    """Seconds and peak MiB (beyond the features) of one forward and backward on this process's CPU threads."""
    g = torch.Generator().manual_seed(0)
    a, b = (normalize(torch.randn(size, DIM, generator=g), dim=-1).requires_grad_() for _ in "ab")
    scale, bias = torch.tensor([20.0], requires_grad=True), torch.tensor([-10.0], requires_grad=True)
    ids, strip_mb = torch.arange(size), 64.0 if impl == "tiled" else None
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    out = (
        info_nce(a, b, ids, scale, 0.0, strip_mb)
        if kind == "info_nce"
        else sigmoid_loss(a, b, ids, scale, bias, strip_mb)
    )
    out.value.backward()  # type: ignore[no-untyped-call]
    seconds = time.perf_counter() - start
    return seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def loss_table(sizes: tuple[int, ...]) -> None:
    """Print time and peak memory of the plain and the tiled losses; every cell in a process of its own."""
    print(f"one forward and backward, D = {DIM}, {torch.get_num_threads()} thread(s)")
    print(f"{'loss':>9} {'N':>6}  {'plain s':>8} {'tiled s':>8}  {'plain MiB':>9} {'tiled MiB':>9}")
    for kind in ("info_nce", "sigmoid"):
        for size in sizes:
            cells = {}
            for impl in ("plain", "tiled"):
                if impl == "plain" and size > PLAIN_LIMIT:
                    continue
                command = [sys.executable, "-m", "dualenc.bench", "loss-cell", kind, str(size), impl]
                text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                cells[impl] = [float(x) for x in text.split()]
            (plain_s, plain_mib), (tiled_s, tiled_mib) = cells.get("plain", [float("nan")] * 2), cells["tiled"]
            print(f"{kind:>9} {size:>6}  {plain_s:8.2f} {tiled_s:8.2f}  {plain_mib:9.0f} {tiled_mib:9.0f}", flush=True)


def ranks(size: int, dim: int) -> None:
    """Exact ranks of ``size`` queries among as many candidates in one process: seconds and peak memory of it all."""
    from evals.metrics import Positives, best_ranks

    g = torch.Generator().manual_seed(0)
    a = normalize(torch.randn(size, dim, generator=g), dim=1)
    b = normalize(a + 2 / dim**0.5 * torch.randn(size, dim, generator=g), dim=1)
    pairs = Positives([[i] for i in range(size)], size)
    wall, cpu = time.perf_counter(), time.process_time()
    found = best_ranks(a, b, pairs)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    threads = torch.get_num_threads()
    print(f"N = {size}, D = {dim}, {threads} thread(s): {wall:.1f} s, {cpu:.1f} CPU s, peak {peak:.0f} MiB", end="")
    print(f", R@1 {float((found == 1).mean()):.4f}, mean rank {float(found.mean()):.2f}")


def main(arguments: list[str]) -> None:
    """Run the benchmark that is named."""
    if arguments[:1] == ["loss"]:
        loss_table(tuple(int(n) for n in arguments[1:]) or SIZES)
    elif arguments[:1] == ["loss-cell"]:
        print(*loss_cell(arguments[1], int(arguments[2]), arguments[3]))
    elif arguments[:1] == ["ranks"]:
        numbers = [int(n) for n in arguments[1:]]
        ranks(*(numbers + [100_000, 256][len(numbers) :]))
    else:
        raise ConfigError("write: python -m dualenc.bench loss [N …], or python -m dualenc.bench ranks [N [D]]")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except DualencError as e:
        raise SystemExit(f"error: {e}") from None
