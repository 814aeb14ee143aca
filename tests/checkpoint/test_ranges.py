"""Tensors written in pieces by any number of ranks: every element once, any range read, damage named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from dualenc.checkpoint.ranges import INDEX, Files, Piece, deal, file_name, stored, write
from dualenc.errors import CheckpointError

TENSORS = {
    "matrix": torch.arange(35.0).view(7, 5),
    "scalar": torch.tensor(3),
    "vector": torch.arange(11.0),
    "empty": torch.zeros(0, 4),
    "filter": torch.arange(48.0, dtype=torch.bfloat16).view(4, 3, 2, 2),
}
PIECES = [Piece(k, tuple(t.shape), 0, t.flatten()) for k, t in TENSORS.items()]


def write_all(folder: Path, world_size: int) -> Path:
    for rank in range(world_size):
        write(folder / file_name("x", rank, world_size), deal(PIECES, rank, world_size))
    return folder


@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 40])
def test_what_ranks_write_is_read_whole(tmp_path: Path, world_size: int) -> None:
    found = stored(write_all(tmp_path, world_size), "x")
    assert found.shapes == {k: tuple(t.shape) for k, t in TENSORS.items()}
    for name, t in TENSORS.items():
        assert torch.equal(found.whole(name), t)
        assert found.whole(name).dtype == t.dtype


@given(sizes=st.lists(st.integers(0, 30), max_size=6), world_size=st.integers(1, 9))
def test_dealing_gives_every_element_once_in_equal_shares(sizes: list[int], world_size: int) -> None:
    pieces = [Piece(str(i), (n,), 0, torch.full((n,), float(i))) for i, n in enumerate(sizes)]
    shares = [deal(pieces, r, world_size) for r in range(world_size)]
    seen = sorted((p.name, e) for share in shares for p in share for e in range(p.start, p.end))
    assert seen == sorted((str(i), e) for i, n in enumerate(sizes) for e in range(n))
    counts = [sum(p.data.numel() for p in share) for share in shares]
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("form", ["whole", "pieces"])
def test_any_range_is_read_whichever_form_wrote_it(tmp_path: Path, form: str) -> None:
    if form == "whole":
        save_file(TENSORS, tmp_path / "x.safetensors")
    else:
        write_all(tmp_path, 4)
    found = stored(tmp_path, "x")
    for name, t in TENSORS.items():
        for start in range(t.numel() + 1):
            for end in range(start, t.numel() + 1):
                assert torch.equal(found.read(name, start, end).to(t.dtype), t.flatten()[start:end])


def test_reading_a_range_touches_only_the_files_that_hold_it(tmp_path: Path) -> None:
    t = torch.arange(1000.0)
    for r in range(4):
        write(tmp_path / file_name("x", r, 4), [Piece("w", (1000,), 250 * r, t[250 * r : 250 * (r + 1)])])
    found = stored(tmp_path, "x")
    asked: list[str] = []
    original = found._slice
    found._slice = lambda run, name, low, high: asked.append(run.path.name) or original(run, name, low, high)  # type: ignore[func-returns-value,method-assign]
    assert torch.equal(found.read("w", 240, 260), t[240:260])
    assert asked == [file_name("x", 0, 4), file_name("x", 1, 4)]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    (write_all(tmp_path, 3) / file_name("x", 1, 3)).unlink()
    with pytest.raises(CheckpointError, match=r"x-00002-of-00003\.safetensors is missing"):
        stored(tmp_path, "x")
    with pytest.raises(CheckpointError, match=r"has neither y\.safetensors nor its shards"):
        stored(tmp_path, "y")


def test_files_of_two_saves_do_not_mix(tmp_path: Path) -> None:
    write_all(tmp_path, 3)
    write_all(tmp_path, 2)
    with pytest.raises(CheckpointError, match="mixes x files written by 2 and 3 ranks"):
        stored(tmp_path, "x")


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    path = write_all(tmp_path, 2) / file_name("x", 1, 2)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"x-00002-of-00002\.safetensors is damaged"):
        stored(tmp_path, "x")


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ([(0, 4), (5, 10)], "w: elements 4 to 4 are missing"),
        ([(0, 6), (5, 10)], "w: some elements appear twice"),
        ([(0, 5), (5, 9)], "w: only 9 of its 10 elements are present"),
        ([(2, 5), (5, 10)], "w: elements 0 to 1 are missing"),
    ],
)
def test_gaps_and_overlaps_name_the_tensor(tmp_path: Path, ranges: list[tuple[int, int]], message: str) -> None:
    for r, (start, end) in enumerate(ranges):
        write(tmp_path / file_name("x", r, 2), [Piece("w", (10,), start, torch.zeros(end - start))])
    with pytest.raises(CheckpointError, match=message):
        stored(tmp_path, "x")


def test_an_index_that_lies_is_refused(tmp_path: Path) -> None:
    path = tmp_path / file_name("x", 0, 1)
    for index in (
        {"w": {"shape": [4], "start": 0, "end": 4}},
        {"w": {"shape": "no"}},
        {"v": {"shape": [3], "start": 0, "end": 3}},
    ):
        save_file({"w": torch.zeros(3)}, path, metadata={INDEX: json.dumps(index)})
        with pytest.raises(CheckpointError, match=r"x-00001-of-00001\.safetensors: its list of pieces"):
            Files([path])


def test_the_header_says_what_each_piece_is(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", [Piece("w/exp_avg", (4, 5), 10, torch.zeros(5))])
    with safe_open(tmp_path / "a.safetensors", framework="pt") as f:
        assert json.loads(f.metadata()[INDEX]) == {"w/exp_avg": {"shape": [4, 5], "start": 10, "end": 15}}
