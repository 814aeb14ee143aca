"""Columns around the ring, in real processes: the gathered loss's numbers, and nobody holds all features."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
import gradcheck
from _spawn import spawn

from dualenc.config import Component
from dualenc.errors import ConfigError
from dualenc.losses import build_loss

torch.set_num_threads(1)
JOBS = Path(__file__).with_name("_ring_jobs.py")


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [2, 3])
def test_every_block_meets_every_rank_and_comes_home(ranks: int) -> None:
    for rank, out in enumerate(spawn(JOBS, "meetings", ranks)):
        assert out["met"] == [[10 * ((rank - hop) % ranks) + k for k in range(3)] for hop in range(ranks)]
        assert out["home"].tolist() == [sum(range(ranks + 1))] * 3


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_ring_and_gathered_tiles_equal_the_plain_matrix(ranks: int) -> None:
    """Value, metrics and all gradients of every rank; fp64 to 1e-12, fp32 to 3e-6."""
    for found in spawn(JOBS, "compare", ranks):
        assert len(found) == 2 * 3 * 6 * 3
        assert {k: x for k, x in found.items() if not x <= (1e-12 if "float64" in k else 3e-6)} == {}


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [1, 3])
def test_ring_equals_the_papers(ranks: int) -> None:
    for found in spawn(JOBS, "against_the_papers", ranks):
        assert len(found) == 8
        assert {k: x for k, x in found.items() if not x <= 1e-12} == {}


@pytest.mark.dist
@pytest.mark.slow
def test_the_rings_memory_does_not_know_the_number_of_ranks() -> None:
    """Nothing of N·D exists: more ranks, same bytes. (Tiles of logits are [B, B/2]: small beside D = 2048.)"""
    two, four = (spawn(JOBS, "memory", ranks)[0] for ranks in (2, 4))
    block = 16 * 2048 * 4
    for kind in ("info_nce", "sigmoid"):
        assert four[f"{kind} ring"][1] == block
        assert four[f"{kind} ring"][0] < 1.02 * two[f"{kind} ring"][0]
        assert four[f"{kind} gathered"][1] == 4 * block
        assert four[f"{kind} gathered"][0] > 1.4 * two[f"{kind} gathered"][0]


@pytest.mark.dist
@pytest.mark.slow
def test_training_with_the_ring_is_exact() -> None:
    """Through the whole step: DDP and ZeRO 2, micro-batches and dropout, three SGD steps."""
    found = spawn(gradcheck.__file__, "sweep", 2, {"engines": ["DDP", "ZeRO 2"], "columns": "ring"})[0]
    assert len(found) == 16
    assert {k: x for k, x in found.items() if not x[0] <= 1e-5} == {}


def test_one_process_needs_no_ring() -> None:
    loss = build_loss(Component(name="info_nce", columns="ring"))
    eye = torch.eye(2)
    assert float(loss(eye, eye, torch.tensor([0, 1]), torch.tensor([2.0])).value) == pytest.approx(0.126928, abs=1e-6)


def test_plain_does_not_go_with_the_ring() -> None:
    with pytest.raises(ConfigError, match="impl: plain needs all columns"):
        build_loss(Component(name="info_nce", impl="plain", columns="ring"))
