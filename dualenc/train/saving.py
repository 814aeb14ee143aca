"""When checkpoints are written, what they hold, and which are kept."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from dualenc.checkpoint import save as ckpt
from dualenc.checkpoint.ranges import copies
from dualenc.config import dump_yaml
from dualenc.distributed.world import any_true, barrier
from dualenc.encoders.dual_encoder import heads_of, is_head
from dualenc.engine.held import all_finite
from dualenc.train.build import Parts
from dualenc.train.hooks import Finite, Moment
from dualenc.train.tracking import git_hash

logger = logging.getLogger(__name__)

Write = Callable[[ckpt.Saver], None]


def _nothing(_: ckpt.Saver) -> None:
    return None


class Writing:
    """A checkpoint that a thread of this rank writes while training goes on; ranks talk only when it is begun and
    completed, in the main thread. Begin no process while it lasts: a fork would copy the locks that the thread holds.

    Args:
        saver: not entered yet.
        write: what the thread does, without talking to other ranks.
        rest: what is written once every rank has written its part; talks to other ranks.
        alone: rank 0 writes everything.
    """

    def __init__(self, saver: ckpt.Saver, write: Write, rest: Write, alone: bool) -> None:
        self._saver, self._write, self._rest, self._alone = saver, write, rest, alone
        saver.__enter__()
        pool = ThreadPoolExecutor(1, thread_name_prefix="dualenc-save")
        self._written = pool.submit(self._run)
        pool.shutdown(wait=False)

    def _run(self) -> None:
        self._write(self._saver)
        self._saver.digest()

    def is_done(self) -> bool:
        """Whether this rank's thread has ended."""
        return self._written.done()

    def complete(self) -> None:
        """Wait for the thread, and give the checkpoint its name; all ranks together. Raises what the thread raised."""
        with ExitStack() as entered:
            entered.push(self._saver)
            self._written.result()
            self._rest(self._saver)

    def complete_alone(self) -> None:
        """The same without other ranks, which may be gone; only where that is possible. Raises nothing: the run has
        failed already, and its earlier checkpoints are intact."""
        if self._written.exception() is None and self._alone and self._saver.world.rank == 0:
            try:
                self._saver.finish_alone()
            except OSError as e:
                logger.warning("Checkpoint %s was not completed: %s", self._saver.final.name, e)


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
        self._pending: Writing | None = None
        self.steps: list[int] = []
        if parts.resumed_from == ckpt.folder_of(parts.run_dir, parts.state.step):
            self.steps.append(parts.state.step)  # of this run, and not proven yet

    # --- when -------------------------------------------------------------------------------------------------

    def due(self, now: Moment) -> bool:
        owed = now.looking and (self._owed or self._unpruned)
        complete = now.written and self._pending is not None
        ends = now.last or now.ends_phase
        return now.save_due or self.by_step(now) or ends or now.stopping or now.fallen or owed or complete

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
        wanted = now.save_due or self.by_step(now) or ends or now.stopping or now.fallen or self._owed
        if wanted or now.written:
            self.settle()
        if wanted:
            self._owed = bool(self.finite.in_a_row) or not self._weights_are_finite()
            if self._owed and ends:
                at_phase = "The last step before the next phase, or the weights after it, are not finite."
                self.finite.give_up("The weights after the last step are not finite." if now.last else at_phase)
            if self._owed:
                self._last = time.monotonic()
            else:
                ends = ends or now.stopping or now.fallen
                self.write(background=self._parts.recipe.checkpoint.background and not ends)
        if self._unpruned:
            self._prune(proven=now.step if now.last else self.finite.proven)

    def _weights_are_finite(self) -> bool:
        return not any_true(not all_finite(self._parts.engine.module), self._parts.world)

    # --- what -------------------------------------------------------------------------------------------------

    def write(self, background: bool = False) -> None:
        """All ranks take part: rank 0 writes what it collected, or every rank what it holds.

        In the ``background`` a thread writes copies, and :meth:`settle` gives the folder its name.
        """
        p = self._parts
        self._last = time.monotonic()
        p.state.ledger = p.ledger.state_dict(p.world)
        write, rest = (self._sharded if p.sharded else self._whole)(copied=background)
        saver = ckpt.Saver(p.run_dir, p.state.step, p.world)
        self.steps.append(p.state.step)
        if background:
            alone = p.world.world_size == 1 or not (p.sharded or p.memory)
            self._pending = Writing(saver, write, rest, alone=alone)
            return
        with saver:
            write(saver)
            rest(saver)
        self._unpruned = True

    def is_written(self) -> bool:
        """Whether this rank writes nothing in the background, or has written it."""
        return self._pending is None or self._pending.is_done()

    def settle(self) -> None:
        """Wait for the checkpoint that is written in the background, and complete it; all ranks together.

        Raises:
            OSError: this rank could not write.
            DualencError: another one could not.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.complete()
            self._unpruned = True

    def end(self) -> None:
        """At the end of a run that failed: keep the checkpoint that is being written if no other rank is needed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.complete_alone()

    def _whole(self, copied: bool) -> tuple[Write, Write]:
        """What rank 0 writes: tensors that it has collected, which are copies anyway."""
        p = self._parts
        weights = p.engine.model_state()
        optimizer, p.state.optimizer = p.engine.optimizer_state()
        average = p.average.state_dict() if p.average else None
        remembered = self._remembered(copied)
        if p.world.rank != 0:
            return remembered, _nothing
        small = self._rest()
        ready = p.bundle.for_use(weights if average is None else average)

        def write(saver: ckpt.Saver) -> None:
            if average is not None or heads_of(weights) or p.bundle.model.adapters:
                saver.tensors("weights.safetensors", weights)
            saver.tensors("optimizer.safetensors", optimizer)
            remembered(saver)
            small(saver, ready=ready)

        return write, _nothing

    def _sharded(self, copied: bool) -> tuple[Write, Write]:
        """What every rank writes; with ``copied`` nothing of it shares memory with what is being trained."""
        p = self._parts
        rank, world_size = p.world.rank, p.world.world_size
        optimizer, p.state.optimizer = p.engine.optimizer_pieces()
        weights = p.engine.model_pieces()
        average = weights if p.average is None else p.average.pieces(rank, world_size)
        both = p.average is not None or len(p.bundle.model.heads) > 0
        if copied:
            optimizer, kept = copies(optimizer), copies(weights)
            average, weights = (kept if p.average is None else copies(average)), kept
        small = self._rest() if rank == 0 else None
        remembered = self._remembered(copied)

        def write(saver: ckpt.Saver) -> None:
            remembered(saver)
            if both:
                saver.pieces("weights", weights)
            saver.pieces("model/model", [x for x in average if not is_head(x.name)])
            saver.pieces("optimizer", optimizer)

        def rest(saver: ckpt.Saver) -> None:
            files = {Path(name).name: digest for name, (_, digest) in saver.written().items() if "/" in name}
            if small is not None:
                small(saver, pieces=files)

        return write, rest

    def _remembered(self, copied: bool) -> Write:
        """Writes what the loss remembers; every rank writes its part, however the rest is written."""
        p = self._parts
        if not p.memory:
            return _nothing
        pieces = p.memory.pieces(p.world.rank, p.world.world_size)
        if copied:
            pieces = copies(pieces)

        def write(saver: ckpt.Saver) -> None:
            saver.pieces("memory", pieces)

        return write

    def _rest(self) -> Callable[..., None]:
        """Writes what rank 0 writes besides the optimizer's tensors, as it is now; takes a saver, and the weights as
        ``Bundle.save`` takes them."""
        p = self._parts
        provenance = {"step": p.state.step, "samples_seen": p.state.samples_seen, "git": git_hash()}
        teachers = None
        if p.distiller is not None:
            teachers = {k: x.detach().cpu().clone() for k, x in p.distiller.state_dict().items()}
        state = copy.deepcopy(p.state)

        def write(saver: ckpt.Saver, **weights: Any) -> None:
            p.bundle.save(saver.folder / "model", provenance=provenance, **weights)
            if teachers is not None:
                saver.tensors("teachers.safetensors", teachers)
            saver.state(state)
            (saver.folder / "recipe.yaml").write_text(dump_yaml(p.whole), encoding="utf-8")

        return write

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
        self.settle()
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
