"""Shards that were damaged, joined, swapped or packed by other tools: named in a sentence, and nothing lost in silence.

The inputs of ``../shared/faults`` that are about shards, and generated ones of the same kinds.
"""

from __future__ import annotations

import dataclasses
import gzip
import http.server
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from _shared import DATA, PYTHONPATH, ROOT
from conftest import numbered, write_tar
from rich.console import Console

from dualenc.cli.train import print_pipes
from dualenc.config import Data, Modality, Source, load_recipe
from dualenc.data.loader import Loader
from dualenc.data.modalities import ModalityInput, build_inputs
from dualenc.data.shards import remote
from dualenc.data.shards.index import (
    build_index,
    expand,
    index_local,
    load_index,
    open_source,
    refuse_pipes,
    samples_per_pass,
)
from dualenc.data.shards.listing import Texts
from dualenc.data.shards.reader import Found, Reader, SampleError, iter_samples
from dualenc.data.shards.remote import Bounds, ReadFailed, ShardCache
from dualenc.data.shards.tar import TarIndex, index_tar
from dualenc.errors import ConfigError, DataError
from dualenc_data_tools.check import check, check_recipe
from dualenc_evals.read.shards import tar_samples

FAULTS = DATA.parent / "faults"
WANTED = {"image": ["jpg", "jpeg", "png", "webp"], "text": ["txt", "json:caption"]}
PAIRS = [("image", "text")]


def fault(name: str) -> Path:
    path = FAULTS / name
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    return path


@pytest.fixture(scope="module")
def inputs() -> dict[str, ModalityInput]:
    image = {"input": {"size": 32}}
    text = {"input": {"tokenizer": "clip-bpe:600", "context_length": 16}}
    kinds = {"image": image, "text": text}
    return build_inputs({n: Modality.model_validate({"encoder": {"name": "x"}, **k}) for n, k in kinds.items()})


@pytest.fixture(scope="module")
def ab() -> dict[str, ModalityInput]:
    text = {"kind": "text", "input": {"tokenizer": "clip-bpe:600", "context_length": 16}, "encoder": {"name": "x"}}
    return build_inputs({n: Modality.model_validate(text) for n in "ab"})


def data(shards: object, **more: object) -> Data:
    members = more.pop("members", {})
    index = more.pop("index", None)
    row = {"name": "s", "shards": shards, "members": members, "index": index}
    return Data.model_validate({"workers": 0, "sources": [row], **more})


def one_pass(d: Data, inputs: dict[str, ModalityInput], pairs: list[tuple[str, str]], batch: int = 10) -> Loader:
    loader = Loader(d, inputs, pairs, seed=0, batch_size=batch)
    loader.stop_step = -(-loader.plan.samples_per_pass // batch)
    return loader


def source(shards: object, **more: object) -> Source:
    return Source.model_validate({"name": "s", "shards": shards, **more})


def keys_of(path: Path) -> list[str]:
    return [k.removeprefix(f"{path.name}/") for k, _ in iter_samples(str(path), WANTED)]


# --- one reader --------------------------------------------------------------------------------------------------

ODD = [
    ("a.jpg", b"1"),
    ("a.txt", b"2"),
    ("a.TXT", b"3"),
    ("__meta__/x.txt", b"4"),
    ("d/._b.jpg", b"mac"),
    ("d/b.JPG", b"5"),
    ("d/._b.txt", b"mac"),
    ("d/b.Txt", b"6"),
    ("._c.jpg", b"mac"),
    ("c.jpg", b"7"),
    ("e.txt", b"8"),
    ("c.txt", b"9"),
    (".DS_Store", b"mac"),
    ("d/.hidden.txt", b"x"),
    ("noending", b"x"),
    ("e.txt", b"10"),
]
ODD_SAMPLES = [
    ("a", {"jpg": b"1", "txt": b"2"}),
    ("a", {"txt": b"3"}),
    ("d/b", {"jpg": b"5", "txt": b"6"}),
    ("c", {"jpg": b"7"}),
    ("e", {"txt": b"8"}),
    ("c", {"txt": b"9"}),
    ("e", {"txt": b"10"}),
]


def test_the_same_tar_gives_the_same_samples_everywhere(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, ab: dict[str, ModalityInput]
) -> None:
    path = write_tar(tmp_path / "odd.tar", ODD)
    wanted = {"jpg": ["jpg"], "txt": ["txt"]}
    training = [(k, f) for k, f in iter_samples(str(path), wanted) if isinstance(f, Found)]
    assert [(k.removeprefix("odd.tar/"), f.values) for k, f in training] == ODD_SAMPLES
    assert "the members of 1 keys (c, …) are not adjacent" in caplog.text
    evaluation = [(s.key, {e: s.read(e) for e in s.members}) for s in tar_samples([str(path)])]
    assert evaluation == ODD_SAMPLES
    checked = check(str(path), workers=1, progress=False)
    assert checked.stats.samples == len(ODD_SAMPLES)
    assert checked.stats.problems["scattered members"] == 1
    assert checked.stats.problems["duplicate key"] == 2
    loader = one_pass(data(str(path), members={"a": ["jpg"], "b": ["txt"]}), ab, [("a", "b")], 7)
    (batch,) = list(loader)
    assert sorted(batch.keys) == sorted(f"s/odd.tar/{k}" for k, _ in ODD_SAMPLES)
    assert len(batch.bad) == 5


def test_tars_are_read_by_one_module() -> None:
    users = {
        str(p.relative_to(ROOT))
        for top in ("dualenc", "evals", "data_tools")
        for p in (ROOT / top).rglob("*.py")
        if "import tarfile" in p.read_text(encoding="utf-8")
    }
    # The quickstart's source unpacks the archives that it is packed from.
    assert users <= {"data_tools/dualenc_data_tools/sources/quickstart.py"}


def test_patterns_that_name_too_much_are_refused_at_once() -> None:
    begin = time.monotonic()
    for pattern in (
        "x-{0..9999999999}.tar",
        "{0..999999}/{0..999999}.tar",
        "{a,b}" * 40 + ".tar",
        "{a,{0..9999999999}}.tar",
        f"x-{{0..{'9' * 5000}}}.tar",
    ):
        with pytest.raises(DataError, match=r"at most 1,000,000|too large"):
            expand(pattern)
    assert time.monotonic() - begin < 2
    assert expand("x-{000..004..2}.tar") == ["x-000.tar", "x-002.tar", "x-004.tar"]
    assert expand("{a,b{0..1}}.tar") == ["a.tar", "b0.tar", "b1.tar"]


# --- the inputs of shared/faults ---------------------------------------------------------------------------------


def test_data_after_an_end_mark(tmp_path: Path) -> None:
    zeroed = fault("zero_block.tar")
    for use in (
        lambda: list(iter_samples(str(zeroed), WANTED)),
        lambda: list(tar_samples([str(zeroed)])),
        lambda: build_index([str(zeroed)], tmp_path),
    ):
        with pytest.raises(DataError, match=r"holds data after its end mark .*at byte 119808"):
            use()
    assert check(str(zeroed), workers=1, progress=False).stats.problems == {"broken shard": 1}


def test_names_with_dots_in_them() -> None:
    report = check(str(fault("dots_version.tar")), workers=1, progress=False)
    assert report.stats.problems == {"no pair": 1}
    (said,) = report.stats.examples["no pair"]
    assert "none of the 20 samples" in said
    assert ".0.jpg (1)" in said
    assert "'_' instead of '.'" in said


def test_keys_with_folders_are_whole() -> None:
    path = fault("folders_in_keys.tar")
    keys = keys_of(path)
    assert len(keys) == len(set(keys)) == 30
    assert keys[:3] == ["a/s00000", "b/s00001", "c/s00002"]
    assert [s.key for s in tar_samples([str(path)])] == keys


def test_keys_that_come_twice(inputs: dict[str, ModalityInput]) -> None:
    path = fault("duplicate_keys.tar")
    loader = one_pass(data(str(path)), inputs, PAIRS)
    batches = list(loader)
    trained = sum(b.size - len(b.bad) for b in batches)
    report = check(str(path), workers=1, progress=False)
    evaluated = sum(1 for _ in tar_samples([str(path)]))
    assert trained == evaluated == report.stats.samples == report.stats.paired == 40
    assert report.stats.problems == {"duplicate key": 10}


def test_planted_samples_are_each_counted_once(inputs: dict[str, ModalityInput]) -> None:
    path = fault("planted.tar")
    planted = json.loads(fault("planted.json").read_text())
    every = {k for keys in planted.values() for k in keys}
    assert check(str(path), workers=1, progress=False).stats.problems.total() == len(every) == 42
    loader = one_pass(data(str(path), max_bad_share=1.0), inputs, PAIRS)
    lost = Counter(bad.key for b in loader for bad in b.bad)
    assert lost == Counter(dict.fromkeys(every, 1))


def test_a_damaged_index(tmp_path: Path, ab: dict[str, ModalityInput]) -> None:
    raw = fault("broken_index.npz").read_bytes()
    with pytest.raises(DataError, match=r"s\.idx\.npz is damaged .*dualenc shards index") as e:
        TarIndex.from_bytes(raw, "s.idx.npz")
    assert "\n" not in str(e.value)
    (path,) = numbered(tmp_path, [20])
    build_index([str(path)])
    Path(f"{path}.idx.npz").write_bytes(raw)
    with pytest.raises(DataError, match="is damaged"):
        list(one_pass(data(str(path), members={"a": ["a"], "b": ["b"]}), ab, [("a", "b")]))
    run = [sys.executable, "-m", "dualenc", "shards", "check", str(path)]
    env = os.environ | {"PYTHONPATH": PYTHONPATH, "COLUMNS": "200"}
    done = subprocess.run(run, env=env, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr
    assert "is damaged" in done.stdout


# --- generated members of the same kinds -------------------------------------------------------------------------


def test_joined_compressed_and_unfinished_tars(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one, two = (p.read_bytes() for p in numbered(tmp_path, [3, 3]))
    bad = tmp_path / "bad.tar"
    bad.write_bytes(one + two)
    with pytest.raises(DataError, match="two tars were joined"):
        index_local(str(bad))
    bad.write_bytes(gzip.compress(one))
    with pytest.raises(DataError, match=r"gzip-compressed, .*gunzip .*bad\.tar"):
        index_local(str(bad))
    with pytest.raises(DataError, match="gzip-compressed"):
        list(tar_samples([str(bad)]))
    # Cut between two members: only the missing end mark tells.
    bad.write_bytes(one[: 4 * 1024])
    assert len(index_local(str(bad))) == 2
    assert "has no end-of-archive mark" in caplog.text
    assert "no end-of-archive mark" in check(str(bad), workers=1, progress=False).stats.examples["broken shard"][0]


def test_a_shard_that_is_not_as_it_was_indexed(tmp_path: Path, ab: dict[str, ModalityInput]) -> None:
    def pack(name: str, text: bytes, mtime: int = 0) -> bytes:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as tar:
            for i in range(40):
                for ending in "ab":
                    info = tarfile.TarInfo(f"{i:02d}.{ending}")
                    info.size, info.mtime = 20, mtime
                    tar.addfile(info, io.BytesIO(text.ljust(20)))
        (tmp_path / name).write_bytes(out.getvalue())
        return out.getvalue()

    whole = pack("s.tar", b"a red square")
    path = tmp_path / "s.tar"
    build_index([str(path)])
    d = data(str(path), members={"a": ["a"], "b": ["b"]})

    def train() -> int:
        return sum(len(b.bad) for b in one_pass(d, ab, [("a", "b")]))

    assert train() == 0
    # Swapped for one with the same names, sizes and counts, packed at another time: the headers tell.
    pack("s.tar", b"a green ball", mtime=1_700_000_000)
    with pytest.raises(DataError, match=r"index of .*s\.tar is stale"):
        train()
    # … packed at the same time: the contents tell, and each sample is lost by name.
    pack("s.tar", b"a green ball")
    with pytest.raises(DataError, match=r"None of the first .* not those that were indexed"):
        train()
    # One member changed in place.
    at = whole.index(b"a red square")
    path.write_bytes(whole[:at] + b"a rad square" + whole[at + 12 :])
    assert train() == 1
    assert check(str(path), workers=1, progress=False).stats.problems["broken shard"] == 0
    path.write_bytes(whole[:-512])
    with pytest.raises(DataError, match="was cut short or replaced"):
        train()
    # An index beside another's sidecar.
    pack("s.tar", b"a green ball", mtime=5)
    sidecar = Path(f"{path}.idx.npz").read_bytes()
    build_index([str(path)])
    Path(f"{path}.idx.npz").write_bytes(sidecar)
    with pytest.raises(DataError, match="headers are not those that were indexed"):
        train()


def test_a_shard_cut_while_it_is_read(tmp_path: Path) -> None:
    (path,) = numbered(tmp_path, [30])
    reader = Reader([open_source(source(str(path)))], None, 0)
    assert reader.find(0, 0, reader.locate(0, 0, 0), {"a": ["a"]}).values == {"a": b"0 0"}
    os.truncate(path, 5000)
    with pytest.raises(DataError, match="is shorter than its index says"):
        reader.find(0, 0, reader.locate(0, 0, 29), {"a": ["a"]})


def test_indexes_of_earlier_versions_still_load(tmp_path: Path) -> None:
    (path,) = numbered(tmp_path, [5])
    file = build_index([str(path)])
    sidecar = Path(f"{path}.idx.npz")
    index = TarIndex.from_bytes(sidecar.read_bytes(), "x")
    assert index.digest
    index.header = index.contents = None
    index.digest = ""
    sidecar.write_bytes(index.to_bytes())
    rows = json.loads(file.read_text())
    del rows["shards"][0]["headers"]
    file.write_text(json.dumps(rows))
    assert load_index(str(file)).shards[0].headers is None
    assert [f.values for _, f in iter_samples(str(path), {"a": ["a"]}) if isinstance(f, Found)] == [
        {"a": f"0 {i}".encode()} for i in range(5)
    ]


def test_check_says_what_to_write(tmp_path: Path, pictures: list[bytes]) -> None:
    several = [("x.left.webp", pictures[0]), ("x.caption.txt", b"a thing")]
    path = write_tar(tmp_path / "a.tar", [(f"{i}{n[1:]}", raw) for i in range(9) for n, raw in several])
    (said,) = check(str(path), workers=1, progress=False).stats.examples["no pair"]
    assert "members: {image: [left.webp], text: [caption.txt]}" in said
    other = [("x.webp", pictures[0]), ("x.json", b'{"title": "a thing"}')]
    path = write_tar(tmp_path / "b.tar", [(f"{i}{n[1:]}", raw) for i in range(9) for n, raw in other])
    (said,) = check(str(path), workers=1, progress=False).stats.examples["no pair"]
    assert "text: [json:KEY]" in said


def test_check_by_a_recipes_members(tmp_path: Path, pictures: list[bytes]) -> None:
    several = [("x.left.webp", pictures[0]), ("x.caption.txt", b"a thing"), ("x.txt", b"\xff not used")]
    path = write_tar(tmp_path / "a.tar", [(f"{i}{n[1:]}", raw) for i in range(9) for n, raw in several])
    recipe = ROOT / "recipes" / "quickstart" / "quickstart.yaml"
    row = f"data.sources=[{{name: mine, shards: '{path}', members: {{image: [left.webp], text: [MEMBER]}}}}]"
    assert check_recipe(load_recipe(recipe, [row.replace("MEMBER", "caption.txt")]), workers=1, progress=False).ok
    lost = check_recipe(load_recipe(recipe, [row.replace("MEMBER", "txt")]), workers=1, progress=False)
    assert lost.stats.problems == {"broken text": 9}
    none = check_recipe(load_recipe(recipe, [row.replace("MEMBER", "text")]), workers=1, progress=False)
    assert none.stats.problems == {"no pair": 1}


# --- mutation ----------------------------------------------------------------------------------------------------


def with_checksum(header: bytes) -> bytes:
    plain = header[:148] + b" " * 8 + header[156:512]
    return plain[:148] + b"%06o\0 " % sum(plain) + plain[156:]


def outcomes(cases: int, seed: int, make: Callable[[random.Random], bytes], use: Callable[[bytes], object]) -> Counter:
    """Use mutated bytes; what is raised must be a DataError of one line."""
    rng = random.Random(seed)
    out: Counter[str] = Counter()
    for _ in range(cases):
        raw = make(rng)
        begin = time.monotonic()
        said = ""
        try:
            use(raw)
        except DataError as e:
            said = str(e)
        out["refused" if said else "read"] += 1
        assert "\n" not in said
        assert time.monotonic() - begin < 5
    return out


def test_mutated_headers_end_in_samples_or_a_sentence(tmp_path: Path) -> None:
    names = ["a.jpg", "a.txt", "d/" * 60 + "b.txt", "ü.txt", "d/c.json"]
    sources = [
        write_tar(tmp_path / f"{f}.tar", [(n, b"x" * 700) for n in names], f).read_bytes()
        for f in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    ]

    def mutated(rng: random.Random) -> bytes:
        raw = bytearray(rng.choice(sources))
        block = 512 * rng.randrange(len(raw) // 512)
        for _ in range(rng.choice((1, 1, 2, 5, 40))):
            where = rng.choice((rng.randrange(512), rng.randrange(124, 136), rng.randrange(148, 157)))
            raw[block + where] = rng.choice((rng.randrange(256), *b"0179-_ \0\x80\xffLxgSKX5"))
        if rng.random() < 0.8:
            raw[block : block + 512] = with_checksum(bytes(raw[block : block + 512]))
        return bytes(raw[: rng.choice((len(raw), len(raw), rng.randrange(1, len(raw))))])

    def use(raw: bytes) -> None:
        index = index_tar(lambda at, n: raw[at : at + n], len(raw), "x.tar")
        index.scattered()
        again = TarIndex.from_bytes(index.to_bytes(), "x") if len(raw) % 16 == 0 else index
        assert [again.sample(i) for i in range(len(again))] == [index.sample(i) for i in range(len(index))]

    got = outcomes(4000, 11, mutated, use)
    assert min(got["read"], got["refused"]) > 300, got


def test_mutated_indexes_end_in_samples_or_a_sentence(tmp_path: Path) -> None:
    (path,) = numbered(tmp_path, [12])
    whole = index_local(str(path), contents=True).to_bytes()

    def mutated(rng: random.Random) -> bytes:
        raw = bytearray(whole)
        for _ in range(rng.choice((1, 2, 8))):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        return bytes(raw[: rng.choice((len(raw), len(raw), rng.randrange(len(raw))))])

    def use(raw: bytes) -> None:
        index = TarIndex.from_bytes(raw, "x.idx.npz")
        for i in range(len(index)):
            for at, size in index.sample(i).members.values():
                assert 512 <= at <= index.tar_bytes - size

    got = outcomes(1500, 12, mutated, use)
    assert got["refused"] > 300, got
    file = build_index([str(path)])
    text = file.read_bytes()

    def mutated_json(rng: random.Random) -> bytes:
        raw = bytearray(text)
        for _ in range(rng.choice((1, 2, 8))):
            raw[rng.randrange(len(raw))] = rng.choice((rng.randrange(256), *b'0123456789-.e"{}[],:'))
        return bytes(raw)

    def use_json(raw: bytes) -> None:
        file.write_bytes(raw)
        load_index(str(file))

    got = outcomes(1500, 13, mutated_json, use_json)
    assert min(got["read"], got["refused"]) > 100, got
    file.write_text("[" * 200_000)
    with pytest.raises(DataError, match="not a shard index"):
        load_index(str(file))


# --- servers and commands ----------------------------------------------------------------------------------------


class Faulty(http.server.BaseHTTPRequestHandler):
    """Answers by a seeded mood: whole, unavailable, dropped, cut, slow, silent for longer than allowed."""

    rng: random.Random
    raw: bytes
    moods = ("whole", "whole", "503", "drop", "cut", "slow", "silent")

    def do_GET(self) -> None:
        mood = self.rng.choice(self.moods)
        span = self.headers.get("Range", "")
        first, _, last = span.removeprefix("bytes=").partition("-")
        part = self.raw[int(first) : int(last) + 1 if last else None] if span else self.raw
        if mood == "503":
            return self.send_error(503)
        if mood == "drop":
            self.close_connection = True
            return None
        self.send_response(206 if span else 200)
        if span:
            stop = int(first) + len(part) - 1
            self.send_header("Content-Range", f"bytes {first}-{stop}/{len(self.raw)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.close_connection = mood != "whole"
        try:
            if mood == "slow":
                for at in range(0, len(part), max(1, len(part) // 4)):
                    self.wfile.write(part[at : at + max(1, len(part) // 4)])
                    self.wfile.flush()
                    time.sleep(0.05)
            else:
                self.wfile.write(part if mood == "whole" else part[: len(part) // 2])
                self.wfile.flush()
            if mood == "silent":
                time.sleep(0.6)
        except OSError:
            pass  # the reader gave up, as it should
        return None

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def faulty(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    (path,) = numbered(tmp_path, [20])
    handler = type("Handler", (Faulty,), {"rng": random.Random(5), "raw": path.read_bytes()})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/s-000.tar", path
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_faulty_server_costs_time_or_a_sample_never_wrong_bytes(
    faulty: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, path = faulty
    index = build_index([str(path)])
    pauses: list[float] = []
    monkeypatch.setattr(remote, "pause", pauses.append)
    opened = open_source(source(url, index=str(index)))
    bounds = Bounds(connect_s=2.0, idle_s=0.3)
    got: Counter[str] = Counter()
    for run in range(50):
        cache = ShardCache(tmp_path / f"cache{run}", 1.0 if run % 2 else 1e-6, 3, bounds)
        reader = Reader([opened], cache, 3, window=100, bounds=bounds)
        sample = reader.locate(0, 0, run % 20)
        try:
            found = reader.find(0, 0, sample, {"a": ["a"]}).values
        except SampleError as e:
            found, lost = {}, e.reason
        got["read" if found else "lost"] += 1
        assert found == {"a": f"0 {run % 20}".encode()} or "tried 4 times" in lost
    assert got["read"] > 30, got
    assert len(pauses) > 20
    assert not list(tmp_path.rglob("*.part"))


def test_no_index_behind_http_is_one_sentence(faulty: tuple[str, Path]) -> None:
    url, _ = faulty
    with pytest.raises(DataError, match=r"127\.0\.0\.1") as e:
        open_source(source(url.replace("s-000", "other"), index=url.replace("s-000.tar", "index.json")))
    assert "\n" not in str(e.value)


def test_pipes_need_a_word_and_are_announced(tmp_path: Path) -> None:
    shards = f"pipe:cat {tmp_path}/x.tar"
    with pytest.raises(ConfigError, match=r"would run that command in a shell; .*data\.allow_pipe=true"):
        samples_per_pass(data(shards))
    with pytest.raises(ConfigError, match=r"write --allow-pipe"):
        refuse_pipes(shards, False, "--allow-pipe")
    refuse_pipes(shards, True, "--allow-pipe")
    recipe = ROOT / "recipes" / "quickstart" / "quickstart.yaml"
    for allowed, said in (("false", "needs data.allow_pipe=true to run 'cat "), ("true", "runs 'cat ")):
        out = io.StringIO()
        given = [f"data.sources=[{{name: net, shards: '{shards}'}}]", f"data.allow_pipe={allowed}"]
        print_pipes(Console(file=out, width=300), load_recipe(recipe, given))
        assert said in out.getvalue()
        assert f"cat {tmp_path}/x.tar" in out.getvalue()


_READS = """
import sys, multiprocessing
from pathlib import Path
from dualenc.data.shards.remote import ShardCache

def read():
    ShardCache(sys.argv[1], 1.0, 0).get(f"pipe:echo $$ > {sys.argv[1]}/started; sleep 300 | cat; true")

if sys.argv[2] == "worker":
    multiprocessing.get_context("fork").Process(target=read).start()
    multiprocessing.active_children()[0].join()
else:
    read()
"""


def await_end(group: int) -> None:
    """A process group ends within 10 s."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    os.killpg(group, signal.SIGKILL)
    pytest.fail("the command goes on")


@pytest.mark.parametrize("where", ["trainer", "worker"])
def test_commands_end_with_the_trainer(tmp_path: Path, where: str) -> None:
    """Also when it is killed, and when the one that waits for the command is one of its workers."""
    env = os.environ | {"PYTHONPATH": PYTHONPATH}
    trainer = subprocess.Popen([sys.executable, "-c", _READS, str(tmp_path), where], env=env)
    started = tmp_path / "started"
    deadline = time.monotonic() + 60
    while not (started.exists() and started.read_text().strip()) and time.monotonic() < deadline:
        time.sleep(0.05)
    group = os.getpgid(int(started.read_text()))
    assert group != os.getpgid(trainer.pid)
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    await_end(group)


def test_a_command_that_fails_says_why(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 1.0, 0)
    with pytest.raises(ReadFailed, match="status 3: no route"):
        cache.get("pipe:echo no route >&2; exit 3")
    with pytest.raises(ReadFailed, match="status 1"):
        cache.get("pipe:false | cat")
    assert cache.get("pipe:cat; printf abc").read_bytes() == b"abc", "its input is empty, not the trainer's"


def test_a_command_that_stays_silent_is_killed_with_all_it_started(tmp_path: Path) -> None:
    """Bounded by data.idle_s since its last byte, however long the whole takes; what it writes to stderr is no data."""
    cache = ShardCache(tmp_path / "cache", 1.0, 0, Bounds(idle_s=1.0))
    slow = "for i in 1 2 3 4 5 6; do printf x; sleep 0.4; done"
    assert cache.get(f"pipe:{slow}").read_bytes() == b"xxxxxx"
    stuck = f"echo $$ > {tmp_path}/started; printf abc; (while :; do echo busy >&2; sleep 0.1; done) & sleep 300 | cat"
    began = time.monotonic()
    with pytest.raises(ReadFailed, match=r"Reading pipe:echo .* wrote nothing for 1 s \(data.idle_s\) after 3 bytes"):
        cache.get(f"pipe:{stuck}")
    assert time.monotonic() - began < 30
    await_end(int((tmp_path / "started").read_text()))
    assert list((tmp_path / "cache").glob("*.part")) == []


def test_a_silent_command_costs_a_run_its_shard_by_name(tmp_path: Path) -> None:
    """The samples of that shard are counted and named; the others are read."""
    (path,) = numbered(tmp_path, [3])
    url = f"pipe:cat {path}; sleep 300"
    opened = open_source(Source(name="s", shards=[str(path)]))
    opened = dataclasses.replace(opened, urls=Texts([url]), folder_of=np.array([-1]), remote=True)
    reader = Reader([opened], ShardCache(tmp_path / "cache", 1.0, 0, Bounds(idle_s=0.5)), retries=0)
    with pytest.raises(SampleError, match=r"sleep 300.*wrote nothing for 0\.5 s"):
        reader.read(0, 0, index_local(str(path)).sample(0), "a")
