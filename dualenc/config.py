"""The recipe: one run, whole, as typed data.

A recipe is YAML. ``base:`` names a recipe it starts from; the command line adds dotted overrides; what results is
checked against the models below. Every error names the key, the file it stands in, and the nearest right key.

Parts chosen by name (encoders, losses, a modality's input) carry settings that only their own class can check:
:class:`Component` keeps them, :func:`settings_as` checks them where the part is built.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from dualenc.errors import ConfigError, did_you_mean
from dualenc.sections import Anchor as Anchor
from dualenc.sections import Component as Component
from dualenc.sections import Distill as Distill
from dualenc.sections import Evals as Evals
from dualenc.sections import Guard as Guard
from dualenc.sections import LookAhead as LookAhead
from dualenc.sections import Lora as Lora
from dualenc.sections import Positive as Positive
from dualenc.sections import Section as Section
from dualenc.sections import Share as Share
from dualenc.sections import Teacher as Teacher
from dualenc.sections import Unlocked as Unlocked
from dualenc.sections import with_anchor, with_shared
from dualenc.shipped import recipes_folder

S = TypeVar("S", bound=BaseModel)


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
    sampling: Literal["without_replacement", "with_replacement"] = "without_replacement"
    lanes: Positive = Field(
        1, description="the pass is cut into this many streams of shards; ranks read their lanes' shards only"
    )
    window: Positive = Field(default=1_000_000, description="samples shuffled together within a lane")
    workers: Annotated[int, Field(ge=0)] = 2
    prefetch: Positive = 4
    retries: Annotated[int, Field(ge=0)] = 3
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
    betas: tuple[float, float] = (0.9, 0.98)
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


class Engine(Section):
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


class Recipe(Section):
    """One training run."""

    name: str
    description: str = ""
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
    engine: Engine = Engine()
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


# --- reading -----------------------------------------------------------------------------------------------------


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe file, its bases, and ``key.sub=value`` overrides; check the result.

    Raises:
        ConfigError: naming the key, the file it came from, the value, and what to write instead.
    """
    raw, origin = read_yaml(Path(path))
    for item in overrides:
        apply_override(raw, item, origin)
    return parse(Recipe, raw, origin, str(path))


def read_yaml(path: Path, key: str = "base", seen: tuple[Path, ...] = ()) -> tuple[dict[str, Any], dict[str, str]]:
    """Read a mapping with inheritance by ``key``; return it and a map dotted key → the file that said it."""
    path = Path(path)
    if not path.is_file():
        near = did_you_mean(path.name, [p.name for p in path.parent.glob("*.y*ml")]) if path.parent.is_dir() else ""
        raise ConfigError(f"There is no file {path}. {near}".strip())
    if path.resolve() in seen:
        raise ConfigError(f"{path}: {key}: goes round in a circle ({' → '.join(p.name for p in (*seen, path))})")
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(e).split())}") from e
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold keys and values, it holds {type(raw).__name__}")
    bases = raw.pop(key, [])
    own = _resolve_paths(raw, path.parent)
    merged: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for base in [bases] if isinstance(bases, str) else bases or []:
        base_raw, base_origin = read_yaml(path.parent / base, key, (*seen, path.resolve()))
        merged = _merge(merged, base_raw)
        origin |= base_origin
    origin |= dict.fromkeys(_dotted(own), str(path))
    return _merge(merged, own), origin


def apply_override(raw: dict[str, Any], item: str, origin: dict[str, str]) -> None:
    """Set ``a.b.c=value`` (value read as YAML; ``a.0.b`` reaches into lists) in ``raw``."""
    key, eq, text = item.partition("=")
    if not eq or not re.fullmatch(r"[\w\-]+(\.[\w\-]+)*", key):
        raise ConfigError(f"Cannot read {item!r}: write key=value, for example optim.lr=1e-3")
    try:
        value = yaml.load(text, Loader=_StrictLoader) if text else None
    except yaml.YAMLError as e:
        raise ConfigError(f"{key}: {text!r} is not valid YAML: {' '.join(str(e).split())}") from e
    node: Any = raw
    *parents, last = key.split(".")
    for part in parents:
        node = _child(node, part, key)
    if isinstance(node, list):
        node[_position(node, last, key)] = value
    else:
        node[last] = value
    origin[key] = "the command line"


def _child(node: Any, part: str, key: str) -> Any:
    if isinstance(node, list):
        return node[_position(node, part, key)]
    if not isinstance(node.get(part), dict | list):
        node[part] = {}
    return node[part]


def _position(node: list[Any], part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise ConfigError(f"{key}: {part!r} is not a position in a list of {len(node)}")
    return int(part)


def parse(cls: type[S], raw: Mapping[str, Any], origin: Mapping[str, str], where: str) -> S:
    """Check ``raw`` against ``cls``; an error becomes sentences with key, file and remedy."""
    try:
        return cls.model_validate(raw)
    except ValidationError as e:
        lines = [_sentence(cls, err, origin, where) for err in e.errors()]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from e


def settings_as(cls: type[S], settings: Mapping[str, Any], where: str) -> S:
    """Check the settings of a component or input against its own model; ``where`` is its dotted key."""
    try:
        return cls.model_validate(dict(settings))
    except ValidationError as e:
        lines = [_sentence(cls, err, {}, where, prefix=where + ".") for err in e.errors()]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from e


def dump_yaml(model: BaseModel) -> str:
    """The resolved recipe as YAML that :func:`load_recipe` reads back."""
    return yaml.safe_dump(model.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)


def _sentence(cls: type[BaseModel], err: Any, origin: Mapping[str, str], where: str, prefix: str = "") -> str:
    loc = [str(p) for p in err["loc"]]
    key = ".".join(loc)
    source = next((origin[".".join(loc[:n])] for n in range(len(loc), 0, -1) if ".".join(loc[:n]) in origin), where)
    shown = prefix + key if key else where
    if err["type"] == "extra_forbidden":
        return f"{shown}: unknown key (in {source}). {did_you_mean(loc[-1], _fields_at(cls, loc[:-1]))}"
    if err["type"] == "missing":
        return f"{shown}: this key is needed (in {where})."
    message = err["msg"].removeprefix("Value error, ")
    value = err["input"] if isinstance(err["input"], str | int | float | bool | None) else None
    got = f", got {value!r}" if value is not None else ""
    return f"{shown}: {message}{got} (in {source})." if key else f"{message} (in {source})."


def _fields_at(cls: type[BaseModel], loc: list[str]) -> list[str]:
    """Names of the fields a (nested) model has at ``loc``."""
    model: Any = cls
    for part in loc:
        if isinstance(model, type) and issubclass(model, BaseModel) and part in model.model_fields:
            model = model.model_fields[part].annotation
        inner = [a for a in _leaves(model) if isinstance(a, type) and issubclass(a, BaseModel)]
        model = inner[0] if inner else model
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


def _leaves(annotation: Any) -> list[Any]:
    args = getattr(annotation, "__args__", ())
    return [leaf for a in args for leaf in _leaves(a)] if args else [annotation]


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Mappings merge key by key; a component with another ``name`` and everything else replaces."""
    out = dict(base)
    for k, v in over.items():
        old = out.get(k)
        renamed = (
            isinstance(v, dict) and isinstance(old, dict) and "name" in v and v["name"] != old.get("name", v["name"])
        )
        out[k] = _merge(old, v) if isinstance(v, dict) and isinstance(old, dict) and not renamed else v
    return out


RECIPES = "${RECIPES}/"
"""What a path begins with that is looked for among the shipped recipes, wherever the package is installed."""


def _resolve_paths(node: Any, folder: Path) -> Any:
    if isinstance(node, dict):
        return {k: _resolve_paths(v, folder) for k, v in node.items()}
    if isinstance(node, list):
        return [_resolve_paths(v, folder) for v in node]
    if isinstance(node, str) and node.startswith(("./", "../")):
        return os.path.normpath(folder / node)
    if isinstance(node, str) and node.startswith(RECIPES):
        return str(recipes_folder() / node.removeprefix(RECIPES))
    return node


def _dotted(node: Any, prefix: str = "") -> list[str]:
    if isinstance(node, dict):
        items: Iterable[tuple[str, Any]] = ((str(k), v) for k, v in node.items())
    elif isinstance(node, list):
        items = ((str(i), v) for i, v in enumerate(node))
    else:
        return []
    out: list[str] = []
    for k, v in items:
        out += [prefix + k, *_dotted(v, f"{prefix}{k}.")]
    return out


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that reads 1e-3 as a number and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(k, deep=True) for k, _ in node.value]  # type: ignore[no-untyped-call]
        twice = {k for k in keys if isinstance(k, str) and keys.count(k) > 1}
        if twice:
            raise yaml.YAMLError(f"{node.start_mark}: key {sorted(twice)[0]!r} is given twice")
        return super().construct_mapping(node, deep)


_StrictLoader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_StrictLoader.add_implicit_resolver(  # type: ignore[no-untyped-call]
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)
