"""Start the ranks of one machine and supervise them: ``dualenc launch --nproc N``.

It does what ``torchrun --standalone`` does with less output: one line says which rank ended how, the exit code is that
rank's, and only crashes are restarted (torchrun also restarts a run whose recipe is wrong).
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType

FINAL = frozenset({0, 2, 3, 4, 5, 6, 130})
"""Exit codes that a restart would give again: done, wrong recipe, data, checkpoint, diverged, stopped by the guard,
stopped with a checkpoint."""

GRACE_S = 20.0
"""How long the other ranks may take to report once one has ended; longer than ``naming_missing_ranks``."""

_PR_SET_PDEATHSIG = 1


def launch(command: Sequence[str], nproc: int, max_restarts: int = 0, grace_s: float = GRACE_S) -> int:
    """Run ``command`` in ``nproc`` processes that find each other; restart all of them when one crashes.

    Args:
        command: what each rank runs; ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK`` … are in its environment.
        nproc: number of ranks, ≥ 1.
        max_restarts: how often to restart after a crash.
        grace_s: seconds until the ranks left over by a crash are killed.

    Returns:
        The exit code of the first rank that failed (128 + N if signal N ended it), else 0.
    """
    for attempt in range(max_restarts + 1):
        ranks = RankProcesses(command, nproc, grace_s)
        code = ranks.run()
        if code in FINAL or ranks.signalled or attempt == max_restarts:
            break
        _say(f"restarting all ranks ({attempt + 1} of {max_restarts}) from the newest checkpoint")
    return code


class RankProcesses:
    """One start of all ranks, with its own store: in an old one gloo would find the addresses of dead ranks."""

    def __init__(self, command: Sequence[str], nproc: int, grace_s: float) -> None:
        self.command, self.nproc, self.grace_s = list(command), nproc, grace_s
        self.signalled = False
        self.processes: list[subprocess.Popen[bytes]] = []

    def run(self) -> int:
        """Start, wait for all ranks, and return the exit code (see :func:`launch`)."""
        from torch._C._distributed_c10d import TCPStore

        # The launcher keeps the store: it outlives any rank, so the others can still find out which one is gone.
        store = TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
        tie = _die_with_parent()
        with self._forwarding():
            for rank in range(self.nproc):
                env = rank_environment(os.environ, rank, self.nproc, store.port)
                # A group of its own: Ctrl-C reaches a rank once, through the launcher, not twice.
                self.processes.append(subprocess.Popen(self.command, env=env, process_group=0, preexec_fn=tie))
            try:
                return self._wait()
            finally:
                self._kill()

    def _wait(self) -> int:
        code, deadline = 0, float("inf")
        while any(p.poll() is None for p in self.processes):
            if code == 0:
                code = self._first_failure()
                if code:
                    deadline = time.monotonic() + self.grace_s
            if time.monotonic() > deadline:
                left = [str(r) for r, p in enumerate(self.processes) if p.poll() is None]
                _say(f"rank {', '.join(left)} did not exit within {self.grace_s:.0f} s; killing it")
                self._kill()
            time.sleep(0.05)
        return code or self._first_failure()

    def _first_failure(self) -> int:
        """The exit code of the rank that failed; of several, one that says more than 1 ("lost the others") does."""
        ended = {r: p.returncode for r, p in enumerate(self.processes) if p.poll() not in (None, 0)}
        if not ended:
            return 0
        rank = min(ended, key=lambda r: (ended[r] == 1, r))
        code = ended[rank]
        if code < 0:
            _say(f"rank {rank} was ended by {signal.Signals(-code).name}")
            return 128 - code
        _say(f"rank {rank} ended with exit code {code}")
        return int(code)

    def _kill(self) -> None:
        for p in self.processes:
            if p.poll() is None:
                p.kill()
        for p in self.processes:
            p.wait()

    @contextmanager
    def _forwarding(self) -> Iterator[None]:
        """SIGTERM, SIGINT and SIGHUP go to every rank, which writes a checkpoint and exits; the launcher waits."""

        def forward(number: int, _: FrameType | None) -> None:
            self.signalled = True
            for p in self.processes:
                if p.poll() is None:
                    p.send_signal(number)

        wanted = [s for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) if signal.getsignal(s) != signal.SIG_IGN]
        old = {s: signal.signal(s, forward) for s in wanted}
        try:
            yield
        finally:
            for s, handler in old.items():
                signal.signal(s, handler)


def rank_environment(env: Mapping[str, str], rank: int, nproc: int, port: int) -> dict[str, str]:
    """The environment of one rank: torchrun's variables, and the cores shared among the ranks."""
    threads = max(len(os.sched_getaffinity(0)) // nproc, 1)
    return {
        "OMP_NUM_THREADS": str(threads),
        **env,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def _die_with_parent() -> Callable[[], None] | None:
    """What a rank does first: ask Linux to kill it with the launcher; an orphan would keep writing checkpoints."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl

    def tie() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    return tie


def _say(text: str) -> None:
    print(f"dualenc launch: {text}", file=sys.stderr, flush=True)
