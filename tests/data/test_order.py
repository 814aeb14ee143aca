"""The order: every sample once a pass, the same for every world, reached by number."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualenc.data.order import Plan, Refs, permute
from dualenc.errors import ConfigError, DataError

counts = st.lists(st.integers(1, 40), min_size=1, max_size=9)
large = st.lists(st.integers(200, 300), min_size=1, max_size=5)
seeds = st.integers(-(2**40), 2**70)


def triples(refs: Refs) -> list[tuple[int, int, int]]:
    return list(zip(refs.source.tolist(), refs.shard.tolist(), refs.sample.tolist(), strict=True))


def everything(counts: list[int], source: int = 0) -> set[tuple[int, int, int]]:
    return {(source, i, j) for i, n in enumerate(counts) for j in range(n)}


@given(st.integers(0, 2**64 - 1), st.integers(1, 3000))
def test_permute_is_a_bijection(key: int, size: int) -> None:
    assert sorted(permute(key, size, np.arange(size)).tolist()) == list(range(size))


def test_permute_is_even() -> None:
    # 24 orders of 4 things over 6,000 keys: chi-square with 23 degrees of freedom is below 60 (p < 4e-5 otherwise).
    found = Counter(tuple(permute(key, 4, np.arange(4)).tolist()) for key in range(6_000))
    expected = 6_000 / 24
    assert len(found) == 24
    assert sum((n - expected) ** 2 / expected for n in found.values()) < 60


def test_permute_has_no_serial_correlation() -> None:
    n = 100_000
    x = permute(7, n, np.arange(n)) / n
    assert abs(np.corrcoef(x[:-1], x[1:])[0, 1]) < 4 / n**0.5
    assert abs(np.corrcoef(x, np.arange(n))[0, 1]) < 4 / n**0.5


@given(counts, seeds, st.integers(1, 50), st.integers(1, 60), st.integers(0, 3))
@settings(deadline=None)
def test_every_sample_once_a_pass(counts: list[int], seed: int, lanes: int, window: int, one: int) -> None:
    plan = Plan(["s"], [counts], seed, lanes=lanes, window=window)
    n = sum(counts)
    assert plan.samples_per_pass == plan.total == n
    refs = plan.at(np.arange(one * n, (one + 1) * n))
    assert len(refs) == n
    assert set(triples(refs)) == everything(counts)
    assert set(refs.passes.tolist()) == {one}


@given(counts, seeds, st.sampled_from([1, 2, 3, 5]), st.integers(1, 30), st.integers(0, 100))
@settings(deadline=None)
def test_ranks_share_one_order(counts: list[int], seed: int, lanes: int, window: int, step: int) -> None:
    plan = Plan(["s"], [counts], seed, lanes=lanes, window=window)
    whole = triples(plan.local(step, 0, 1, 12))
    for world in (2, 3, 4):
        parts = [
            triples(Plan(["s"], [counts], seed, lanes=lanes, window=window).local(step, r, world, 12))
            for r in range(world)
        ]
        assert all(len(p) == 12 // world for p in parts)
        assert [parts[j % world][j // world] for j in range(12)] == whole


@given(counts, counts, seeds, st.floats(0.02, 50), st.integers(0, 5000))
@settings(deadline=None)
def test_any_position_stands_alone(a: list[int], b: list[int], seed: int, weight: float, start: int) -> None:
    # Resuming at any step gives what an unbroken run gives there: a fresh plan asked for one position only.
    make = lambda: Plan(["a", "b"], [a, b], seed, weights=[weight, 1.0], lanes=2, window=7)
    run = triples(make().at(np.arange(start, start + 40)))
    for i in (0, 13, 39):
        assert triples(make().at([start + i])) == [run[i]]


@given(large, large, seeds, st.floats(0.05, 20))
@settings(deadline=None, max_examples=15)
def test_a_mixture_keeps_shares_and_each_source_s_own_order(
    a: list[int], b: list[int], seed: int, weight: float
) -> None:
    plan = Plan(["a", "b"], [a, b], seed, weights=[weight, 1.0], window=190)
    total = 5 * plan.block + 123
    refs = plan.at(np.arange(total))
    share = weight / (weight + 1)
    whole = int((refs.source[: 5 * plan.block] == 0).sum())
    assert abs(whole - 5 * plan.block * share) <= 1
    for i, (name, c) in enumerate((("a", a), ("b", b))):
        mine = refs.source == i
        alone = Plan([name], [c], seed, window=190).at(np.arange(int(mine.sum())))
        assert refs.shard[mine].tolist() == alone.shard.tolist()
        assert refs.sample[mine].tolist() == alone.sample.tolist()
        assert refs.passes[mine].tolist() == alone.passes.tolist()


def test_three_weights_over_a_long_run() -> None:
    plan = Plan(["a", "b", "c"], [[1000], [2000], [700, 700]], 3, weights=[0.001, 2, 1])
    refs = plan.at(np.arange(100_000))
    got = np.bincount(refs.source, minlength=3) / 100_000
    np.testing.assert_allclose(got, np.array([0.001, 2, 1]) / 3.001, atol=plan.block / 100_000 / 4)


def test_with_replacement_is_uniform_and_counts_draws_as_passes() -> None:
    plan = Plan(["s"], [[3, 50, 47]], 5, sampling="with_replacement")
    refs = plan.at(np.arange(100_000))
    n = Counter(triples(refs))
    assert set(n) == everything([3, 50, 47])
    assert sum((v - 1000) ** 2 / 1000 for v in n.values()) < 180  # 99 degrees of freedom: p < 1e-6 beyond
    assert refs.passes.tolist() == list(range(100_000))
    assert triples(plan.at([77_777])) == [triples(refs)[77_777]]


def test_passes_seeds_and_names_differ() -> None:
    order = lambda seed, name, one: triples(Plan([name], [[30, 30]], seed).at(np.arange(60 * one, 60 * one + 60)))
    all_of_them = [order(0, "s", 0), order(0, "s", 1), order(1, "s", 0), order(0, "t", 0)]
    for i, a in enumerate(all_of_them):
        for b in all_of_them[:i]:
            assert sum(x == y for x, y in zip(a, b, strict=True)) < 12  # 1 is expected


def test_a_lane_keeps_to_its_shards() -> None:
    # 4 lanes, 8 equal shards, batch and world multiples: rank r reads two shards of a pass and no others.
    plan = Plan(["s"], [[50] * 8], 0, lanes=4, window=1000)
    for rank in range(4):
        read = {t[1] for step in range(50) for t in triples(plan.local(step, rank, 4, 8))}
        assert len(read) == 2


def test_a_window_bounds_how_far_samples_move() -> None:
    plan = Plan(["s"], [[1000] * 100], 0, window=2000)
    refs = plan.at(np.arange(2000))
    assert len(set(refs.shard.tolist())) == 2


# What stood there when the order was fixed. If this fails, every run's data order has changed: that needs a new
# major version, not new numbers here.
GOLDEN_ONE = [
    (0, 0, 0),
    (0, 1, 2),
    (0, 0, 2),
    (0, 1, 3),
    (0, 0, 1),
    (0, 2, 0),
    (0, 1, 0),
    (0, 1, 4),
    (0, 1, 1),
    (0, 2, 1),
]
GOLDEN_MIX = [
    (1, 0, 392),
    (1, 0, 999),
    (1, 0, 458),
    (0, 1, 3),
    (0, 1, 3),
    (1, 0, 401),
    (1, 0, 322),
    (1, 0, 74),
    (1, 0, 108),
    (1, 0, 720),
    (1, 0, 62),
    (1, 0, 981),
]
GOLDEN_DRAWN = [(0, 2, 1), (0, 0, 2), (0, 0, 2), (0, 1, 0), (0, 1, 0), (0, 1, 0), (0, 1, 2), (0, 1, 4)]


def test_golden_order() -> None:
    assert triples(Plan(["train"], [[3, 5, 2]], 0, lanes=2, window=4).at(np.arange(10))) == GOLDEN_ONE
    mix = Plan(["a", "b"], [[4, 4], [1000]], 42, weights=[1, 3]).at(np.arange(1020, 1032))
    assert triples(mix) == GOLDEN_MIX
    drawn = Plan(["train"], [[3, 5, 2]], 7, sampling="with_replacement").at(np.arange(8))
    assert triples(drawn) == GOLDEN_DRAWN


def test_the_same_in_another_process() -> None:
    code = (
        "import numpy as np; from dualenc.data.order import Plan; "
        "r = Plan(['train'], [[3, 5, 2]], 0, lanes=2, window=4).at(np.arange(10)); "
        "print(list(zip(r.source.tolist(), r.shard.tolist(), r.sample.tolist())))"
    )
    for salt in ("1", "2"):
        out = subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": salt, "PATH": ""},
            capture_output=True,
            text=True,
            check=True,
        )
        assert ast.literal_eval(out.stdout) == GOLDEN_ONE


def test_a_billion_samples_cost_no_more() -> None:
    plan = Plan(["big"], [[10_000] * 100_000], 0, lanes=64, window=1_000_000)
    begin = time.perf_counter()
    refs = plan.local(2_000_000, 3, 8, 32_768)  # pass 65, never visited before
    assert time.perf_counter() - begin < 5
    assert len(refs) == 4096
    assert set(refs.passes.tolist()) == {65}


def test_what_cannot_be_planned() -> None:
    with pytest.raises(DataError, match="'s' has a shard without samples"):
        Plan(["s"], [[3, 0]], 0)
    with pytest.raises(ConfigError, match="multiple of the 3 ranks"):
        Plan(["s"], [[3]], 0).local(0, 0, 3, 8)
    with pytest.raises(ConfigError, match="weight of 'b'"):
        Plan(["a", "b"], [[3], [3]], 0, weights=[1, 1e-9])


def test_digest_tells_plans_apart() -> None:
    base = Plan(["s"], [[3, 4]], 0)
    assert base.digest() == Plan(["s"], [[3, 4]], 0).digest()
    others = [
        Plan(["s"], [[4, 3]], 0),
        Plan(["t"], [[3, 4]], 0),
        Plan(["s"], [[3, 4]], 1),
        Plan(["s"], [[3, 4]], 0, window=5),
    ]
    assert len({base.digest(), *(p.digest() for p in others)}) == 5
