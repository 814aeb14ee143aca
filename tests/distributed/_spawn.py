"""Run a function in W real processes joined by gloo, as torchrun would start them.

``spawn(path, "function", world_size, arguments)`` calls ``function(world, **arguments)`` of the file on every rank and
returns what each rank returned (JSON and tensors). A hang is an error after ``timeout_s``.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _shared import PYTHONPATH

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def start(
    path: str | Path, function: str, world_size: int, arguments: dict[str, Any], out: Path, group_timeout_s: float = 60
) -> list[subprocess.Popen[str]]:
    """Start the processes; each writes ``out/RANK.pt``."""
    port = free_port()
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTHONPATH": PYTHONPATH,
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, __file__, str(path), function, json.dumps(arguments), str(out), str(group_timeout_s)]
    return [
        subprocess.Popen(
            command,
            env=env | {"RANK": str(r), "LOCAL_RANK": str(r)},
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for r in range(world_size)
    ]


def spawn(
    path: str | Path,
    function: str,
    world_size: int,
    arguments: dict[str, Any] | None = None,
    timeout_s: float = 240,
    group_timeout_s: float = 60,
) -> list[Any]:
    """What every rank returned, in rank order; raises AssertionError with the output of every rank that failed.

    Of all, not of the first: the lowest is often only the one that saw another's connection close.
    """
    import torch

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        processes = start(path, function, world_size, arguments or {}, out, group_timeout_s)
        deadline = time.monotonic() + timeout_s
        texts = []
        try:
            for p in processes:
                texts.append(p.communicate(timeout=max(deadline - time.monotonic(), 1))[0])
        except subprocess.TimeoutExpired as e:
            raise AssertionError(f"{function} on {world_size} ranks did not end in {timeout_s} s") from e
        finally:
            for p in processes:
                p.kill()
        failed = [
            f"rank {r} of {world_size} ended with {p.returncode}:\n{texts[r][-4000:]}"
            for r, p in enumerate(processes)
            if p.returncode
        ]
        assert not failed, "\n".join(failed)
        return [torch.load(out / f"{r}.pt", weights_only=True) for r in range(world_size)]


def _child() -> None:
    path, function, arguments, out, timeout_s = sys.argv[1:]
    import torch

    from dualenc.distributed.world import close_world, init_world

    spec = importlib.util.spec_from_file_location("spawned", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    world = init_world("cpu", float(timeout_s), threads=1)
    result = getattr(module, function)(world, **json.loads(arguments))
    torch.save(result, Path(out) / f"{world.rank}.pt")
    close_world(world)


if __name__ == "__main__":
    _child()
