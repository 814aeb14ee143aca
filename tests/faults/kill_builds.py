"""SIGKILL at seeded random moments of a build with steps; the same build again must end in an unbroken one's bytes.

``python tests/faults/kill_builds.py [--kills 10] [--samples 5000] [--engine local|ray] [--seed S]`` makes pictures with
captions, some of them broken, repeated or not worth keeping, builds them unbroken once, then for every kill in a new
folder: kill, half of the time kill the resumed build too, resume with another number of processes, compare all files.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[2]
STEPS = [
    {"filter": "caption_rules", "each": "caption"},
    {"filter": "size", "keep": "shorter >= 12", "note": True},
]


def make_inputs(folder: Path, samples: int) -> None:
    """Pictures of 16 … 47 px with one or two captions each."""
    rng = np.random.default_rng(0)
    for i in range(samples):
        name = folder / f"{i:05d}.jpg"
        if i % 97 == 50:
            name.write_bytes(b"not an image")
        elif i % 61 == 60:
            name.write_bytes((folder / f"{i - 7:05d}.jpg").read_bytes())
        else:
            out = io.BytesIO()
            side = 8 if i % 53 == 3 else 16 + i % 32
            Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(out, "JPEG")
            name.write_bytes(out.getvalue())
        name.with_suffix(".txt").write_text("IMG_0001.JPG" if i % 41 == 5 else f"picture number {i}")


def settings(inputs: Path, samples: int, processes: int) -> dict[str, Any]:
    """Of every build of these inputs."""
    return {
        "path": str(inputs),
        "size": 40,
        "val_every": 9,
        "distinct": "image",
        "origin": "drawn",
        "steps": STEPS,
        "shard_samples": max(8, samples // 25),
        "shard_mb": samples / 12_000,
        "max_dropped_share": 0.2,
        "processes": processes,
    }


def fork(inputs: Path, out: Path, samples: int, processes: int, engine: str) -> int:
    """Start a build in a process of its own: its pid."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setpgid(0, 0)
        said = os.open(out.with_suffix(".txt"), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        from dualenc_data_tools.build import build

        build("folder", out, settings(inputs, samples, processes), progress=False, engine=engine, address="local")
        code = 0
    except BaseException:  # noqa: BLE001 – the child must not go on as a copy of this process
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(pid: int, seconds: float) -> int | None:
    """Exit code of a build if it ends in so many seconds."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def files(out: Path) -> dict[str, bytes]:
    """Every file of a build, hidden ones too."""
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


def whole(inputs: Path, out: Path, samples: int, processes: int, engine: str) -> float:
    """Run a build to its end: its seconds."""
    began = time.monotonic()
    code = ended(fork(inputs, out, samples, processes, engine), 300)
    if code != 0:
        raise SystemExit(f"{out.name}: ended with {code}: {out.with_suffix('.txt').read_text()[-2000:]}")
    return time.monotonic() - began


def kill(inputs: Path, out: Path, samples: int, processes: int, engine: str, moment: Callable[[], bool]) -> bool:
    """Kill a build once ``moment`` is true; whether it was still running."""
    pid = fork(inputs, out, samples, processes, engine)
    while not moment():
        if ended(pid, 0.004) is not None:
            return False
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return True


def drawn(rng: random.Random, out: Path, seconds: float, shards: int) -> Callable[[], bool]:
    """A moment of a build: after some time, or shortly after some number of shards is complete."""
    if rng.random() < 0.4:
        until = time.monotonic() + rng.uniform(0, seconds)
        return lambda: time.monotonic() >= until
    count, wait, seen = rng.randint(1, shards + 1), rng.uniform(0, 0.03), [0.0]

    def reached() -> bool:
        journal = out / ".build-train.jsonl"
        if not seen[0] and journal.is_file() and journal.read_bytes().count(b"\n") > count:
            seen[0] = time.monotonic()
        return bool(seen[0]) and time.monotonic() >= seen[0] + wait

    return reached


def complete(out: Path) -> int:
    """Shards in the journal of a stopped build."""
    journal = out / ".build-train.jsonl"
    return max(0, journal.read_bytes().count(b"\n") - 1) if journal.is_file() else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--engine", default="local")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    import dualenc_data_tools.build
    import dualenc_data_tools.choose  # noqa: F401 – what the forked builds use

    rng, kills, wrong = random.Random(given.seed), 0, 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        inputs = folder / "inputs"
        inputs.mkdir()
        make_inputs(inputs, given.samples)
        seconds = whole(inputs, folder / "whole", given.samples, 1, "local")
        expected = files(folder / "whole")
        shards = [n for n in expected if n.endswith(".tar")]
        print(f"unbroken, local, 1 process: {len(shards)} shards, {seconds:.1f} s", flush=True)
        for n in (2, 4):
            seconds = whole(inputs, folder / f"whole-{n}", given.samples, n, given.engine)
            same = files(folder / f"whole-{n}") == expected
            wrong += not same
            print(
                f"unbroken, {given.engine}, {n} processes: {'equal' if same else 'DIFFERS'}, {seconds:.1f} s",
                flush=True,
            )
        while kills < given.kills:
            out = folder / f"killed-{kills}"
            processes, moment = rng.choice((1, 2, 4)), drawn(rng, out, seconds, len(shards))
            if not kill(inputs, out, given.samples, processes, given.engine, moment):
                seconds = max(0.1, 0.9 * seconds)  # the machine is less busy than it was
                shutil.rmtree(out)
                continue
            found = [f"{complete(out)} of {len(shards)} shards"]
            more = complete(out) + rng.randint(1, 3)
            again = drawn(random.Random(rng.random()), out, seconds, more)
            if rng.random() < 0.5 and kill(inputs, out, given.samples, 2, given.engine, again):
                found.append(f"again at {complete(out)}")
            if (out / ".build-train.jsonl").exists() or not (out / "index.json").exists():
                whole(inputs, out, given.samples, rng.choice((1, 2, 4)), given.engine)
            kills += 1
            same = files(out) == expected
            wrong += not same
            print(f"killed at {', '.join(found)}: {'equal' if same else 'DIFFERS'}", flush=True)
    print(f"{kills} kills, {wrong} differences")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
