"""Data workers as processes: started so that none hangs, deaf to signals meant for the trainer, gone when it is."""

from __future__ import annotations

import ctypes
import functools
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import queues
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any

import torch

from dualenc.errors import DataError

logger = logging.getLogger(__name__)

_START_LIMITS_S = (20.0, 40.0, 80.0)


def start_workers(count: int, build: Callable[[Callable[[int], None]], Any]) -> Any:
    """Start ``count`` forked workers and return ``build``'s iterator once every one of them runs.

    CPython 3.11 can hang in ``fork``: where another thread (gloo's and NCCL's run loops do) is just entering or
    leaving Python, the child waits forever for a lock whose owner it does not have. Measured: once in about 500 starts
    after a collective. Such a worker is killed and all are started again; as a step is a pure function of its number,
    nothing else changes.

    Args:
        build: builds torch's iterator, given the ``worker_init_fn`` that it has to use.

    Raises:
        DataError: if workers hang again and again.
    """
    for limit in _START_LIMITS_S:
        # Plain shared memory without a lock: a lock is what a hanging worker would leave taken.
        running = multiprocessing.get_context("fork").RawArray(ctypes.c_int, count)
        before = {p.pid for p in multiprocessing.active_children()}
        with sigterm_blocked():  # before torch starts threads in a worker, which would take the signal
            iterator = build(functools.partial(init_worker, running=running))
        started = [p for p in multiprocessing.active_children() if p.pid not in before]
        hanging = _not_running(started, running, limit)
        if not hanging:
            return iterator
        logger.warning(
            "%d of %d data workers did not start within %.0f s: killed, and all started again.",
            len(hanging),
            count,
            limit,
        )
        iterator._shutdown_workers()  # first, or torch would report the killed ones as lost
        for p in hanging:
            p.kill()
            p.join()
    raise DataError(
        f"The data workers (data.workers: {count}) hung at each of {len(_START_LIMITS_S)} attempts to start them: "
        "the machine lacks memory or processes, or cannot fork; data.workers=0 reads in the main process."
    )


def _not_running(started: Sequence[BaseProcess], running: Any, limit_s: float) -> list[BaseProcess]:
    """Those alive that ran no Python within ``limit_s``. A dead one is reported where its batch is missed."""
    deadline, pause = time.monotonic() + limit_s, 0.001
    while True:
        waiting = [p for p in started if p.pid not in set(running) and p.is_alive()]
        if not waiting or time.monotonic() > deadline:
            return waiting
        time.sleep(pause)
        pause = min(pause * 2, 0.05)


def init_worker(worker: int, running: Any = None) -> None:
    """One thread each, as the many workers share the cores with training; the main process handles signals.

    Ctrl-C and a scheduler's SIGTERM reach every process of a job. Workers must survive them, or the run could not
    finish its step and write a checkpoint; only a SIGTERM from the main process itself ends a worker. SIGTERM is
    blocked from the worker's start (see :func:`sigterm_blocked`). ``running[worker]`` becomes its process id.
    """
    if running is not None:
        running[worker] = os.getpid()
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    queues.Queue._on_queue_feeder_error = staticmethod(_end_on_failed_hand_over)  # type: ignore[attr-defined]
    threading.Thread(target=_obey_parent, args=(os.getppid(),), name="dualenc-signals", daemon=True).start()
    _report_while_alive(os.getppid())


def _end_on_failed_hand_over(error: Exception, _: Any) -> None:
    """Exit where a batch cannot be put into shared memory: it is lost, and the trainer would wait for it forever."""
    print(f"dualenc: a data worker cannot hand over a batch ({error})", file=sys.stderr, flush=True)
    os._exit(1)


def _report_while_alive(parent: int) -> None:
    """Suppress the lost-connection error of a worker whose trainer was killed: nobody is left to read it."""
    report = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        lost = isinstance(error, OSError | EOFError)
        if lost:
            time.sleep(1.0)  # the connection is lost before the process is seen to have exited
        if os.getppid() == parent or not lost:
            report(kind, error, trace)

    sys.excepthook = hook


@contextmanager
def sigterm_blocked() -> Iterator[None]:
    """Processes and threads started inside have SIGTERM blocked, and so have all their threads."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _obey_parent(parent: int) -> None:
    while True:
        if signal.sigwaitinfo({signal.SIGTERM}).si_pid == parent:
            os._exit(0)
