"""Large indexes: columns that answer as a list of rows would, text parsed in pieces, 10^8 samples planned at once."""

from __future__ import annotations

import io
import json
import random
import time
import tracemalloc
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import scale
from dualenc.data.order import Plan
from dualenc.data.shards import listing
from dualenc.data.shards.index import build_plan, open_sources
from dualenc.data.shards.listing import ShardInfo, ShardTable, Texts, read_listing
from dualenc.errors import DataError

strings = st.lists(st.text(max_size=12) | st.just("train-0.tar") | st.just("name \udcff"), max_size=40)


@given(strings, strings)
@settings(deadline=None)
def test_texts_are_a_list_of_strings(here: list[str], wanted: list[str]) -> None:
    texts = Texts(here)
    assert list(texts) == texts[:] == here == texts
    assert [texts[i] for i in range(-len(here), len(here))] == here + here
    assert texts == Texts(here)
    last = {t: i for i, t in enumerate(here)}
    asked = wanted + here
    assert texts.find(asked, len(asked)).tolist() == [last.get(t, -1) for t in asked]
    assert (texts.repeated() is None) == (len(last) == len(here))


def test_texts_of_equal_hash_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "hashes", lambda texts, count: np.array([len(t) for t in texts], np.int64))
    texts = Texts(["aa", "ab", "c", "aa", "ad"])
    assert texts.find(["ab", "aa", "zz", "c", "d", "ad"], 6).tolist() == [1, 3, -1, 2, -1, 4]


rows = st.fixed_dictionaries(
    {"url": st.text(max_size=9), "samples": st.integers(0, 2**40), "bytes": st.integers(0, 2**50)},
    optional={"digest": st.text("0123456789abcdef", min_size=1, max_size=9), "headers": st.just("ab" * 32)},
)


@given(st.lists(rows, max_size=12), st.sampled_from([None, 1]), st.integers(1, 40), st.booleans(), st.booleans())
@settings(deadline=None)
def test_an_index_read_in_pieces(
    shards: list[dict[str, object]], indent: int | None, piece: int, ascii_only: bool, later: bool
) -> None:
    more = {"note": [{"a": 1}, 2.5]}
    doc = {**more, "shards": shards, "version": 1} if later else {"version": 1, "shards": shards, **more}
    raw = json.dumps(doc, indent=indent, ensure_ascii=ascii_only).encode()
    stream = io.BytesIO(raw)
    table = read_listing(lambda _: stream.read(piece), "x")
    assert table[:] == [ShardInfo(**r) for r in shards]  # type: ignore[arg-type]
    assert ShardTable(map(asdict, table))[:] == table[:]
    for cut in {len(raw) // 2, len(raw) - 1}:
        with pytest.raises(DataError, match="not a shard index"):
            read_listing(io.BytesIO(raw[:cut]).read, "x")
    with pytest.raises(DataError, match="not a shard index"):
        read_listing(io.BytesIO(raw + b"1").read, "x")


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        '{"version": 1}',
        '{"version": 1, "shards": {}}',
        '{"version": 1, "shards": [1]}',
        '{"version": 1, "shards": [{"url": "a", "samples": -1, "bytes": 1}]}',
        '{"version": 1, "shards": [{"url": "a", "samples": 1, "bytes": 1, "headers": 5}]}',
        '{"version": 1, "shards": [{"url": "a", "samples": 1e99, "bytes": 1}]}',
    ],
)
def test_what_is_not_an_index(text: str) -> None:
    with pytest.raises(DataError, match="not a shard index"):
        read_listing(io.BytesIO(text.encode()).read, "x")


def test_a_hundred_million_samples(tmp_path: Path) -> None:
    path = tmp_path / "index.json"
    scale.write_index(path, 10_000, 10_000)
    data = scale.settings(path, 10_000)
    tracemalloc.start()
    begin = time.process_time()
    sets = open_sources(data)
    plan = build_plan(data, sets, 0)
    refs = plan.local(10**6, 4095, 4096, 131_072)
    seconds, peak = time.process_time() - begin, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < 30  # 0.1 without tracing, on an idle machine
    assert peak < 8e6
    counts = [r["samples"] for r in json.loads(path.read_text())["shards"]]
    assert sets[0].counts == counts
    plain = Plan(["web"], [counts], 0)
    assert plan.digest() == plain.digest()
    assert plan.total == sum(counts)
    again = plain.local(10**6, 4095, 4096, 131_072)
    assert (refs.shard == again.shard).all()
    assert (refs.sample == again.sample).all()


@pytest.mark.parametrize("written", ["here", "urls", "elsewhere"])
def test_shards_are_found_in_an_index_of_any_order(tmp_path: Path, written: str) -> None:
    path = tmp_path / "index.json"
    names = [f"train-{i:07d}.tar" for i in range(50)]
    as_listed = {"here": "", "urls": "https://data.example/web/", "elsewhere": "/mnt/old/"}[written]
    order = random.Random(0).sample(range(50), 50)
    listed = [{"url": as_listed + names[i], "samples": 100 + i, "bytes": 5000 + i} for i in order]
    path.write_text(json.dumps({"version": 1, "shards": listed}))
    if written == "elsewhere":
        with pytest.raises(DataError, match=r"train-0000000\.tar is not indexed"):
            open_sources(scale.settings(path, 40))
        return
    (found,) = open_sources(scale.settings(path, 40))
    assert found.counts == list(range(100, 140))
    assert [i.bytes for i in found.infos] == list(range(5000, 5040))
    assert found.infos[7] == ShardInfo(as_listed + names[7], 107, 5007)
    assert str(found.sidecar(7)).startswith(f"{tmp_path}/train-0000007.tar")
    assert found.remote
