"""Benchmarks that print the numbers quoted elsewhere.

    python -m benchmarks.losses loss [N …] [--max-gib 12] [--runs 3] [--threads T] [--kinds info_nce,cwcl …]
    python -m benchmarks.losses against TREE|open_clip [N …] [--kinds info_nce,cwcl] [--runs 5] [--threads T]
    python -m benchmarks.losses ranks [--size 100000] [--dim 256]

``loss``: CPU time and peak memory of one forward and backward of each loss, plain and tiled, D = 512, and of the peer:
open_clip's own ClipLoss and SigLipLoss. Every run is a process of its own (a peak cannot be taken back), the ways take
turns, medians are shown, and the ratio is the median of the rounds'; nan: left out for its memory, or not to be had.
``against``: time alone, of the same loss in another checkout of this project or of open_clip's, in two processes that
take turns (this / that). CPU time, since wall times say little on a machine that does other work; with one thread they
are the same on an idle one. ``ranks``: exact
retrieval ranks of as many queries as candidates. Linux only.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from math import log
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dualenc.config import Component
from dualenc.errors import DualencError
from dualenc.losses import Extras, build_loss

DIM, WIDTH = 512, 512
SIZES = (2048, 4096, 8192, 16384, 32768)
PLAIN_BYTES = {"info_nce": 40, "sigmoid": 30}
"""Per logit, a little more than measured: tells beforehand what would not fit. Others: 60."""
PEERS = {"info_nce": "ClipLoss", "sigmoid": "SigLipLoss"}
"""Of open_clip."""

Cell = tuple[float, float, float]
"""Wall seconds, MiB, CPU seconds."""


def loss_cell(kind: str, size: int, impl: str) -> Cell:
    """Seconds, peak MiB (beyond the features) and CPU seconds of a forward and backward in this process, a fresh one.

    Args:
        impl: plain, tiled, peer (open_clip's), or default: as a recipe that names the loss alone.
    """
    g = torch.Generator().manual_seed(0)
    run = _peer(kind) if impl == "peer" else _ours(kind, impl)
    one = torch.ones(1, requires_grad=True)
    torch.autograd.grad(one * one, one, torch.ones(1))  # it imports sympy at its first call: half a second, 80 MiB
    for n in (256, size):  # the small one first: threads and libraries start
        a, b, frozen = (normalize(torch.randn(n, d, generator=g), dim=-1) for d in (DIM, DIM, WIDTH))
        a.requires_grad_()
        b.requires_grad_()
        scale, bias = torch.tensor([20.0], requires_grad=True), torch.tensor([-10.0], requires_grad=True)
        before, start, cpu = _mib("/proc/self/status", "VmRSS"), time.perf_counter(), time.process_time()
        run(a, b, scale, bias, frozen).backward()  # type: ignore[no-untyped-call]
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    # Not getrusage, whose peak starts at the parent's.
    return seconds, _mib("/proc/self/status", "VmHWM") - before, cpu


def _ours(kind: str, impl: str) -> Callable[..., Tensor]:
    settings = {} if impl == "default" else {"impl": impl}
    loss = build_loss(Component.model_validate({"name": kind, **settings}))

    def run(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, frozen: Tensor) -> Tensor:
        slots = torch.arange(len(a))
        labels = {"label": slots // 4, "group": slots // 4, "clusters": slots // 4, "length": slots % 20}
        labels["tree"] = torch.stack([slots // 64, slots // 4], 1)
        extras = Extras(("a", "b"), {}, {"frozen": frozen}, labels)
        more = {"extras": extras} if loss.takes_extras else {}
        return loss(a, b, slots, scale, bias, **more).value

    return run


def _peer(kind: str) -> Callable[..., Tensor]:
    import open_clip.loss

    loss = getattr(open_clip.loss, PEERS[kind])()

    def run(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, frozen: Tensor) -> Tensor:
        out: Tensor = loss(a, b, scale, bias) if kind == "sigmoid" else loss(a, b, scale)
        return out

    return run


def _mib(path: str, field: str) -> float:
    """A field of a file in /proc that is given in kB."""
    return int(Path(path).read_text(encoding="ascii").split(f"{field}:")[1].split()[0]) / 1024


def cell(kind: str, size: int, impl: str, threads: int) -> Cell:
    """:func:`loss_cell` in a process of its own."""
    command = [sys.executable, __file__, "loss-cell", kind, str(size), impl, str(threads)]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    text = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env).stdout
    seconds, mib, cpu = map(float, text.split())
    return seconds, mib, cpu


def measure(kind: str, size: int, impls: list[str], runs: int, threads: int) -> dict[str, list[Cell]]:
    """Runs by implementation; they take turns, so that a slow minute of the machine affects all alike."""
    found: dict[str, list[Cell]] = {impl: [] for impl in impls}
    for _ in range(runs):
        for impl in impls:
            found[impl].append(cell(kind, size, impl, threads))
    return found


def _ratio(over: Sequence[Cell], under: Sequence[Cell]) -> float:
    """The median of the ratios of CPU time, run by run."""
    return median(x[2] / y[2] for x, y in zip(over, under, strict=True))


def _medians(cells: Sequence[Cell]) -> Cell:
    seconds, mib, cpu = (median(x) for x in zip(*cells, strict=True))
    return seconds, mib, cpu


class Server:
    """A process that measures one cell after another, with the losses of a checkout."""

    def __init__(self, threads: int, tree: Path | None = None) -> None:
        command = [sys.executable, __file__, "loss-cells", str(threads)]
        env = os.environ | {"PYTHONPATH": str(tree or Path(__file__).parents[1])}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

    def seconds(self, kind: str, size: int, impl: str) -> float:
        """CPU time of a cell. Raises RuntimeError if the process has ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{kind} {size} {impl}\n")
        self.process.stdin.flush()
        if not (line := self.process.stdout.readline()):
            raise RuntimeError(f"the process that measures {kind} ended with {self.process.wait()}")
        return float(line)

    def close(self) -> None:
        """End it."""
        self.process.communicate()


def serve(threads: int) -> None:
    """What a :class:`Server` runs."""
    torch.set_num_threads(threads)
    for line in sys.stdin:
        kind, size, impl = line.split()
        print(loss_cell(kind, int(size), impl)[2], flush=True)


def against(tree: str, kinds: list[str], sizes: list[int], runs: int, threads: int) -> None:
    """Print this checkout's time over the other's, as a recipe that names the loss alone computes it."""
    peer = tree == "open_clip"
    that, this = Server(threads, None if peer else Path(tree)), Server(threads)
    print(f"CPU seconds, that = {tree}, D = {DIM}, {threads} thread(s), medians of {runs} pairs")
    print(f"{'loss':>15} {'N':>6}  {'that s':>8} {'this s':>8} {'ratio':>6}")
    for size in sizes:
        for kind in kinds:
            pairs = []
            for k in range(runs):
                turns = [(that, "peer" if peer else "default"), (this, "default")]
                found = {server: server.seconds(kind, size, impl) for server, impl in turns[:: 1 if k % 2 else -1]}
                pairs.append((found[that], found[this]))
            ratio = median(y / x for x, y in pairs)
            x, y = (median(values) for values in zip(*pairs, strict=True))
            print(f"{kind:>15} {size:>6}  {x:8.2f} {y:8.2f} {ratio:6.2f}", flush=True)
    that.close()
    this.close()


def slope(sizes: list[int], values: list[float]) -> float:
    """Of the least-squares line through (log size, log value); NaN below two points."""
    if len(sizes) < 2:
        return float("nan")
    xs, ys = [log(n) for n in sizes], [log(max(v, 1e-9)) for v in values]
    mx, my = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - mx) * (y - my) for x, y in zip(xs, ys, strict=True)) / sum((x - mx) ** 2 for x in xs)


def loss_table(kinds: list[str], sizes: list[int], max_gib: float, runs: int, threads: int) -> None:
    """Print the table and, under each loss, how memory grows with N."""
    load = os.getloadavg()[0]
    print(
        f"CPU seconds of one forward and backward, D = {DIM}, {threads} thread(s), medians of {runs}, load {load:.1f}"
    )
    heads = f"{'peer s':>8} {'plain s':>8} {'tiled s':>8} {'peer/tiled':>10}"
    print(f"{'loss':>15} {'N':>6}  {heads}  {'peer MiB':>9} {'plain MiB':>9} {'tiled MiB':>9}")
    for kind in kinds:
        memory: dict[str, dict[int, float]] = {}
        for size in sizes:
            limit = min(max_gib * 1024, 0.8 * _mib("/proc/meminfo", "MemAvailable"))
            fits = PLAIN_BYTES.get(kind, 60) * size**2 / 2**20 <= limit
            ways = [*(["peer"] if kind in PEERS else []), "plain"] if fits else []
            runs_of = measure(kind, size, [*ways, "tiled"], runs, threads)
            cells = {k: _medians(found) for k, found in runs_of.items()}
            for impl, (_, mib, _) in cells.items():
                memory.setdefault(impl, {})[size] = mib
            none = (float("nan"),) * 3
            peer, plain, tiled = (cells.get(k, none) for k in ("peer", "plain", "tiled"))
            ratio = _ratio(runs_of["peer"], runs_of["tiled"]) if "peer" in runs_of else float("nan")
            times = f"{peer[2]:8.2f} {plain[2]:8.2f} {tiled[2]:8.2f} {ratio:10.2f}"
            print(f"{kind:>15} {size:>6}  {times}  {peer[1]:9.0f} {plain[1]:9.0f} {tiled[1]:9.0f}", flush=True)
        slopes = ", ".join(f"{impl} {slope(list(m), list(m.values())):.2f}" for impl, m in memory.items())
        print(f"{kind:>15} slope of log memory over log N: {slopes}")


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
    table = commands.add_parser("loss", help="CPU time and memory of the losses, plain and tiled")
    table.add_argument("sizes", type=int, nargs="*", default=list(SIZES), metavar="N")
    table.add_argument(
        "--max-gib",
        type=float,
        default=12.0,
        help="skip plain runs that need more than this, or than 80 %% of the free memory",
    )
    table.add_argument("--runs", type=int, default=3)
    table.add_argument("--kinds", default="info_nce,sigmoid", help="names of losses, separated by commas")
    table.add_argument("--threads", type=int, default=torch.get_num_threads())
    other = commands.add_parser("against", help="time against another checkout of this project")
    other.add_argument("tree", help="a checkout, or open_clip for its own losses")
    other.add_argument("sizes", type=int, nargs="*", default=list(SIZES[:4]), metavar="N")
    other.add_argument("--kinds", default="info_nce,cwcl")
    other.add_argument("--runs", type=int, default=5)
    other.add_argument("--threads", type=int, default=torch.get_num_threads())
    one = commands.add_parser("loss-cell", help="one run of the table, in a fresh process")
    one.add_argument("kind")
    one.add_argument("size", type=int)
    one.add_argument("impl", choices=["plain", "tiled", "peer", "default"])
    one.add_argument("threads", type=int)
    commands.add_parser("loss-cells", help="what against runs").add_argument("threads", type=int)
    exact = commands.add_parser("ranks", help="exact retrieval ranks: time, and peak memory of the process")
    exact.add_argument("--size", type=int, default=100_000)
    exact.add_argument("--dim", type=int, default=256)
    given = parser.parse_args(arguments)
    if given.command == "loss":
        loss_table(given.kinds.split(","), given.sizes, given.max_gib, given.runs, given.threads)
    elif given.command == "against":
        against(given.tree, given.kinds.split(","), given.sizes, given.runs, given.threads)
    elif given.command == "ranks":
        ranks(given.size, given.dim)
    elif given.command == "loss-cells":
        serve(given.threads)
    else:
        torch.set_num_threads(given.threads)
        print(*loss_cell(given.kind, given.size, given.impl))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except DualencError as e:
        raise SystemExit(f"error: {e}") from None
