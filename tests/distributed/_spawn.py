"""Run a function in W real processes joined by gloo, as torchrun would start them.

``spawn(path, "function", world_size, arguments)`` calls ``function(world, **arguments)`` of the file on every rank and
returns what each rank returned (JSON and tensors). A hang is an error after ``timeout_s``.

Ranks are forked from a process that has imported torch and the library and has done nothing else (:func:`_serve`): an
import takes two seconds of the processor and a test has none of its own to wait for. Even and odd ranks come from two
such processes, so that they hash strings differently, as processes do.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _shared import PYTHONPATH

ROOT = Path(__file__).parents[2]
IMPORTED = ("dualenc.train.loop", "accelerate", "torch._dynamo", "torch.distributed.fsdp", "deepspeed.compile.backend")
"""What engines import sooner or later, DeepSpeed if it is installed."""
_OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT", "PYTEST_CURRENT_TEST")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class _Server:
    """A process that forks ranks; it ends with this one, whose end of its standard input closes then."""

    def __init__(self, env: dict[str, str]) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="ranks")
        self.address = f"{self.folder.name}/socket"
        self.process = subprocess.Popen(
            [sys.executable, __file__, self.address], env=env, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def connect(self) -> socket.socket:
        assert self.process.stdout is not None
        if not os.path.exists(self.address):
            assert self.process.stdout.readline() == b"ready\n", "the process that ranks are forked from did not start"
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self.address)
        return connection

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.folder.cleanup()


_servers: dict[tuple[tuple[str, str], ...], list[_Server]] = {}


def _servers_for(env: dict[str, str]) -> list[_Server]:
    """Two of them with this environment; those with another one end."""
    fixed = {k: v for k, v in env.items() if k not in _OF_A_RANK}
    key = tuple(sorted(fixed.items()))
    if key not in _servers:
        for server in (s for pair in _servers.values() for s in pair):
            server.close()
        _servers.clear()
        _servers[key] = [_Server(fixed), _Server(fixed)]
    return _servers[key]


class Rank:
    """One process of a job, used as a :class:`subprocess.Popen`."""

    def __init__(self, connection: socket.socket, log: Path, request: dict[str, Any]) -> None:
        self.returncode: int | None = None
        self._connection, self._log = connection, log
        self._said = connection.makefile("r")
        connection.sendall((json.dumps(request) + "\n").encode())
        self.pid = int(self._said.readline())

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self._connection.settimeout(timeout)
            try:
                self.returncode = int(self._said.readline())
            except TimeoutError as e:
                raise subprocess.TimeoutExpired(f"rank with process id {self.pid}", timeout or 0) from e
            self._said.close()
            self._connection.close()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        self.wait(timeout)
        return self._log.read_text(encoding="utf-8", errors="replace"), None

    def kill(self) -> None:
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(self.pid, signal.SIGKILL)


def start(
    path: str | Path, function: str, world_size: int, arguments: dict[str, Any], out: Path, group_timeout_s: float = 60
) -> list[Rank]:
    """Start the processes; each writes ``out/RANK.pt``."""
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "PYTHONPATH": PYTHONPATH,
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
    }
    servers = _servers_for(env)
    ranks = []
    for r in range(world_size):
        log = out / f"rank-{r}.txt"
        request = {
            "env": env | {"RANK": str(r), "LOCAL_RANK": str(r)},
            "log": str(log),
            "argv": [__file__, str(path), function, json.dumps(arguments), str(out), str(group_timeout_s)],
        }
        ranks.append(Rank(servers[r % 2].connect(), log, request))
    return ranks


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


def _serve(address: str) -> list[str]:
    """Fork a process for every request, and tell who asked its id and then its exit status.

    Returns in the forked process only, with its arguments: it ends as any program does, exit handlers and all.
    """
    for name in IMPORTED:
        if importlib.util.find_spec(name.partition(".")[0]) is not None:
            importlib.import_module(name)
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # of those that watch a rank nothing is asked
    server = socket.socket(socket.AF_UNIX)
    server.bind(address + "~")
    server.listen(16)
    os.rename(address + "~", address)
    print("ready", flush=True)
    while True:
        if sys.stdin in select.select([server, sys.stdin], [], [])[0]:
            os._exit(0)
        connection = server.accept()[0]
        if os.fork():
            connection.close()
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        server.close()
        request = json.loads(connection.makefile("r").readline())
        rank = os.fork()
        if rank == 0:
            connection.close()
            _become(request)
            return list(request["argv"])
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        connection.sendall(f"{rank}\n".encode())
        _, status = os.waitpid(rank, 0)
        connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
        os._exit(0)


def _become(request: dict[str, Any]) -> None:
    """Take the environment of a rank; what it prints goes to its file."""
    os.environ.clear()
    os.environ.update(request["env"])
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for at, fd in ((0, nothing), (1, log), (2, log)):
        os.dup2(fd, at)
    sys.argv = request["argv"]


def _run(path: str, function: str, arguments: str, out: str, timeout_s: str) -> None:
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
    _run(*_serve(sys.argv[1])[1:])
