"""Checkpoints: atomic, verified, found automatically, and independent of engine and world size.

    RUN/checkpoints/step-0000000100/
        model/                   the bundle: what `dualenc eval` loads (the moving average, if the recipe keeps one)
        weights.safetensors      the trained weights, only where model/ holds their moving average, or where a loss
                                 has heads of its own, which are not part of the model
        teachers.safetensors     when distilling: the state of teachers that follow the student
        memory-*.safetensors     what the loss remembers (queues, slow towers, numbers for each sample), if it does;
                                 every rank writes its part
        optimizer.safetensors    optimizer state by parameter name, whatever engine wrote it
        state.json               step, samples_seen, lost-sample counts, small optimizer values
        manifest.json            size and sha256 of every file above, written last

In a sharded checkpoint every rank writes what it holds (:mod:`dualenc.checkpoint.ranges`): the three files of tensors
are then ``model/model-00001-of-00008.safetensors`` and so on. The folder must be one that all ranks see.

A folder without a manifest, or whose files differ from it, does not count: the newest good checkpoint is used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from dualenc.checkpoint.ranges import Files, Joined, Piece, file_name, find, stored, write, write_tensors
from dualenc.config import Recipe
from dualenc.distributed.world import World, all_gather_object, broadcast_object
from dualenc.errors import CheckpointError, DualencError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
SHARDED_FROM = 8 * 2**30
"""Bytes of weights and optimizer state from which ``checkpoint.sharded: auto`` lets every rank write its own.

Below that (about 700 M parameters under AdamW) one file is easier to copy and open, and rank 0 collects,
hashes and writes it in seconds. Where every rank holds everything (DDP, ZeRO 0) nothing is collected at any size.
"""
_STEP = re.compile(r"step-(\d{10})")
_STATES = {"adamw": 2, "muon": 2, "sgd": 1}  # of a parameter's size; Muon has one for matrices and AdamW's for the rest


@dataclass
class TrainState:
    """Everything besides tensors that a run needs to resume. The data order and all random draws are functions of
    ``step`` and the recipe, so no loader or RNG state is kept."""

    step: int = 0
    samples_seen: int = 0
    nonfinite_steps: int = 0
    ledger: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    fingerprint: dict[str, Any] = field(default_factory=dict)
    data: dict[str, str] = field(default_factory=dict)
    guard: dict[str, Any] = field(default_factory=dict)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Counted(_Strict):
    counts: dict[str, list[int]] = {}


class _OptimizerScalars(_Strict):
    name: str = ""
    scalars: dict[str, dict[str, float]] = {}


class _Watched(_Strict):
    before: dict[str, float] = {}
    step: int = 0
    fallen: bool = False


class _SavedState(_Strict):
    """The schema of state.json: :class:`TrainState` with the types of its contents."""

    step: int = Field(default=0, ge=0)
    samples_seen: int = Field(default=0, ge=0)
    nonfinite_steps: int = Field(default=0, ge=0)
    ledger: _Counted = _Counted()
    optimizer: _OptimizerScalars = _OptimizerScalars()
    fingerprint: dict[str, Any] = {}
    data: dict[str, str] = {}
    guard: _Watched = _Watched()


def folder_of(run_dir: Path, step: int) -> Path:
    """The folder of the checkpoint of ``step``."""
    return run_dir / "checkpoints" / f"step-{step:010d}"


def step_of(save: Path) -> int:
    """The step of a checkpoint, from its name; −1 if the name has none."""
    found = _STEP.search(save.name)
    return int(found[1]) if found else -1


def set_aside(save: Path, name: str) -> None:
    """Rename a checkpoint so that :func:`newest_good` does not find it; replaces an older one of that name."""
    if save.is_dir():
        target = save.with_name(name)
        shutil.rmtree(target, ignore_errors=True)
        save.rename(target)


def is_sharded(recipe: Recipe, parameters: int, trained: int, world_size: int) -> bool:
    """Whether checkpoints of this run are sharded: ``checkpoint.sharded``, and what ``auto`` means.

    Args:
        parameters, trained: their numbers; weights and state are fp32.
    """
    said = recipe.checkpoint.sharded
    if said != "auto":
        return said
    engine = recipe.engine
    cut = engine.parallel == "fsdp2" if engine.kind == "accelerate" else engine.zero_stage > 0
    copies = 2 if recipe.optim.ema_samples or recipe.optim.trajectory else 1
    return cut and world_size > 1 and 4 * (copies * parameters + _STATES[recipe.optim.name] * trained) >= SHARDED_FROM


# --- writing -----------------------------------------------------------------------------------------------------


class Saver:
    """Writes one checkpoint: a context that stages files in a hidden folder and renames it when all are on disk.

    All ranks enter and leave it together, and the folder must be on a file system that all of them see. What is not a
    piece is written by rank 0. Every rank hashes what it wrote, so rank 0 reads nothing of the others'. An exception on
    any rank removes the folder and is raised there; on the others it is a DualencError that names the rank (not
    a CheckpointError: after a restart the disk may have room).
    """

    def __init__(self, run_dir: Path, step: int, world: World | None = None) -> None:
        self.world = world or World()
        self.final = folder_of(run_dir, step)
        own = self.final.with_name(f".writing-{self.final.name}-{os.getpid()}")
        self.folder = broadcast_object(own, self.world)
        self._mine: dict[str, list[Any]] = {}
        self._of_ranks: set[Path] = set()  # pieces, of which the other ranks may be writing theirs right now
        self._given_up: str | None = None
        self._over = False  # no more messages: a rank has failed, and it waits for none
        self._digests: dict[str, list[Any]] = {}

    def __enter__(self) -> Saver:
        error: OSError | None = None
        if self.world.rank == 0:
            try:
                sweep(self.final.parent)  # before writing: a killed writer may have filled the disk
                self.folder.mkdir(parents=True)
            except OSError as e:
                error = e
        self._exchange({}, error)
        if error is not None:
            raise error
        self._raise_if_given_up()
        return self

    def tensors(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Write a safetensors file (rank 0)."""
        write_tensors(self.folder / name, {k: v.detach().cpu().contiguous() for k, v in tensors.items()})

    def pieces(self, stem: str, pieces: Iterable[Piece]) -> None:
        """Write this rank's file of ``stem`` (every rank)."""
        names = [file_name(stem, rank, self.world.world_size) for rank in range(self.world.world_size)]
        self._of_ranks |= {self.folder / name for name in names}
        path = self.folder / names[self.world.rank]
        path.parent.mkdir(exist_ok=True)
        write(path, pieces)
        _fsync(path)
        self._mine[str(path.relative_to(self.folder))] = _digest(path)

    def written(self) -> dict[str, list[Any]]:
        """Size and sha256 of all ranks' pieces by file name, on all ranks, which must call it alike.

        Raises:
            DualencError: if a rank could not write its own.
        """
        all_files = self._exchange(self._mine, None)
        self._raise_if_given_up()
        return all_files

    def digest(self) -> None:
        """Hash and sync what rank 0 has written so far besides pieces, so that leaving has little left to do.

        The folder also has what other ranks are writing meanwhile: their pieces, and the hidden files into which
        safetensors writes first. Those are not touched.
        """
        if self.world.rank != 0:
            return
        for path in self._files():
            if path not in self._of_ranks and not path.name.startswith("."):
                _fsync(path)
                self._digests[str(path.relative_to(self.folder))] = _digest(path)

    def finish_alone(self) -> None:
        """What leaving the context does, without asking other ranks: for rank 0, if it has written everything.

        Raises:
            OSError: as leaving does.
        """
        self._finish(self._mine)
        self._over = True

    def _files(self) -> list[Path]:
        return [p for p in sorted(self.folder.rglob("*")) if p.is_file()]

    def state(self, state: TrainState) -> None:
        """Write state.json (rank 0)."""
        (self.folder / "state.json").write_text(json.dumps(asdict(state), indent=1), encoding="utf-8")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        pieces = {} if self._over else self._exchange(self._mine, error)
        finished = None
        if not self._over and self.world.rank == 0:
            try:
                self._finish(pieces)
            except OSError as e:
                finished = e
        if not self._over:
            self._exchange({}, finished)
        if self._over and self.world.rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
        if finished is not None:
            raise finished
        if error is None:
            self._raise_if_given_up()

    def _finish(self, pieces: dict[str, list[Any]]) -> None:
        """On rank 0, when all ranks have written: write the manifest, then rename the folder to its final name."""
        for name, (size, _) in pieces.items():
            if not (self.folder / name).is_file() or (self.folder / name).stat().st_size != size:
                raise OSError(f"rank 0 does not see {self.folder / name} ({size} bytes): is the run folder shared?")
        own = {str(p.relative_to(self.folder)): p for p in self._files()}
        own = {name: p for name, p in own.items() if name not in pieces}
        files = pieces | {name: self._digests.get(name) or _digest(p) for name, p in own.items()}
        manifest = self.folder / MANIFEST
        manifest.write_text(json.dumps(dict(sorted(files.items())), indent=1), encoding="utf-8")
        folders = [p for p in self.folder.rglob("*") if p.is_dir()]
        for path in [*own.values(), *folders, manifest, self.folder]:
            _fsync(path)
        if self.final.exists():  # a checkpoint of the same step from before a resume: the new one replaces it
            shutil.rmtree(self.final)
        self.folder.rename(self.final)
        _fsync(self.final.parent)

    def _exchange(self, files: dict[str, list[Any]], error: BaseException | None) -> dict[str, list[Any]]:
        """Every rank's files, or the first error, which ends the checkpoint on all ranks.

        A rank that fails between two exchanges reports its error at the next one, so no rank waits for it in vain.
        """
        said = None if error is None else f"{type(error).__name__}: {error}"
        before, self._over = self._over, True  # if the exchange itself fails, there is nobody to talk to
        found = all_gather_object((files, said), self.world)
        self._over = before
        for rank, (_, failed) in enumerate(found):
            if failed is not None:
                self._over = True
                self._given_up = f"Checkpoint {self.final.name} was not written: rank {rank} failed ({failed})"
                break
        return {name: digest for own, _ in found for name, digest in own.items()}

    def _raise_if_given_up(self) -> None:
        if self._over:
            raise DualencError(self._given_up or f"Checkpoint {self.final.name} was not written")


def prune(run_dir: Path, keep: int, proven: int | None = None) -> None:
    """Keep the newest ``keep`` checkpoints, and the newest up to step ``proven``."""
    saves = list_saves(run_dir)
    good = [p for p in saves if proven is not None and step_of(p) <= proven]
    for path in saves[:-keep]:
        if path not in good[-1:]:
            # Out of sight in one step: of a removal that is killed, :func:`sweep` takes the rest.
            gone = path.with_name(f".writing-{path.name}-{os.getpid()}-gone")
            path.rename(gone)
            shutil.rmtree(gone)


def sweep(folder: Path) -> None:
    """Remove what a killed writer left staged in ``folder``, the one with the checkpoints."""
    for path in folder.glob(".writing-*"):
        shutil.rmtree(path, ignore_errors=True)


def list_saves(run_dir: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    folder = run_dir / "checkpoints"
    found = [p for p in folder.iterdir() if _STEP.fullmatch(p.name)] if folder.is_dir() else []
    return sorted(p for p in found if (p / MANIFEST).is_file())


def newest_good(run_dir: Path, world: World | None = None) -> Path | None:
    """The newest checkpoint whose files are all as written; damaged ones are named in a warning and skipped.

    With a world of several ranks, every rank calls it and reads its share of the files.
    """
    world = world or World()
    for path in reversed(broadcast_object(list_saves(run_dir), world)):
        damage = damaged(path, world)
        if damage is None:
            return path
        if world.rank == 0:
            logger.warning("Skipping damaged checkpoint %s: %s", path, damage)
    return None


def damaged(save: Path, world: World | None = None) -> str | None:
    """What is wrong with a checkpoint, or None; the same on all ranks of ``world``; each reads a share of it."""
    world = world or World()
    found = [d for d in all_gather_object(_damaged(save, world.rank, world.world_size), world) if d is not None]
    return found[0] if found else None


def _damaged(save: Path, rank: int, world_size: int) -> str | None:
    try:
        files = _manifest(save)
    except (OSError, ValueError, RecursionError) as e:
        return f"its manifest cannot be read ({e})"
    by_size = sorted(files.items(), key=lambda item: (-item[1][0], item[0]))
    for name, digest in by_size[rank::world_size]:
        path = save / name
        if not path.is_file():
            return f"{name} is missing"
        if _digest(path) != digest:
            return f"{name} is not what was written (its size or sha256 differs)"
    return None


def _manifest(save: Path) -> dict[str, list[Any]]:
    """File name → [size, sha256].

    Raises:
        ValueError: it is not that, or names a file outside the checkpoint.
        OSError: it cannot be read.
    """
    files = json.loads((save / MANIFEST).read_text(encoding="utf-8"))
    if not isinstance(files, dict):
        raise ValueError(f"it is not a mapping but a {type(files).__name__}")
    for name, entry in files.items():
        if not name or "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"it names {name!r}, which is not a file in the checkpoint")
        if not (isinstance(entry, list) and [type(x) for x in entry] == [int, str]):
            raise ValueError(f"its entry of {name!r} is not [size, sha256]")
    return files


def refuse_damaged(save: Path, world: World | None = None) -> None:
    """Raise unless ``save`` is finished and undamaged; every rank of ``world`` calls it.

    Raises:
        CheckpointError: if the folder is not a checkpoint, or a file in it is missing or changed.
    """
    if not (save / MANIFEST).is_file():
        raise CheckpointError(f"{save} is not a finished checkpoint: it has no {MANIFEST}")
    damage = damaged(save, world)
    if damage is not None:
        raise CheckpointError(f"{save} cannot be used: {damage}")


def load_state(save: Path) -> TrainState:
    """Read state.json of an undamaged checkpoint.

    Raises:
        CheckpointError: naming the field that is not what a training run writes.
    """
    path = save / "state.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        _SavedState.model_validate(raw)
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(map(str, first["loc"])) or "its content"
        raise CheckpointError(f"{path} cannot be used: {where}: {first['msg']}") from e
    except (OSError, ValueError, RecursionError) as e:
        raise CheckpointError(f"{path} cannot be read ({e})") from e
    return TrainState(**raw)


def optimizer_state(save: Path) -> Files:
    """The optimizer state, whole or in pieces."""
    return stored(save, "optimizer")


def trained_weights(save: Path) -> Files:
    """The weights that training resumes with (not their moving average)."""
    return stored(save, "weights") if has_average(save) else stored(save / "model", "model")


def loss_memory(save: Path) -> Files:
    """What the loss remembers, whole or in pieces."""
    return stored(save, "memory")


def average_weights(save: Path) -> Joined:
    """The moving average of the weights; only where :func:`has_average`. Heads that only a loss uses are not part of
    the bundle: their average restarts from the trained ones."""
    return Joined(stored(save / "model", "model"), trained_weights(save))


def has_average(save: Path) -> bool:
    """Whether trained weights are stored beside the bundle: it holds their average, or a loss has heads of its own."""
    return bool(find(save, "weights"))


def _digest(path: Path) -> list[Any]:
    with path.open("rb") as f:
        return [path.stat().st_size, hashlib.file_digest(f, "sha256").hexdigest()]


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
