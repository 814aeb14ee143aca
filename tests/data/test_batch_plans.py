"""Batch plans: every sample once an epoch, one order for every world, reached by number, and batches as they say."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_tar
from hypothesis import given, settings
from hypothesis import strategies as st

from dualenc.config import Data
from dualenc.data.batches import BatchPlan, Composed, compose, prepare
from dualenc.data.batches.facts import sample_id
from dualenc.data.batches.mined import bags_in_order
from dualenc.data.batches.mined_files import read_labels, read_neighbors, write_mined
from dualenc.data.order import Ints, Plan
from dualenc.errors import ConfigError, DataError

seeds = st.integers(0, 2**40)
labelled = st.lists(st.integers(-1, 6), min_size=1, max_size=150)
ADJACENT = [(-1) ** k * (k // 2 + 1) for k in range(6)]


class Known:
    """Facts in memory: the labels of one source's samples, and their numbers as ids."""

    def __init__(self, *labels: list[int]) -> None:
        self.labels = [np.array(x, np.int64) for x in labels]

    def values(self, source: int, name: str) -> Ints:
        return self.labels[source]

    def ids(self, source: int) -> Ints:
        return np.arange(len(self.labels[source]))


def plan_of(
    batches: Mapping[str, Any], labels: list[list[int]], size: int, seed: int = 0, weights: list[float] | None = None
) -> Composed:
    names = [f"s{i}" for i in range(len(labels))]
    data = Data.model_validate({"sources": [{"name": n, "shards": "x.tar"} for n in names], "batches": dict(batches)})
    counts = [[len(x) // 3, len(x) - len(x) // 3] if len(x) > 3 else [len(x)] for x in labels]
    plan = compose(Plan(names, counts, seed, weights), data, size, Known(*labels))
    assert isinstance(plan, Composed)
    return plan


def lines(plan: Composed, start: int, stop: int) -> list[tuple[int, int, int]]:
    """(source, number in the source, epoch) of global positions."""
    refs = plan.at(np.arange(start, stop))
    number = [plan.sources[s].starts[h] + j for s, h, j in zip(refs.source, refs.shard, refs.sample, strict=True)]
    return list(zip(refs.source.tolist(), map(int, number), refs.passes.tolist(), strict=True))


def neighbors_file(folder: Path, n: int, k: int = 4) -> str:
    """Samples on a circle: the nearest are those beside them."""
    near = (np.arange(n)[:, None] + np.array(ADJACENT[:k])) % n if n > 1 else np.full((1, k), -1)
    near[near == np.arange(n)[:, None]] = -1
    arrays = {"ids": np.arange(n), "neighbors": near.astype(np.int32)}
    return str(write_mined(folder / f"near-{n}.safetensors", arrays, {}))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mined")


def plans(labels: list[int], folder: Path, size: int) -> dict[str, dict[str, Any]]:
    """Every plan, with settings for one source and a batch of ``size``."""
    n = len(labels)
    near = neighbors_file(folder, n)
    clusters = write_mined(folder / "c.safetensors", {"ids": np.arange(n), "labels": np.array(labels) % 3}, {})
    even = 2 if size % 2 == 0 else 1
    return {
        "by_source": {},
        "by_value": {"value": "v"},
        "clusters": {"files": [str(clusters), str(clusters)]},
        "groups": {"value": "v", "per_group": even},
        "hard_negatives": {"files": near},
        "bags": {"files": near, "sizes": {0: 1, 1: even, 3: size}},
    }


@given(labelled, seeds, st.integers(1, 24), st.integers(0, 4))
@settings(deadline=None, max_examples=25)
def test_every_sample_once_an_epoch(folder: Path, labels: list[int], seed: int, size: int, one: int) -> None:
    n = len(labels)
    if all(x < 0 for x in labels):
        labels = [0] * n
    for name, conf in plans(labels, folder, size).items():
        plan = plan_of({"name": name, **conf}, [labels], size, seed)
        assert plan.samples_per_pass == n, name
        found = lines(plan, one * n, (one + 1) * n)
        assert sorted(x for _, x, _ in found) == list(range(n)), name
        assert {e for *_, e in found} == {one}, name


@given(labelled, seeds, st.integers(1, 6), st.integers(0, 60))
@settings(deadline=None, max_examples=6)
def test_one_order_for_every_world_reached_by_number(
    folder: Path, labels: list[int], seed: int, twelfth: int, step: int
) -> None:
    size = 12 * twelfth
    for name, conf in plans(labels, folder, size).items():
        make = lambda name=name, conf=conf: plan_of({"name": name, **conf}, [labels], size, seed)
        run = make()
        for t in range(2):  # an unbroken run came by here
            run.local(max(step - 2 + t, 0), 0, 1, size)
        whole = run.local(step, 0, 1, size)
        for world in (2, 3):
            for rank in range(world):
                part = make().local(step, rank, world, size)
                for field in ("source", "shard", "sample", "passes"):
                    np.testing.assert_array_equal(getattr(part, field), getattr(whole, field)[rank::world], name)


@given(labelled, labelled, seeds, st.floats(0.2, 5), st.integers(1, 16))
@settings(deadline=None, max_examples=6)
def test_sources_keep_their_shares_by_whole_batches(
    a: list[int], b: list[int], seed: int, weight: float, size: int
) -> None:
    for name in ("by_source", "by_value"):
        plan = plan_of(
            {"name": name, **({"value": "v"} if name == "by_value" else {})}, [a, b], size, seed, [weight, 1]
        )
        batches = 200
        found = plan.at(np.arange(0, batches * size, size)).source  # of the first slot of each
        block = plan.at(np.arange(1024) * size).source if name == "by_source" else found
        assert abs(float((block == 0).mean()) - weight / (weight + 1)) < (2 / 1024 if name == "by_source" else 0.2)
        for t in range(6):
            assert len(set(plan.at(np.arange(t * size, (t + 1) * size)).source.tolist())) == 1
    alone = plan_of({"name": "by_source"}, [b], size, seed)
    alone.sources[0].key = plan.sources[1].key
    of_b = [
        x for x in lines(plan_of({"name": "by_source"}, [a, b], size, seed, [weight, 1]), 0, 40 * size) if x[0] == 1
    ]
    assert [x[1:] for x in of_b] == [x[1:] for x in lines(alone, 0, len(of_b))]


@given(labelled, seeds, st.integers(1, 12), st.integers(0, 3))
@settings(deadline=None, max_examples=25)
def test_whole_batches_are_of_one_label(labels: list[int], seed: int, size: int, one: int) -> None:
    # As many batches as the labels' counts allow, wherever epochs begin; leave_out has no others.
    n = len(labels)
    plan = plan_of({"name": "by_value", "value": "v"}, [labels], size, seed)
    first, last = -(-one * n // size), (one + 1) * n // size
    pure = 0
    for t in range(first, last):
        pure += len({labels[x] for _, x, _ in lines(plan, t * size, (t + 1) * size)}) == 1
    assert pure >= min(sum(c // size for c in Counter(labels).values()) - 1, last - first)
    whole = sum(c // size for c in Counter(labels).values())
    strict = {"name": "by_value", "value": "v", "remainder": "leave_out"}
    if not whole:
        with pytest.raises(ConfigError, match=r"use remainder: mix or a smaller batch\.size"):
            plan_of(strict, [labels], size, seed)
        return
    plan = plan_of(strict, [labels], size, seed)
    assert plan.samples_per_pass == whole * size
    found = lines(plan, one * whole * size, (one + 1) * whole * size)
    assert len({x for _, x, _ in found}) == len(found)
    for t in range(whole):
        assert len({labels[x] for _, x, _ in found[t * size : (t + 1) * size]}) == 1


@given(st.lists(st.integers(0, 30), min_size=40, max_size=200), seeds, st.integers(2, 4), st.integers(2, 4))
@settings(deadline=None, max_examples=25)
def test_a_batch_has_groups_times_samples(labels: list[int], seed: int, per_group: int, each: int) -> None:
    size = per_group * each
    counts = Counter(labels)
    batches = sum(c // per_group for c in counts.values()) // each
    if not batches:
        return
    conf = {"name": "groups", "value": "v", "per_group": per_group, "remainder": "leave_out"}
    plan = plan_of(conf, [labels], size, seed)
    assert plan.samples_per_pass == batches * size
    found = lines(plan, 0, batches * size)
    assert len({x for _, x, _ in found}) == len(found)
    for t in range(batches):
        groups = Counter(labels[x] for _, x, _ in found[t * size : (t + 1) * size])
        assert all(c % per_group == 0 for c in groups.values())
        assert all(c == per_group or counts[g] // per_group > batches for g, c in groups.items())


def test_what_is_left_out_changes() -> None:
    labels = [0] * 15 + [1] * 9
    plan = plan_of({"name": "by_value", "value": "v", "remainder": "leave_out"}, [labels], 8)
    seen = Counter(x for _, x, _ in lines(plan, 0, 100 * 16))
    # 100 epochs of 16: one batch of 15 samples, one of 9. Chi-square, 22 degrees of freedom: below 60.
    expected = [100 * 8 / 15] * 15 + [100 * 8 / 9] * 9
    assert sum((seen[i] - e) ** 2 / e for i, e in enumerate(expected)) < 60


@pytest.mark.parametrize("name", ["by_value", "groups", "hard_negatives", "bags"])
def test_samples_are_in_any_batch_of_an_epoch(name: str, folder: Path) -> None:
    # 64 samples in 8 batches over 120 epochs: where one sample is, and who is with it in bags of one.
    labels = [i % 4 for i in range(64)]
    conf = plans(labels, folder, 8)[name] | ({"sizes": {0: 1}} if name == "bags" else {})
    plan = plan_of({"name": name, **conf}, [labels], 8)
    batch: Counter[int] = Counter()
    met: Counter[int] = Counter()
    for e in range(120):
        found = [x for _, x, _ in lines(plan, e * 64, (e + 1) * 64)]
        own = found.index(5) // 8
        batch[own] += 1
        met.update(x for x in found[own * 8 : own * 8 + 8] if x != 5)
    assert sum((batch[b] - 15) ** 2 / 15 for b in range(8)) < 35  # 7 degrees of freedom: p < 2e-5 otherwise
    if name == "bags":
        assert sum((met[x] - 120 / 9) ** 2 / (120 / 9) for x in range(64) if x != 5) < 125  # 62
    if name == "by_value":
        assert {x % 4 for x in met} == {1}
    if name == "hard_negatives":  # on a circle: those beside it nearly always, those across hardly ever
        assert met[4] > 80
        assert met[37] < 20


def test_bags_are_neighbours_and_grow() -> None:
    n = 60
    near = ((np.arange(n)[:, None] + np.array([1, -1])) % n).astype(np.int32)
    for bag in (2, 4, 12):
        line, full = bags_in_order(near, bag, key=3)
        assert sorted(line.tolist()) == list(range(n))
        assert full >= 0.5 * n
        for start in range(0, full, bag):
            members = sorted(line[start : start + bag].tolist())
            gaps = [(b - a) % n for a, b in zip(members, [*members[1:], members[0]], strict=True)]
            assert sorted(gaps)[-1] == n - bag + 1, "a run of the circle"
    assert bags_in_order(near, 4, key=3)[0].tolist() != bags_in_order(near, 4, key=4)[0].tolist()


def test_clusters_of_several_stages_are_joint(folder: Path) -> None:
    n = 64
    files = [
        str(write_mined(folder / f"stage{s}.safetensors", {"ids": np.arange(n), "labels": np.arange(n) // d % 2}, {}))
        for s, d in enumerate((1, 2))
    ]
    plan = plan_of({"name": "clusters", "files": files}, [[0] * n], 16)
    for t in range(4):
        assert len({x % 4 for _, x, _ in lines(plan, t * 16, t * 16 + 16)}) == 1, "both digits agree"
    assert plan.digest() != plan_of({"name": "clusters", "files": files[0]}, [[0] * n], 16).digest()
    assert "4 clusters of 16 / 16 / 16 samples" in plan.describe()[0]
    # another file with the same clusters is the same plan's data; other clusters are another
    write_mined(folder / "stage1.safetensors", {"ids": np.arange(n), "labels": np.arange(n) % 3}, {})
    assert plan.digest() != plan_of({"name": "clusters", "files": files}, [[0] * n], 16).digest()


def test_refusals(folder: Path) -> None:
    near = neighbors_file(folder, 8)
    for conf, size, said in (
        ({"name": "by_valu", "value": "v"}, 4, "There is no batch plan 'by_valu'. Did you mean 'by_value'"),
        ({"name": "groups", "value": "v", "per_group": 3}, 8, r"3 does not divide batch.size \(8\)"),
        ({"name": "bags", "files": near, "sizes": {0: 3}}, 8, r"3 \(from epoch 0\) does not divide"),
        ({"name": "bags", "files": near, "sizes": {1: 2}}, 8, "the first size must be that of epoch 0"),
        ({"name": "by_value"}, 8, "data.batches.value: this key is needed"),
        ({"name": "clusters", "files": str(folder / "none")}, 8, "write one with: dualenc mine clusters"),
        ({"name": "clusters", "files": near}, 8, "holds no labels, only ids, neighbors"),
        ({"name": "hard_negatives", "files": {"other": near}}, 8, "source 's0' has no file of neighbours"),
    ):
        with pytest.raises((ConfigError, DataError), match=said):
            plan_of(conf, [[0] * 8], size)


class Backwards(BatchPlan):
    """A plan from outside: the last samples first."""

    scattered = False

    def batch(self, k: int, slots: Ints) -> tuple[Ints, Ints]:
        q = k * self.size + slots
        return self.order.n - 1 - q % self.order.n, q // self.order.n


def test_a_plan_from_outside() -> None:
    plan = plan_of({"name": f"{__name__}:Backwards"}, [[0] * 10], 4)
    assert lines(plan, 0, 12) == [(0, 9 - q % 10, q // 10) for q in range(12)]
    assert not plan.scattered
    with pytest.raises(ConfigError, match="has no 'Config'"):
        plan_of({"name": f"{__name__}:Known"}, [[0] * 10], 4)


def test_values_and_ids_of_real_shards_are_kept_beside_them(tmp_path: Path) -> None:
    # What is counted here is read from the tars by the standard library's rules: three speakers, one sample without.
    speakers = ["ann", "bob", "ann", None, "cy", "ann"]
    for shard in range(2):
        members = []
        for i, who in enumerate(speakers):
            about = json.dumps({} if who is None else {"speaker": who}).encode()
            members += [(f"{i:03d}.json", about), (f"{i:03d}.txt", b"x"), (f"{i:03d}.jpg", b"y")]
        write_tar(tmp_path / f"t-{shard}.tar", members)
    raw = {
        "sources": [{"name": "a", "shards": f"{tmp_path}/t-{{0..1}}.tar", "values": {"speaker": "json:speaker"}}],
        "batches": {"name": "groups", "value": "speaker", "per_group": 2},
    }
    plan = prepare(Data.model_validate(raw), 4, 0)
    assert "12 samples, 4 groups (speaker) of 2 / 2 / 6 samples" in plan.describe()[0]
    (kept,) = tmp_path.glob("batches-speaker-*.npy")
    values = np.load(kept)
    assert [values[0], values[3]] == [values[2], -1]
    assert len(set(values.tolist())) == 4
    kept.write_bytes(kept.read_bytes()[:-8])
    with pytest.raises(DataError, match=r"batches-speaker-\w+.npy cannot be read|does not hold"):
        prepare(Data.model_validate(raw), 4, 0)
    kept.unlink()
    assert prepare(Data.model_validate(raw), 4, 0).digest() == plan.digest()
    for change, said in (
        ({"batches": {"name": "by_value", "value": "language"}}, "source 'a' has no value 'language'"),
        ({"sampling": "with_replacement"}, "cannot be used with data.sampling: with_replacement"),
    ):
        with pytest.raises(ConfigError, match=said):
            prepare(Data.model_validate(raw | change), 4, 0)
    # ids: by SHARD/KEY, so a file of clusters made from these shards fits, in any order, and also as JSON lines
    names = [(f"t-{s}.tar", f"{i:03d}") for s in range(2) for i in range(6)]
    (tmp_path / "c.jsonl").write_text(
        "".join(json.dumps({"id": f"{s}/{k}", "label": int(k) % 3}) + "\n" for s, k in reversed(names))
    )
    clusters = prepare(
        Data.model_validate(raw | {"batches": {"name": "clusters", "files": str(tmp_path / "c.jsonl")}}), 4, 0
    )
    assert "12 samples, 3 clusters of 4 / 4 / 4 samples" in clusters.describe()[0]
    ids = np.array([sample_id(s, k) for s, k in names])
    assert read_labels(str(tmp_path / "c.jsonl"), ids, "a").tolist() == [int(k) % 3 for _, k in names]
    # neighbours come back as numbers in the source; those of other sources drop out
    near = np.array([[2, 1, -1], [0, 2, 3], [3, 0, 1], [1, 0, 2]], np.int32)
    file = write_mined(
        tmp_path / "n.safetensors", {"ids": np.array([ids[5], 7, ids[1], ids[0]]), "neighbors": near}, {}
    )
    found = read_neighbors(str(file), ids, "a")
    assert found[5].tolist() == [1, -1, -1]
    assert found[0].tolist() == [-1, 5, 1]
    assert (found[2] == -1).all()
    with pytest.raises(DataError, match="has none of the 3 samples of source 'b'"):
        read_labels(str(tmp_path / "c.jsonl"), np.array([1, 2, 3]), "b")
