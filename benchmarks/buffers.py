"""What numbers for every sample cost: memory of a rank, and time and bytes of a step, whatever the number of samples.

    python -m benchmarks.buffers [--samples 10000 10000000] [--ranks 4] [--batch 256] [--steps 20]

Starts the ranks on this machine (gloo) and times what a loss does with its buffer in a step: read the numbers of the
rank's slots, write new ones, commit. Two numbers a sample are those of sogclr and fastclip v0, v1 and v3 (one a side),
ten those of fastclip v2. Also a checkpoint of the buffer: every rank's file, and reading it on one rank more. The
median over steps of the slowest rank is shown. Linux only.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from dualenc.checkpoint.ranges import file_name, stored, write
from dualenc.distributed.launch import launch
from dualenc.distributed.world import World, all_gather_object, barrier, broadcast_object, close_world, init_world
from dualenc.memory import RunShape, SampleBuffer

PAIR = ("image", "text")
HEAD = (
    "samples      numbers  ranks  slots/rank   buffer/rank  resident/rank  read + commit   sent/step       file   save"
)


def resident() -> float:
    """MiB of this process in memory."""
    with open("/proc/self/status", encoding="utf-8") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("VmRSS")) / 1024


def one(world: World, samples: int, numbers: int, slots: int, steps: int) -> str:
    """A line of the table."""
    before = resident()
    run = RunShape(512, [PAIR], samples, world.rank, world.world_size)
    buffer = SampleBuffer({f"n{k}": 0.0 for k in range(numbers)}, run)
    g = torch.Generator().manual_seed(world.rank)
    there, no, took = torch.ones(slots, dtype=torch.bool), torch.tensor(False), []
    for _ in range(steps):
        of = torch.randint(0, samples, (slots,), generator=g)
        barrier(world)
        began = time.perf_counter()
        kept = buffer.read(of, there)
        buffer.propose(of, there, {k: x + 1 for k, x in kept.items()})
        buffer.commit(no)
        took.append(time.perf_counter() - began)
    grown = resident() - before
    with tempfile.TemporaryDirectory() as own:
        folder = Path(broadcast_object(own, world))
        path = folder / file_name("memory", world.rank, world.world_size)
        began = time.perf_counter()
        write(path, buffer.pieces("samples", world.rank, world.world_size))
        saved, size = time.perf_counter() - began, path.stat().st_size / 2**20
        barrier(world)
        _check_elsewhere(folder, buffer, run)
        barrier(world)
    found = all_gather_object((median(took), grown, buffer.bytes() / 2**20, size, saved), world)
    slowest, most, held, file, save = (max(x) for x in zip(*found, strict=True))
    # ids gathered twice (8 bytes), numbers reduced and gathered (4 bytes): each rank sends its share to the others
    sent = (world.world_size - 1) * slots * (2 * 8 + 2 * 4 * numbers) / 1024
    return (
        f"{samples:<12,} {numbers:>7} {world.world_size:>6} {slots:>11,} {held:>9,.1f} MiB {most:>10,.1f} MiB "
        f"{1000 * slowest:>11.2f} ms {sent:>7,.0f} KiB {file:>6,.0f} MiB {save:>4.2f} s"
    )


def _check_elsewhere(folder: Path, buffer: SampleBuffer, run: RunShape) -> None:
    """Another number of ranks reads the same numbers."""
    saved = stored(folder, "memory")
    other = SampleBuffer(dict.fromkeys(buffer.fields, 0.0), RunShape(run.dim, run.pairs, run.samples, 0, 5))
    other.load("samples", saved)
    for k, (_, start, x) in other.held().items():
        if not torch.equal(saved.read(f"samples/{k}", start, start + len(x)), x):
            raise SystemExit(f"{k} was not read as it was written")


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description="Memory and time of numbers for every sample.")
    parser.add_argument("--samples", type=int, nargs="*", default=[10_000, 10_000_000])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--batch", type=int, default=256, help="slots of a rank")
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    if "RANK" not in os.environ and arguments.ranks > 1:
        return launch([sys.executable, "-m", "benchmarks.buffers", *sys.argv[1:]], arguments.ranks)
    world = init_world("cpu", threads=1)
    if world.rank == 0:
        print(HEAD, flush=True)
    for samples in arguments.samples:
        for numbers in (2, 10):
            line = one(world, samples, numbers, arguments.batch, arguments.steps)
            if world.rank == 0:
                print(line, flush=True)
    close_world(world)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
