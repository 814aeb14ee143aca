"""What the spawned ranks of test_sharded.py run."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parent))
from _runs import build

from dualenc.checkpoint import save as ckpt
from dualenc.checkpoint.ranges import Files, Piece
from dualenc.distributed.world import World, barrier
from dualenc.errors import DualencError
from dualenc.train.loop import Run


class Allocations(TorchDispatchMode):
    """Counts the tensors that come into being inside: their bytes, and the elements of the largest."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {_storage(t) for t in tree_leaves((args, kwargs)) if type(t) in (Tensor, torch.nn.Parameter)}
        for t in tree_leaves(out):
            if type(t) is Tensor and t.numel() and _storage(t) not in given:
                self.bytes += t.numel() * t.element_size()
                self.largest = max(self.largest, t.numel())
        return out


def _storage(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def chained(world: World, parts: list[list[str]]) -> list[dict[str, Any]]:
    """Runs one after another. Each checks what it loaded and what it saved, element by element, against the collected
    form of the very state; then it saves again whole and sharded and counts what that brought into memory."""
    out = []
    for overrides in parts:
        run = build(world, overrides)
        loaded = differences(run, run.parts.resumed_from) if run.parts.resumed_from else {}
        run.train()
        saved = ckpt.folder_of(run.parts.run_dir, run.parts.state.step)
        row = {"step": run.parts.state.step, "loaded": loaded, "saved": differences(run, saved)}
        row["files"] = sorted(str(p.relative_to(saved)) for p in saved.rglob("*.safetensors"))
        for sharded in (False, True):
            run.parts.sharded = sharded
            with Allocations() as seen:
                run.save.write()
            row["sharded" if sharded else "whole"] = {"bytes": seen.bytes, "largest": seen.largest}
        row["own"] = own(run)
        run.close()
        out.append(row)
    return out


def plain(world: World, parts: list[list[str]]) -> None:
    """Runs one after another."""
    for overrides in parts:
        run = build(world, overrides)
        run.train()
        run.close()


def digesting(world: World, folder: str) -> list[str]:
    """Rank 0 hashes what it has written while rank 1 is in the middle of its piece: the names in the manifest."""
    empty = torch.zeros(0)
    with ckpt.Saver(Path(folder), 1, world) as saver:
        temporary = saver.folder / ".tmpAbCdEf"
        if world.rank == 1:
            temporary.write_bytes(b"half a piece")
            (saver.folder / "memory-00002-of-00002.safetensors").write_bytes(b"half a piece")
        barrier(world)
        if world.rank == 0:
            saver.tensors("optimizer.safetensors", {"a": empty})
            saver.pieces("memory", [Piece("a", (2,), 0, torch.zeros(1))])
        seen: list[str] = []
        original = ckpt._digest
        ckpt._digest = lambda path: (seen.append(path.name), original(path))[1]
        saver.digest()
        ckpt._digest = original
        barrier(world)
        if world.rank == 1:
            temporary.unlink()
            saver.pieces("memory", [Piece("a", (2,), 1, torch.zeros(1))])
    return [*seen, str(ckpt.damaged(ckpt.folder_of(Path(folder), 1), world))]


def differences(run: Run, save: Path) -> dict[str, int]:
    """How many tensors of a save are not bit for bit what all ranks collect from the engine (rank 0 compares)."""
    weights, (optimizer, _) = run.parts.engine.model_state(), run.parts.engine.optimizer_state()
    average = run.parts.average.state_dict() if run.parts.average else {}
    if run.parts.world.rank != 0:
        return {}
    pairs: list[tuple[dict[str, Tensor], Files]] = [
        (weights, ckpt.trained_weights(save)),
        (optimizer, ckpt.optimizer_state(save)),
        (average, ckpt.average_weights(save)),
    ]
    wrong = sum(not torch.equal(t, f.whole(k)) for tensors, f in pairs for k, t in tensors.items() if k in f.shapes)
    unknown = sum(len(tensors.keys() ^ f.shapes.keys()) for tensors, f in pairs)
    return {"compared": sum(len(t) for t, _ in pairs), "wrong": wrong, "unknown": unknown}


def own(run: Run) -> dict[str, int]:
    """Bytes and largest piece of what this rank writes, and of the whole state."""

    def size(pieces: Iterable[Piece]) -> int:
        return sum(p.data.numel() * p.data.element_size() for p in pieces)

    assert run.parts.average is not None
    all_pieces = [*run.parts.engine.model_pieces(), *run.parts.engine.optimizer_pieces()[0]]
    all_pieces += run.parts.average.pieces(run.parts.world.rank, run.parts.world.world_size)
    return {"bytes": size(all_pieces), "largest": max(p.data.numel() for p in all_pieces)}


SECOND = ".writing-step-0000000002"


def failing(world: World, overrides: list[str], out: str) -> None:
    """Rank 1 has no room on its disk: every rank writes down what it says and what is left then. Again, and rank 0 is
    killed when it has written the second of its three files of the second save."""
    original_write, original_digest = ckpt.write, ckpt._digest

    def write(path: Path, pieces: Iterable[Piece]) -> None:
        original_write(path, pieces)
        if world.rank == 1:
            raise OSError("No space left on device")

    def digest(path: Path) -> list[Any]:
        if world.rank == 0 and path.name.startswith("model-") and path.parents[1].name.startswith(SECOND):
            os.kill(os.getpid(), signal.SIGKILL)
        return original_digest(path)

    ckpt.write = write
    run = build(world, overrides)
    try:
        run.train()
        message = "saved"
    except (OSError, DualencError) as e:
        message = f"{type(e).__name__}: {e}"
    run.close()
    barrier(world)
    left = [p.name for p in (run.parts.run_dir / "checkpoints").iterdir()]
    (Path(out) / f"said-{world.rank}").write_text(f"{message}; left: {left}")
    ckpt.write, ckpt._digest = original_write, digest
    build(world, overrides).train()
