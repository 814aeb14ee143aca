"""Selections: exactly those samples at those weights, for every world, reached by number; refused for other shards."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import numbered, write_tar
from hypothesis import given, settings
from hypothesis import strategies as st

from dualenc.config import Data, Source
from dualenc.data.loader import Loader
from dualenc.data.order import Plan, Refs
from dualenc.data.selected_order import COPY, Chosen, SelectedOrder
from dualenc.data.shards.index import ShardSet, build_index, open_source, samples_per_pass
from dualenc.data.shards.listing import Texts
from dualenc.data.shards.reader import Reader
from dualenc.data.shards.selection import (
    read_chosen,
    read_scores,
    read_weights,
    starts,
    write_scores,
    write_selection,
)
from dualenc.errors import ConfigError, DataError

COUNTS = [7, 12, 5]
Triple = tuple[int, int]


def chosen(rows: dict[Triple, float]) -> Chosen:
    at = sorted(rows)
    shard, sample = (np.array([t[i] for t in at], np.int64) for i in (0, 1))
    return Chosen("x", shard, sample, np.array([rows[t] for t in at], np.float64))


def plan_of(rows: dict[Triple, float], seed: int, lanes: int = 1, window: int = 100, replace: bool = False) -> Plan:
    counts = [max(j for s, j in rows if s == i) + 1 if any(s == i for s, _ in rows) else 1 for i in range(9)]
    plan = Plan(["s"], [counts], seed, lanes=lanes, window=window)
    plan.reorder(0, SelectedOrder("s", chosen(rows), seed, replace, lanes, window))
    return plan


def seen(refs: Refs) -> Counter[Triple]:
    return Counter(zip(refs.shard.tolist(), refs.sample.tolist(), strict=True))


places = st.tuples(st.integers(0, 8), st.integers(0, 30))
whole = st.dictionaries(places, st.integers(1, 3), min_size=1, max_size=60)
weights = st.floats(0.05, 3.5).map(lambda w: round(w * 64) / 64 or 1 / 64)
mixed = st.dictionaries(places, weights, min_size=1, max_size=60).filter(lambda d: sum(d.values()) >= 2)


@given(whole, st.integers(0, 2**40), st.integers(1, 9), st.integers(1, 40), st.integers(0, 3))
@settings(deadline=None, max_examples=30)
def test_whole_weights_are_copies(rows: dict[Triple, int], seed: int, lanes: int, window: int, one: int) -> None:
    plan = plan_of(dict(rows), seed, lanes, window)
    n = sum(rows.values())
    assert plan.samples_per_pass == n
    refs = plan.at(np.arange(one * n, (one + 1) * n))
    assert seen(refs) == rows
    # Each copy has a number of its own, from which it is augmented.
    assert set(np.unique(refs.passes % COPY).tolist()) == {one}
    assert len(set(zip(refs.shard.tolist(), refs.sample.tolist(), refs.passes.tolist(), strict=True))) == n


@given(mixed, st.integers(0, 2**40), st.integers(1, 5), st.integers(1, 40))
@settings(deadline=None, max_examples=30)
def test_any_weights_by_epoch(rows: dict[Triple, float], seed: int, lanes: int, window: int) -> None:
    plan = plan_of(rows, seed, lanes, window)
    order, total = plan.sources[0], sum(rows.values())
    assert isinstance(order, SelectedOrder)
    for one in (0, 1, 17, 10**6):
        begin, end = order._start(one), order._start(one + 1)
        assert begin == pytest.approx(one * total, abs=1)
        assert end - begin in (math.floor(total), math.ceil(total))
        refs = plan.at(np.arange(begin, end))
        got = seen(refs)
        assert set(got) <= set(rows)
        assert all(math.floor(w) <= got[t] <= math.floor(w) + 3 for t, w in rows.items())
        assert set(np.unique(refs.passes % COPY).tolist()) == {one % COPY}
    # Positions stand alone: a shuffled handful gives what the whole run of them gives.
    P = np.random.default_rng(0).integers(0, 3 * end, 50)
    refs, alone = plan.at(P), [plan_of(rows, seed, lanes, window).at([p]) for p in P[:5].tolist()]
    assert [(int(r.shard[0]), int(r.sample[0]), int(r.passes[0])) for r in alone] == list(
        zip(refs.shard[:5].tolist(), refs.sample[:5].tolist(), refs.passes[:5].tolist(), strict=True)
    )


@given(st.lists(st.integers(1, 40), min_size=1, max_size=9), st.integers(0, 2**40), st.integers(1, 5))
@settings(deadline=None, max_examples=30)
def test_everything_at_weight_one_changes_nothing(counts: list[int], seed: int, lanes: int) -> None:
    plain = Plan(["s"], [counts], seed, lanes=lanes, window=13)
    full = Plan(["s"], [counts], seed, lanes=lanes, window=13)
    rows = {(i, j): 1.0 for i, n in enumerate(counts) for j in range(n)}
    full.reorder(0, SelectedOrder("s", chosen(rows), seed, False, lanes, 13))
    P = np.arange(3 * sum(counts))
    a, b = plain.at(P), full.at(P)
    assert all(np.array_equal(getattr(a, f), getattr(b, f)) for f in ("shard", "sample", "passes"))


@pytest.mark.parametrize("replace", [False, True])
def test_weights_by_chi_square(replace: bool) -> None:
    rng = np.random.default_rng(5)
    drawn = rng.choice([0.1, 0.25, 0.5, 0.7, 1.0, 1.3, 2.6], 200)
    rows = {(i // 40, i % 40): float(w) for i, w in enumerate(drawn)}
    plan = plan_of(rows, 3, window=64, replace=replace)
    epochs = 400
    total = int(sum(rows.values()) * epochs)
    got = seen(plan.at(np.arange(total)))
    expected = np.array([w * epochs for _, w in sorted(rows.items())])
    found = np.array([got[t] for t in sorted(rows)])
    # 200 cells: chi-square with 199 degrees of freedom is below 290 (p < 3e-5). Drawn by parts, it is far below.
    assert (np.square(found - expected) / expected).sum() < 290
    assert got.total() == total
    if not replace:
        exact = [abs(f - e) for f, e, w in zip(found, expected, sorted(rows.items()), strict=True) if w[1] == 1.0]
        assert exact
        assert max(exact) <= 1


def test_drawn_pairs_vary() -> None:
    # Half of 256 samples an epoch: two that are not neighbours meet in a quarter of the epochs, as if independent.
    plan = plan_of({(i // 32, i % 32): 0.5 for i in range(256)}, 1)
    epochs = [seen(plan.at(np.arange(e * 128, (e + 1) * 128))) for e in range(400)]
    assert all(c.total() == 128 for c in epochs)
    meet = sum((0, 0) in e and (5, 9) in e for e in epochs)
    assert 65 < meet < 135
    assert sum((0, 0) in e for e in epochs) == pytest.approx(200, abs=50)


def test_large_is_fast_and_seeks() -> None:
    n = 2_000_000
    shard = np.arange(n) // 10_000
    weight = np.random.default_rng(0).choice([0.3, 1.0, 1.7], n)
    order = SelectedOrder("s", Chosen("x", shard, np.arange(n) % 10_000, weight), 0, False, 8, 1_000_000)
    far = 10**13 + np.arange(4096)  # epoch five million; products exceed 2^63
    a, b, c = order.at(far)
    assert (np.diff(c % COPY) <= 1).all()
    assert len(set(zip(a.tolist(), b.tolist(), c.tolist(), strict=True))) == 4096


# --- files -------------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path: Path) -> ShardSet:
    paths = numbered(tmp_path, COUNTS)
    build_index([str(p) for p in paths])
    return open_source(Source(name="s", shards=f"{tmp_path}/s-*.tar"))


def write(shards: ShardSet, path: Path, weight: np.ndarray[Any, Any], why: Any = "test") -> Path:
    reader = Reader([shards], None, 0)
    write_selection(path, shards, lambda k: reader.index(0, k), weight, why)
    return path


WEIGHT = np.array([0, 1, 0, 2, 0.5, 0, 1] + [0] * 12 + [1, 0, 0, 0.25, 1.0])


def test_files_round_trip(shards: ShardSet, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    write(shards, tmp_path / "good.selection.parquet", WEIGHT, [f"r{i}" for i in range(24)])
    rows = pq.read_table(tmp_path / "good.selection.parquet").to_pylist()
    assert rows[0] == {"shard": "s-000.tar", "index": 1, "key": "0_1", "weight": 1.0, "why": "r1"}
    assert [r["key"] for r in rows] == ["0_1", "0_3", "0_4", "0_6", "2_0", "2_3", "2_4"]
    assert np.array_equal(read_weights("good", shards), WEIGHT)
    got = read_chosen(str(tmp_path / "good.selection.parquet"), shards)
    assert got.told(24) == f"selection {got.name}: 7 of 24 samples, weights 0.25 to 2, 6.8 per epoch"
    one = open_source(Source(name="one", shards=str(tmp_path / "s-002.tar")))  # a part of the shards is enough
    assert read_weights("good", one).tolist() == [1, 0, 0, 0.25, 1]
    reader = Reader([shards], None, 0)
    numbers, texts = np.arange(24) / 7, np.array(["a", None, "ü"] * 8, object)
    numbers[3] = np.nan
    write_scores(tmp_path / "n.scores.parquet", shards, lambda k: reader.index(0, k), numbers)
    write_scores(tmp_path / "t.scores.parquet", shards, lambda k: reader.index(0, k), texts)
    assert np.array_equal(read_scores("n", shards), numbers, equal_nan=True)
    assert read_scores("t", shards).tolist() == texts.tolist()


def test_other_shards_are_refused(shards: ShardSet, tmp_path: Path) -> None:
    write(shards, tmp_path / "good.selection.parquet", WEIGHT)
    with pytest.raises(DataError, match=r"There is no .*better\.selection\.parquet; make it with"):
        read_chosen("better", shards)
    (tmp_path / "bad.selection.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match="is damaged"):
        read_chosen("bad", shards)
    with pytest.raises(DataError, match=r"the weight -1 of a sample is not between 0 and 1,000,000"):
        write(shards, tmp_path / "minus.selection.parquet", -np.ones(24))
    numbered(tmp_path, [7, 13, 5])
    build_index([str(p) for p in sorted(tmp_path.glob("s-*.tar"))])
    again = open_source(Source(name="s", shards=f"{tmp_path}/s-*.tar"))
    with pytest.raises(DataError, match=r"s-001\.tar has changed since: it had 12 samples in .* and has 13 in"):
        read_chosen("good", again)
    # As many samples and bytes, other keys: the digest of the headers tells.
    numbered(tmp_path, COUNTS)
    members = [m for j in range(7) for m in ((f"0_{j + 1}.a", f"0 {j}".encode()), (f"0_{j + 1}.b", b"b"))]
    write_tar(tmp_path / "s-000.tar", members)
    (tmp_path / "index.json").unlink()
    for with_index in (False, True):
        if with_index:
            build_index([str(p) for p in sorted(tmp_path.glob("s-*.tar"))])
        with pytest.raises(DataError, match=r"s-000\.tar has changed since: its headers"):
            read_chosen("good", open_source(Source(name="s", shards=f"{tmp_path}/s-*.tar")))
    numbered(tmp_path, [*COUNTS, 3])
    (tmp_path / "index.json").unlink()
    with pytest.raises(DataError, match=r"does not cover the shard s-003\.tar of source 's'"):
        read_chosen("good", open_source(Source(name="s", shards=f"{tmp_path}/s-*.tar")))
    with pytest.raises(ConfigError, match="have no folder"):
        read_chosen("good", replace(shards, urls=Texts(["pipe:cat x.tar"]), names=Texts(["x.tar"])))


def test_the_loader_sees_the_selection(shards: ShardSet, tmp_path: Path) -> None:
    from test_loader import AB, TWO, parts, take

    text = {"kind": "text", "input": {"tokenizer": "clip-bpe:600", "context_length": 16}}
    texts = parts(a=text, b=text)
    write(shards, tmp_path / "good.selection.parquet", WEIGHT)

    def loader(selection: str | None = "good", **more: Any) -> Loader:
        source: dict[str, Any] = {"name": "s", "shards": f"{tmp_path}/s-*.tar", "members": AB}
        source |= {"selection": selection} if selection else {}
        data = Data.model_validate(
            {"workers": more.pop("workers", 0), "mix": more.pop("mix", 0.0), "sources": [source]}
        )
        return Loader(data, texts, TWO, seed=1, batch_size=4, **more)

    keys = {f"s/{shards.names[s]}/{s}_{int(i - starts(shards)[s])}" for i in np.flatnonzero(WEIGHT)
            for s in [int(np.searchsorted(starts(shards), i, side="right") - 1)]}  # fmt: skip
    runs = [[b.keys for b in take(loader(workers=w), 27)] for w in (0, 2)]
    assert runs[0] == runs[1]
    assert Counter(k for b in runs[0] for k in b).keys() == keys
    assert [b.keys for b in take(loader(start_step=11), 16)] == runs[0][11:]
    halves = [[b.keys for b in take(loader(rank=r, world=2), 27)] for r in (0, 1)]
    assert [[k for pair in zip(a, b, strict=True) for k in pair] for a, b in zip(*halves, strict=True)] == runs[0]
    mixed = take(loader(mix=1.0), 27)  # partners are selected samples, too
    assert {k for b in mixed for k in b.keys} == keys
    assert all(len(loader().plan.sources[0].in_shard(s)) == n for s, n in ((0, 4), (2, 3)))  # type: ignore[attr-defined]
    plain, with_one = loader(None).plan.digest(), loader().plan.digest()
    write(shards, tmp_path / "good.selection.parquet", WEIGHT * 2)
    assert len({plain, with_one, loader().plan.digest()}) == 3
    source = Source(name="s", shards=f"{tmp_path}/s-*.tar", selection="good")
    assert samples_per_pass(Data(sources=[source])) == 14
    assert "selection" not in Source(name="s", shards="x.tar").model_dump()
