"""Counting what was lost, over ranks and resumes, and when to stop."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dualenc.data.batch import BadSample, Batch
from dualenc.data.quarantine import Ledger
from dualenc.errors import DataError


def batch(source: str, seen: int, bad: int, start: int = 0) -> Batch:
    keys = [f"{source}/s.tar/{start + i}" for i in range(seen)]
    lost = [BadSample(source, "s.tar", str(start + i), "x.jpg", "broken") for i in range(bad)]
    return Batch(seen, {}, {}, torch.zeros(seen, dtype=torch.long), keys, bad=lost)


def test_counts_and_file(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "run", 0.02)
    ledger.add(batch("a", 10, 2))
    ledger.add(batch("b", 10, 0))
    ledger.add(batch("a", 10, 2))  # the same samples in a later pass
    assert ledger.counts() == {"a": (20, 4), "b": (10, 0)}
    rows = [json.loads(line) for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert [(r["source"], r["shard"], r["key"], r["member"], r["reason"]) for r in rows] == [
        ("a", "s.tar", "0", "x.jpg", "broken"),
        ("a", "s.tar", "1", "x.jpg", "broken"),
    ]
    Ledger(tmp_path / "run", 0.02, rank=3).add(batch("a", 1, 1))
    assert (tmp_path / "run" / "quarantine.rank3.jsonl").is_file()


def test_a_resumed_run_names_nothing_twice(tmp_path: Path) -> None:
    """Also what another rank named, and after a kill in the middle of a line."""
    Ledger(tmp_path, 0.5, rank=1).add(batch("a", 4, 2))
    first = Ledger(tmp_path, 0.5)
    first.add(batch("a", 4, 1, start=10))
    path = tmp_path / "quarantine.jsonl"
    path.write_text(path.read_text() + '{"step": 7, "sou')
    again = Ledger(tmp_path, 0.5)
    again.load_state_dict({"counts": {"a": [8, 3]}})
    again.add(batch("a", 4, 2))
    again.add(batch("a", 4, 2, start=10))
    assert again.counts() == {"a": (16, 7)}
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["10", "11"]


@pytest.mark.parametrize(
    ("seen", "bad", "share", "stops"),
    [
        (9, 9, 0.02, False),
        (10, 10, 0.02, True),
        (64, 3, 0.02, False),  # bad luck in the first batch
        (10_000, 199, 0.02, False),
        (10_000, 220, 0.02, False),  # within three standard deviations of 2 %
        (10_000, 300, 0.02, True),
        (10_000, 1, 0.0, True),
        (10_000, 0, 0.0, False),
        (100, 100, 1.0, False),
    ],
)
def test_when_it_stops(seen: int, bad: int, share: float, stops: bool) -> None:
    ledger = Ledger(None, share)
    ledger.add(batch("a", seen, bad))
    if stops:
        with pytest.raises(DataError, match=rf"Source 'a' lost {bad} of {seen} samples.*The last one: s.tar/.*broken"):
            ledger.check()
    else:
        ledger.check()


def test_the_final_check_is_exact() -> None:
    ledger = Ledger(None, 0.02)
    ledger.add(batch("a", 10_000, 201))
    ledger.check()
    with pytest.raises(DataError):
        ledger.check(final=True)


def test_resume_goes_on_counting() -> None:
    first = Ledger(None, 0.02)
    first.add(batch("a", 100, 5))
    state = json.loads(json.dumps(first.state_dict()))
    second = Ledger(None, 0.02, sources=["a", "b"])
    second.load_state_dict(state)
    second.add(batch("a", 10, 1, start=100))
    assert second.counts() == {"a": (110, 6), "b": (0, 0)}
    fresh = Ledger(None, 0.02)
    fresh.load_state_dict({})
    assert fresh.counts() == {}


def count_on_a_rank(world: Any, folder: str) -> dict[str, Any]:
    """What every rank of the test below does: other sources on each, resumed from a common save."""
    ledger = Ledger(folder, 0.02, world.rank, sources=["a", "b", "c"])
    ledger.load_state_dict({"counts": {"a": [100, 1]}})
    ledger.add(batch("a", 10, 1) if world.rank == 0 else batch("b", 20, 4))
    return {"counts": ledger.sum_over_ranks(world), "state": ledger.state_dict(world)["counts"]}


@pytest.mark.dist
def test_two_ranks_agree_on_the_sum(tmp_path: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
    from _spawn import spawn

    ranks = spawn(__file__, "count_on_a_rank", 2, {"folder": str(tmp_path)})
    expected = {"a": [110, 2], "b": [20, 4], "c": [0, 0]}
    for rank in ranks:
        assert {s: list(c) for s, c in rank["counts"].items()} == expected
        assert rank["state"] == expected
    assert len((tmp_path / "quarantine.jsonl").read_text().splitlines()) == 1
    assert len((tmp_path / "quarantine.rank1.jsonl").read_text().splitlines()) == 4
