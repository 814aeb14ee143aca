"""What is fetched before it is read: the same samples in fewer and simultaneous requests, and never wrong bytes."""

from __future__ import annotations

import contextlib
import http.server
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_tar
from hypothesis import given
from hypothesis import strategies as st

from dualenc.config import Data, Modality
from dualenc.data.batch import Batch
from dualenc.data.loader import Loader
from dualenc.data.modalities import ModalityInput, build_inputs
from dualenc.data.shards import remote
from dualenc.data.shards.ahead import Ranges, merged
from dualenc.data.shards.index import build_index, how_read, open_sources, window_of
from dualenc.data.shards.members import needed
from dualenc.data.shards.remote import ReadFailed
from dualenc.data.shards.tar import Sample

SHARDS, SAMPLES = 4, 25


class Server(http.server.BaseHTTPRequestHandler):
    """Files with byte ranges after ``latency_s``; ``moods`` other than whole damage an answer."""

    protocol_version = "HTTP/1.1"
    folder: Path
    latency_s = 0.0
    ranges = True
    moods: tuple[str, ...] = ("whole",)
    rng = random.Random(1)
    asked: list[tuple[str, str | None]]
    busy: list[int]
    lock = threading.Lock()

    def do_GET(self) -> None:
        cls = type(self)
        name, span = Path(self.path).name, self.headers.get("Range")
        with cls.lock:
            cls.asked.append((name, span))
            cls.busy.append(cls.busy[-1] + 1)
            mood = cls.rng.choice(cls.moods) if name.endswith(".tar") else "whole"
        time.sleep(cls.latency_s)
        try:
            self._answer(cls.folder / name, span if cls.ranges else None, mood)
        finally:
            with cls.lock:
                cls.busy.append(cls.busy[-1] - 1)

    def _answer(self, path: Path, span: str | None, mood: str) -> None:
        if not path.is_file():
            return self.send_error(404)
        if mood == "503":
            return self.send_error(503)
        raw = path.read_bytes()
        match = re.match(r"bytes=(\d+)-(\d*)", span or "")
        part = raw[int(match[1]) : int(match[2] or len(raw)) + 1] if match else raw
        if mood == "flipped" and len(part) > 1000:  # in the data of the first member
            part = part[:612] + bytes([part[612] ^ 1]) + part[613:]
        self.send_response(206 if match else 200)
        self.send_header("Content-Length", str(len(part)))
        if match:
            self.send_header("Content-Range", f"bytes {match[1]}-{int(match[1]) + len(part) - 1}/{len(raw)}")
        self.end_headers()
        if mood == "cut":
            self.close_connection = True
            part = part[: len(part) // 2]
        with contextlib.suppress(OSError):  # the reader is done, and no longer listens
            self.wfile.write(part)
        return None

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Path, type[Server]]]:
    folder = tmp_path / "served"
    folder.mkdir()
    for i in range(SHARDS):
        members = [m for j in range(SAMPLES) for m in ((f"{j}.a", f"{i} {j} ".encode() * 600), (f"{j}.b", b"b"))]
        write_tar(folder / f"s-{i}.tar", members)
    build_index([str(p) for p in sorted(folder.glob("*.tar"))])
    handler = type("Handler", (Server,), {"folder": folder, "asked": [], "busy": [0]})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(remote, "pause", lambda _: None)
    yield f"http://127.0.0.1:{server.server_address[1]}/s-{{0..{SHARDS - 1}}}.tar", folder, handler
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def texts() -> dict[str, ModalityInput]:
    text = {"kind": "text", "input": {"tokenizer": "clip-bpe:600", "context_length": 32}, "encoder": {"name": "x"}}
    return build_inputs({n: Modality.model_validate(text) for n in "ab"})


def data(url: str, **more: Any) -> Data:
    row = {"name": "s", "shards": url, "members": {"a": ["a"], "b": ["b"]}}
    return Data.model_validate({"workers": 0, "cache_gb": 1e-6, "idle_s": 2.0, "sources": [row], **more})


def batches(d: Data, texts: dict[str, ModalityInput], steps: int = 10) -> list[Batch]:
    loader = Loader(d, texts, [("a", "b")], seed=0, batch_size=10)
    loader.stop_step = steps
    return list(loader)


def same(x: list[Batch], y: list[Batch]) -> bool:
    return len(x) == len(y) and all(
        a.keys == b.keys and torch.equal(a.ids, b.ids) and torch.equal(a.inputs["a"]["ids"], b.inputs["a"]["ids"])
        for a, b in zip(x, y, strict=True)
    )


spans = st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 300)), max_size=30)


@given(spans=spans, gap=st.integers(0, 200), largest=st.integers(1, 2000))
def test_merged_spans_cover_all_and_each_is_in_one(spans: list[tuple[int, int]], gap: int, largest: int) -> None:
    spans = [(a, a + n) for a, n in spans]
    got = merged(spans, gap, largest)
    assert sum(count for _, count in got) == len(spans)
    for a, b in spans:
        assert any(first <= a and b <= last for (first, last), _ in got)
    for (first, last), _count in got:
        assert last - first <= largest or (first, last) in spans
        assert first in {a for a, _ in spans}
        assert last in {b for _, b in spans}


def test_ranges_are_fetched_together_and_give_the_local_batches(
    served: tuple[str, Path, type[Server]], texts: dict[str, ModalityInput]
) -> None:
    url, folder, handler = served
    local = batches(data(str(folder / "s-*.tar")), texts)
    handler.latency_s = 0.02
    assert same(batches(data(url), texts), local)
    tars = [span for name, span in handler.asked if name.endswith(".tar")]
    assert all(tars)
    assert len(tars) < 1.5 * SHARDS * SAMPLES  # both members of a sample in one request, some samples too
    assert max(handler.busy) >= 8
    assert len([n for n, _ in handler.asked if n.endswith(".npz")]) == SHARDS


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_fetch_ahead_too(
    served: tuple[str, Path, type[Server]], texts: dict[str, ModalityInput], workers: int
) -> None:
    url, folder, _ = served
    local = batches(data(str(folder / "s-*.tar")), texts)
    for cache_gb in (1e-6, 1.0):
        assert same(batches(data(url, workers=workers, cache_gb=cache_gb), texts), local)


def test_whole_shards_are_fetched_once_and_together(
    served: tuple[str, Path, type[Server]], texts: dict[str, ModalityInput]
) -> None:
    url, folder, handler = served
    handler.latency_s = 0.05
    assert same(batches(data(url, cache_gb=1.0), texts), batches(data(str(folder / "s-*.tar")), texts))
    assert Counter(n for n, _ in handler.asked if n.endswith(".tar")) == {f"s-{i}.tar": 1 for i in range(SHARDS)}
    assert max(handler.busy) >= 3


def test_a_server_without_ranges_is_asked_for_one(
    served: tuple[str, Path, type[Server]], texts: dict[str, ModalityInput]
) -> None:
    url, folder, handler = served
    handler.ranges = False
    assert same(batches(data(url), texts, 3), batches(data(str(folder / "s-*.tar")), texts, 3))
    assert len([s for n, s in handler.asked if n.endswith(".tar") and s]) == 1


@pytest.mark.parametrize("cache_gb", [1e-6, 1.0])
def test_a_faulty_server_costs_a_sample_never_wrong_bytes(
    served: tuple[str, Path, type[Server]], texts: dict[str, ModalityInput], cache_gb: float
) -> None:
    url, folder, handler = served
    right = {
        key: row.tolist()
        for b in batches(data(str(folder / "s-*.tar")), texts)
        for key, row in zip(b.keys, b.inputs["a"]["ids"], strict=True)
    }
    handler.moods = ("whole", "whole", "whole", "cut", "503", "flipped")
    got = lost = 0
    for batch in batches(data(url, cache_gb=cache_gb, retries=1), texts):
        lost += len(batch.bad)
        assert all("could not be read" in b.reason or "not those that were indexed" in b.reason for b in batch.bad)
        for slot, row in zip(batch.rows["a"].tolist(), batch.inputs["a"]["ids"], strict=True):
            got += 1
            want = right[batch.keys[slot]]
            assert row.tolist()[: len(want)] == want[: len(row)]
    assert got + lost == SHARDS * SAMPLES
    assert got > 20


def test_one_lost_request_costs_only_the_member_it_was_for() -> None:
    failing = True

    def fetch(url: str, start: int, stop: int) -> bytes:
        if failing:
            raise ReadFailed("gone")
        return bytes(range(start, stop))

    ranges = Ranges(fetch)
    ranges.ask("u", [(0, 10), (10, 20), (200_000, 200_010)], step := 3)
    assert ranges.take("u", 0, 10) is None  # two members: each is read by itself then
    with pytest.raises(ReadFailed, match="gone"):
        ranges.take("u", 200_000, 200_010)
    failing = False
    ranges.ask("u", [(0, 10), (10, 20), (20, 30)], step)
    assert ranges.take("u", 10, 20) == bytes(range(10, 20))
    assert ranges.take("v", 10, 20) is None
    ranges.forget(step)
    assert ranges.take("u", 0, 10) is None
    assert ranges._held == 0
    ranges.close()


def test_bytes_held_are_bounded() -> None:
    started: list[int] = []

    def fetch(url: str, start: int, stop: int) -> bytes:
        started.append(start)
        return bytes(stop - start)

    ranges = Ranges(fetch, held=25)
    far = [i << 20 for i in range(6)]
    ranges.ask("u", [(a, a + 10) for a in far], 0)
    time.sleep(0.2)
    assert sorted(started) == far[:3]
    for a in far[::-1]:  # also those that had not begun
        assert ranges.take("u", a, a + 10) == bytes(10)
    assert sorted(started) == far
    ranges.close()


def test_members_that_will_be_read() -> None:
    sample = Sample("k", {"jpg": (0, 1), "json": (2, 3), "cam1.jpg": (4, 5), "cam2.jpg": (6, 7), "x.pkl": (8, 9)})
    wanted = {"image": ["png", "JPG"], "text": ["txt", "json:caption"], "camera": ["json:rig+cam*"], "none": ["wav"]}
    assert needed(sample, wanted) == ["jpg", "json", "cam1.jpg", "cam2.jpg"]


def test_the_window_is_chosen_from_the_cache(served: tuple[str, Path, type[Server]]) -> None:
    url, folder, _ = served
    total = sum(p.stat().st_size for p in folder.glob("*.tar"))
    small = data(url, window="auto", cache_gb=total * 0.6 / 1e9)
    sets = open_sources(small)
    window = window_of(small, sets)
    assert 0 < window < SHARDS * SAMPLES / 2
    (line,) = how_read(small, sets)
    assert f"whole shards are fetched into the cache (data.cache_gb={small.cache_gb:g}), window {window}" in line
    (line,) = how_read(small.model_copy(update={"window": 1000}), sets)
    assert f"by byte range; data.window=auto ({window})" in line
    assert window_of(data(url, window="auto", cache_gb=1.0), sets) == 1_000_000
    assert how_read(data(str(folder / "s-*.tar")), open_sources(data(str(folder / "s-*.tar")))) == []


def test_the_parent_reads_on_after_a_forked_worker(
    served: tuple[str, Path, type[Server]], texts: dict[str, ModalityInput]
) -> None:
    """fsspec empties its store in a fork; closing the parent's client there took its connections out of its epoll."""
    url, _, _ = served
    begin = time.monotonic()
    for _ in range(3):
        batches(data(url, workers=1, idle_s=30.0), texts, 2)
    assert time.monotonic() - begin < 25
