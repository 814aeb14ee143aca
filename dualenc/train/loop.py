"""The run: build, resume, step, save, evaluate, stop cleanly.

The clock is samples seen. Everything random is a function of (seed, step, rank) or (seed, sample id, pass), so a
resumed run needs no loader state and no RNG state: it sets the step and goes on with the samples it would have read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from dualenc.checkpoint import save as ckpt
from dualenc.config import Recipe, dump_yaml
from dualenc.data.batch import Batch
from dualenc.data.loader import Loader
from dualenc.data.quarantine import Ledger
from dualenc.distill import Distiller
from dualenc.distributed.failure import naming_missing_ranks
from dualenc.distributed.world import World, all_reduce_sum, barrier, close_world, init_world
from dualenc.encoders.dual_encoder import heads_of, is_head
from dualenc.engine import Engine, build_engine, lr_factor
from dualenc.engine.ema import EMA, Average, Trajectory
from dualenc.errors import CheckpointError, DivergenceError, Interrupted
from dualenc.losses import Loss, build_loss
from dualenc.model import Bundle, Embedder, build_bundle
from dualenc.model.bundle import seeded
from dualenc.train.guard import Watch
from dualenc.train.start import init_towers, init_weights
from dualenc.train.step import StepResult, train_step
from dualenc.train.stop import StopFlag
from dualenc.train.tracking import JsonlSink, Tracker, environment, git_hash, keep_rank_files_until

logger = logging.getLogger(__name__)

HEADLINE = ("_R@1", "_R@10", "top1")
"""Endings of the metrics that are worth a line on the terminal; all of them go to metrics.jsonl."""

Evaluate = Callable[[Embedder, World], Mapping[str, float]]
"""Given a way to embed and the world, all ranks together: task/metric → value."""


@dataclass
class Meter:
    """Sums over the steps since the last log line."""

    steps: int = 0
    loss: float = 0.0
    seconds: float = 0.0
    wait: float = 0.0

    def add(self, loss: float, seconds: float, wait: float) -> None:
        self.steps += 1
        self.loss += loss
        self.seconds += seconds
        self.wait += wait


class Run:
    """One training run on one rank; all ranks call the same methods in the same order."""

    def __init__(
        self, recipe: Recipe, run_dir: Path, world: World, evaluate: Evaluate | None, guard: Evaluate | None = None
    ) -> None:
        self.recipe, self.run_dir, self.world, self.evaluate = recipe, run_dir, world, evaluate
        self.watch_with = guard
        self.stop = StopFlag()
        self.bundle: Bundle = build_bundle(recipe)
        save = self._find_save()
        if save is None and recipe.checkpoint.init_from:
            init_weights(self.bundle, recipe.checkpoint.init_from)
        if save is None:
            init_towers(self.bundle, recipe)
        for m, part in recipe.modalities.items():
            if part.lora is not None and part.shares is None:
                with seeded(recipe.seed, m, "lora"):
                    self.bundle.model.add_adapters(m, part.lora)
        self.distiller = Distiller(recipe, self.bundle, world.device) if recipe.distill is not None else None
        self.state = ckpt.TrainState(fingerprint=fingerprint(recipe))
        if self.distiller is not None:
            self.state.fingerprint["teachers"] = self.distiller.describe()
        if save is not None:
            saved = ckpt.load_state(save)
            refuse_changes(saved.fingerprint, self.state.fingerprint, save)
            saved.fingerprint = self.state.fingerprint
            self.state = saved
        parameters = list(self.bundle.model.parameters())
        self.parameter_count = sum(p.numel() for p in parameters)  # ZeRO 3 empties them
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        self.sharded = ckpt.is_sharded(recipe, self.parameter_count, trained, world.world_size)
        self.sharded = self.sharded and not self.bundle.model.adapters  # rank 0 merges them, from whole tensors
        self.engine: Engine = build_engine(recipe.engine, recipe.optim, self.bundle.model, world)
        if save is not None:  # after the engine has cut the model: a rank reads its own part
            self.engine.load_model_state(ckpt.trained_weights(save))
            self.engine.load_optimizer_state(ckpt.optimizer_state(save), self.state.optimizer)
        self.loss: Loss = build_loss(recipe.loss)
        if self.distiller is not None:
            self.loss = self.distiller.loss(self.loss)
            if save is not None:
                self.distiller.load_state_dict(load_file(str(save / "teachers.safetensors")))
        self.loader = Loader(
            recipe.data,
            self.bundle.inputs,
            recipe.pairs,
            seed=recipe.seed,
            batch_size=recipe.batch.size,
            rank=world.rank,
            world=world.world_size,
            start_step=self.state.step,
            pin_memory=self.engine.device.type == "cuda",
            views=self.distiller.views if self.distiller else None,
            redraw=self.distiller.redraw if self.distiller else None,
        )
        if self.distiller is not None:
            self.distiller.covers(self.loader.sets)
        check_data(self.state, self.loader.plan.digest(), save)
        self.total_steps = total_steps(recipe, self.loader.plan.samples_per_pass)
        self.loader.stop_step = self.total_steps
        self.ema = self._build_ema(save)
        names = [s.name for s in recipe.data.sources]
        self.ledger = Ledger(run_dir, recipe.data.max_bad_share, world.rank, names)
        self.ledger.load_state_dict(self.state.ledger)
        self.tracker = Tracker(run_dir, recipe, self.state.step, self.total_steps, world.rank == 0)
        keep_rank_files_until(run_dir, self.state.step, world.rank, world.world_size)
        self.samples: JsonlSink | None = None
        if recipe.tracking.sample_ids:
            self.samples = JsonlSink(run_dir / f"samples-rank{world.rank}.jsonl", self.state.step)
        conf = recipe.eval.guard
        self.watch = Watch(conf, self.state.guard) if conf is not None and guard is not None else None
        self.resumed_from = save
        self._last_save = time.monotonic()

    # --- the loop ---------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Train to the end of the budget.

        Raises:
            Interrupted: after SIGTERM or Ctrl-C, once the run is saved.
            DivergenceError: after ``engine.max_nonfinite`` non-finite steps in a row.
            DataError: when a source lost more than ``data.max_bad_share`` of its samples.
            GuardError: when the zero-shot of ``eval.guard`` fell too far, once the run is saved.
        """
        if self.recipe.eval.at_start and self.state.step == 0:
            self._evaluate()
        if self.watch is not None and self.watch.before_going_on and self._guard():
            self.watch.refuse(ckpt.folder_of(self.run_dir, self.state.step))
        meter, in_a_row, clock = Meter(), 0, time.perf_counter()
        for batch in self.loader:
            result = self._step(batch)
            in_a_row = self._count_nonfinite(result, batch, in_a_row)
            now = time.perf_counter()
            meter.add(result.loss, now - clock, self.loader.last_wait_s)
            clock = now
            stopping, due = self._agree(self.stop.raised, self._save_is_due())
            last = self.state.step == self.total_steps
            if self.state.step % self.recipe.tracking.log_every == 0 or last or stopping:
                self._log(result, meter)
                meter = Meter()
            self.tracker.advance(self.state.step)
            guarding = self.watch is not None and self.watch.due(self.state.step, last)
            fallen = guarding and self._guard()
            saving = due or last or stopping or fallen
            if saving:
                self._save()
            if stopping and not last:
                raise Interrupted(self._how_to_go_on())
            every = self.recipe.eval.every_steps
            evaluating = last or bool(every and self.state.step % every == 0)
            if evaluating:
                self._evaluate()
            if fallen and self.watch is not None:
                self.watch.refuse(ckpt.folder_of(self.run_dir, self.state.step))
            if saving or evaluating or guarding:
                clock = time.perf_counter()  # none of them is part of the next step's time

    def _step(self, batch: Batch) -> StepResult:
        if batch.step != self.state.step:
            raise RuntimeError(f"the loader gave step {batch.step}, the run is at {self.state.step}")
        # Dropout and patch dropout draw from here: resuming needs no RNG state. Ranks must differ.
        torch.manual_seed(derive_seed(self.recipe.seed, self.state.step, self.world.rank))
        self.ledger.add(batch)
        self.engine.set_lr_factor(
            lr_factor(self.state.samples_seen, self.total_steps * self.recipe.batch.size, self.recipe.schedule)
        )
        batch = batch.to(self.engine.device)
        if self.distiller is not None:
            batch = self.distiller.prepare(batch, self.engine.module, self.loss)
        result = train_step(self.engine, batch, self.recipe.pairs, self.loss, micro=self.recipe.batch.micro)
        self.state.step += 1
        self.state.samples_seen += self.recipe.batch.size
        if self.samples is not None:
            self.samples.write(self.state.step, {"samples": batch.keys})
        if self.ema is not None:
            self.ema.update(self.engine.module, self.recipe.batch.size, result.skipped)
        return result

    def _count_nonfinite(self, result: StepResult, batch: Batch, in_a_row: int) -> int:
        """A skipped step is one decision of all ranks (train_step made it); its samples are written down."""
        if not result.skipped:
            return 0
        self.state.nonfinite_steps += 1
        with (self.run_dir / f"nonfinite-rank{self.world.rank}.jsonl").open("a", encoding="utf-8") as f:
            f.write(json.dumps({"step": self.state.step, "samples": batch.keys}) + "\n")
        self.tracker.say(
            f"Step {self.state.step}: loss or gradient is not finite; skipped on all ranks, samples noted."
        )
        if in_a_row + 1 >= self.recipe.engine.max_nonfinite:
            raise DivergenceError(
                f"{in_a_row + 1} non-finite steps in a row (engine.max_nonfinite). Lower optim.lr, or use "
                f"engine.precision fp32; the samples of these steps are in {self.run_dir}/nonfinite-rank*.jsonl."
            )
        return in_a_row + 1

    def _agree(self, *flags: bool) -> list[bool]:
        """Flags true on any rank are true on all: signals reach ranks at different steps."""
        total = all_reduce_sum(torch.tensor([float(f) for f in flags]), self.world)
        return [bool(v > 0) for v in total.tolist()]

    def _log(self, result: StepResult, meter: Meter) -> None:
        counts = self.ledger.sum_over_ranks(self.world)
        self.ledger.check(counts, final=self.state.step == self.total_steps)
        if meter.steps == 0:
            return
        values = {
            "samples_seen": self.state.samples_seen,
            "loss": meter.loss / meter.steps,
            "lr": self.engine.lr,
            "samples_per_s": meter.steps * self.recipe.batch.size / max(meter.seconds, 1e-9),
            "data_wait_share": meter.wait / max(meter.seconds, 1e-9),
            "grad_norm": result.grad_norm,
            **result.metrics,
            **{f"lost/{source}": bad for source, (_, bad) in counts.items() if bad},
        }
        self.tracker.log(self.state.step, values)

    # --- saving -----------------------------------------------------------------------------------------------

    def _find_save(self) -> Path | None:
        resume = self.recipe.checkpoint.resume
        if resume == "none":
            return None
        if resume == "auto":
            return ckpt.newest_good(self.run_dir, self.world)
        path = Path(resume)
        if not path.is_dir():
            raise CheckpointError(
                f"checkpoint.resume: there is no folder {resume}; write auto, none, or a save's folder"
            )
        if not (path / "checkpoints").is_dir():
            ckpt.refuse_damaged(path, self.world)
            return path
        save = ckpt.newest_good(path, self.world)
        if save is None:
            raise CheckpointError(f"checkpoint.resume: {resume} holds no finished save")
        return save

    def _build_ema(self, save: Path | None) -> Average | None:
        optim, size = self.recipe.optim, self.recipe.batch.size
        ema: Average
        if optim.trajectory is not None:
            t, seen = optim.trajectory, self.state.samples_seen
            ema = Trajectory(self.engine.module, t.mean, t.std, self.total_steps * size, seen, size)
        elif optim.ema_samples is not None:
            ema = EMA(self.engine.module, optim.ema_samples)
        else:
            return None
        if save is not None and ckpt.has_average(save):
            ema.load_state_dict(ckpt.average_weights(save))
        return ema

    def _save_is_due(self) -> bool:
        conf = self.recipe.checkpoint
        by_step = conf.every_steps is not None and self.state.step % conf.every_steps == 0
        minutes = (time.monotonic() - self._last_save) / 60
        return by_step or (conf.every_minutes is not None and minutes >= conf.every_minutes)

    def _save(self) -> None:
        """All ranks take part: rank 0 writes what it collected, or every rank what it holds."""
        self._last_save = time.monotonic()
        self.state.ledger = self.ledger.state_dict(self.world)
        (self._save_sharded if self.sharded else self._save_whole)()
        if self.world.rank == 0:
            ckpt.prune(self.run_dir, self.recipe.checkpoint.keep)
        barrier(self.world)

    def _save_whole(self) -> None:
        weights = self.engine.model_state()
        optimizer, self.state.optimizer = self.engine.optimizer_state()
        average = self.ema.state_dict() if self.ema else None
        with ckpt.Saver(self.run_dir, self.state.step, self.world) as saver:
            if self.world.rank == 0:
                if average is not None or heads_of(weights) or self.bundle.model.adapters:
                    saver.tensors("weights.safetensors", weights)
                saver.tensors("optimizer.safetensors", optimizer)
                self._save_rest(saver, state=weights if average is None else average)

    def _save_sharded(self) -> None:
        rank, world_size = self.world.rank, self.world.world_size
        optimizer, self.state.optimizer = self.engine.optimizer_pieces()
        with ckpt.Saver(self.run_dir, self.state.step, self.world) as saver:
            weights = self.engine.model_pieces()
            average = weights if self.ema is None else self.ema.pieces(rank, world_size)
            if self.ema is not None or len(self.bundle.model.heads):
                saver.pieces("weights", weights)
            saver.pieces("model/model", [p for p in average if not is_head(p.name)])
            saver.pieces("optimizer", optimizer)
            files = {Path(name).name: digest for name, (_, digest) in saver.written().items() if "/" in name}
            if rank == 0:
                self._save_rest(saver, pieces=files)

    def _save_rest(self, saver: ckpt.Saver, **weights: Any) -> None:
        """What rank 0 writes besides the optimizer's tensors; ``weights``: as ``Bundle.save`` takes them."""
        provenance = {"step": self.state.step, "samples_seen": self.state.samples_seen, "git": git_hash()}
        self.bundle.save(saver.folder / "model", provenance=provenance, **weights)
        if self.distiller is not None:
            saver.tensors("teachers.safetensors", self.distiller.state_dict())
        saver.state(self.state)
        (saver.folder / "recipe.yaml").write_text(dump_yaml(self.recipe), encoding="utf-8")

    def _how_to_go_on(self) -> str:
        return (
            f"Stopped by {self.stop.name} and saved at step {self.state.step} of {self.total_steps} in "
            f"{ckpt.folder_of(self.run_dir, self.state.step)}. The same command goes on from there."
        )

    def _guard(self) -> bool:
        """Compare with the beginning; whether the run is to stop for it, the same on all ranks."""
        assert self.watch is not None
        assert self.watch_with is not None
        self._write("guard", self.watch.check(self._measure(self.watch_with), self.state.step))
        stop, said = self.watch.conf.action == "stop", self.watch.sentence
        if said is not None and not stop:
            self.tracker.say(f"eval.guard: {said}.")
        return self._agree(stop and said is not None)[0]

    def _measure(self, evaluate: Evaluate) -> Mapping[str, float]:
        self.engine.eval()
        try:
            embedder = Embedder.from_bundle(self.bundle, forward=self.engine.forward, device=self.engine.device)
            with torch.no_grad():
                return evaluate(embedder, self.world)
        finally:
            self.engine.train()

    def _write(self, what: str, values: Mapping[str, float]) -> None:
        rows = {f"{what}/{k}": v for k, v in values.items()}
        self.tracker.log(self.state.step, {"samples_seen": self.state.samples_seen} | rows)

    def _evaluate(self) -> None:
        if self.evaluate is None:
            return
        values = self._measure(self.evaluate)
        self._write("eval", values)
        for task in dict.fromkeys(k.split("/")[0] for k in values):
            own = {k.split("/")[1]: v for k, v in values.items() if k.startswith(f"{task}/")}
            shown = [f"{k.replace('_', ' ')} {100 * v:.1f}" for k, v in own.items() if k.endswith(HEADLINE)]
            self.tracker.say(f"step {self.state.step}  {task}: {', '.join(shown)} %")

    def close(self) -> None:
        self.tracker.close()
        self.loader.close()
        if self.samples is not None:
            self.samples.close()


def train(recipe: Recipe, evaluate: Evaluate | None = None, guard: Evaluate | None = None) -> Path:
    """Train ``recipe`` on this rank (all ranks of a launcher call it alike); return the run folder.

    ``guard`` evaluates the tasks of ``eval.guard``.
    """
    run_dir = run_folder(recipe)
    world = init_world(recipe.engine.device, recipe.engine.timeout_s, recipe.engine.threads)
    clean = False
    try:
        with naming_missing_ranks(world):
            if world.rank == 0:
                run_dir.mkdir(parents=True, exist_ok=True)
            barrier(world)
            run = Run(recipe, run_dir, world, evaluate, guard)
            if world.rank == 0:
                (run_dir / "recipe.yaml").write_text(dump_yaml(recipe), encoding="utf-8")
                info = json.dumps(environment(world.world_size), indent=1)
                (run_dir / "environment.json").write_text(info, encoding="utf-8")
            greet(run)
            try:
                with run.stop.listening():
                    run.train()
            except RuntimeError as e:
                lost = run.loader.lost_worker(e, run.state.step) if "DataLoader worker" in str(e) else None
                if lost is None:
                    raise
                raise lost from e
            finally:
                run.close()
        clean = True
    finally:
        close_world(world, clean=clean)
    return run_dir


def greet(run: Run) -> None:
    """The lines that say what is about to happen."""
    r = run.recipe
    run.tracker.say(
        f"{r.name}: {run.parameter_count / 1e6:.2f} M parameters, "
        f"global batch {r.batch.size} on {run.world.world_size} rank(s), "
        f"{run.total_steps} steps = {run.total_steps * r.batch.size:,} samples, in {run.run_dir}"
    )
    if run.resumed_from is not None:
        done = " (nothing left to train)" if run.state.step >= run.total_steps else ""
        run.tracker.say(f"Going on from {run.resumed_from}, step {run.state.step}{done}.")


def run_folder(recipe: Recipe) -> Path:
    """Where the run lives: ``out`` of the recipe, else runs/NAME under the working folder."""
    return Path(recipe.out) if recipe.out else Path("runs") / recipe.name


def total_steps(recipe: Recipe, samples_per_pass: int) -> int:
    """Length of the run in steps of the global batch; samples are rounded down to whole steps (at least 1)."""
    budget = recipe.budget
    if budget.steps is not None:
        return budget.steps
    samples = budget.samples if budget.samples is not None else int((budget.passes or 0) * samples_per_pass)
    return max(samples // recipe.batch.size, 1)


def derive_seed(*parts: int) -> int:
    """A 63-bit seed from integers: blake2b of their decimal text, so the same on every machine."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


# --- resuming ----------------------------------------------------------------------------------------------------


def fingerprint(recipe: Recipe) -> dict[str, Any]:
    """What must stay the same for a resumed run to be the run that was saved."""
    full = recipe.model_dump(mode="json")
    data = {k: full["data"][k] for k in ("sampling", "lanes", "window")}
    sources = [{k: s[k] for k in ("name", "weight", "members")} for s in full["data"]["sources"]]
    keys = ("seed", "modalities", "pairs", "embed_dim", "loss")
    distill = full["distill"]
    if distill is not None:  # where a teacher lies may change; what it is, is compared by its hash
        where = ("model", "cache", "precision", "max_missing")
        distill["teachers"] = [{k: v for k, v in t.items() if k not in where} for t in distill["teachers"]]
    return {k: full[k] for k in keys} | {
        "data": data | {"sources": sources},
        "distill": distill,
        "batch.size": full["batch"]["size"],
        "optim.name": full["optim"]["name"],
    }


def refuse_changes(saved: Mapping[str, Any], now: Mapping[str, Any], save: Path) -> None:
    """Raise CheckpointError naming the first field that differs: a silent change would make another run of it."""
    for key, value in json.loads(json.dumps(dict(now))).items():
        if saved.get(key) != value:
            where, old, new = first_difference(key, saved.get(key), value)
            raise CheckpointError(
                f"{save} was written with {where} = {old!r}, the recipe now says {new!r}. Change it back, or start "
                "anew: checkpoint.resume=none, or checkpoint.init_from=SAVE to take over the weights only."
            )


def check_data(state: ckpt.TrainState, digest: str, save: Path | None) -> None:
    """Remember what data the run reads; refuse to resume on other counts of samples: it would be another order."""
    saved = state.data.setdefault("plan", digest)
    if saved != digest:
        raise CheckpointError(
            f"{save} was written on other data: names, weights or sample counts of the shards differ. Give the run the "
            "shards it began with, or start anew: checkpoint.init_from=SAVE takes over the weights only."
        )


def first_difference(key: str, old: Any, new: Any) -> tuple[str, Any, Any]:
    """The dotted key where two nested values first differ, and both values there."""
    if isinstance(old, dict) and isinstance(new, dict):
        for k in [*new, *(k for k in old if k not in new)]:
            if old.get(k) != new.get(k):
                return first_difference(f"{key}.{k}", old.get(k), new.get(k))
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (a, b) in enumerate(zip(old, new, strict=True)):
            if a != b:
                return first_difference(f"{key}.{i}", a, b)
    return key, old, new
