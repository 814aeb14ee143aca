"""The recipe: one run, whole, as typed data.

A recipe is YAML. ``base:`` names a recipe it starts from; the command line adds dotted overrides; what results is
checked against the models below. Every error names the key, the file it stands in, and the nearest right key.

Parts chosen by name (encoders, losses, a modality's input) carry settings that only their own class can check:
:class:`Component` keeps them, :func:`settings_as` checks them where the part is built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from dualenc.config.distill import Distill, with_anchor
from dualenc.config.reading import apply_override, parse, read_yaml
from dualenc.config.section import Component, Positive, Section, Share
from dualenc.errors import did_you_mean
from dualenc.plugins import import_plugins, named_in
from dualenc.shipped import find_recipe

Decay = Annotated[float, Field(ge=0, lt=1)]


class Unlocked(Section):
    """A tower of which only the last part is trained."""

    unlocked_groups: Positive = Field(description="so many blocks before the head are trained, and the head")


class Lora(Section):
    """Low-rank adapters beside a tower's layers (Hu et al. 2021): nothing else of the tower is trained."""

    rank: Positive = 8
    alpha: Annotated[float, Field(gt=0)] = Field(default=16.0, description="adapters count alpha / rank times")
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: Literal["auto"] | list[str] = Field(
        default="auto", description="endings of layers' names; auto: every linear layer, or convolution where none is"
    )
    head: bool = Field(default=False, description="train the projection to the shared space too")


class Modality(Section):
    """One modality: how its raw bytes become tensors, and its tower."""

    kind: str | None = Field(default=None, description="which modality file handles it; default: the key itself")
    input: dict[str, Any] = Field(default_factory=dict, description="settings of that modality (size, tokenizer, …)")
    encoder: Component
    lock: bool | Literal["trunk"] | Unlocked = Field(
        default=False,
        description="keep the tower's weights as they are (LiT); trunk: all but its projection; "
        "{unlocked_groups: N}: all but its last N blocks and its projection",
    )
    shares: str | None = Field(
        default=None, description="another modality whose tower encodes this one too; leave out encoder then"
    )
    init_from: str | None = Field(
        default=None, description="start from this tower of a trained MODEL; MODEL#NAME: from its modality NAME"
    )
    lora: Lora | None = Field(default=None, description="train adapters instead of the tower's weights")

    @model_validator(mode="after")
    def _one_way(self) -> Modality:
        if self.lock and self.lora is not None:
            raise ValueError("lora keeps the tower's own weights by itself: leave lock out")
        return self


def with_shared(parts: Mapping[str, Any], name: str) -> Any:
    """The part of a recipe's ``modalities``; what ``shares`` a tower has that one's encoder, kind and lock."""
    part = parts[name]
    shares = part.get("shares") if isinstance(part, dict) else None
    if shares is None:
        return part
    other = parts.get(shares)
    if not isinstance(other, dict) or shares == name or other.get("shares") is not None:
        owners = [m for m, p in parts.items() if m != name and isinstance(p, dict) and p.get("shares") is None]
        raise ValueError(
            f"modalities.{name}.shares: {shares!r} has no tower of its own. {did_you_mean(shares, owners)}"
        )
    taken = {k: other[k] for k in ("encoder", "lock", "lora", "init_from") if k in other} | {
        "kind": other.get("kind") or shares
    }
    for key, value in part.items():
        if key in ("encoder", "lock", "lora", "init_from") and value != taken.get(key, value):
            raise ValueError(f"modalities.{name}.{key}: it shares the tower of {shares!r}; leave {key} out")
    return {**part, **taken, "shares": shares}


class Source(Section):
    """A set of shards. ``weight`` is its share of samples among the sources (relative)."""

    name: str
    shards: str | list[str] = Field(description="path, brace pattern, list, pipe:COMMAND, http(s):// or s3:// URL")
    weight: Annotated[float, Field(gt=0)] = 1.0
    index: str | None = Field(default=None, description="index file; default: index.json beside the shards")
    members: dict[str, list[str]] = Field(
        default_factory=dict,
        description="modality → endings tried in turn; 'json:KEY' takes a key of the .json member; default: the kind's",
    )
    same: str | None = Field(
        default=None,
        description="ending (txt, json:instance) whose equal values make samples one pair: each other's positives",
    )


class Data(Section):
    """Where samples come from and how they are ordered and read."""

    sources: list[Source] = Field(min_length=1)
    sampling: str | Component = Field(
        default="without_replacement",
        description="the plan: without_replacement, with_replacement, or one from outside; {name: …} with its settings",
    )
    lanes: Positive = Field(
        1, description="the pass is cut into this many streams of shards; ranks read their lanes' shards only"
    )
    window: Positive = Field(default=1_000_000, description="samples shuffled together within a lane")
    workers: Annotated[int, Field(ge=0)] = 2
    prefetch: Positive = 4
    retries: Annotated[int, Field(ge=0)] = 3
    connect_s: Annotated[float, Field(gt=0)] = Field(
        default=15.0, description="seconds to wait for a connection to a server of shards, before the next try"
    )
    idle_s: Annotated[float, Field(gt=0)] = Field(
        default=60.0, description="seconds a server of shards may send nothing, before the next try; no limit in all"
    )
    allow_pipe: bool = Field(
        default=False, description="run the shell commands of pipe:COMMAND shards; otherwise they are refused"
    )
    mix: Share = Field(
        default=0.0,
        description="share of samples that another of their shard is mixed into: sounds added, captions joined",
    )
    max_bad_share: Share = Field(default=0.02, description="stop when a source lost more than this share")
    cache_dir: str | None = Field(
        default=None, description="where remote shards are kept while they are read; default: a temporary folder"
    )
    cache_gb: Annotated[float, Field(gt=0)] = 50.0
    stall_s: Annotated[float, Field(gt=0)] = Field(
        120.0, description="say which batch is awaited after this many seconds"
    )


class LogitScale(Section):
    """The temperature: logits = scale · cosine (+ bias)."""

    init: Annotated[float, Field(gt=0)] = 1 / 0.07
    max: Annotated[float, Field(gt=0)] = 100.0
    learnable: bool = True
    bias: float | None = Field(default=None, description="initial logit bias (SigLIP: −10); none: no bias")


class Batches(Section):
    """``size`` is the global batch over all ranks; ``micro`` bounds how many samples a rank encodes at once."""

    size: Positive
    micro: Positive | None = None


class TrajectoryAverage(Section):
    """Weights of a run averaged with a Gaussian over its length (PromptSRC); both are shares of the run."""

    mean: Share = 0.75
    std: Annotated[float, Field(gt=0)] = 0.05


class Optim(Section):
    """AdamW or Muon (matrices inside the towers; everything else AdamW). Gains, biases, scale: no weight decay."""

    name: Literal["adamw", "muon", "sgd"] = "adamw"
    lr: Annotated[float, Field(gt=0)] = 1e-3
    betas: tuple[Decay, Decay] = (0.9, 0.98)
    eps: Annotated[float, Field(gt=0)] = 1e-6
    weight_decay: Annotated[float, Field(ge=0)] = 0.2
    momentum: Share = Field(default=0.95, description="of Muon and SGD")
    muon_lr: Annotated[float, Field(gt=0)] = 0.02
    logit_scale_lr: Annotated[float, Field(gt=0)] | None = Field(default=None, description="default: lr")
    clip_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    ema_samples: Positive | None = Field(default=None, description="half-life of the weights' average, in samples")
    trajectory: TrajectoryAverage | None = Field(default=None, description="save a Gaussian average over the run")
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None, description="lr falls by this factor a block, from a tower's head to its embeddings"
    )
    lr_scale: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="modality → factor on the learning rate of its tower"
    )

    @model_validator(mode="after")
    def _one_average(self) -> Optim:
        if self.ema_samples is not None and self.trajectory is not None:
            raise ValueError("ema_samples and trajectory: a save holds one average; leave one of them out")
        return self


class Schedule(Section):
    """Learning rate over samples: warm-up, then the named shape down to ``final`` (a share of the peak)."""

    name: Literal["cosine", "constant", "constant_cooldown", "wsd"] = "cosine"
    warmup_samples: Annotated[int, Field(ge=0)] = 0
    cooldown_samples: Annotated[int, Field(ge=0)] = 0
    cooldown_shape: Literal["linear", "sqrt", "cosine"] = "sqrt"
    final: Share = 0.0


class Budget(Section):
    """How long to train: exactly one of ``steps``, ``samples``, ``passes``."""

    steps: Positive | None = None
    samples: Positive | None = None
    passes: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _one(self) -> Budget:
        if sum(v is not None for v in (self.steps, self.samples, self.passes)) != 1:
            raise ValueError("give exactly one of steps, samples, passes")
        return self


class EngineConfig(Section):
    """What runs the step. ``kind: deepspeed, zero_stage: 2`` is all that has to change."""

    kind: Literal["accelerate", "deepspeed"] = "accelerate"
    parallel: Literal["auto", "ddp", "fsdp2"] = Field(default="auto", description="auto: one process or DDP")
    zero_stage: Literal[0, 1, 2, 3] = 2
    offload_optimizer: bool = False
    offload_params: bool = False
    precision: Literal["fp32", "bf16"] = Field(default="fp32", description="bf16: autocast; weights stay fp32")
    compile: bool = Field(default=False, description="torch.compile each tower")
    grad_checkpointing: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Positive | None = Field(
        default=None, description="CPU threads per process; default: torch's own, shared among local ranks"
    )
    timeout_s: Positive = 600
    max_nonfinite: Positive = Field(default=10, description="stop after this many non-finite steps in a row")


class Checkpoints(Section):
    """When the run is saved. The last step is always saved."""

    every_steps: Positive | None = None
    every_minutes: Annotated[float, Field(gt=0)] | None = 15.0
    keep: Positive = 2
    resume: str = Field(
        default="auto", description="auto: newest good save of this run; none: start anew; or a checkpoint folder"
    )
    sharded: Literal["auto", True, False] = Field(
        default="auto",
        description="every rank writes what it holds, not rank 0 all; auto: FSDP2 or ZeRO 1–3 from 8 GiB of state",
    )
    init_from: str | None = Field(default=None, description="start from the weights of this MODEL (as in eval)")


class Tracking(Section):
    """Where numbers go. metrics.jsonl is always written."""

    log_every: Positive = 10
    sample_ids: bool = Field(default=False, description="write every step's sample ids to samples-rankR.jsonl")
    tensorboard: bool = False
    wandb: bool = False
    wandb_project: str = "dualenc"


class Guard(Section):
    """Zero-shot on a small held-out set before the first step, at intervals and after: a fall means that fine-tuning
    is unlearning what the model could (open_clip#740)."""

    tasks: list[str] = Field(min_length=1, description="names or YAML files, small ones")
    metric: str | None = Field(default=None, description="a share; default: top1, or else the first R@1, of each task")
    every_steps: Positive | None = Field(default=None, description="default: only before the first and after the last")
    max_fall: Annotated[float, Field(gt=0, le=100)] = Field(5.0, description="points (percent) below the start")
    action: Literal["stop", "warn"] = Field(default="stop", description="stop: save, and end with exit code 6")


class Evals(Section):
    """Zero-shot evaluation while training. ``tasks`` are names or YAML files."""

    tasks: list[str] = Field(default_factory=list)
    every_steps: Positive | None = None
    at_start: bool = False
    guard: Guard | None = None


class Recipe(Section):
    """One training run."""

    name: str
    description: str = ""
    plugins: list[str] = Field(
        default_factory=list, description="modules imported first: they bring losses, encoders, modalities … of others"
    )
    seed: int = 0
    out: str | None = Field(default=None, description="run folder; default: runs/NAME")
    modalities: dict[str, Modality] = Field(min_length=2)
    pairs: list[tuple[str, str]] = Field(
        default_factory=list, description="default: the one pair when there are two modalities"
    )
    embed_dim: Positive = 512
    logit_scale: LogitScale = LogitScale()
    loss: Component = Component(name="info_nce")
    distill: Distill | None = None
    data: Data
    batch: Batches
    budget: Budget
    optim: Optim = Optim()
    schedule: Schedule = Schedule()
    engine: EngineConfig = EngineConfig()
    checkpoint: Checkpoints = Checkpoints()
    eval: Evals = Evals()
    tracking: Tracking = Tracking()

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
        scale = self.logit_scale
        if scale.init > scale.max:
            raise ValueError(
                f"logit_scale: init ({scale.init:g}) is above max ({scale.max:g}); raise max or lower init"
            )
        kinds = [frozenset(pair) for pair in self.pairs]
        for k, pair in enumerate(self.pairs):
            if kinds.index(kinds[k]) < k:
                raise ValueError(f"pairs: {list(pair)} stands twice (a pair has no direction); leave one out")
        if self.batch.micro is not None and self.batch.micro > self.batch.size:
            raise ValueError(f"batch.micro ({self.batch.micro}) is larger than batch.size ({self.batch.size})")
        for m in self.optim.lr_scale:
            if m not in self.modalities:
                raise ValueError(f"optim.lr_scale: there is no modality {m!r}. {did_you_mean(m, self.modalities)}")
        if any(m.lora for m in self.modalities.values()):
            if self.optim.ema_samples is not None or self.optim.trajectory is not None:
                raise ValueError("optim: an average of adapters is not that of the weights; leave it out with lora")
            if self.checkpoint.sharded is True:
                raise ValueError("checkpoint.sharded: adapters are merged by rank 0; write auto or false with lora")
        sources = [s.name for s in self.data.sources]
        if len(set(sources)) != len(sources):
            raise ValueError(f"data.sources: names must differ, got {sources}")
        if self.data.mix and self.distill is not None and self.distill.teachers:
            raise ValueError(
                f"data.mix: {self.data.mix:g} cannot be used under distill.teachers, which see every item unmixed and "
                "would teach the mixture something else; write data.mix: 0"
            )
        return self


def pair_name(pair: tuple[str, str]) -> str:
    """The key of a pair in scale, bias and metrics: ``image-text``."""
    return "-".join(pair)


def load_recipe(
    path: str | Path,
    overrides: Iterable[str] = (),
    complete: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None,
) -> Recipe:
    """Read a recipe file, its bases, and ``key.sub=value`` overrides; check the result.

    Its ``plugins`` are imported first of all.

    Args:
        path: a YAML file, or the name of a recipe that comes with the package, such as ``quickstart``.
        overrides: values are read as YAML.
        complete: fills in what the recipe leaves out before it is checked, see :mod:`dualenc.model.start_from`.

    Raises:
        ConfigError: naming the key, the file it came from, the value, and what to write instead.
    """
    file = find_recipe(path)
    raw, origin = read_yaml(file)
    for item in overrides:
        apply_override(raw, item, origin)
    source = origin.get("plugins", str(file))
    import_plugins(named_in(raw, source), f"plugins (in {source})")
    return parse(Recipe, raw if complete is None else complete(raw), origin, str(file))
