"""The sections on learning from a teacher: ``distill``, and ``anchor``, which is short for one."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from dualenc.config.section import Component, Positive, Section, Share


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


class Anchor(Section):
    """Short for a ``distill`` section whose teacher is the model the run starts from (``checkpoint.init_from``)."""

    feature: dict[str, Annotated[float, Field(ge=0)]] = Field(description="modality → weight of mean |f − f0|")
    logits: Annotated[float, Field(ge=0)] = Field(default=1.0, description="weight of KL(p0 ‖ p)")


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
