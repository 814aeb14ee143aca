"""Classification of the features by entity with a large margin (MOFI, Wu et al. 2023, arXiv 2306.07952), with classes
cut over ranks (partial-FC, An et al. 2021, arXiv 2010.05222).

With v_e a unit vector of each of E entities, y_i the entity of row x_i, scale s and margin m

    L = −1/n Σ_i log( exp(s(x_i·v_{y_i} − m)) / (exp(s(x_i·v_{y_i} − m)) + Σ_{e ∈ S, e ≠ y_i} exp(s x_i·v_e)) )

S is all classes, or ``sampled`` of them that change from step to step: an arithmetic progression modulo E whose start
and stride are drawn from (seed, step), so it is the same on any number of ranks.

Rank r of W holds E/W of the vectors. Features of the global batch are gathered, every rank takes its own classes, and
largest logits and sums of exponentials are reduced: 3 numbers a row. So the softmax is exact, and value and gradients
are those of one process. The vectors are a state of the loss (:class:`dualenc.memory.ClassMatrix`) and no parameters of
the model: no engine reduces or copies them. After a step each moves by ``lr`` · Σ_i (1[e = y_i] − p_ie) x_i, the
gradient of a sum and not of a mean, and back onto the sphere, so ``lr`` means the same at every batch size.

Memory on each of W ranks: E/W · D numbers twice (vectors, and their gradient within a step) and ``strip_mb`` of logits.
On paper, 2 M entities of D = 512 are 4.1 GB; over 64 ranks 64 MB twice. Such logits of a batch of 32,768 over 31,250
classes would be 4.1 GB; strips of rows hold 64 MiB of them.

MOFI's scale, margin and number of sampled classes are unverified.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dualenc.config import Positive, pair_name
from dualenc.data.batch import ABSENT, present
from dualenc.distributed.gather import all_gather, gather, gather_ids, total
from dualenc.distributed.world import world_size
from dualenc.errors import ConfigError
from dualenc.losses.blockwise.strips import strip_size
from dualenc.losses.loss import Extras, Loss, LossOutput, losses
from dualenc.losses.rowwise import StripConfig
from dualenc.memory import ClassMatrix, LossState, RunShape
from dualenc.seeds import derive_seed


@losses.register("entity_classifier")
class EntityClassifier(Loss):
    """Rows are classified by entity with a large margin; the classes' vectors are cut over ranks.

    Formula: −log(e^{s(x_i·v_y−m)} / (e^{s(x_i·v_y−m)} + Σ_{e∈S, e≠y} e^{s·x_i·v_e}))
    Paper: MOFI, Wu et al. 2023, arXiv 2306.07952; partial-FC, arXiv 2010.05222
    Needs: a label; it keeps a vector for each class and pair
    """

    takes_extras = True

    class Config(StripConfig):
        """Settings."""

        side: Literal["both", "a", "b"] = Field("a", description="towers of the pair that are classified")
        label: str = Field("label", description="name in data.sources.N.values; of type int or id")
        classes: Positive = Field(
            description="E: entities. A label is taken modulo E, so ids of texts may share a class: make E larger than "
            "their number, or use numbers from 0 to E − 1"
        )
        sampled: Positive | None = Field(default=None, description="classes in each step's softmax; default: all")
        scale: Annotated[float, Field(gt=0)] = Field(32.0, description="s: factor of the cosines; it is not trained")
        margin: Annotated[float, Field(ge=0)] = Field(0.2, description="m: taken off the cosine with the own class")
        lr: Annotated[float, Field(gt=0)] = Field(0.1, description="step size of the class vectors; no schedule")
        seed: int = Field(default=0, description="of the classes that are sampled")

        @model_validator(mode="after")
        def _fewer(self) -> Self:
            if self.sampled is not None and self.sampled > self.classes:
                raise ValueError(f"sampled: {self.sampled} of {self.classes} classes; leave it out for all of them")
            return self

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.needs = [config.label]
        self.states: dict[str, ClassMatrix] = {}

    def memory(self, run: RunShape) -> Mapping[str, LossState]:
        """The vectors of the classes, for each pair."""
        c = self.config
        names: Sequence[str] = [pair_name(p) for p in run.pairs]
        self.states = {name: ClassMatrix(c.classes, c.lr, name, run) for name in names}
        return {f"classes/{name}": x for name, x in self.states.items()}

    def forward(
        self,
        a: Tensor,
        b: Tensor,
        ids: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        extras: Extras | None = None,
    ) -> LossOutput:
        """See the module; scale and bias of the pair are not used."""
        assert extras is not None
        c, matrix = self.config, self.states[pair_name(extras.pair)]
        label = extras.both[c.label]
        if label.ndim != 1 or label.is_floating_point():
            raise ConfigError(
                f"loss: the value {c.label!r} must be one whole number or id a sample; use type int or id"
            )
        there = (ids >= 0) & present(label)
        labels = gather_ids(torch.where(there, label % matrix.count, ABSENT))
        n = (labels >= 0).sum().clamp(min=1)
        drawn = None if c.sampled is None else sampled_rows(c, extras.step, matrix)
        value, gradient, metrics = a.new_zeros(()), torch.zeros_like(matrix.rows), dict[str, Tensor]()
        sides = c.of(a, b)
        for name, x in sides:
            rows = gather(torch.where(there[:, None], x, 0.0))
            found = ShardedSoftmax(rows, labels, matrix, drawn, c)
            value = value + torch.where(labels >= 0, found.loss, 0.0).sum() / n / len(sides)
            gradient += found.gradient()
            metrics[f"entity_top1_{name}"] = found.hits() / n
        matrix.propose(gradient)
        return LossOutput(value, metrics)


def sampled_rows(config: EntityClassifier.Config, step: int, matrix: ClassMatrix) -> Tensor:
    """This rank's rows of the classes that a step's softmax is over, in order."""
    assert config.sampled is not None
    draw = np.random.Generator(np.random.Philox(key=derive_seed("sampled classes", config.seed, step)))
    stride = int(draw.integers(1, matrix.count + 1))
    while math.gcd(stride, matrix.count) > 1:
        stride += 1
    at = (int(draw.integers(matrix.count)) + stride * np.arange(config.sampled, dtype=np.int64)) % matrix.count
    at = np.sort(at[(at >= matrix.start) & (at < matrix.start + matrix.size)]) - matrix.start
    return torch.from_numpy(at).to(matrix.rows.device, non_blocking=True)


class ShardedSoftmax:
    """The loss [N] of all gathered rows, of which this rank computes its own classes' part.

    Args:
        rows: [N, D], of all ranks; labels: [N] their classes, −1: none.
        drawn: this rank's rows of the matrix that are in the softmax; None: all.
    """

    def __init__(
        self, rows: Tensor, labels: Tensor, matrix: ClassMatrix, drawn: Tensor | None, config: EntityClassifier.Config
    ) -> None:
        self.rows, self.labels, self.matrix, self.drawn, self.config = rows, labels, matrix, drawn, config
        self.at = matrix.places(labels)
        self.held = matrix.rows[:-1] if drawn is None else matrix.rows[drawn]
        self.numbers = torch.arange(matrix.size, device=rows.device) if drawn is None else drawn
        cosine = (rows * matrix.rows[self.at]).sum(1)
        own = total(torch.where(self.at < matrix.size, cosine, 0.0))
        self.own = config.scale * (own - config.margin)
        self.top = torch.zeros_like(self.own)  # until it is known
        with torch.no_grad():
            largest = torch.cat([self._others(rows, at).amax(1) for rows, at, _ in self._strips()])
            self.largest = all_gather(largest[None]).amax(0) if world_size() > 1 else largest
            self.top = torch.maximum(self.own, self.largest)
        parts = [
            checkpoint(self._sums, *strip, use_reentrant=False, preserve_rng_state=False) for strip in self._strips()
        ]
        others = total(torch.cat(parts))
        self.lse = (others + (self.own - self.top).exp()).log() + self.top
        self.loss = self.lse - self.own

    def _strips(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Rows, the place of their class here, and their largest logit, some rows at a time."""
        n, all_rows = strip_size(len(self.held), self.config.strip_mb), (self.rows, self.at, self.top.detach())
        return [(x[k : k + n], at[k : k + n], top[k : k + n]) for x, at, top in [all_rows] for k in range(0, len(x), n)]

    def _others(self, rows: Tensor, at: Tensor) -> Tensor:
        """Logits [n, 1 + held] of this rank's classes but the own one, −inf there; the first column is −inf."""
        z = self.config.scale * (rows @ self.held.T)
        z = z.masked_fill(self.numbers == at[:, None], -float("inf"))
        return torch.nn.functional.pad(z, (1, 0), value=-float("inf"))

    def _sums(self, rows: Tensor, at: Tensor, top: Tensor) -> Tensor:
        return (self._others(rows, at) - top[:, None]).exp().sum(1)

    @torch.no_grad()
    def gradient(self) -> Tensor:
        """Σ_i (p_ie − 1[e = y_i]) x_i at this rank's rows of the matrix."""
        out = torch.zeros_like(self.matrix.rows)
        there = self.labels >= 0
        of_held = torch.zeros_like(self.held)
        for k, (rows, at, _) in enumerate(self._strips()):
            start = k * strip_size(len(self.held), self.config.strip_mb)
            kept, lse = (x[start : start + len(rows)] for x in (there, self.lse))
            p = (self._others(rows, at)[:, 1:] - lse[:, None]).exp() * kept[:, None]
            of_held += p.T @ rows
        out.index_copy_(0, self.numbers, of_held)
        pull = torch.where(there, (self.own - self.lse).exp() - 1, 0.0)
        return out.index_add_(0, self.at, pull[:, None] * self.rows)

    @torch.no_grad()
    def hits(self) -> Tensor:
        """Rows whose own class is nearer than every other, without the margin."""
        c = self.config
        return ((self.own + c.scale * c.margin > self.largest) & (self.labels >= 0)).sum().float()
