"""The sections on learning from a teacher: ``distill``, and ``anchor``, a shorthand for it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from dualenc.config.section import Component, Positive, Section, Share


class Teacher(Section):
    """A frozen model to learn from: run beside the student (``model``), or its stored features (``cache``)."""

    model: str | None = Field(default=None, description="a MODEL, as in dualenc eval")
    cache: str | None = Field(
        default=None, description="a folder written by dualenc embed --recipe; the teacher is not run"
    )
    weights: str | None = Field(default=None, description="first characters of the sha256 its weights must have")
    weight: Annotated[float, Field(gt=0)] = Field(1.0, description="relative weight among several teachers")
    modalities: dict[str, str] = Field(
        default_factory=dict, description="student's modality → teacher's modality, where the names differ"
    )
    plain: list[str] = Field(
        default_factory=list,
        description="modalities that it sees as in evaluation, without the student's augmentation",
    )
    logit_scale: Annotated[float, Field(gt=0)] | None = Field(default=None, description="default: the teacher's own")
    fusion: Positive | None = Field(
        default=None,
        description="for a cross-encoder (vilt:FOLDER): how many other rows of the batch to score each row against",
    )
    precision: Literal["fp32", "bf16"] = Field(default="fp32", description="precision of the teacher's forward")
    max_missing: Share = Field(default=0.0, description="largest share of samples without stored features")

    @model_validator(mode="after")
    def _some(self) -> Teacher:
        if self.model is None and self.cache is None:
            raise ValueError(
                "give model (run beside the student), cache (its stored features), or both (then compared)"
            )
        return self


class LookAhead(Section):
    """A teacher that is a moving average of the student some virtual steps ahead (FST, Du et al. 2022)."""

    steps: Annotated[int, Field(ge=0)] = Field(default=1, description="virtual SGD steps per step; 0: a mean teacher")
    lr: Annotated[float, Field(ge=0)] = Field(
        default=0.01, description="learning rate of the virtual steps (plain SGD)"
    )
    decay: Share = Field(default=0.999, description="upper bound of the average's decay, min(1 − 1/(t+1), decay)")
    weight: Annotated[float, Field(gt=0)] = Field(default=1.0, description="relative weight among the teachers")


class Distill(Section):
    """Learning from teachers: ``hard`` · loss + Σ weight · term, each term averaged over the teachers."""

    teachers: list[Teacher] = Field(default_factory=list, description="models to learn from")
    look_ahead: LookAhead | None = Field(default=None, description="the student's own average as a teacher")
    terms: list[Component] = Field(min_length=1, description="see dualenc list terms; default weight: 1")
    hard: Annotated[float, Field(ge=0)] = Field(default=1.0, description="weight of the recipe's own loss")

    @model_validator(mode="after")
    def _any_teacher(self) -> Distill:
        if not self.teachers and self.look_ahead is None:
            raise ValueError("give at least one teacher in teachers, or look_ahead")
        return self


class Anchor(Section):
    """Shorthand for a ``distill`` section whose teacher is the model the run starts from (``checkpoint.init_from``)."""

    feature: dict[str, Annotated[float, Field(ge=0)]] = Field(description="modality → weight of mean |f − f0|")
    logits: Annotated[float, Field(ge=0)] = Field(default=1.0, description="weight of KL(p0 ‖ p)")


def with_anchor(raw: dict[str, Any]) -> dict[str, Any]:
    """The recipe with ``anchor`` expanded to its ``distill`` section."""
    out = {k: v for k, v in raw.items() if k != "anchor"}
    if raw.get("anchor") is None:
        return out
    start = (raw.get("checkpoint") or {}).get("init_from")
    if not start:
        raise ValueError("anchor: the run does not start from a model; name one with checkpoint.init_from")
    if raw.get("distill") is not None:
        raise ValueError("anchor: cannot be combined with distill; add {name: anchor, …} to distill.terms instead")
    term = {"name": "anchor", **Anchor.model_validate(raw["anchor"]).model_dump()}
    return {**out, "distill": {"teachers": [{"model": start}], "terms": [term]}}
