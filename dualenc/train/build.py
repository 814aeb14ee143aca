"""A run put together from its recipe: every part of it, typed, in the order in which they depend on each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from dualenc.checkpoint import save as ckpt
from dualenc.checkpoint.ranges import Stored
from dualenc.config import Recipe
from dualenc.data.batches import prepare
from dualenc.data.loader import Loader
from dualenc.data.modalities import ModalityInput
from dualenc.data.modalities.modality import FewShapes
from dualenc.data.modalities.text import TextInput
from dualenc.data.quarantine import Ledger
from dualenc.distill import Distiller
from dualenc.distributed.world import World, agree, all_gather_object
from dualenc.encoders import unused_parameters
from dualenc.encoders.caption_head import Captioning, Vocabulary
from dualenc.encoders.dual_encoder import DualEncoder
from dualenc.encoders.trainable.prompts import is_prompt
from dualenc.engine import Engine, build_engine, lr_factor
from dualenc.engine.ema import EMA, Average, Trajectory
from dualenc.errors import CheckpointError, ConfigError, DataError, did_you_mean
from dualenc.losses import Loss, build_loss, check_loss
from dualenc.memory import RunShape
from dualenc.model import Bundle, build_bundle, load_model
from dualenc.model.bundle import seeded
from dualenc.model.carry import Carried, Kept
from dualenc.model.mixing import two_rows
from dualenc.train.flops import FlopCount
from dualenc.train.memory import Memory, goes_on, slow_models, view_learners
from dualenc.train.phases import Span, refuse_newcomers, span_at, spans_on
from dualenc.train.resume import check_data, find_save, fingerprint, refuse_changes
from dualenc.train.tracking import JsonlSink, Tracker, keep_rank_files_until


@dataclass
class Parts:
    """What a run is made of.

    Attributes:
        bundle: the model as it is saved; ``engine`` trains its ``model``.
        loss: the recipe's; with a ``distiller``, wrapped by its objective.
        memory: what the recipe's loss remembers.
        state: what is saved besides tensors; it moves on with every step.
        average: of the weights, if the recipe keeps one.
        samples: where the ids of every step's samples are written, if the recipe asks for them.
        resumed_from: the checkpoint this run resumes from.
        total_steps: length of the whole run.
        span: the phase of the run that these parts are for; ``recipe`` is its recipe, ``whole`` that of the run.
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
    memory: Memory
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
    span: Span
    whole: Recipe

    @property
    def lr_factor(self) -> float:
        """The factor on every base learning rate for the next step."""
        start, stop = self.span.rates
        return lr_factor(self.state.samples_seen - start, stop - start, self.recipe.schedule)

    def close(self) -> None:
        """Stop the workers and close the files."""
        self.tracker.close()
        self.loader.close()
        if self.samples is not None:
            self.samples.close()


def build(whole: Recipe, run_dir: Path, world: World, save: Path | None = None) -> Parts:
    """Build a run that starts from scratch or resumes from its checkpoint. All ranks call it alike.

    Args:
        whole: the recipe of the run; of its phases the one that the checkpoint leads to is built.
        save: the checkpoint to resume from; None: what the recipe says.

    Raises:
        ConfigError, DataError, CheckpointError: the recipe asks for something that does not exist or cannot be built.
    """
    save = find_save(whole, run_dir, world) if save is None else save
    spans = spans_on(whole, world.world_size)
    step = 0 if save is None else ckpt.load_state(save).step
    span = span_at(spans, step) if spans is not None else None
    recipe = whole if span is None else span.recipe
    crossing = span is not None and span.number > 0 and span.start == step
    loss = build_loss(recipe.loss)
    check_loss(loss, recipe.data, recipe.pairs)
    bundle = begin_model(recipe, fresh=save is None)
    add_heads(loss, bundle, recipe.seed)
    distiller = Distiller(recipe, bundle, world.device) if recipe.distill is not None else None
    state = begin_state(whole, distiller, save, spans)
    counts = [(p.numel(), p.requires_grad) for p in bundle.model.parameters()]  # before ZeRO 3 empties them
    size = sum(n for n, _ in counts)
    sharded = ckpt.is_sharded(recipe, size, sum(n for n, trained in counts if trained), world.world_size)
    flops = FlopCount(bundle.model)
    saved = None if save is None else saved_of(save, state, bundle.model, recipe, span if crossing else None)
    slow = slow_models(loss, bundle.model, world.device)
    views = view_learners(loss, bundle, world.device, recipe.seed)
    pad_for_compile(recipe, bundle)
    engine = build_engine(recipe.engine, recipe.optim, bundle.model, world, may_be_unused(recipe, bundle, world))
    if saved is not None:  # after the engine has cut the model: a rank reads its own part
        engine.load_model_state(saved.weights)
        engine.load_optimizer_state(saved.optimizer, saved.scalars)
    own_loss = loss
    if distiller is not None:
        loss = distiller.loss(loss)
        if save is not None:
            distiller.load_state_dict(load_file(str(save / "teachers.safetensors")))
    on_gpu = engine.device.type == "cuda"
    loader = build_loader(recipe, bundle, world, distiller, state.step, pin_memory=on_gpu, span=span)
    check_data(state, loader.plan.digest(), save, 0 if span is None else span.data_phase)
    if span is None:
        total = total_steps(recipe, loader.plan.samples_per_pass)
        span = Span.whole(recipe, total)
    total = span.total
    loader.stop_step = span.stop
    samples = sum(n for s in loader.sets for n in s.counts)
    shape = RunShape(bundle.embed_dim, recipe.pairs, samples, world.rank, world.world_size, engine.device)
    memory = Memory(own_loss, slow, shape, recipe.batch.micro, recipe.engine.precision == "bf16", views)
    begin_memory(memory, engine, save, goes_on(spans[span.number - 1].recipe, recipe) if crossing and spans else True)
    average = build_average(recipe, engine, state.samples_seen, total, saved)
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
        memory=memory,
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
        span=span,
        whole=whole,
    )


def begin_memory(memory: Memory, engine: Engine, save: Path | None, continues: bool) -> None:
    """What the loss keeps from step to step: read from the checkpoint, or begun with the weights as they are.

    Args:
        continues: the checkpoint's loss keeps the same things; not so where a phase begins that changes them.
    """
    if memory and save is not None and continues:
        memory.load(ckpt.loss_memory(save))
    else:
        memory.begin(engine.module)


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
        for group, asked in loss.captioning.items():
            rows = {m: two_rows(bundle.inputs[m]) for m in (asked.of, asked.captions)}
            bundle.model.add_caption_head(group, asked, rows, vocabulary_of(bundle.inputs[asked.captions], asked))
        for group, context in loss.in_context.items():
            bundle.model.add_context_head(group, context)
    for m in loss.places_of:
        bundle.model.say_places(m)


def vocabulary_of(source: ModalityInput, asked: Captioning) -> Vocabulary:
    """The tokens of the captions' input.

    Raises:
        ConfigError: it is not text.
    """
    if not isinstance(source, TextInput):
        raise ConfigError(f"loss: caption: modalities.{asked.captions} is not text; name the captions' in captions")
    return Vocabulary(source.vocab_size, None if source.masks_padding else source.eot_id)


def pad_for_compile(recipe: Recipe, bundle: Bundle) -> None:
    """Let inputs give their towers few shapes if these are compiled."""
    for source in bundle.inputs.values():
        if recipe.engine.compile and isinstance(source, FewShapes):
            source.few_shapes(COMPILED_LENGTHS)


def may_be_unused(recipe: Recipe, bundle: Bundle, world: World) -> bool:
    """Whether DDP has to look for parameters without gradient in every step: ``engine.find_unused: auto``."""
    engine = recipe.engine
    if (
        world.world_size == 1
        or engine.kind != "accelerate"
        or engine.parallel == "fsdp2"
        or engine.find_unused != "auto"
    ):
        return False
    # Rows with something in them, and those that stand in for a modality that a rank's batch lacks.
    trials = (
        {m: two_rows(x) for m, x in bundle.inputs.items()},
        {m: x.collate([x.dummy()]) for m, x in bundle.inputs.items()},
    )
    return any(unused_parameters(bundle.model, inputs) for inputs in trials)


def init_weights(bundle: Bundle, spec: str) -> None:
    """Load the weights of another model; an error names the first tensor that does not fit."""
    source = load_model(spec).model.state_dict()
    bundle.model.load_state_dict(_taken(bundle.model.state_dict(), source, "checkpoint.init_from", spec))


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
        bundle.model.tower(m).load_state_dict(_taken(own, source, where, part.init_from))


def _taken(own: Mapping[str, Tensor], source: Mapping[str, Tensor], where: str, spec: str) -> dict[str, Tensor]:
    """The tensors of ``source`` by the names of ``own``; prompts that it does not have stay as they are.

    Raises:
        CheckpointError: a tensor is missing or of another shape, or the source has prompts that would be left out.
    """
    lost = sorted(name for name in source.keys() - own.keys() if is_prompt(name))
    if lost:
        raise CheckpointError(
            f"{where}: {spec} has learned prompts ({lost[0]}), which this recipe leaves out; give the modality the "
            "same prompts and input.prefix"
        )
    out = {}
    for name, tensor in own.items():
        if name not in source and is_prompt(name):
            out[name] = tensor
            continue
        if name not in source:
            raise CheckpointError(f"{where}: {spec} has no tensor {name}; its architecture differs")
        if source[name].shape != tensor.shape:
            raise CheckpointError(
                f"{where}: {name} has shape {list(source[name].shape)} in {spec}, {list(tensor.shape)} in this recipe"
            )
        out[name] = source[name]
    return out


# --- the other parts ---------------------------------------------------------------------------------------------


COMPILED_LENGTHS = 4
"""To how many lengths captions are padded under ``engine.compile``: each new one may be compiled anew."""


@dataclass(frozen=True, slots=True)
class Saved:
    """What a checkpoint gives a run: weights, their average if it has one, optimizer state."""

    weights: Stored
    average: Stored | None
    optimizer: Stored
    scalars: Mapping[str, Any]


def saved_of(save: Path, state: ckpt.TrainState, model: DualEncoder, recipe: Recipe, begins: Span | None) -> Saved:
    """What a checkpoint holds, as it is; or, where the phase ``begins`` with it, as the phase's ``model`` goes on."""
    weights, optimizer = ckpt.trained_weights(save), ckpt.optimizer_state(save)
    average = ckpt.average_weights(save) if ckpt.has_average(save) else None
    if begins is None:
        return Saved(weights, average, optimizer, state.optimizer)
    carried = Carried(weights, model)
    trained = {n: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad}
    trained = {n: s for n, s in trained.items() if n not in carried.fitted}
    kept = Kept(optimizer, trained)
    had = {k.rpartition("/")[0] for k in kept.shapes}
    refuse_newcomers(recipe, begins.number, {n for n, p in model.named_parameters() if p.requires_grad} - had)
    scalars = dict(state.optimizer)
    scalars["scalars"] = {n: v for n, v in scalars.get("scalars", {}).items() if n in trained}
    return Saved(carried, None if average is None else Carried(average, model), kept, scalars)


def begin_state(
    recipe: Recipe, distiller: Distiller | None, save: Path | None, spans: list[Span] | None = None
) -> ckpt.TrainState:
    """The state of a new run, or that of a checkpoint, which must belong to the same run."""
    now = fingerprint(recipe)
    if spans is not None:
        now["phases"] = [{"step": s.start, **fingerprint(s.recipe)} for s in spans[1:]]
    if distiller is not None:
        now["teachers"] = distiller.describe()
    if save is None:
        return ckpt.TrainState(fingerprint=now)
    state = ckpt.load_state(save)
    refuse_changes(state.fingerprint, now, save, state.step)
    state.fingerprint = now
    return state


def build_loader(
    recipe: Recipe,
    bundle: Bundle,
    world: World,
    distiller: Distiller | None,
    start_step: int,
    pin_memory: bool,
    span: Span | None = None,
) -> Loader:
    """This rank's batches, with what the teachers ask for. What a batch plan reads is written by rank 0 first."""
    seed = recipe.seed if span is None else span.data_seed
    if recipe.data.batches is not None:
        first = world.rank == 0
        agree(lambda: prepare(recipe.data, recipe.batch.size, seed) if first else None, world)
    loader = Loader(
        recipe.data,
        bundle.inputs,
        recipe.pairs,
        seed=seed,
        batch_size=recipe.batch.size,
        rank=world.rank,
        world=world.world_size,
        start_step=start_step,
        pin_memory=pin_memory,
        views=distiller.views if distiller else None,
        redraw=distiller.redraw if distiller else None,
        order_from=0 if span is None else span.data_from,
        order_offset=0 if span is None else span.data_offset,
    )
    if recipe.data.batches is not None and len(set(all_gather_object(loader.plan.digest(), world))) > 1:
        raise DataError(
            f"data.batches: the ranks read different files for {recipe.data.batches.name}; copy the shards and the "
            "file of clusters or neighbours from one machine to all"
        )
    if distiller is not None:
        distiller.covers(loader.sets)
    return loader


def build_average(recipe: Recipe, engine: Engine, seen: int, total_steps: int, saved: Saved | None) -> Average | None:
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
    if saved is not None and saved.average is not None:
        average.load_state_dict(saved.average)
    return average


def total_steps(recipe: Recipe, samples_per_pass: int) -> int:
    """Length of the run in steps of the global batch; samples are rounded down to whole steps (at least 1)."""
    budget = recipe.budget
    if budget.steps is not None:
        return budget.steps
    samples = budget.samples if budget.samples is not None else int((budget.passes or 0) * samples_per_pass)
    return max(samples // recipe.batch.size, 1)
