"""Labels that a model gives samples without one: zero-shot predictions as scores beside the shards.

    dualenc shards filter 'SHARDS' --with pseudo_labels --set pseudo_labels.model=RUN \\
        --set 'pseudo_labels.classes=[cat, dog]'
    dualenc shards select 'SHARDS' --out sure 'pseudo_place <= 0.25 and pseudo_confidence >= 0.5'

and in the recipe of the run that trains on them: ``selection: sure``, ``members: {image: [jpg], text:
["scores:pseudo_label"]}``, ``values: {label: "scores:pseudo_label"}``. Only for samples that no evaluation looks at: a
model that was trained on the labels it gave a test set has no zero-shot number on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field, field_validator

from dualenc.data.modalities.text import one_place
from dualenc.data.shards.selection import Values
from dualenc.errors import ConfigError, DataError
from dualenc.model.zero_shot import classifier
from dualenc_data_tools.choose.concepts import lines_of
from dualenc_data_tools.choose.filter import Candidate, Score, filters
from dualenc_data_tools.choose.model_filters import ModelScore, OfModel


class PseudoLabelsConfig(ModelScore):
    """Settings of the labels that a model gives."""

    classes: list[str] | str = Field(description="the classes' names, or a text file with one per line")
    templates: list[str] = Field(default=["{}"], min_length=1, description="prompts with {} for the name; averaged")

    @field_validator("templates")
    @classmethod
    def _one_place(cls, templates: list[str]) -> list[str]:
        return one_place(templates, "the class name")


@filters.register("pseudo_labels")
class PseudoLabels(OfModel):
    """Zero-shot predictions for samples without labels: ``pseudo_label`` (a class's name), ``pseudo_confidence`` (its
    softmax at the model's temperature), ``pseudo_place`` (place by confidence in its class, as a share: ``<= 0.25`` is
    the surest quarter of every class). Train on them with ``scores:pseudo_label``; never on the samples of a task."""

    Config: ClassVar[type[ModelScore]] = PseudoLabelsConfig

    def __init__(self, config: PseudoLabelsConfig) -> None:
        super().__init__(config)
        self.names = _names(config.classes)
        self.item, self.text = self.sides
        self.reads: Mapping[str, Sequence[str]] = {self.item: self.reads[self.item]}
        prompts: list[Any] = [t.replace("{}", n) for n in self.names for t in config.templates]
        x = self.embedder.embed(self.text, prompts, config.batch_size, {})
        owners = torch.arange(len(self.names)).repeat_interleave(len(config.templates))
        self.weights = classifier(x, owners, len(self.names))

    def score(self, rows: Sequence[Candidate]) -> dict[str, list[Score]]:
        x, of = self.features(self.item, rows)
        names: list[Score] = [None] * len(rows)
        sure: list[Score] = [None] * len(rows)
        if of:
            scale = self.embedder.logit_scale("-".join(self.sides))
            confidence, best = (scale * x @ self.weights.T).softmax(1).max(1)
            for row, value, label in zip(of, confidence.tolist(), best.tolist(), strict=True):
                names[row], sure[row] = self.names[label], value
        return {"pseudo_label": names, "pseudo_confidence": sure}

    def finish(self, values: dict[str, Values]) -> dict[str, Values]:
        label = values["pseudo_label"]
        if label.dtype != object:  # no sample could be read
            raise DataError("pseudo_labels: no sample has an item that the model can encode")
        return values | {"pseudo_place": places(label, values["pseudo_confidence"])}


def places(label: Values, confidence: Values) -> Values:
    """The share of its class that is at least as sure as each sample, in (0, 1]; NaN without a label. Of equally sure
    ones the first in stored order comes first."""
    out = np.full(len(label), np.nan)
    for name in sorted({t for t in label.tolist() if t is not None}):
        at = np.flatnonzero(label == name)
        order = at[np.argsort(-confidence[at], kind="stable")]
        out[order] = np.arange(1, len(at) + 1) / len(at)
    return out


def _names(classes: list[str] | str) -> list[str]:
    if isinstance(classes, str):
        classes = [line.strip() for line in lines_of(classes, "pseudo_labels.classes") if line.strip()]
    if len(classes) < 2 or len(set(classes)) < len(classes):
        raise ConfigError(f"pseudo_labels.classes: give two or more different names, got {classes!r:.120}")
    return classes
