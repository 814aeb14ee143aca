"""The recipe: everything about one run, as typed data.

A recipe is YAML. ``base:`` names a recipe it inherits from; the command line adds dotted overrides; the result is
checked against the models below. Every error names the key, the file it is in, and the nearest valid key.

Parts chosen by name (encoders, losses, a modality's input) carry settings that only their own class can check:
:class:`Component` keeps them, :func:`settings_as` checks them where the part is built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AliasChoices,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from dualenc.config.distill import Distill, with_anchor
from dualenc.config.modality import Modality, streams_of, with_shared
from dualenc.config.phases import Phase, check_kept
from dualenc.config.reading import apply_override, merge, parse, read_yaml
from dualenc.config.section import Component, Positive, Section, Share
from dualenc.config.source import Source
from dualenc.errors import did_you_mean
from dualenc.plugins import import_plugins, named_in
from dualenc.shipped import find_recipe

Decay = Annotated[float, Field(ge=0, lt=1)]


class Data(Section):
    """Where samples come from and how they are ordered and read."""

    sources: list[Source] = Field(min_length=1, description="sets of shards")
    sampling: str | Component = Field(
        default="without_replacement",
        description="without_replacement, with_replacement, or a plugin's plan; {name: …} with its settings",
    )
    batches: Component | None = Field(
        default=None,
        description="which samples meet in a batch: by_source, by_value, clusters, groups, hard_negatives, bags or a "
        "plugin's plan; {name: …} with its settings; default: any",
    )
    lanes: Positive = Field(
        1, description="each epoch is split into this many streams of shards; a rank reads only its own lanes' shards"
    )
    window: Positive | Literal["auto"] = Field(
        default=1_000_000,
        description="samples shuffled together within a lane; auto: as many as keep the remote shards they are in "
        "within the cache (cache_gb), so that whole shards are read",
    )
    workers: Annotated[int, Field(ge=0)] = Field(
        default=2, description="processes per rank that read and decode; 0: the training process does it"
    )
    prefetch: Positive = Field(default=4, description="batches each worker prepares ahead")
    retries: Annotated[int, Field(ge=0)] = Field(
        default=3, description="attempts after a failed read before a shard counts as unreadable"
    )
    connect_s: Annotated[float, Field(gt=0)] = Field(
        default=15.0, description="seconds to wait for a connection to a shard server before retrying"
    )
    idle_s: Annotated[float, Field(gt=0)] = Field(
        default=60.0,
        description="seconds without data from a shard server or pipe: command before retrying; total is not limited",
    )
    allow_pipe: bool = Field(
        default=False, description="run the shell commands of pipe:COMMAND shards; refused by default"
    )
    mix: Share = Field(
        default=0.0,
        description="share of samples mixed with another one of their shard: audio added, captions joined",
    )
    mix_label: str | None = Field(
        default=None,
        description="name in data.sources.N.values: only samples with the same value there are mixed; null: any two",
    )
    max_bad_share: Share = Field(
        default=0.02, description="stop when more than this share of a source's samples is unusable"
    )
    cache_dir: str | None = Field(
        default=None, description="folder for remote shards while they are read; default: a temporary folder"
    )
    cache_gb: Annotated[float, Field(gt=0)] = Field(
        default=50.0, description="GB (10^9 bytes) of remote shards kept in cache_dir"
    )
    stall_s: Annotated[float, Field(gt=0)] = Field(
        120.0, description="after this many seconds, say which batch training waits for"
    )

    @field_validator("batches", mode="before")
    @classmethod
    def _one_plan(cls, raw: Any) -> Any:
        return {"name": raw} if isinstance(raw, str) else raw

    @model_serializer(mode="wrap")
    def _without_what_is_not_used(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Recipes without a batch plan or ``mix_label`` are written, compared and resumed as before there was any."""
        out: dict[str, Any] = write(self)
        unused = {name for name in ("batches", "mix_label") if out[name] is None}
        return {k: v for k, v in out.items() if k not in unused}

    @model_validator(mode="after")
    def _mix_label_is_read(self) -> Data:
        known = sorted({name for source in self.sources for name in source.values})
        if self.mix_label is not None and self.mix_label not in known:
            raise ValueError(
                f"mix_label: no source reads a value {self.mix_label!r}; "
                + (f"its values are {', '.join(known)}" if known else "name it in data.sources.N.values")
            )
        return self


class LogitScale(Section):
    """The temperature: logits = scale · cosine (+ bias)."""

    init: Annotated[float, Field(gt=0)] = Field(
        default=1 / 0.07, description="initial scale, 1 / temperature; SigLIP: 10"
    )
    max: Annotated[float, Field(gt=0)] = Field(default=100.0, description="upper bound, applied in the forward")
    learnable: bool = Field(default=True, description="train the scale; false: it keeps its initial value")
    bias: float | None = Field(default=None, description="initial logit bias (SigLIP: −10); none: no bias")


class Batches(Section):
    """``size`` is the global batch over all ranks; ``micro`` bounds how many samples a rank encodes at once."""

    size: Positive = Field(description="samples per step over all ranks; the same on any number of ranks")
    micro: Positive | None = Field(
        default=None,
        description="samples a rank encodes at once; bounds memory and changes no gradient; default: all of its share",
    )


class TrajectoryAverage(Section):
    """Weights of a run averaged with a Gaussian over its length (PromptSRC); both are shares of the run."""

    mean: Share = Field(default=0.75, description="centre of the Gaussian")
    std: Annotated[float, Field(gt=0)] = Field(default=0.05, description="standard deviation of the Gaussian")


class Optim(Section):
    """AdamW or Muon (matrices inside the towers; everything else AdamW). Gains, biases, scale: no weight decay."""

    name: Literal["adamw", "muon", "sgd"] = Field(default="adamw", description="optimizer of the towers")
    lr: Annotated[float, Field(gt=0)] = Field(default=1e-3, description="peak learning rate")
    betas: tuple[Decay, Decay] = Field(default=(0.9, 0.98), description="AdamW's decay of the first and second moment")
    eps: Annotated[float, Field(gt=0)] = Field(default=1e-6, description="AdamW's ε")
    weight_decay: Annotated[float, Field(ge=0)] = Field(default=0.2, description="decoupled weight decay of matrices")
    momentum: Share = Field(default=0.95, description="momentum of Muon and SGD")
    muon_lr: Annotated[float, Field(gt=0)] = Field(
        default=0.02, description="peak learning rate of the matrices that Muon steps"
    )
    logit_scale_lr: Annotated[float, Field(gt=0)] | None = Field(default=None, description="default: lr")
    clip_grad_norm: Annotated[float, Field(gt=0)] | None = Field(
        default=1.0, description="bound of the gradient's norm over all parameters; null: no clipping"
    )
    ema_samples: Positive | None = Field(
        default=None, description="half-life of an exponential moving average of the weights, in samples"
    )
    trajectory: TrajectoryAverage | None = Field(
        default=None, description="save a Gaussian-weighted average of the run's weights"
    )
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None, description="learning-rate factor per block, from a tower's head down to its embeddings"
    )
    lr_scale: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="modality → learning-rate factor of its tower"
    )
    fused: Literal["auto", True, False] = Field(
        default="auto",
        description="one kernel for the update; auto: on CUDA. On a CPU it is 3 times as fast and rounds differently",
    )

    @model_validator(mode="after")
    def _one_average(self) -> Optim:
        if self.ema_samples is not None and self.trajectory is not None:
            raise ValueError("ema_samples and trajectory: a checkpoint holds one average; leave one of them out")
        return self


class Schedule(Section):
    """Learning rate over samples: warm-up, then the named shape down to ``final`` (a share of the peak)."""

    name: Literal["cosine", "constant", "constant_cooldown", "wsd"] = Field(
        default="cosine", description="shape after the warm-up"
    )
    warmup_samples: Annotated[int, Field(ge=0)] = Field(
        default=0, description="samples over which the rate rises from 0 to its peak"
    )
    cooldown_samples: Annotated[int, Field(ge=0)] = Field(
        default=0, description="samples of the final decay of constant_cooldown and wsd"
    )
    cooldown_shape: Literal["linear", "sqrt", "cosine"] = Field(default="sqrt", description="shape of that decay")
    final: Share = Field(default=0.0, description="rate at the end as a share of the peak")


class Budget(Section):
    """How long to train: exactly one of ``steps``, ``samples``, ``epochs`` (``passes`` is another name for epochs, and
    the one that is written)."""

    steps: Positive | None = Field(default=None, description="optimizer steps")
    samples: Positive | None = Field(default=None, description="samples seen; rounded down to whole steps")
    passes: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        validation_alias=AliasChoices("passes", "epochs"),
        description="epochs: full passes over the data; budget.epochs and budget.passes are the same key",
    )

    @model_validator(mode="before")
    @classmethod
    def _one_name(cls, raw: Any) -> Any:
        if not isinstance(raw, dict) or not {"epochs", "passes"} <= raw.keys():
            return raw
        if raw["epochs"] is not None and raw["passes"] is not None:
            raise ValueError("epochs and passes are two names of one key; give only one of them")
        unused = "epochs" if raw["epochs"] is None else "passes"
        return {k: v for k, v in raw.items() if k != unused}

    @model_validator(mode="after")
    def _one(self) -> Budget:
        if sum(v is not None for v in (self.steps, self.samples, self.passes)) != 1:
            raise ValueError("give exactly one of steps, samples, epochs")
        return self


class EngineConfig(Section):
    """The engine that runs the step. ``kind: deepspeed, zero_stage: 2`` is the only change needed for DeepSpeed."""

    kind: Literal["accelerate", "deepspeed"] = Field(default="accelerate", description="who runs the step")
    parallel: Literal["auto", "ddp", "fsdp2"] = Field(default="auto", description="auto: DDP, or a single process")
    zero_stage: Literal[0, 1, 2, 3] = Field(default=2, description="DeepSpeed's ZeRO stage; 0: DDP by DeepSpeed")
    offload_optimizer: bool = Field(default=False, description="DeepSpeed: optimizer state in host memory")
    offload_params: bool = Field(default=False, description="DeepSpeed, stage 3: parameters in host memory")
    shard_size: Positive | None = Field(
        default=None,
        description="FSDP2: ranks that share a copy of the state, such as those of a machine (HSDP); default: all",
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp32",
        description="bf16, fp16: autocast; weights stay fp32. fp16 scales the loss, for GPUs without bf16",
    )
    gather_dtype: Literal["fp32", "bf16"] = Field(
        default="fp32", description="FSDP2: what a tower's weights are gathered in; the optimizer's stay fp32"
    )
    reduce_dtype: Literal["fp32", "bf16"] = Field(
        default="fp32", description="FSDP2: what a tower's gradients are summed over ranks in"
    )
    tf32: bool | None = Field(
        default=None, description="matrix products and convolutions of fp32 in TF32 on CUDA; null: as torch has it"
    )
    compile: Literal[False, True, "blocks"] = Field(
        default=False, description="torch.compile each tower; blocks: each of its repeated blocks, which starts faster"
    )
    grad_checkpointing: bool | Positive = Field(
        default=False,
        description="recompute activations in the backward instead of keeping them; N: those of every N-th block only",
    )
    channels_last: Literal["auto", True, False] = Field(
        default="auto", description="convolutional image towers in channels-last layout; auto: on CUDA"
    )
    float8: bool = Field(
        default=False, description="linear layers of the towers multiply in float8, with torchao on an H100 or newer"
    )
    device: Literal["auto", "cpu", "cuda", "mps", "xpu"] = Field(
        default="auto", description="auto: CUDA where there is a GPU; mps, xpu: where torch has it, one rank"
    )
    threads: Positive | None = Field(
        default=None, description="CPU threads per process; default: torch's own, shared among local ranks"
    )
    timeout_s: Positive = Field(
        default=600, description="seconds that a rank waits for the others before the run ends with an error"
    )
    find_unused: Literal["auto", True, False] = Field(
        default="auto",
        description="DDP: search for parameters without gradient in every step; auto: if a trial run finds any",
    )
    max_nonfinite: Positive = Field(default=10, description="stop after this many non-finite steps in a row")


class Checkpoints(Section):
    """When checkpoints are written. The last step always writes one."""

    every_steps: Positive | None = Field(
        default=None, description="steps between checkpoints; null: only every_minutes counts"
    )
    every_minutes: Annotated[float, Field(gt=0)] | None = Field(
        default=15.0, description="minutes between checkpoints; null: only every_steps counts"
    )
    keep: Positive = Field(default=2, description="newest checkpoints to keep")
    resume: str = Field(
        default="auto",
        description="auto: newest good checkpoint of this run; none: start from scratch; or a checkpoint folder",
    )
    sharded: Literal["auto", True, False] = Field(
        default="auto",
        description="every rank writes its own part, not rank 0 all; auto: FSDP2 or ZeRO 1–3 from 8 GiB of state",
    )
    background: bool = Field(
        default=False,
        description="copy the state to host memory and write it while training continues; costs that memory",
    )
    init_from: str | None = Field(default=None, description="start from the weights of this MODEL (as in eval)")


class Tracking(Section):
    """Where metrics are logged. metrics.jsonl is always written."""

    log_every: Positive = Field(default=10, description="steps between lines of metrics.jsonl")
    sample_ids: bool = Field(default=False, description="write every step's sample ids to samples-rankR.jsonl")
    tensorboard: bool = Field(
        default=False, description="also write TensorBoard's files (pip install 'dualenc[tracking]')"
    )
    wandb: bool = Field(default=False, description="also log to Weights & Biases (pip install 'dualenc[tracking]')")
    wandb_project: str = Field(default="dualenc", description="project of wandb")


class Guard(Section):
    """Zero-shot on small held-out sets before the first step, at intervals and at the end: a fall means fine-tuning
    makes the model forget (open_clip#740)."""

    tasks: list[str] = Field(min_length=1, description="task names or YAML files; small tasks")
    metric: str | None = Field(
        default=None, description="a metric between 0 and 1; default: each task's top1, else its first R@1"
    )
    every_steps: Positive | None = Field(
        default=None, description="default: only before the first and after the last step"
    )
    max_fall: Annotated[float, Field(gt=0, le=100)] = Field(
        5.0, description="largest allowed fall below the start, in percentage points"
    )
    action: Literal["stop", "warn"] = Field(
        default="stop", description="stop: write a checkpoint and exit with code 6; warn: only say so"
    )


class Evals(Section):
    """Zero-shot evaluation while training. ``tasks`` are names or YAML files."""

    tasks: list[str] = Field(
        default_factory=list, description="task names or YAML files, measured at the end and every every_steps"
    )
    every_steps: Positive | None = Field(
        default=None, description="steps between evaluations; default: only at the end"
    )
    at_start: bool = Field(default=False, description="also before the first step")
    guard: Guard | None = Field(default=None, description="stop or warn when fine-tuning makes the model forget")


class Recipe(Section):
    """One training run."""

    name: str = Field(description="name of the run and of its folder below runs/")
    description: str = Field(default="", description="what it trains, for lists and the model card")
    plugins: list[str] = Field(
        default_factory=list,
        description="modules to import first, which register losses, encoders, modalities … of their own",
    )
    seed: int = Field(default=0, description="of weights, order and augmentation")
    out: str | None = Field(default=None, description="run folder; default: runs/NAME")
    modalities: dict[str, Modality] = Field(
        min_length=2, description="what is read and which tower encodes it, by name"
    )
    pairs: list[tuple[str, str]] = Field(
        default_factory=list, description="default: the only pair, if there are two modalities"
    )
    embed_dim: Positive = Field(default=512, description="D, the dimension of the shared space")
    logit_scale: LogitScale = Field(default=LogitScale(), description="the temperature of each pair")
    loss: Component = Field(
        default=Component(name="info_nce"),
        description="a name, {name: …} with settings, or a list of these with a weight each; see dualenc list losses",
    )
    distill: Distill | None = Field(default=None, description="teachers to learn from; default: none")
    data: Data = Field(description="shards and how they are read")
    batch: Batches = Field(description="global batch and micro-batch")
    budget: Budget = Field(description="how long to train")
    optim: Optim = Field(default=Optim(), description="optimizer")
    schedule: Schedule = Field(default=Schedule(), description="learning rate over the run")
    engine: EngineConfig = Field(default=EngineConfig(), description="who runs the step, on what, in which precision")
    checkpoint: Checkpoints = Field(
        default=Checkpoints(), description="when checkpoints are written and where the run starts"
    )
    eval: Evals = Field(default=Evals(), description="zero-shot evaluation while training")
    tracking: Tracking = Field(default=Tracking(), description="where metrics go")
    phases: list[Phase] = Field(
        default_factory=list,
        description="what changes within the run: at: where; keys of modalities, loss, data, batch, optim, schedule",
    )

    @model_serializer(mode="wrap")
    def _without_phases(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Recipes without phases are written, compared and resumed as they were before there were any."""
        out: dict[str, Any] = write(self)
        return out if self.phases else {k: v for k, v in out.items() if k != "phases"}

    @model_validator(mode="after")
    def _phases_are_recipes(self) -> Recipe:
        phase_recipes(self)
        return self

    @field_validator("loss", mode="before")
    @classmethod
    def _one_loss(cls, raw: Any) -> Any:
        if isinstance(raw, list):
            return {"name": "sum", "terms": raw}
        return {"name": raw} if isinstance(raw, str) else raw

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, raw: Any) -> Any:
        if isinstance(raw, dict):
            raw = with_anchor(raw)
        if not isinstance(raw, dict) or not isinstance(raw.get("modalities"), dict):
            return raw
        raw = {**raw, "modalities": {m: with_shared(raw["modalities"], m) for m in raw["modalities"]}}
        names = list(raw["modalities"])
        if not raw.get("pairs") and len(names) == 2:
            return {**raw, "pairs": [names]}
        return raw

    @model_validator(mode="after")
    def _pairs_known(self) -> Recipe:
        if not self.pairs:
            raise ValueError("pairs: name the pairs to contrast, such as [[image, text], [audio, text]]")
        for pair in self.pairs:
            for m in pair:
                if m not in self.modalities:
                    raise ValueError(f"pairs: there is no modality {m!r}. {did_you_mean(m, self.modalities)}")
            if pair[0] == pair[1]:
                raise ValueError(f"pairs: {pair[0]!r} cannot be paired with itself")
        streams_of(self.modalities)
        scale = self.logit_scale
        if scale.init > scale.max:
            raise ValueError(
                f"logit_scale: init ({scale.init:g}) is above max ({scale.max:g}); raise max or lower init"
            )
        kinds = [frozenset(pair) for pair in self.pairs]
        for k, pair in enumerate(self.pairs):
            if kinds.index(kinds[k]) < k:
                raise ValueError(f"pairs: {list(pair)} is listed twice (pairs have no direction); remove one")
        if self.batch.micro is not None and self.batch.micro > self.batch.size:
            raise ValueError(f"batch.micro ({self.batch.micro}) is larger than batch.size ({self.batch.size})")
        for m in self.optim.lr_scale:
            if m not in self.modalities:
                raise ValueError(f"optim.lr_scale: there is no modality {m!r}. {did_you_mean(m, self.modalities)}")
        if any(m.lora for m in self.modalities.values()):
            if self.optim.ema_samples is not None or self.optim.trajectory is not None:
                raise ValueError(
                    "optim: ema_samples and trajectory cannot average lora adapters; leave them out with lora"
                )
            if self.checkpoint.sharded is True:
                raise ValueError(
                    "checkpoint.sharded: rank 0 merges lora adapters from whole tensors; use auto or false with lora"
                )
        sources = [s.name for s in self.data.sources]
        if len(set(sources)) != len(sources):
            raise ValueError(f"data.sources: names must differ, got {sources}")
        if self.data.mix and self.distill is not None and self.distill.teachers:
            raise ValueError(
                f"data.mix: {self.data.mix:g} cannot be used with distill.teachers, which see every item unmixed, so "
                "their features would not fit the mixture; use data.mix: 0"
            )
        return self


def phase_recipes(recipe: Recipe) -> list[Recipe]:
    """The recipe of each phase, the first being the recipe itself; each is built on the one before and has no phases.

    Raises:
        ConfigError: a phase makes an invalid recipe, or changes what a run keeps.
    """
    out = [recipe.model_copy(update={"phases": []})]
    for number, phase in enumerate(recipe.phases):
        before = out[-1].model_dump(mode="json")
        raw = merge(before, phase.changes)
        for part in raw["modalities"].values():
            if isinstance(part, dict) and part.get("shares") is not None:  # taken from the other one again
                for key in ("encoder", "kind", "lock", "lora", "prompts", "init_from"):
                    part.pop(key, None)
        now = parse(Recipe, raw, {}, f"phases.{number}")
        check_kept(number, before, now.model_dump(mode="json"))
        out.append(now)
    return out


def pair_name(pair: tuple[str, str]) -> str:
    """The key of a pair in scale, bias and metrics: ``image-text``."""
    return "-".join(pair)


def load_recipe(
    path: str | Path,
    overrides: Iterable[str] = (),
    complete: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None,
) -> Recipe:
    """Read a recipe file, its bases, and ``key.sub=value`` overrides; check the result.

    Its ``plugins`` are imported first.

    Args:
        path: a YAML file, or the name of a shipped recipe, such as ``quickstart``.
        overrides: values are read as YAML.
        complete: fills in what the recipe leaves out before it is checked; see :mod:`dualenc.model.start_from`.

    Raises:
        ConfigError: naming the key, its file, the value, and what to write instead.
    """
    file = find_recipe(path)
    raw, origin = read_yaml(file)
    for item in overrides:
        apply_override(raw, item, origin)
    source = origin.get("plugins", str(file))
    import_plugins(named_in(raw, source), f"plugins (in {source})")
    return parse(Recipe, raw if complete is None else complete(raw), origin, str(file))
