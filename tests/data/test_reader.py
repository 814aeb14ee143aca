"""Bytes from tars, from http, from pipes; what is retried, counted, refused."""

from __future__ import annotations

import functools
import http.server
import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import numbered, read_tar, write_tar

from dualenc.config import Source
from dualenc.data.shards import remote
from dualenc.data.shards.index import build_index, open_source
from dualenc.data.shards.reader import Found, Reader, SampleError, check_members, iter_samples
from dualenc.data.shards.remote import Bounds, ReadFailed, ShardCache
from dualenc.errors import ConfigError, DataError

WANTED = {"image": ["jpg", "webp"], "text": ["txt", "json:caption", "json:captions"]}


class Server(http.server.SimpleHTTPRequestHandler):
    """Files with byte ranges; may cut an answer in the middle, and notes what was asked for."""

    ranges = True
    cut = 0
    asked: list[tuple[str, str | None]]

    def do_GET(self) -> None:
        cls = type(self)
        span = self.headers.get("Range")
        cls.asked.append((self.path, span))
        path = Path(self.directory) / self.path.lstrip("/")
        if not path.is_file():
            return self.send_error(404)
        raw = path.read_bytes()
        match = re.match(r"bytes=(\d+)-(\d*)", span or "") if cls.ranges else None
        part = raw[int(match[1]) : int(match[2] or len(raw)) + 1] if match else raw
        self.send_response(206 if match else 200)
        self.send_header("Content-Length", str(len(part)))
        if match:
            self.send_header("Content-Range", f"bytes {match[1]}-{int(match[1]) + len(part) - 1}/{len(raw)}")
        self.end_headers()
        if cls.cut > 0:
            cls.cut -= 1
            part = part[: len(part) // 2]
            self.close_connection = True
        self.wfile.write(part)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, Path, type[Server]]]:
    folder = tmp_path / "served"
    folder.mkdir()
    handler = type("Handler", (Server,), {"asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", folder, handler
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    pauses: list[float] = []
    monkeypatch.setattr(remote, "pause", pauses.append)
    return pauses


def source(shards: object, **more: object) -> Source:
    return Source.model_validate({"name": "s", "shards": shards, **more})


def all_of(reader: Reader, wanted: dict[str, list[str]]) -> list[object]:
    out: list[object] = []
    for shard, info in enumerate(reader.sets[0].infos):
        for i in range(info.samples):
            found = reader.find(0, shard, reader.locate(0, shard, i), wanted)
            out.append(found.values)
    return out


def test_real_shards_by_seeking(quickstart: Path) -> None:
    path = quickstart / "val-clipart-000000.tar"
    members = read_tar(path)
    got = list(iter_samples(str(path), WANTED))
    assert len(got) == 62
    for key, found in got:
        assert isinstance(found, Found)
        base = key.removeprefix("val-clipart-000000.tar/")
        assert found.values == {"image": members[f"{base}.webp"], "text": members[f"{base}.txt"]}
        assert found.members == {"image": "webp", "text": "txt"}


def test_captions_from_json(tmp_path: Path) -> None:
    rows: list[object] = [{"caption": "one"}, {"captions": ["a", "b"]}, {"other": 1}, ["no mapping"], None]
    members = [(f"{i}.json", json.dumps(r).encode() if r is not None else b"{broken") for i, r in enumerate(rows)]
    path = write_tar(tmp_path / "s.tar", [(n.lower(), raw) for n, raw in members])
    got = [f for _, f in iter_samples(str(path), WANTED)]
    assert isinstance(got[0], Found)
    assert isinstance(got[1], Found)
    assert isinstance(got[2], Found)
    assert (got[0].values, got[1].values, got[2].values) == ({"text": "one"}, {"text": ["a", "b"]}, {})
    assert "holds list" in str(got[3])
    assert "not valid JSON" in str(got[4])


def test_names_that_climb_are_refused_and_pickles_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = b"cos\nsystem\n(S'touch pwned'\ntR."
    names = ["../up.txt", "/etc/abs.txt", "d/../../x.txt", "ok.pkl", "ok.pyd", "ok.pth", "ok.txt"]
    path = write_tar(tmp_path / "s.tar", [(n, bomb if "ok." in n and n != "ok.txt" else b"hello") for n in names])
    read: list[str] = []
    plain = Reader.read
    monkeypatch.setattr(Reader, "read", lambda self, s, h, sample, e: (read.append(e), plain(self, s, h, sample, e))[1])
    got = [f for _, f in iter_samples(str(path), {"text": ["txt"]})]
    assert [isinstance(f, SampleError) and "refused" in f.reason for f in got] == [True, True, True, False]
    assert isinstance(got[3], Found)
    assert got[3].values == {"text": b"hello"}
    assert read == ["txt"]
    for ending in ("pkl", "data.PYD", "pth", "pt", "pickle"):
        with pytest.raises(ConfigError, match="pickled"):
            check_members({"text": [ending]}, "data.sources.0.members")


def test_http_whole_shards(served: tuple[str, Path, type[Server]], tmp_path: Path) -> None:
    url, folder, handler = served
    handler.ranges = False
    paths = numbered(folder, [4, 3])
    build_index([str(p) for p in paths])
    opened = open_source(source(f"{url}/s-{{000..001}}.tar"))
    assert opened.counts == [4, 3]
    cache = ShardCache(tmp_path / "cache", 1.0, 3)
    got = all_of(Reader([opened], cache, 3), {"a": ["a"]})
    assert got == [{"a": f"{i} {j}".encode()} for i, n in ((0, 4), (1, 3)) for j in range(n)]
    assert [p for p, _ in handler.asked].count("/s-000.tar") == 1
    assert sorted(p.suffix for p in (tmp_path / "cache").iterdir()) == [".lock", ".lock", ".tar", ".tar"]
    handler.asked.clear()
    all_of(Reader([opened], cache, 3), {"a": ["a"]})
    assert not [p for p, _ in handler.asked if p.endswith(".tar")]


def test_http_by_range_where_the_cache_is_too_small(served: tuple[str, Path, type[Server]], tmp_path: Path) -> None:
    url, folder, handler = served
    build_index([str(p) for p in numbered(folder, [4, 3])])
    opened = open_source(source(f"{url}/s-{{000..001}}.tar"))
    cache = ShardCache(tmp_path / "cache", 1e-6, 3)
    got = all_of(Reader([opened], cache, 3, window=1000), {"a": ["a"]})
    assert len(got) == 7
    assert got[5] == {"a": b"1 1"}
    tars = [span for p, span in handler.asked if p.endswith(".tar")]
    assert len(tars) == 7
    assert all(tars)
    # A server without ranges sends the whole shard: then whole shards are read.
    handler.ranges = False
    handler.asked.clear()
    assert all_of(Reader([opened], cache, 3, window=1000), {"a": ["a"]}) == got
    assert len([p for p, _ in handler.asked if p.endswith(".tar")]) == 3


@pytest.mark.parametrize("gb", [1.0, 1e-6])
def test_a_broken_connection_is_retried_then_counted(
    served: tuple[str, Path, type[Server]], tmp_path: Path, gb: float, no_pauses: list[float]
) -> None:
    url, folder, handler = served
    build_index([str(p) for p in numbered(folder, [4])])
    opened = open_source(source(f"{url}/s-000.tar"))
    reader = Reader([opened], ShardCache(tmp_path / "cache", gb, 2), 2, window=1000)
    sample = reader.locate(0, 0, 0)
    handler.cut = 2
    assert reader.find(0, 0, sample, {"a": ["a"]}).values == {"a": b"0 0"}
    assert no_pauses == [0.2, 0.4]
    fresh = Reader([opened], ShardCache(tmp_path / "other", gb, 2), 2, window=1000)
    sample = fresh.locate(0, 0, 1)
    handler.cut = 3
    with pytest.raises(SampleError, match="tried 3 times"):
        fresh.find(0, 0, sample, {"a": ["a"]})
    # One failed read costs that sample only.
    assert fresh.find(0, 0, sample, {"a": ["a"]}).values == {"a": b"0 1"}
    # After three in a row the shard is left alone for a while: its samples fail at once, without asking again.
    third = Reader([opened], ShardCache(tmp_path / "third", gb, 2), 2, window=1000)
    sample = third.locate(0, 0, 1)
    handler.cut = 9
    for _ in range(3):
        with pytest.raises(SampleError, match="tried 3 times"):
            third.find(0, 0, sample, {"a": ["a"]})
    assert handler.cut == 0
    asked = len(handler.asked)
    with pytest.raises(SampleError, match="tried 3 times"):
        third.find(0, 0, sample, {"a": ["a"]})
    assert len(handler.asked) == asked
    assert not list(tmp_path.rglob("*.part"))


def test_a_retry_goes_on_where_the_last_one_stopped(
    served: tuple[str, Path, type[Server]], tmp_path: Path, no_pauses: list[float]
) -> None:
    url, folder, handler = served
    path = write_tar(folder / "s-000.tar", [(f"{i}.a", bytes([i]) * 700_000) for i in range(20)])
    build_index([str(path)])
    handler.cut = 3  # each answer is half of what is missing: more failures than tries, and every one brings data
    got = ShardCache(tmp_path / "cache", 1.0, 1).get(f"{url}/s-000.tar", path.stat().st_size)
    assert got.read_bytes() == path.read_bytes()
    spans = [span for p, span in handler.asked if p == "/s-000.tar"]
    assert spans[0] is None
    starts = [int(span.removeprefix("bytes=").rstrip("-")) for span in spans[1:] if span]
    assert len(starts) == 3
    assert starts == sorted(set(starts))
    assert starts[0] >= 7_000_000


def test_a_server_that_falls_silent_is_given_up(tmp_path: Path, no_pauses: list[float]) -> None:
    """Connected, and then nothing: bounded by data.idle_s, whatever the length of the whole."""
    release = threading.Event()

    class Silent(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(206 if self.headers.get("Range") else 200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(b"x" * 1000)
            self.wfile.flush()
            release.wait(20)

        def log_message(self, *_: object) -> None:
            """Quiet."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Silent)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    url = f"http://127.0.0.1:{server.server_address[1]}/s.tar"
    begin = time.monotonic()
    try:
        with pytest.raises(ReadFailed, match="tried 2 times"):
            ShardCache(tmp_path / "cache", 1.0, 1, Bounds(connect_s=2.0, idle_s=0.5)).get(url)
        with pytest.raises(ReadFailed, match="tried 1 times"):
            remote.fetch_bytes(url, 0, 0, 5000, Bounds(connect_s=2.0, idle_s=0.5))
    finally:
        release.set()
        server.shutdown()
        thread.join()
        server.server_close()
    assert time.monotonic() - begin < 10


def test_a_missing_remote_shard_is_an_error_at_once(
    served: tuple[str, Path, type[Server]], tmp_path: Path, no_pauses: list[float]
) -> None:
    url, folder, _ = served
    (path,) = numbered(folder, [4])
    build_index([str(path)])
    opened = open_source(source(f"{url}/s-000.tar"))
    path.unlink()
    (folder / "s-000.tar.idx.npz").unlink()
    with pytest.raises(DataError, match="no shard http"):
        Reader([opened], ShardCache(tmp_path / "cache", 1.0, 3), 3).locate(0, 0, 0)
    assert no_pauses == []
    with pytest.raises(DataError, match="is not indexed"):
        open_source(source(f"{url}/gone-{{0..1}}.tar"))


def test_a_replaced_remote_shard_is_noticed(served: tuple[str, Path, type[Server]], tmp_path: Path) -> None:
    url, folder, _ = served
    (path,) = numbered(folder, [4])
    build_index([str(path)])
    opened = open_source(source(f"{url}/s-000.tar"))
    write_tar(path, [(f"{i}.a", b"x" * 3000) for i in range(9)])
    reader = Reader([opened], ShardCache(tmp_path / "cache", 1.0, 0), 0)
    with pytest.raises(SampleError, match="the index says"):
        reader.find(0, 0, reader.locate(0, 0, 0), {"a": ["a"]})


def test_pipes(tmp_path: Path) -> None:
    (path,) = numbered(tmp_path, [5])
    url = f"pipe:cat {path}"
    index = build_index([url], tmp_path / "index")
    opened = open_source(source(url, index=str(index)))
    cache = ShardCache(tmp_path / "cache", 1.0, 1)
    assert opened.counts == [5]
    assert opened.names == ["s-000.tar"]
    assert len(all_of(Reader([opened], cache, 1), {"a": ["a"]})) == 5
    # A command that writes half and fails, also in front of a "|", is no short shard.
    for command in (f"head -c 1000 {path}; exit 3", f"(cat {path}; exit 3) | cat", f"cat {path}; echo why >&2; exit 3"):
        with pytest.raises(ReadFailed, match=r"exited with status 3.*tried 2 times"):
            cache.get("pipe:" + command)
    with pytest.raises(ReadFailed, match="the index says"):
        cache.get(f"pipe:head -c 1000 {path}", expected=path.stat().st_size)
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 1
    assert not list((tmp_path / "cache").glob("*.part"))


def test_the_cache_is_bounded_and_keeps_what_was_used_last(tmp_path: Path) -> None:
    paths = numbered(tmp_path, [40] * 4)
    size = paths[0].stat().st_size
    cache = ShardCache(tmp_path / "cache", 2.5 * size / 1e9, 0)
    urls = [f"pipe:cat {p}" for p in paths]
    first = cache.get(urls[0])
    second = cache.get(urls[1])
    cache.get(urls[0])
    cache.get(urls[2])
    assert first.exists()
    assert not second.exists()
    assert sum(p.stat().st_size for p in (tmp_path / "cache").glob("*.tar")) <= 2.5 * size


def test_a_stale_sidecar_of_the_same_size_stops(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", [("a.a", b"1"), ("b.a", b"2")])
    build_index([str(path)])
    write_tar(path, [("c.a", b"1"), ("d.a", b"2")])
    reader = Reader([open_source(source(str(path)))], None, 0)
    with pytest.raises(DataError, match="stale"):
        reader.find(0, 0, reader.locate(0, 0, 0), {"a": ["a"]})
