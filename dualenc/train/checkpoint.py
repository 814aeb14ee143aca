"""Saves that are atomic, verified, found by themselves, and independent of engine and world size.

    RUN/checkpoints/step-0000000100/
        model/                   the bundle: what `dualenc eval` loads (the moving average, if the recipe keeps one)
        weights.safetensors      the trained weights, only where model/ holds their moving average, or where a loss
                                 has heads of its own, which are no part of the model
        teachers.safetensors     when distilling: the state of teachers that follow the student
        optimizer.safetensors    optimizer state by parameter name, whatever engine wrote it
        state.json               step, samples_seen, lost-sample counts, small optimizer values
        manifest.json            size and sha256 of every file above, written last

A folder without a manifest, or whose files differ from it, is not a save: the newest good one is used instead.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from dualenc.errors import CheckpointError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_STEP = re.compile(r"step-(\d{10})$")


@dataclass
class TrainState:
    """Everything besides tensors that a run needs to go on. The data order and all random draws are functions of
    ``step`` and the recipe, so no loader or RNG state is kept."""

    step: int = 0
    samples_seen: int = 0
    nonfinite_steps: int = 0
    ledger: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    fingerprint: dict[str, Any] = field(default_factory=dict)
    data: dict[str, str] = field(default_factory=dict)


def folder_of(run_dir: Path, step: int) -> Path:
    """Where the save of ``step`` stands."""
    return run_dir / "checkpoints" / f"step-{step:010d}"


class Saver:
    """Writes one save: a context that stages files in a hidden folder and renames it when all are on disk.

    Used by rank 0 only. An exception inside the context leaves the staged folder behind for nobody: it is removed.
    """

    def __init__(self, run_dir: Path, step: int) -> None:
        self.final = folder_of(run_dir, step)
        self.folder = self.final.with_name(f".writing-{self.final.name}-{os.getpid()}")

    def __enter__(self) -> Saver:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        return self

    def tensors(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Write a safetensors file."""
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, str(self.folder / name))

    def state(self, state: TrainState) -> None:
        """Write state.json."""
        (self.folder / "state.json").write_text(json.dumps(asdict(state), indent=1), encoding="utf-8")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        files = {str(p.relative_to(self.folder)): _digest(p) for p in sorted(self.folder.rglob("*")) if p.is_file()}
        manifest = self.folder / MANIFEST
        manifest.write_text(json.dumps(files, indent=1), encoding="utf-8")
        for path in [*(self.folder / f for f in files), manifest, self.folder]:
            _fsync(path)
        if self.final.exists():  # a save of the same step from before a resume: the new one replaces it
            shutil.rmtree(self.final)
        self.folder.rename(self.final)
        _fsync(self.final.parent)


def prune(run_dir: Path, keep: int) -> None:
    """Keep the newest ``keep`` saves; also sweep what a killed writer left staged."""
    saves = list_saves(run_dir)
    for path in saves[:-keep]:
        shutil.rmtree(path)
    for path in (run_dir / "checkpoints").glob(".writing-*"):
        shutil.rmtree(path, ignore_errors=True)


def list_saves(run_dir: Path) -> list[Path]:
    """Finished saves, oldest first."""
    folder = run_dir / "checkpoints"
    found = [p for p in folder.iterdir() if _STEP.search(p.name)] if folder.is_dir() else []
    return sorted(p for p in found if (p / MANIFEST).is_file())


def newest_good(run_dir: Path) -> Path | None:
    """The newest save whose every file is as it was written; damaged ones are named in a warning and passed over."""
    for path in reversed(list_saves(run_dir)):
        damage = damaged(path)
        if damage is None:
            return path
        logger.warning("Passing over %s: %s", path, damage)
    return None


def damaged(save: Path) -> str | None:
    """What is wrong with a save, or None."""
    try:
        files = json.loads((save / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as e:
        return f"its manifest cannot be read ({e})"
    for name, digest in files.items():
        path = save / name
        if not path.is_file():
            return f"{name} is missing"
        if _digest(path) != digest:
            return f"{name} is not what was written (size or sha256 differs)"
    return None


def load_state(save: Path) -> TrainState:
    """Read state.json of a good save.

    Raises:
        CheckpointError: if the folder is not a save, or a file in it is missing or changed.
    """
    if not (save / MANIFEST).is_file():
        raise CheckpointError(f"{save} is not a finished save: it has no {MANIFEST}")
    damage = damaged(save)
    if damage is not None:
        raise CheckpointError(f"{save} cannot be used: {damage}")
    return TrainState(**json.loads((save / "state.json").read_text(encoding="utf-8")))


def load_tensors(save: Path, name: str) -> dict[str, Tensor]:
    """Read one safetensors file of a save to CPU memory."""
    return load_file(str(save / name))


def trained_weights(save: Path) -> dict[str, Tensor]:
    """The weights training goes on with (not their moving average)."""
    own = save / "weights.safetensors"
    return load_file(str(own if own.exists() else save / "model" / "model.safetensors"))


def _digest(path: Path) -> list[Any]:
    with path.open("rb") as f:
        return [path.stat().st_size, hashlib.file_digest(f, "sha256").hexdigest()]


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
