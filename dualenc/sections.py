"""Parts of a recipe that stand by themselves, and what all of them are made of; :mod:`dualenc.config` is the whole."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

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
