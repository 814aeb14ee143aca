"""Batches: the same for every number of workers and ranks, complete, and nothing lost in silence."""

from __future__ import annotations

import io
import json
import logging
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _shared import PYTHONPATH
from conftest import numbered, write_tar
from PIL import Image
from torch import Tensor

from dualenc.config import Data, Modality
from dualenc.data.batch import ABSENT, Batch
from dualenc.data.dataset import sample_rng
from dualenc.data.loader import Loader
from dualenc.data.modalities import ModalityInput, build_inputs
from dualenc.data.quarantine import Ledger
from dualenc.data.values import stable_id
from dualenc.errors import ConfigError, DataError

PAIRS = [("image", "text")]


def parts(**kinds: dict[str, Any]) -> dict[str, ModalityInput]:
    return build_inputs({n: Modality.model_validate({"encoder": {"name": "x"}, **k}) for n, k in kinds.items()})


@pytest.fixture(scope="module")
def inputs() -> dict[str, ModalityInput]:
    image = {"input": {"size": 32, "augment": {"scale": [0.6, 1.0], "flip": True}}}
    return parts(image=image, text={"input": {"tokenizer": "clip-bpe:8192", "context_length": 32}})


@pytest.fixture(scope="module")
def texts() -> dict[str, ModalityInput]:
    """Two text modalities: for everything that is not about pictures."""
    text = {"kind": "text", "input": {"tokenizer": "clip-bpe:600", "context_length": 16}}
    return parts(a=text, b=text, c=text)


def data(*sources: dict[str, Any], **more: Any) -> Data:
    rows = [{"name": f"s{i}", **s} for i, s in enumerate(sources)]
    return Data.model_validate({"workers": 0, "stall_s": 60, **more, "sources": rows})


def take(loader: Loader, steps: int) -> list[Batch]:
    loader.stop_step = loader.start_step + steps
    return list(loader)


AB = {"a": ["a"], "b": ["b"]}
TWO = [("a", "b")]


def same(x: Batch, y: Batch) -> bool:
    tensors = [(x.ids, y.ids)]
    for m in x.inputs:
        tensors.append((x.rows[m], y.rows[m]))
        a, b = x.inputs[m], y.inputs[m]
        tensors += [(a, b)] if isinstance(a, Tensor) else [(a[k], b[k]) for k in a]
    return x.keys == y.keys and x.step == y.step and all(torch.equal(a, b) for a, b in tensors)


def test_workers_change_nothing(quickstart: Path, inputs: dict[str, ModalityInput]) -> None:
    runs = []
    for workers in (0, 2):
        d = data({"shards": f"{quickstart}/train-{{000000..000003}}.tar"}, workers=workers)
        runs.append(take(Loader(d, inputs, PAIRS, seed=3, batch_size=64), 5))
    assert [b.step for b in runs[0]] == [0, 1, 2, 3, 4]
    assert all(same(a, b) for a, b in zip(*runs, strict=True))
    batch = runs[0][0]
    assert batch.inputs["image"].shape == (64, 3, 32, 32)
    assert batch.inputs["image"].dtype == torch.uint8
    assert batch.inputs["text"]["ids"].shape == batch.inputs["text"]["mask"].shape
    assert batch.rows["image"].tolist() == batch.rows["text"].tolist() == list(range(64))
    assert batch.ids.tolist() == [stable_id(k) for k in batch.keys]
    assert not batch.bad
    assert batch.load_s > 0


def test_a_pass_over_the_quickstart_is_complete(quickstart: Path, texts: dict[str, ModalityInput]) -> None:
    members = {"a": ["txt"], "b": ["txt"]}
    d = data({"shards": f"{quickstart}/train-*.tar", "members": members}, lanes=3, window=500)
    loader = Loader(d, texts, TWO, seed=0, batch_size=24)
    assert loader.plan.samples_per_pass == 3912
    keys = [k for b in take(loader, 163) for k in b.keys]
    assert len(set(keys)) == len(keys) == 3912


def test_ranks_are_one_batch(quickstart: Path, inputs: dict[str, ModalityInput]) -> None:
    d = data({"shards": f"{quickstart}/train-{{000000..000003}}.tar"})
    whole = take(Loader(d, inputs, PAIRS, seed=1, batch_size=16, start_step=240), 8)  # across the end of a pass
    for world in (2, 4):
        ranks = [
            take(Loader(d, inputs, PAIRS, seed=1, batch_size=16, rank=r, world=world, start_step=240), 8)
            for r in range(world)
        ]
        for step, batch in enumerate(whole):
            assert [ranks[j % world][step].keys[j // world] for j in range(16)] == batch.keys
            assert [int(ranks[j % world][step].ids[j // world]) for j in range(16)] == batch.ids.tolist()
            for j in range(16):
                # the augmented pixels too: they do not depend on who reads
                assert torch.equal(ranks[j % world][step].inputs["image"][j // world], batch.inputs["image"][j])


def test_resume_is_setting_the_step(quickstart: Path, inputs: dict[str, ModalityInput]) -> None:
    d = data({"shards": f"{quickstart}/train-{{000000..000003}}.tar"}, window=300)
    unbroken = take(Loader(d, inputs, PAIRS, seed=0, batch_size=32), 12)
    for start in (1, 7, 11):
        resumed = take(Loader(d, inputs, PAIRS, seed=0, batch_size=32, start_step=start), 12 - start)
        assert all(same(a, b) for a, b in zip(unbroken[start:], resumed, strict=True))


def test_augmentation_depends_on_seed_sample_pass_and_modality() -> None:
    draw = lambda *a: sample_rng(*a).random(4).tolist()
    assert draw(0, "k", 0, "image") == draw(0, "k", 0, "image")
    others = [(1, "k", 0, "image"), (0, "l", 0, "image"), (0, "k", 1, "image"), (0, "k", 0, "camera")]
    assert len({tuple(draw(*a)) for a in [(0, "k", 0, "image"), *others]}) == 5
    rng = sample_rng(0, "k", 0, "image")
    rng.integers(0, 10, dtype=np.uint32)  # leaves half a word behind
    assert draw(0, "k", 0, "image") == draw(0, "k", 0, "image")
    # stated numbers: they may not change between versions
    assert draw(0, "train/s.tar/k", 0, "image") == pytest.approx(GOLDEN_DRAW, abs=0)
    assert stable_id("train/s.tar/k") == GOLDEN_ID


GOLDEN_DRAW = [0.0249433424099752, 0.7157936695634285, 0.9815518552174118, 0.700639219145304]
GOLDEN_ID = 4331885342566943329


def corrupt(path: Path, out: Path, share: float) -> set[str]:
    """Copy a shard, breaking some of its pictures in turn in four ways; return the keys that were hurt."""
    rng, hurt, members = random.Random(0), set(), []
    with tarfile.open(path) as tar:
        for info in tar:
            raw = tar.extractfile(info).read()  # type: ignore[union-attr]
            key, ending = info.name.split(".")
            if ending == "webp" and rng.random() < share:
                raw = [raw[: len(raw) // 2], b"", b"\0" * len(raw), b"<html>"][len(hurt) % 4]
                hurt.add(key)
            members.append((info.name, raw))
    write_tar(out, members)
    return hurt


def test_every_lost_sample_is_counted_and_named(
    quickstart: Path, inputs: dict[str, ModalityInput], tmp_path: Path
) -> None:
    hurt = corrupt(quickstart / "train-000000.tar", tmp_path / "x-0.tar", 0.01)
    fine = quickstart / "train-000001.tar"
    assert len(hurt) >= 5
    d = data({"name": "hurt", "shards": str(tmp_path / "x-0.tar")}, {"name": "fine", "shards": str(fine)})
    loader = Loader(d, inputs, PAIRS, seed=0, batch_size=64)
    n = loader.plan.sizes["hurt"]
    ledger = Ledger(tmp_path / "run", 0.02, sources=["hurt", "fine"])
    seen: Counter[str] = Counter()
    for batch in take(loader, 2 * n // 64 + 4):
        ledger.add(batch)
        seen.update(k.split("/")[0] for k in batch.keys)
        lost = [i for i, v in enumerate(batch.ids.tolist()) if v == ABSENT]
        assert len(lost) == len(batch.bad)
        for m in ("image", "text"):
            assert sorted([*batch.rows[m].tolist(), *lost]) == list(range(64))
        assert len(batch.inputs["image"]) == len(batch.inputs["text"]["ids"]) == 64 - len(lost)
    counts = ledger.counts()
    assert counts["fine"] == (seen["fine"], 0)
    assert counts["hurt"][0] == seen["hurt"] >= n
    named = [json.loads(line) for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert {r["key"] for r in named} == hurt
    assert len(named) == len(hurt)
    assert {r["source"] for r in named} == {"hurt"}
    assert {r["member"] for r in named} == {f"{k}.webp" for k in hurt}
    ledger.check()
    with pytest.raises(DataError, match=r"Source 'hurt' lost \d+ of \d+ samples"):
        strict = Ledger(None, 0.001)
        strict.add(Batch(0, {}, {}, torch.zeros(0), []))
        strict.check(counts)


def jpeg() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(out, "JPEG")
    return out.getvalue()


def test_a_hostile_shard(inputs: dict[str, ModalityInput], tmp_path: Path) -> None:
    members: list[tuple[str, bytes]] = []
    for i in range(60):
        members += [(f"ok{i}.jpg", jpeg()), (f"ok{i}.txt", b"fine"), (f"ok{i}.pkl", b"cos\nsystem\n(S'false'\ntR.")]
    members += [
        ("only.txt", b"no picture"),
        ("../up.jpg", jpeg()),
        ("../up.txt", b"x"),
        ("blank.jpg", jpeg()),
        ("blank.txt", b" "),
    ]
    write_tar(tmp_path / "s.tar", members)
    d = data({"shards": str(tmp_path / "s.tar")})
    (batch,) = take(Loader(d, inputs, PAIRS, seed=0, batch_size=63), 1)
    reasons = {b.key: b.reason for b in batch.bad}
    assert set(reasons) == {"only", "../up", "blank"}
    assert reasons["only"].startswith("no member for image (looked for jpg, jpeg, png")
    assert "refused" in reasons["../up"]
    assert reasons["blank"] == "the caption is empty"
    assert (batch.ids != ABSENT).sum() == 60


def test_sources_with_other_modalities(texts: dict[str, ModalityInput], tmp_path: Path) -> None:
    numbered(tmp_path, [30], "ab")
    write_tar(tmp_path / "cb-000.tar", [m for i in range(30) for m in ((f"{i}.c", b"c"), (f"{i}.b", b"b"))])
    write_tar(
        tmp_path / "abc-000.tar", [m for i in range(30) for m in ((f"{i}.c", b"c"), (f"{i}.b", b"b"), (f"{i}.a", b"a"))]
    )
    sources = [
        {"name": "ab", "shards": str(tmp_path / "ab-000.tar"), "members": AB},
        {"name": "cb", "shards": str(tmp_path / "cb-000.tar"), "members": {"c": ["c"], "b": ["b"]}},
        {"name": "abc", "shards": str(tmp_path / "abc-000.tar"), "members": {**AB, "c": ["c"]}, "weight": 0.2},
    ]
    pairs = [("a", "b"), ("c", "b")]
    loader = Loader(data(*sources), texts, pairs, seed=0, batch_size=40)
    for batch in take(loader, 5):
        assert not batch.bad
        assert (batch.ids != ABSENT).all()
        of = [k.split("/")[0] for k in batch.keys]
        assert batch.rows["a"].tolist() == [i for i, s in enumerate(of) if s in ("ab", "abc")]
        assert batch.rows["c"].tolist() == [i for i, s in enumerate(of) if s in ("cb", "abc")]
        assert batch.rows["b"].tolist() == list(range(40))
        assert len(batch.inputs["a"]["ids"]) == len(batch.rows["a"])
    # A batch in which nothing has c still has one dummy row of it, and empty rows.
    (batch,) = take(Loader(data(sources[0]), texts, pairs, seed=0, batch_size=4), 1)
    assert batch.rows["c"].tolist() == []
    assert batch.inputs["c"]["ids"].shape == (1, 3)
    with pytest.raises(ConfigError, match=r"\['a'\] form none of the pairs"):
        Loader(data({**sources[0], "members": {"a": ["a"]}}), texts, pairs, seed=0, batch_size=4)
    with pytest.raises(ConfigError, match="no modality 'd'"):
        Loader(data({**sources[0], "members": {"d": ["a"]}}), texts, pairs, seed=0, batch_size=4)
    with pytest.raises(ConfigError, match="pickled"):
        Loader(data({**sources[0], "members": {"a": ["pkl"], "b": ["b"]}}), texts, pairs, seed=0, batch_size=4)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_wrong_ending_says_so_at_once(quickstart: Path, inputs: dict[str, ModalityInput], workers: int) -> None:
    members = {"image": ["jpg"], "text": ["txt"]}
    d = data({"name": "emoji", "shards": f"{quickstart}/train-000000.tar", "members": members}, workers=workers)
    loader = Loader(d, inputs, PAIRS, seed=0, batch_size=32)
    begin = time.monotonic()
    with pytest.raises(
        DataError, match=r"None of the first \d+ samples of source 'emoji' .*no member for image \(looked for jpg\)"
    ):
        take(loader, 1)
    assert time.monotonic() - begin < 30
    assert not multiprocessing.active_children()


def test_with_replacement_a_repeat_is_its_own_positive(texts: dict[str, ModalityInput], tmp_path: Path) -> None:
    (path,) = numbered(tmp_path, [5])
    d = data({"shards": str(path), "members": AB}, sampling="with_replacement")
    (batch,) = take(Loader(d, texts, TWO, seed=0, batch_size=32), 1)
    assert len(set(batch.keys)) == len(set(batch.ids.tolist())) <= 5
    assert dict(zip(batch.keys, batch.ids.tolist(), strict=True)) == {k: stable_id(k) for k in set(batch.keys)}


def test_samples_of_one_kind_are_each_other_s_positives(texts: dict[str, ModalityInput], tmp_path: Path) -> None:
    rows = [(f"{i}.{e}", v) for i in range(12) for e, v in (("a", b"a"), ("b", b"b"), ("json", b'{"k": %d}' % (i % 3)))]
    shard = write_tar(tmp_path / "s-000.tar", rows)
    for same in ("json:k", "a"):
        (batch,) = take(
            Loader(data({"shards": str(shard), "members": AB, "same": same}), texts, TWO, seed=0, batch_size=12), 1
        )
        kinds = {k: int(k.rsplit("/", 1)[1]) % 3 if same == "json:k" else 0 for k in batch.keys}
        by_kind = {(kinds[k], i) for k, i in zip(batch.keys, batch.ids.tolist(), strict=True)}
        assert len(by_kind) == len({i for _, i in by_kind}) == len(set(kinds.values()))
    with pytest.raises(DataError, match=r"the sample has no json:other, which data\.sources\.0\.same needs"):
        take(
            Loader(
                data({"shards": str(shard), "members": AB, "same": "json:other"}), texts, TWO, seed=0, batch_size=12
            ),
            6,
        )
    with pytest.raises(ConfigError, match="pickled"):
        Loader(data({"shards": str(shard), "members": AB, "same": "pkl"}), texts, TWO, seed=0, batch_size=12)


def test_more_workers_than_shards_and_fewer_samples_than_a_batch(
    texts: dict[str, ModalityInput], tmp_path: Path
) -> None:
    (path,) = numbered(tmp_path, [7])
    d = data({"shards": str(path), "members": AB}, workers=3, lanes=5)
    batches = take(Loader(d, texts, TWO, seed=0, batch_size=16), 7)
    n = Counter(k for b in batches for k in b.keys)
    assert set(n.values()) == {16}
    assert len(n) == 7
    with pytest.raises(ConfigError, match=r"batch.size \(16\) must be a multiple of the 3 ranks"):
        Loader(d, texts, TWO, seed=0, batch_size=16, world=3)


@pytest.mark.slow
def test_workers_that_are_spawned(texts: dict[str, ModalityInput], tmp_path: Path) -> None:
    (path,) = numbered(tmp_path, [20])
    d = data({"shards": str(path), "members": AB}, workers=1)
    spawned = take(Loader(d, texts, TWO, seed=0, batch_size=8, start_method="spawn"), 2)
    forked = take(Loader(d, texts, TWO, seed=0, batch_size=8), 2)
    assert all(same(a, b) for a, b in zip(spawned, forked, strict=True))


def test_a_killed_worker_is_an_error_not_a_hang(texts: dict[str, ModalityInput], tmp_path: Path) -> None:
    (path,) = numbered(tmp_path, [20])
    loader = Loader(data({"shards": str(path), "members": AB}, workers=1), texts, TWO, seed=0, batch_size=8)
    batches = iter(loader)
    next(batches)
    for child in multiprocessing.active_children():
        os.kill(child.pid or 0, signal.SIGKILL)
    with pytest.raises(DataError, match=r"worker died.*lower data.workers"):
        for _ in range(20):
            next(batches)


def test_workers_outlive_a_scheduler_s_signals(texts: dict[str, ModalityInput], tmp_path: Path) -> None:
    (path,) = numbered(tmp_path, [20])
    loader = Loader(data({"shards": str(path), "members": AB}, workers=1), texts, TWO, seed=0, batch_size=8)
    batches = iter(loader)
    next(batches)
    for child in multiprocessing.active_children():
        for name in ("TERM", "INT"):
            subprocess.run(["kill", f"-{name}", str(child.pid)], check=True)
    assert [next(batches).step for _ in range(30)] == list(range(1, 31))
    children = multiprocessing.active_children()
    children[0].terminate()  # by its own parent
    children[0].join(10)
    assert children[0].exitcode == 0
    loader.close()


def test_closing_stops_the_workers_and_a_new_iteration_starts_again(
    texts: dict[str, ModalityInput], tmp_path: Path
) -> None:
    (path,) = numbered(tmp_path, [20])
    loader = Loader(data({"shards": str(path), "members": AB}, workers=2), texts, TWO, seed=0, batch_size=8)
    first = next(iter(loader))
    loader.close()
    loader.close()
    deadline = time.monotonic() + 10
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not multiprocessing.active_children()
    assert same(first, next(iter(loader)))
    assert loader.data_wait >= loader.last_wait_s > 0
    loader.close()


def test_a_stall_names_what_is_awaited(
    texts: dict[str, ModalityInput], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (path,) = numbered(tmp_path, [20])
    slow = f"pipe:sleep 1; cat {path}"
    from dualenc.data.shards.index import build_index

    index = build_index([slow], tmp_path / "index")
    d = data({"shards": slow, "index": str(index), "members": AB}, stall_s=0.2, workers=1, allow_pipe=True)
    with caplog.at_level(logging.WARNING):
        loader = Loader(d, texts, TWO, seed=0, batch_size=8)
        (batch,) = take(loader, 1)
    assert not batch.bad
    assert f"rank 0 is waiting for step 0, which reads {slow}" in caplog.text
    assert loader.last_wait_s > 0.9
    cache = loader._cache
    assert cache is not None
    assert cache.folder.exists()
    del loader
    assert not cache.folder.exists()


HANGING_FORKS = """
import os, sys, time
hanging = forks = 0
def after_fork():
    if forks <= hanging:
        time.sleep(10_000)
def before_fork():
    global forks
    forks += 1
os.register_at_fork(before=before_fork, after_in_child=after_fork)

import torch.utils.data._utils
torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 1.0  # how long torch waits for each of them to end
from dualenc.config import Data, Modality
from dualenc.data import workers
from dualenc.data.loader import Loader
from dualenc.data.modalities import build_inputs
from dualenc.errors import DataError
text = Modality.model_validate({"kind": "text", "encoder": {"name": "x"}, "input": {"tokenizer": "clip-bpe:600"}})
source = {"name": "s", "shards": sys.argv[1], "members": {"a": ["a"], "b": ["b"]}}
data = Data.model_validate({"workers": 2, "sources": [source]})
for hanging, workers._START_LIMITS_S in ((0, (1.0, 2.0)), (1, (1.0, 2.0)), (1000, (0.5,))):
    forks = 0
    loader = Loader(data, build_inputs({"a": text, "b": text}), [("a", "b")], seed=0, batch_size=8)
    loader.stop_step = 3
    try:
        print([b.keys[0] for b in loader], flush=True)
    except DataError as e:
        print(e, flush=True)
    loader.close()
"""


@pytest.mark.slow
def test_a_worker_that_hangs_in_fork_is_started_again(tmp_path: Path) -> None:
    """As CPython 3.11's does where a thread of gloo holds the interpreter's lock: the child never runs any code."""
    (path,) = numbered(tmp_path, [40])
    env = os.environ | {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", HANGING_FORKS, str(path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    whole, again, never = done.stdout.splitlines()
    assert whole.startswith("['"), done.stderr
    assert again == whole
    assert done.stderr.count("1 of 2 data workers did not start within 1 s: killed, and all started again.") == 1
    assert never.startswith("The data workers (data.workers: 2) hung at each of 1 attempts"), done.stderr


def test_a_dead_source_is_counted_then_stopped(texts: dict[str, ModalityInput], tmp_path: Path) -> None:
    # A pipe that fails halfway: every sample of it is lost, with the command's own words as the reason.
    (path,) = numbered(tmp_path, [40])
    from dualenc.data.shards.index import build_index

    flag = tmp_path / "broken"
    url = f"pipe:if [ -e {flag} ]; then head -c 700 {path}; echo no route >&2; exit 7; else cat {path}; fi"
    index = build_index([url], tmp_path / "index")
    flag.touch()
    net = {"name": "net", "shards": [url], "index": str(index), "members": AB}
    with pytest.raises(ConfigError, match=r"would run that command in a shell; .* data\.allow_pipe=true"):
        Loader(data(net, retries=0), texts, TWO, seed=0, batch_size=32)
    d = data(net, retries=0, allow_pipe=True)
    with pytest.raises(DataError, match=r"source 'net'.*exited with status 7: no route"):
        take(Loader(d, texts, TWO, seed=0, batch_size=32), 1)


@pytest.mark.slow
def test_memory_stays_bounded(texts: dict[str, ModalityInput], tmp_path: Path) -> None:
    import resource

    paths = numbered(tmp_path, [2000] * 4)
    d = data({"shards": [str(p) for p in paths], "members": AB}, window=1000)
    loader = Loader(d, texts, TWO, seed=0, batch_size=200)
    loader.stop_step = 400
    peaks = []
    for batch in loader:
        if batch.step in (40, 399):
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert peaks[1] - peaks[0] < 8_000  # KiB, over 9 passes
