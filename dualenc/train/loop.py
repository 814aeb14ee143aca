"""The run: step, look, log, save, evaluate, stop cleanly.

The clock is samples seen. Everything random is a function of (seed, step, rank) or (seed, sample id, pass), so a
resumed run needs no loader state and no RNG state: it sets the step and continues with the samples it would have read.
"""

from __future__ import annotations

import errno
import gc
import itertools
import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from dualenc.checkpoint.ranges import WriteError
from dualenc.checkpoint.save import folder_of
from dualenc.config import Batches, Recipe, dump_yaml
from dualenc.data.batch import Batch
from dualenc.data.loader import Loader
from dualenc.distributed.failure import naming_missing_ranks
from dualenc.distributed.world import World, any_true, broadcast_object, close_world, init_world
from dualenc.errors import ConfigError, DualencError, Interrupted
from dualenc.files import write_atomically
from dualenc.seeds import derive_seed
from dualenc.train.build import Parts, build, build_loader
from dualenc.train.hooks import Agree, Finite, Hook, KeepAverage, Log, Moment, Stop
from dualenc.train.lock import RunLock
from dualenc.train.measure import CheckGuard, Evaluate, Evaluation, Refuse
from dualenc.train.memory import whole_weights
from dualenc.train.resume import keep_old_recipe
from dualenc.train.saving import Save
from dualenc.train.shared_memory import check_shared_memory
from dualenc.train.step import train_step
from dualenc.train.step_profile import Profile
from dualenc.train.stop import StopFlag
from dualenc.train.tracking import environment

DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG, errno.ENOTDIR}
"""Errors of a disk that is full, read-only, broken, or gone."""


class RunFolderError(DualencError):
    """The run folder cannot be written to."""


class Run:
    """One training run on one rank; all ranks call the same methods in the same order.

    Attributes:
        parts: what it is made of.
        save: how it is saved.
    """

    def __init__(
        self,
        recipe: Recipe,
        run_dir: Path,
        world: World,
        evaluation: Evaluation | None = None,
        guard: Evaluation | None = None,
        stop: StopFlag | None = None,
        profile: int | None = None,
        save: Path | None = None,
    ) -> None:
        self.parts: Parts = build(recipe, run_dir, world, save)
        self.profile = None if profile is None else Profile(self.parts, profile)
        self.stop = stop or StopFlag()
        self.save = Save(self.parts)
        self.log = Log(self.parts)
        self.evaluate = Evaluate(self.parts, evaluation)
        self.guard = CheckGuard(self.parts, recipe.eval.guard, guard)
        self.finite = self.save.finite = Finite(self.parts, self.save.set_aside)
        self.hooks: list[Hook] = [
            KeepAverage(self.parts),
            Agree(self.parts, self.stop, self.save.by_clock, self.save.is_written, also=self._reads),
            self.finite,  # may end the run, so before anything is written
            self.log,
            self.guard,  # before the save, which holds what it found
            self.save,
            Stop(self.parts, self.stop, self.save.said),
            self.evaluate,
            Refuse(self.guard),
        ]

    def train(self) -> None:
        """Train to the end of the budget, or to that of the phase.

        Raises:
            Interrupted: after SIGTERM, SIGHUP or Ctrl-C, once the run is saved.
            DivergenceError: after ``engine.max_nonfinite`` non-finite steps in a row, or if the last was not finite.
            DataError: when a source lost more than ``data.max_bad_share`` of its samples.
            GuardError: when the zero-shot of ``eval.guard`` fell too far, once the run is saved.
        """
        if any_true(self.stop.raised, self.parts.world):
            raise Interrupted(f"Stopped by {self.stop.name or 'a signal to another rank'} before the first step.")
        check_shared_memory(self.parts.recipe, self._probe, self.parts.world)
        self.save.tidy()
        self.evaluate.at_start()
        self.guard.at_start()
        self.log.begin_phase()
        self.log.begin()
        for batch in self.parts.loader:
            if self.profile is not None:
                self.profile.begin(self.parts.loader.last_wait_s)
            now = self._step(batch)
            if self.profile is not None:
                self.profile.hooked()
            for hook in self.hooks:
                if hook.due(now):
                    began = time.perf_counter()
                    if hook is self.guard or hook is self.evaluate:
                        self.save.settle()  # they may start processes, which is safe only without a writing thread
                    hook.run(now)
                    if hook.pauses:
                        self.log.exclude(time.perf_counter() - began)
            if self.profile is not None:
                self.profile.end()

    def steps(self, count: int) -> Iterator[Moment]:
        """The next steps and nothing else: no hook logs, saves or evaluates. As with training, all ranks together."""
        for batch in itertools.islice(self.parts.loader, count):
            now = self._step(batch)
            float(now.result.loss)  # waits for the device
            yield now

    def _probe(self) -> Loader:
        """Batches of one slot, read by this process."""
        p = self.parts
        data = p.recipe.data.model_copy(update={"workers": 0, "batches": None})
        small = p.recipe.model_copy(update={"data": data, "batch": Batches(size=p.world.world_size)})
        return build_loader(small, p.bundle, p.world, p.distiller, 0, pin_memory=False)

    def _step(self, batch: Batch) -> Moment:
        p = self.parts
        if batch.step != p.state.step:
            raise RuntimeError(f"the loader gave step {batch.step}, the run is at {p.state.step}")
        # Dropout and patch dropout draw from here: resuming needs no RNG state. Ranks must differ.
        torch.manual_seed(derive_seed(p.recipe.seed, p.state.step, p.world.rank))
        p.ledger.add(batch)
        p.flops.note(batch)
        size = p.recipe.batch.size
        p.engine.set_lr_factor(p.lr_factor)
        batch = p.memory.recall(replace(batch.to(p.engine.device), seen=p.state.samples_seen), p.engine.module)
        if p.distiller is not None:
            batch = p.distiller.prepare(batch, whole_weights(p.engine.module), p.loss)
        result = train_step(p.engine, batch, p.recipe.pairs, p.loss, micro=p.recipe.batch.micro)
        p.memory.keep(p.engine.module, result.skipped)
        p.state.step += 1
        p.state.samples_seen += size
        if p.samples is not None:
            p.samples.write(p.state.step, {"samples": batch.keys})
        self.finite.note(p.state.step, batch.keys, result.skipped)
        self.log.note(result.loss, p.loader.last_wait_s)
        p.tracker.advance(p.state.step)
        ends = p.state.step == p.span.stop
        return Moment(p.state.step, p.state.step == p.total_steps, result, ends_phase=ends)

    def _reads(self, now: Moment) -> bool:
        """Whether something after this step reads the device anyway."""
        reads = self.log.by_step(now) or self.save.by_step(now) or self.guard.due(now) or self.evaluate.due(now)
        return reads or now.ends_phase

    def close(self) -> None:
        """Let a checkpoint that is being written end; stop the workers and close the files."""
        try:
            self.save.end()
        finally:
            self.parts.close()


def train(
    recipe: Recipe,
    evaluation: Evaluation | None = None,
    guard: Evaluation | None = None,
    profile: int | None = None,
) -> Path:
    """Train ``recipe`` on this rank (all ranks of a launcher call it alike); return the run folder.

    ``guard`` evaluates the tasks of ``eval.guard``; ``profile``: of how many steps a profile is written.
    """
    run_dir = run_folder(recipe)
    stop = StopFlag()
    with stop.listening():
        world = init_world(recipe.engine.device, recipe.engine.timeout_s, recipe.engine.threads)
        clean = False
        try:
            with naming_missing_ranks(world):
                _train(recipe, run_dir, world, evaluation, guard, stop, profile)
            clean = True
        finally:
            close_world(world, clean=clean)
    return run_dir


def _train(
    recipe: Recipe,
    run_dir: Path,
    world: World,
    evaluation: Evaluation | None,
    guard: Evaluation | None,
    stop: StopFlag,
    profile: int | None,
) -> None:
    with _folder(run_dir, world):
        run_phases(recipe, run_dir, world, evaluation, guard, stop, profile)


def run_phases(
    recipe: Recipe,
    run_dir: Path,
    world: World,
    evaluation: Evaluation | None = None,
    guard: Evaluation | None = None,
    stop: StopFlag | None = None,
    profile: int | None = None,
) -> None:
    """Train phase after phase to the end, each built anew from the checkpoint that the one before ends with.

    ``profile`` is of the first phase.
    """
    save: Path | None = None
    while True:
        run = Run(recipe, run_dir, world, evaluation, guard, stop, profile, save)
        profile = None
        _carry_out(run)
        step = run.parts.state.step
        if step >= run.parts.total_steps:
            return
        save = folder_of(run_dir, step)
        del run
        gc.collect()
        if world.device.type == "cuda":
            torch.cuda.empty_cache()


@contextmanager
def _folder(run_dir: Path, world: World) -> Iterator[None]:
    """The run folder, made and locked by rank 0; disk errors become one sentence.

    Raises:
        ConfigError: it cannot be made, or another run uses it.
        RunFolderError: it cannot be written to.
    """
    said: str | None = None
    with ExitStack() as held:
        if world.rank == 0:
            try:
                run_dir.mkdir(parents=True, exist_ok=True)
                held.enter_context(RunLock(run_dir))
                for left in run_dir.glob(".*.tmp"):  # of files that a killed run was writing
                    left.unlink()
            except ConfigError as e:
                said = str(e)
            except (OSError, ValueError) as e:
                said = f"out: the run folder {str(run_dir)!r} cannot be used ({_reason(e)}); choose another: out=FOLDER"
        said = broadcast_object(said, world)
        if said is not None:
            raise ConfigError(said)
        try:
            yield
        except OSError as e:
            if e.errno not in DISK and not isinstance(e, WriteError):
                raise
            raise RunFolderError(
                f"{run_dir} cannot be written to ({_reason(e)}). Its finished checkpoints are intact: free some space "
                "and run the same command to resume from the newest."
            ) from e


def _carry_out(run: Run) -> None:
    recipe, run_dir, world = run.parts.whole, run.parts.run_dir, run.parts.world
    try:
        if world.rank == 0:
            resumed = run.parts.resumed_from is not None
            changed = keep_old_recipe(recipe, run_dir, run.parts.state.step) if resumed else []
            if changed:
                run.parts.tracker.say(f"Changed since the last start: {'; '.join(changed)}.")
            write_atomically(run_dir / "recipe.yaml", dump_yaml(recipe))
            write_atomically(run_dir / "environment.json", json.dumps(environment(world.world_size), indent=1))
        greet(run.parts)
        run.train()
    except RuntimeError as e:
        lost = run.parts.loader.lost_worker(e, run.parts.state.step) if "DataLoader worker" in str(e) else None
        if lost is None:
            raise
        raise lost from e
    finally:
        run.close()


def greet(parts: Parts) -> None:
    """Say what is about to run."""
    r = parts.recipe
    parts.tracker.say(
        f"{r.name}: {parts.parameter_count / 1e6:.2f} M parameters, "
        f"global batch {r.batch.size} on {parts.world.world_size} rank(s), "
        f"{parts.total_steps} steps = {parts.span.total_samples:,} samples, run folder {parts.run_dir}"
    )
    if parts.whole.phases:
        s = parts.span
        parts.tracker.say(f"Phase {s.number} of {len(parts.whole.phases)}: steps {s.start:,} to {s.stop:,}.")
    for line in parts.loader.described:
        parts.tracker.say(f"{line}.")
    for line in parts.loader.how_read:
        parts.tracker.say(f"{line}.")
    if parts.resumed_from is not None:
        done = " (nothing left to train)" if parts.state.step >= parts.total_steps else ""
        parts.tracker.say(f"Resuming from {parts.resumed_from}, step {parts.state.step}{done}.")


def run_folder(recipe: Recipe) -> Path:
    """Where the run lives: ``out`` of the recipe, else runs/NAME under the working folder."""
    return Path(recipe.out) if recipe.out else Path("runs") / recipe.name


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
