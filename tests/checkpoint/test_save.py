"""Saves: atomic, verified, the newest good one found by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dualenc.checkpoint import save as ckpt
from dualenc.errors import CheckpointError


def write(run: Path, step: int) -> Path:
    with ckpt.Saver(run, step) as saver:
        (saver.folder / "model").mkdir()
        saver.tensors("model/model.safetensors", {"w": torch.full((3,), float(step))})
        saver.state(ckpt.TrainState(step=step, samples_seen=step * 8))
    return ckpt.folder_of(run, step)


def test_round_trip(tmp_path: Path) -> None:
    save = write(tmp_path, 5)
    assert ckpt.load_state(save) == ckpt.TrainState(step=5, samples_seen=40)
    assert torch.equal(ckpt.trained_weights(save).whole("w"), torch.full((3,), 5.0))


def test_a_flipped_byte_is_seen_and_the_older_save_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old, new = write(tmp_path, 5), write(tmp_path, 10)
    weights = new / "model" / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    assert ckpt.newest_good(tmp_path) == old
    assert "sha256 differs" in caplog.text
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not what was written"):
        ckpt.refuse_damaged(new)


@pytest.mark.parametrize("missing", ["state.json", ckpt.MANIFEST])
def test_an_unfinished_save_is_none(tmp_path: Path, missing: str) -> None:
    old, new = write(tmp_path, 5), write(tmp_path, 10)
    (new / missing).unlink()
    assert ckpt.newest_good(tmp_path) == old


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="disk full"), ckpt.Saver(tmp_path, 5) as saver:
        saver.tensors("x.safetensors", {"w": torch.zeros(1)})
        raise OSError("disk full")
    assert ckpt.newest_good(tmp_path) is None
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_prune_keeps_the_newest_and_sweep_removes_what_was_staged(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        write(tmp_path, step)
    (tmp_path / "checkpoints" / ".writing-step-0000000020-1").mkdir()
    ckpt.prune(tmp_path, keep=2)
    ckpt.sweep(tmp_path / "checkpoints")
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == ["step-0000000010", "step-0000000015"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    write(tmp_path, 5)
    write(tmp_path, 5)
    assert len(ckpt.list_saves(tmp_path)) == 1
