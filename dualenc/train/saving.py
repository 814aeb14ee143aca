"""When checkpoints are written, what they hold, and which are kept."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from dualenc.checkpoint import save as ckpt
from dualenc.config import dump_yaml
from dualenc.distributed.world import any_true, barrier
from dualenc.encoders.dual_encoder import heads_of, is_head
from dualenc.engine.held import all_finite
from dualenc.train.build import Parts
from dualenc.train.hooks import Finite, Moment
from dualenc.train.tracking import git_hash


class Save:
    """Writes checkpoints by steps, by the clock, at the end and when the run is stopped; but only of finite weights,
    after a finite step. One that falls due while steps are not finite is written once they are finite again.

    Attributes:
        finite: set by the loop; the two hooks use each other.
    """

    pauses = True
    finite: Finite

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._last = time.monotonic()
        self._owed = False
        self._unpruned = False
        self.steps: list[int] = []
        if parts.resumed_from == ckpt.folder_of(parts.run_dir, parts.state.step):
            self.steps.append(parts.state.step)  # of this run, and not proven yet

    # --- when -------------------------------------------------------------------------------------------------

    def due(self, now: Moment) -> bool:
        owed = now.looking and (self._owed or self._unpruned)
        ends = now.last or now.ends_phase
        return now.save_due or self.by_step(now) or ends or now.stopping or now.fallen or owed

    def by_step(self, now: Moment) -> bool:
        """Whether a checkpoint is due by the step number alone."""
        every = self._parts.recipe.checkpoint.every_steps
        return every is not None and now.step % every == 0

    def by_clock(self) -> bool:
        """Whether a checkpoint is due on this rank by the minutes since the last one."""
        every = self._parts.recipe.checkpoint.every_minutes
        return every is not None and time.monotonic() - self._last >= 60 * every

    def run(self, now: Moment) -> None:
        """Write a checkpoint if one is due, and remove those no longer needed.

        Raises:
            DivergenceError: the weights after the last step of the run or of a phase are not finite.
        """
        ends = now.last or now.ends_phase
        if now.save_due or self.by_step(now) or ends or now.stopping or now.fallen or self._owed:
            self._owed = bool(self.finite.in_a_row) or not self._weights_are_finite()
            if self._owed and ends:
                at_phase = "The last step before the next phase, or the weights after it, are not finite."
                self.finite.give_up("The weights after the last step are not finite." if now.last else at_phase)
            if self._owed:
                self._last = time.monotonic()
            else:
                self.write()
        if self._unpruned:
            self._prune(proven=now.step if now.last else self.finite.proven)

    def _weights_are_finite(self) -> bool:
        return not any_true(not all_finite(self._parts.engine.module), self._parts.world)

    # --- what -------------------------------------------------------------------------------------------------

    def write(self) -> None:
        """All ranks take part: rank 0 writes what it collected, or every rank what it holds."""
        p = self._parts
        self._last = time.monotonic()
        p.state.ledger = p.ledger.state_dict(p.world)
        (self._write_sharded if p.sharded else self._write_whole)()
        self.steps.append(p.state.step)
        self._unpruned = True

    def _write_whole(self) -> None:
        p = self._parts
        weights = p.engine.model_state()
        optimizer, p.state.optimizer = p.engine.optimizer_state()
        average = p.average.state_dict() if p.average else None
        with ckpt.Saver(p.run_dir, p.state.step, p.world) as saver:
            if p.world.rank == 0:
                if average is not None or heads_of(weights) or p.bundle.model.adapters:
                    saver.tensors("weights.safetensors", weights)
                saver.tensors("optimizer.safetensors", optimizer)
                self._write_rest(saver, state=weights if average is None else average)

    def _write_sharded(self) -> None:
        p = self._parts
        rank, world_size = p.world.rank, p.world.world_size
        optimizer, p.state.optimizer = p.engine.optimizer_pieces()
        with ckpt.Saver(p.run_dir, p.state.step, p.world) as saver:
            weights = p.engine.model_pieces()
            average = weights if p.average is None else p.average.pieces(rank, world_size)
            if p.average is not None or len(p.bundle.model.heads):
                saver.pieces("weights", weights)
            saver.pieces("model/model", [x for x in average if not is_head(x.name)])
            saver.pieces("optimizer", optimizer)
            files = {Path(name).name: digest for name, (_, digest) in saver.written().items() if "/" in name}
            if rank == 0:
                self._write_rest(saver, pieces=files)

    def _write_rest(self, saver: ckpt.Saver, **weights: Any) -> None:
        """What rank 0 writes besides the optimizer's tensors; ``weights``: as ``Bundle.save`` takes them."""
        p = self._parts
        provenance = {"step": p.state.step, "samples_seen": p.state.samples_seen, "git": git_hash()}
        p.bundle.save(saver.folder / "model", provenance=provenance, **weights)
        if p.distiller is not None:
            saver.tensors("teachers.safetensors", p.distiller.state_dict())
        saver.state(p.state)
        (saver.folder / "recipe.yaml").write_text(dump_yaml(p.whole), encoding="utf-8")

    # --- which are kept ---------------------------------------------------------------------------------------

    def _prune(self, proven: int) -> None:
        """Keep ``checkpoint.keep`` checkpoints, and the newest good one until a newer one is known to be good too."""
        p = self._parts
        self._unpruned = proven < self.steps[-1]
        if p.world.rank == 0:
            ckpt.prune(p.run_dir, p.recipe.checkpoint.keep, proven)
        barrier(p.world)

    def tidy(self) -> None:
        """Remove what a killed run left behind: staged files, and in a finished run checkpoints beyond ``keep``."""
        p = self._parts
        if p.world.rank != 0:
            return
        ckpt.sweep(p.run_dir / "checkpoints")
        saves = ckpt.list_saves(p.run_dir)
        if p.state.step >= p.total_steps and saves and saves[-1] == p.resumed_from:
            ckpt.prune(p.run_dir, p.recipe.checkpoint.keep, p.state.step)

    def set_aside(self, proven: int) -> str:
        """Rename the checkpoints of this run that no finite step followed, so that nothing resumes from them. They
        remain readable by path. Returns a sentence that says so, and where the run resumes."""
        p = self._parts
        bad = [s for s in self.steps if s > proven]
        names = [f"diverged-{s:010d}" for s in bad]
        if p.world.rank == 0:
            for step, name in zip(bad, names, strict=True):
                ckpt.set_aside(ckpt.folder_of(p.run_dir, step), name)
        left = [x for x in ckpt.list_saves(p.run_dir) if ckpt.step_of(x) not in bad]
        where = (
            f"The run will resume from {left[-1]}"
            if left
            else "There is no earlier checkpoint, so the run will start over"
        )
        because = f" (later checkpoints were renamed to {', '.join(names)})" if bad else ""
        return f"{where}{because}."

    def said(self) -> str:
        """Whether the stop left a checkpoint, and where."""
        p = self._parts
        if self.steps and self.steps[-1] == p.state.step:
            where = ckpt.folder_of(p.run_dir, p.state.step)
            return f"wrote checkpoint {where} (step {p.state.step} of {p.total_steps})"
        newest = ckpt.list_saves(p.run_dir)
        left = f"the newest checkpoint is {newest[-1]}" if newest else "there is no earlier checkpoint"
        return f"no checkpoint of step {p.state.step}, because its numbers are not finite; {left}"
