"""A run put together from its recipe: every part of it, typed, in the order in which they depend on each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from dualenc.checkpoint import save as ckpt
from dualenc.config import Recipe
from dualenc.data.loader import Loader
from dualenc.data.quarantine import Ledger
from dualenc.distill import Distiller
from dualenc.distributed.world import World
from dualenc.engine import Engine, build_engine
from dualenc.engine.ema import EMA, Average, Trajectory
from dualenc.errors import CheckpointError, did_you_mean
from dualenc.losses import Loss, build_loss, check_loss
from dualenc.model import Bundle, build_bundle, load_model
from dualenc.model.bundle import seeded
from dualenc.train.flops import FlopCount
from dualenc.train.resume import check_data, find_save, fingerprint, refuse_changes
from dualenc.train.tracking import JsonlSink, Tracker, keep_rank_files_until


@dataclass
class Parts:
    """What a run is made of.

    Attributes:
        bundle: the model as it is saved; ``engine`` trains its ``model``.
        loss: the recipe's; with a ``distiller``, wrapped by its objective.
        state: what is saved besides tensors; it moves on with every step.
        average: of the weights, if the recipe keeps one.
        samples: where the ids of every step's samples are written, if the recipe asks for them.
        resumed_from: the checkpoint this run resumes from.
        total_steps: length of the whole run.
        parameter_count: of the whole model, also where a rank holds a part of it.
        sharded: whether every rank writes its own part of a checkpoint.
        flops: operations of a step, counted on the first batch.
    """

    recipe: Recipe
    run_dir: Path
    world: World
    bundle: Bundle
    distiller: Distiller | None
    state: ckpt.TrainState
    engine: Engine
    loss: Loss
    loader: Loader
    average: Average | None
    ledger: Ledger
    tracker: Tracker
    samples: JsonlSink | None
    resumed_from: Path | None
    total_steps: int
    parameter_count: int
    sharded: bool
    flops: FlopCount

    def close(self) -> None:
        """Stop the workers and close the files."""
        self.tracker.close()
        self.loader.close()
        if self.samples is not None:
            self.samples.close()


def build(recipe: Recipe, run_dir: Path, world: World) -> Parts:
    """Build a run that starts from scratch or resumes from its checkpoint. All ranks call it alike.

    Raises:
        ConfigError, DataError, CheckpointError: the recipe asks for something that does not exist or cannot be built.
    """
    save = find_save(recipe, run_dir, world)
    loss = build_loss(recipe.loss)
    check_loss(loss, recipe.data, recipe.pairs)
    bundle = begin_model(recipe, fresh=save is None)
    add_heads(loss, bundle, recipe.seed)
    distiller = Distiller(recipe, bundle, world.device) if recipe.distill is not None else None
    state = begin_state(recipe, distiller, save)
    counts = [(p.numel(), p.requires_grad) for p in bundle.model.parameters()]  # before ZeRO 3 empties them
    size = sum(n for n, _ in counts)
    sharded = ckpt.is_sharded(recipe, size, sum(n for n, trained in counts if trained), world.world_size)
    flops = FlopCount(bundle.model)
    engine = build_engine(recipe.engine, recipe.optim, bundle.model, world)
    if save is not None:  # after the engine has cut the model: a rank reads its own part
        engine.load_model_state(ckpt.trained_weights(save))
        engine.load_optimizer_state(ckpt.optimizer_state(save), state.optimizer)
    if distiller is not None:
        loss = distiller.loss(loss)
        if save is not None:
            distiller.load_state_dict(load_file(str(save / "teachers.safetensors")))
    loader = build_loader(recipe, bundle, world, distiller, state.step, pin_memory=engine.device.type == "cuda")
    check_data(state, loader.plan.digest(), save)
    total = total_steps(recipe, loader.plan.samples_per_pass)
    loader.stop_step = total
    average = build_average(recipe, engine, state.samples_seen, total, save)
    ledger = Ledger(run_dir, recipe.data.max_bad_share, world.rank, [s.name for s in recipe.data.sources])
    ledger.load_state_dict(state.ledger)
    tracker = Tracker(run_dir, recipe, state.step, total, world.rank == 0)
    keep_rank_files_until(run_dir, state.step, world.rank, world.world_size)
    ids = run_dir / f"samples-rank{world.rank}.jsonl"
    return Parts(
        recipe=recipe,
        run_dir=run_dir,
        world=world,
        bundle=bundle,
        distiller=distiller,
        state=state,
        engine=engine,
        loss=loss,
        loader=loader,
        average=average,
        ledger=ledger,
        tracker=tracker,
        samples=JsonlSink(ids, state.step) if recipe.tracking.sample_ids else None,
        resumed_from=save,
        total_steps=total,
        parameter_count=size,
        sharded=sharded and not bundle.model.adapters,  # rank 0 merges adapters, from whole tensors
        flops=flops,
    )


# --- the model and its first weights -----------------------------------------------------------------------------


def begin_model(recipe: Recipe, fresh: bool) -> Bundle:
    """The model; ``fresh``: with the weights the recipe starts from; else a checkpoint's weights are loaded later."""
    bundle = build_bundle(recipe)
    if fresh and recipe.checkpoint.init_from:
        init_weights(bundle, recipe.checkpoint.init_from)
    if fresh:
        init_towers(bundle, recipe)
    for m, part in recipe.modalities.items():
        if part.lora is not None and part.shares is None:
            with seeded(recipe.seed, m, "lora"):
                bundle.model.add_adapters(m, part.lora)
    return bundle


def add_heads(loss: Loss, bundle: Bundle, seed: int) -> None:
    """Put what the loss trains besides the towers into the model, with the same weights for the same seed."""
    with seeded(seed, "loss", "heads"):
        for group, head in loss.heads(bundle.embed_dim, bundle.model.modalities).items():
            bundle.model.add_head(group, head)
        if loss.hidden:
            rows = {m: x.collate([x.dummy(), x.dummy()]) for m, x in bundle.inputs.items()}
            bundle.model.keep_hidden(loss.hidden, bundle.embed_dim, rows)


def init_weights(bundle: Bundle, spec: str) -> None:
    """Load the weights of another model; an error names the first tensor that does not fit."""
    source = load_model(spec).model.state_dict()
    own = bundle.model.state_dict()
    _check(own, source, "checkpoint.init_from", spec)
    bundle.model.load_state_dict({k: source[k] for k in own})


def init_towers(bundle: Bundle, recipe: Recipe) -> None:
    """Load single towers, as ``modalities.NAME.init_from: MODEL#MODALITY`` says.

    Raises:
        CheckpointError: the model has no such modality, or its tower is another architecture.
    """
    for m, part in recipe.modalities.items():
        if part.init_from is None or part.shares is not None:
            continue
        where = f"modalities.{m}.init_from"
        spec, _, name = part.init_from.partition("#")
        other = load_model(spec)
        name = name or m
        if name not in other.modalities:
            raise CheckpointError(
                f"{where}: {spec} has no modality {name!r}. {did_you_mean(name, other.modalities)} Write {spec}#NAME."
            )
        source, own = other.model.tower(name).state_dict(), bundle.model.tower(m).state_dict()
        _check(own, source, where, part.init_from)
        bundle.model.tower(m).load_state_dict({k: source[k] for k in own})


def _check(own: Mapping[str, Tensor], source: Mapping[str, Tensor], where: str, spec: str) -> None:
    for name, tensor in own.items():
        if name not in source:
            raise CheckpointError(f"{where}: {spec} has no tensor {name}; its architecture differs")
        if source[name].shape != tensor.shape:
            raise CheckpointError(
                f"{where}: {name} has shape {list(source[name].shape)} in {spec}, {list(tensor.shape)} in this recipe"
            )


# --- the other parts ---------------------------------------------------------------------------------------------


def begin_state(recipe: Recipe, distiller: Distiller | None, save: Path | None) -> ckpt.TrainState:
    """The state of a new run, or that of a checkpoint, which must belong to the same run."""
    now = fingerprint(recipe)
    if distiller is not None:
        now["teachers"] = distiller.describe()
    if save is None:
        return ckpt.TrainState(fingerprint=now)
    state = ckpt.load_state(save)
    refuse_changes(state.fingerprint, now, save)
    state.fingerprint = now
    return state


def build_loader(
    recipe: Recipe, bundle: Bundle, world: World, distiller: Distiller | None, start_step: int, pin_memory: bool
) -> Loader:
    """This rank's batches, with what the teachers ask for."""
    loader = Loader(
        recipe.data,
        bundle.inputs,
        recipe.pairs,
        seed=recipe.seed,
        batch_size=recipe.batch.size,
        rank=world.rank,
        world=world.world_size,
        start_step=start_step,
        pin_memory=pin_memory,
        views=distiller.views if distiller else None,
        redraw=distiller.redraw if distiller else None,
    )
    if distiller is not None:
        distiller.covers(loader.sets)
    return loader


def build_average(recipe: Recipe, engine: Engine, seen: int, total_steps: int, save: Path | None) -> Average | None:
    """The weight average that the recipe keeps, if any."""
    optim, size = recipe.optim, recipe.batch.size
    average: Average
    if optim.trajectory is not None:
        t = optim.trajectory
        average = Trajectory(engine.module, t.mean, t.std, total_steps * size, seen, size)
    elif optim.ema_samples is not None:
        average = EMA(engine.module, optim.ema_samples)
    else:
        return None
    if save is not None and ckpt.has_average(save):
        average.load_state_dict(ckpt.average_weights(save))
    return average


def total_steps(recipe: Recipe, samples_per_pass: int) -> int:
    """Length of the run in steps of the global batch; samples are rounded down to whole steps (at least 1)."""
    budget = recipe.budget
    if budget.steps is not None:
        return budget.steps
    samples = budget.samples if budget.samples is not None else int((budget.passes or 0) * samples_per_pass)
    return max(samples // recipe.batch.size, 1)
