"""Parts of a recipe that stand by themselves, and what all of them are made of; :mod:`dualenc.config` is the whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dualenc.errors import did_you_mean

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """A part of a recipe: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Component(BaseModel):
    """A part chosen by ``name``; its other keys are settings that the part's own ``Config`` checks when it is built."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str

    @property
    def settings(self) -> dict[str, Any]:
        """Everything but the name."""
        return dict(self.model_extra or {})


class Teacher(Section):
    """A frozen model to learn from: run beside the student (``model``), or its stored features (``cache``)."""

    model: str | None = Field(default=None, description="a MODEL, as in dualenc eval")
    cache: str | None = Field(default=None, description="a folder that dualenc embed --recipe wrote; nothing is run")
    weights: str | None = Field(default=None, description="beginning of the sha256 that its weights must have")
    weight: Annotated[float, Field(gt=0)] = Field(1.0, description="share among several teachers (relative)")
    modalities: dict[str, str] = Field(
        default_factory=dict, description="student's modality → the teacher's, where the names differ"
    )
    plain: list[str] = Field(
        default_factory=list,
        description="modalities of which it sees the item as in evaluation, not the student's draw",
    )
    logit_scale: Annotated[float, Field(gt=0)] | None = Field(default=None, description="default: the teacher's own")
    fusion: Positive | None = Field(
        default=None, description="a cross-encoder (vilt:FOLDER): score each row against so many others of the batch"
    )
    precision: Literal["fp32", "bf16"] = "fp32"
    max_missing: Share = Field(default=0.0, description="share of samples that may have no stored features")

    @model_validator(mode="after")
    def _some(self) -> Teacher:
        if self.model is None and self.cache is None:
            raise ValueError("give model (run beside the student), cache (features it wrote), or both (then checked)")
        return self


class LookAhead(Section):
    """A teacher that is the moving average of the student some virtual steps ahead (FST, Du et al. 2022)."""

    steps: Annotated[int, Field(ge=0)] = Field(default=1, description="virtual SGD steps a step; 0: a mean teacher")
    lr: Annotated[float, Field(ge=0)] = Field(default=0.01, description="of the virtual steps (plain SGD)")
    decay: Share = Field(default=0.999, description="bound of the average's decay min(1 − 1/(t+1), decay)")
    weight: Annotated[float, Field(gt=0)] = 1.0


class Distill(Section):
    """Learning from teachers: ``hard`` · loss + Σ weight · term, each term averaged over the teachers."""

    teachers: list[Teacher] = Field(default_factory=list)
    look_ahead: LookAhead | None = None
    terms: list[Component] = Field(min_length=1, description="see dualenc list terms; weight: default 1")
    hard: Annotated[float, Field(ge=0)] = Field(default=1.0, description="weight of the recipe's own loss")

    @model_validator(mode="after")
    def _any_teacher(self) -> Distill:
        if not self.teachers and self.look_ahead is None:
            raise ValueError("name at least one of teachers, or a look_ahead teacher")
        return self


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


class Anchor(Section):
    """Short for a ``distill`` section whose teacher is the model the run starts from (``checkpoint.init_from``)."""

    feature: dict[str, Annotated[float, Field(ge=0)]] = Field(description="modality → weight of mean |f − f0|")
    logits: Annotated[float, Field(ge=0)] = Field(default=1.0, description="weight of KL(p0 ‖ p)")


# --- short forms -------------------------------------------------------------------------------------------------


def with_anchor(raw: dict[str, Any]) -> dict[str, Any]:
    """The recipe with ``anchor`` written as the ``distill`` section it is short for."""
    out = {k: v for k, v in raw.items() if k != "anchor"}
    if raw.get("anchor") is None:
        return out
    start = (raw.get("checkpoint") or {}).get("init_from")
    if not start:
        raise ValueError("anchor: the run starts from no model; name one with checkpoint.init_from")
    if raw.get("distill") is not None:
        raise ValueError("anchor: a recipe with distill names its terms there; add {name: anchor, …} to them")
    term = {"name": "anchor", **Anchor.model_validate(raw["anchor"]).model_dump()}
    return {**out, "distill": {"teachers": [{"model": start}], "terms": [term]}}


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
