"""``python -m benchmarks.embed_ranks``: ``dualenc embed`` on two ranks against one, taking turns; do the rows agree?

A rank computes with one thread. Starting takes seconds that do not depend on the data, so two runs are timed for each
number of ranks, over two shards and over all, and the rate is that of the difference. The machine should be idle: on a
loaded one two processes also get twice the share of one, which is not the speed of the program; the load is printed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from benchmarks.matrix import WORDS, built
from dualenc.data.shards.reader import SampleError, iter_samples
from dualenc.shipped import recipes_folder
from dualenc_data_tools.writer import ShardWriter

WIDE = {"input": {"size": 64}, "encoder": {"name": "own/convnet", "widths": [64, 128, 256]}}


def shards(folder: Path, count: int, each: int) -> None:
    """``count`` shards of ``each`` images and captions of the quickstart, over and over."""
    wanted = {"image": ["webp"], "text": ["txt"]}
    pattern = recipes_folder() / "quickstart" / "data" / "train-{000000..000003}.tar"
    rows = []
    for _, found in iter_samples(str(pattern), wanted):
        if isinstance(found, SampleError):
            raise found
        rows.append((found.values["image"], found.values["text"]))
        if len(rows) == each:
            break
    with ShardWriter(folder, max_samples=each, overwrite=True) as writer:
        for k in range(count):
            for i, (image, text) in enumerate(rows):
                writer.write(f"{k:03}-{i:05}", {"webp": image, "txt": text})


def embed(model: Path, pattern: str, out: Path, ranks: int) -> float:
    """Seconds of one command."""
    shutil.rmtree(out, ignore_errors=True)
    launch = ["launch", "--nproc", str(ranks)] if ranks > 1 else []
    command = [sys.executable, "-m", "dualenc", *launch, "embed", str(model), pattern, "--out", str(out)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    began = time.monotonic()
    done = subprocess.run([*command, "--device", "cpu"], capture_output=True, text=True, env=env)
    if done.returncode:
        raise RuntimeError(done.stderr[-1000:])
    return time.monotonic() - began


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def main() -> None:
    """Print each round and the median."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shards", type=int, default=8, help="even, so that two ranks have equally many")
    parser.add_argument("--each", type=int, default=900, help="samples of a shard")
    args = parser.parse_args()
    ratios, whole = [], []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = built(128, image=WIDE, text=WORDS).save(folder / "model")
        shards(folder / "data", args.shards, args.each)
        last = f"{args.shards - 1:06}"
        every = str(sorted((folder / "data").glob("*.tar"))[0]).replace("000000.tar", f"{{000000..{last}}}.tar")
        few = every.replace(f"..{last}", "..000001")
        print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", flush=True)
        for k in range(args.rounds):
            seconds = {}
            for ranks in (1, 2) if k % 2 == 0 else (2, 1):
                start = embed(model, few, folder / f"few{ranks}", ranks)
                seconds[ranks] = embed(model, every, folder / f"out{ranks}", ranks), start
            ratio = (seconds[1][0] - seconds[1][1]) / (seconds[2][0] - seconds[2][1])
            ratios.append(ratio)
            whole.append(seconds[1][0] / seconds[2][0])
            same = contents(folder / "out1") == contents(folder / "out2")
            print(
                f"round {k}: 1 rank {seconds[1][0]:.1f} s ({seconds[1][1]:.1f} for two shards), 2 ranks "
                f"{seconds[2][0]:.1f} s ({seconds[2][1]:.1f}): {ratio:.2f} times as fast, with the start "
                f"{whole[-1]:.2f}; {'the same bytes' if same else 'OTHER BYTES'}",
                flush=True,
            )
    print(f"median of {args.rounds}: {median(ratios):.2f} times as fast; with the start {median(whole):.2f}")


if __name__ == "__main__":
    main()
