"""Samples a second from shards behind http: dualenc's loader and webdataset's streaming, 1 to 8 workers.

    python -m benchmarks.remote [--latency-ms 30] [--mbit 800] [--workers 1 2 4 8] [--samples 2000] [--kb 40] [--runs 3]

A server of its own, in a process of its own, waits ``latency-ms`` before every answer and shares ``mbit`` among all
connections. Both sides only move bytes: a sample is an image's worth of random bytes and a caption, and a row is their
length. dualenc reads whole shards where the window fits into the cache (here: windows of 256 samples, as webdataset's
shuffle buffer of 200, and one of all samples), byte ranges of all where it does not; "one request after another"
is byte ranges without anything fetched ahead. Wall-clock seconds from the start of the workers, from empty caches, less
than an epoch, the sides taking turns.
"""

from __future__ import annotations

import argparse
import http.server
import json
import multiprocessing
import os
import re
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import BaseModel

from dualenc.config import Data, Section
from dualenc.data import dataset
from dualenc.data.loader import Loader
from dualenc.errors import DualencError
from dualenc_data_tools.writer import ShardWriter

BATCH = 64
SHARDS = 16


class Lengths:
    """Rows that are the length of an item's bytes: nothing is decoded."""

    Config: ClassVar[type[BaseModel]] = Section
    default_members: ClassVar[list[str]] = ["bin"]

    def __init__(self, config: Any = None, base_dir: str | Path | None = None) -> None:
        self.config = config or Section()

    def decode(self, raw: Any) -> Any:
        """As it is."""
        return raw

    def train(self, x: Any, rng: np.random.Generator) -> torch.Tensor:
        """Its length."""
        return torch.tensor([len(x)])

    def eval(self, x: Any) -> torch.Tensor:
        """Its length."""
        return torch.tensor([len(x)])

    def collate(self, rows: list[torch.Tensor]) -> torch.Tensor:
        """[B, 1]."""
        return torch.stack(rows)

    def dummy(self) -> torch.Tensor:
        """Nothing."""
        return torch.tensor([0])

    def describe(self) -> dict[str, Any]:
        """Nothing to say."""
        return {"kind": "lengths", "config": {}}


# --- the server ----------------------------------------------------------------------------------------------------


class _Server(http.server.ThreadingHTTPServer):
    request_queue_size = 256

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away in the middle is no news."""


class _Slow(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    folder: ClassVar[Path]
    latency_s: ClassVar[float]
    bytes_per_s: ClassVar[float]
    free_at: ClassVar[list[float]] = [0.0]
    lock: ClassVar[threading.Lock] = threading.Lock()

    def do_GET(self) -> None:
        time.sleep(self.latency_s)
        path = self.folder / Path(self.path).name
        if not path.is_file():
            return self.send_error(404)
        total = path.stat().st_size
        match = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first, last = (int(match[1]), int(match[2] or total - 1)) if match else (0, total - 1)
        last = min(last, total - 1)
        self.send_response(206 if match else 200)
        self.send_header("Content-Length", str(last + 1 - first))
        self.send_header("Content-Range", f"bytes {first}-{last}/{total}")
        self.end_headers()
        with open(path, "rb") as f:
            f.seek(first)
            while first <= last:
                piece = f.read(min(1 << 17, last + 1 - first))
                self._wait_for(len(piece))
                self.wfile.write(piece)
                first += len(piece)
        return None

    def _wait_for(self, size: int) -> None:
        """The line is shared: every piece takes its time on it, one after another."""
        with self.lock:
            self.free_at[0] = max(self.free_at[0], time.monotonic()) + size / self.bytes_per_s
            until = self.free_at[0]
        time.sleep(max(0.0, until - time.monotonic()))

    def log_message(self, *_: object) -> None:
        """Quiet."""


def serve(folder: Path, latency_s: float, bytes_per_s: float, port: Any) -> None:
    """Run the server; ``port`` is a pipe that gets its number."""
    handler = type("Handler", (_Slow,), {"folder": folder, "latency_s": latency_s, "bytes_per_s": bytes_per_s})
    server = _Server(("127.0.0.1", 0), handler)
    port.send(server.server_address[1])
    server.serve_forever()


# --- the sides -----------------------------------------------------------------------------------------------------


def ours(
    url: str, workers: int, cache_gb: float, ahead: int = 4, window: int = 1_000_000
) -> Callable[[int], Iterator[Any]]:
    """dualenc, from an empty cache."""

    def start(batches: int) -> Iterator[Any]:
        dataset._AHEAD = ahead
        row = {"name": "bench", "shards": url, "members": {"a": ["bin"], "b": ["txt"]}}
        data = Data.model_validate({"sources": [row], "workers": workers, "cache_gb": cache_gb, "window": window})
        loader = Loader(data, {"a": Lengths(), "b": Lengths()}, [("a", "b")], seed=0, batch_size=BATCH)
        loader.stop_step = batches
        return iter(loader)

    return start


def theirs(url: str, workers: int) -> Callable[[int], Iterator[Any]]:
    """webdataset: shards streamed by curl, its shuffle buffer, its loader."""

    def start(batches: int) -> Iterator[Any]:
        import webdataset

        stages = webdataset.DataPipeline(
            webdataset.ResampledShards(url),
            webdataset.split_by_worker,
            webdataset.tarfile_to_samples(),
            webdataset.shuffle(200, initial=100),
            webdataset.to_tuple("bin", "txt"),
            webdataset.map(lambda x: torch.tensor([len(x[0]), len(x[1])])),
            webdataset.batched(BATCH, collation_fn=torch.stack),
        )
        loader = iter(webdataset.WebLoader(stages, batch_size=None, num_workers=workers))
        return (next(loader) for _ in range(batches))

    return start


def rate(start: Callable[[int], Iterator[Any]], batches: int) -> float:
    """Samples a second from the start to the last batch: what a run waits for."""
    begin = time.perf_counter()
    count = sum(1 for _ in start(batches))
    return count * BATCH / (time.perf_counter() - begin)


def main(arguments: list[str]) -> None:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.remote")
    parser.add_argument("--latency-ms", type=float, default=30.0)
    parser.add_argument("--mbit", type=float, default=800.0, help="of the line that all connections share")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--kb", type=int, default=40, help="of a sample")
    parser.add_argument("--batches", type=int, default=30)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "This DataLoader will create")
    with tempfile.TemporaryDirectory() as temporary:
        rng = np.random.default_rng(0)
        with ShardWriter(Path(temporary), max_samples=-(-given.samples // SHARDS)) as writer:
            for i in range(given.samples):
                writer.write(f"{i:06d}", {"bin": rng.bytes(given.kb << 10), "txt": b"a photo of a cat"})
        context = multiprocessing.get_context("spawn")
        receives, sends = context.Pipe(duplex=False)
        limits = (given.latency_ms / 1e3, given.mbit * 1e6 / 8)
        server = context.Process(target=serve, args=(Path(temporary), *limits, sends), daemon=True)
        server.start()
        count = len(list(Path(temporary).glob("train-*.tar")))
        url = f"http://127.0.0.1:{receives.recv()}/train-{{000000..{count - 1:06d}}}.tar"
        try:
            rows = [_row(url, w, given.batches, given.runs) for w in given.workers]
        finally:
            server.terminate()
    print(f"{given.latency_ms:.0f} ms, {given.mbit:.0f} Mbit/s, {given.kb} KiB a sample, median of {given.runs} runs")
    for row in rows:
        print(
            f"  samples/s, {row['workers']} worker(s): "
            + ", ".join(f"{k} {v:.1f}" for k, v in row.items() if k != "workers")
        )
    print(f"load {os.getloadavg()[0]:.1f}")
    if given.json is not None:
        given.json.write_text(json.dumps({"rows": rows}, indent=1), "utf-8")


def _row(url: str, workers: int, batches: int, runs: int) -> dict[str, float]:
    sides = {
        "byte ranges": (ours(url, workers, 1e-3), batches),
        "whole shards": (ours(url, workers, 10.0, window=256), batches),
        "whole shards, full shuffle": (ours(url, workers, 10.0), batches),
        "webdataset": (theirs(url, workers), batches),
    }
    if workers == 1:
        sides["one request after another"] = (ours(url, workers, 1e-3, ahead=-1), 3)
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(runs):
        for name, (start, count) in sides.items():
            found[name].append(rate(start, count))
    return {"workers": workers, **{name: round(median(rates), 1) for name, rates in found.items()}}


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except DualencError as e:
        raise SystemExit(f"error: {e}") from None
