"""Scores that a model gives: how well the two sides of a sample fit each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from dualenc.config import Section
from dualenc.config.section import Positive
from dualenc.errors import ConfigError
from dualenc.model.load import load_model
from dualenc_data_tools.choose.filter import Candidate, Filter, Score, filters


class ModelScore(Section):
    """Settings of a score that a model gives."""

    model: str = Field(description="a model as dualenc eval takes it: a run, a folder, hf:…, open_clip:…")
    pair: str | None = Field(
        default=None, description="the pair to score, such as image-text; default: the model's first"
    )
    captions: Literal["mean", "max", "min"] = Field(
        default="mean", description="how the scores of several captions become one"
    )
    batch_size: Positive = Field(default=64, description="items encoded at once")
    device: str = Field(default="cpu", description="cpu, cuda or auto")


class OfModel(Filter):
    """A filter that loads a model once."""

    Config: ClassVar[type[ModelScore]] = ModelScore

    def __init__(self, config: ModelScore) -> None:
        super().__init__(config)
        self.embedder = load_model(config.model, config.device).embedder()
        pairs = [tuple(p) for p in self.embedder.bundle.model.pairs]
        wanted = tuple((config.pair or "-".join(pairs[0])).split("-"))
        if wanted not in pairs:
            known = ", ".join("-".join(p) for p in pairs)
            raise ConfigError(f"pair: {config.model} has no pair {config.pair!r}; it has {known}")
        self.sides = wanted
        self.reads: Mapping[str, Sequence[str]] = {
            m: list(self.embedder.bundle.inputs[m].default_members) for m in wanted
        }

    def features(self, side: str, rows: Sequence[Candidate]) -> tuple[Tensor, list[int]]:
        """Features [n, D] of all items of one side, and the row each is of; a caption is an item."""
        items: list[Any] = []
        of: list[int] = []
        for i, row in enumerate(rows):
            value = row.values.get(side)
            for item in value if isinstance(value, list) else [] if value is None else [value]:
                items.append(item)
                of.append(i)
        bad: dict[int, str] = {}
        x = self.embedder.embed(side, items, self.config.batch_size, bad)
        return x, [r for k, r in enumerate(of) if k not in bad]

    def fold(self, values: Tensor, of: Sequence[int], n: int) -> list[Score]:
        """The values of a row's items as one, for each of n rows."""
        per: list[list[float]] = [[] for _ in range(n)]
        for value, i in zip(values.tolist(), of, strict=True):
            per[i].append(value)
        if self.config.captions == "mean":
            return [sum(v) / len(v) if v else None for v in per]
        return [(max(v) if self.config.captions == "max" else min(v)) if v else None for v in per]


@filters.register("clip_score")
class ClipScore(OfModel):
    """Cosine of the two sides under a model (CLIPScore, Hessel et al. 2021): score ``clip_score``, −1 to 1."""

    def score(self, rows: Sequence[Candidate]) -> dict[str, list[Score]]:
        (a, of_a), (b, of_b) = (self.features(side, rows) for side in self.sides)
        first = {r: k for k, r in reversed(list(enumerate(of_a)))}
        pairs = [(first[r], k, r) for k, r in enumerate(of_b) if r in first]
        if not pairs:
            return {"clip_score": [None] * len(rows)}
        cosine = (a[[p[0] for p in pairs]] * b[[p[1] for p in pairs]]).sum(1)
        return {"clip_score": self.fold(cosine, [p[2] for p in pairs], len(rows))}


@filters.register("model_loss")
class ModelLoss(OfModel):
    """The contrastive loss of each sample under a model, among the 256 samples around it (self-filtering by a model's
    own loss): the mean of both directions at the model's temperature; score ``model_loss``."""

    neighbours = True

    def score(self, rows: Sequence[Candidate]) -> dict[str, list[Score]]:
        (a, of_a), (b, of_b) = (self.features(side, rows) for side in self.sides)
        first_a, first_b = ({r: k for k, r in reversed(list(enumerate(of)))} for of in (of_a, of_b))
        both = [r for r in first_a if r in first_b]
        out: list[Score] = [None] * len(rows)
        if both:
            scale = self.embedder.logit_scale("-".join(self.sides))
            logits = scale * a[[first_a[r] for r in both]] @ b[[first_b[r] for r in both]].T
            diagonal = torch.arange(len(both))
            losses = [torch.nn.functional.cross_entropy(x, diagonal, reduction="none") for x in (logits, logits.T)]
            for r, value in zip(both, ((losses[0] + losses[1]) / 2).tolist(), strict=True):
                out[r] = value
        return {"model_loss": out}
