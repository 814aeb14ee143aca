"""What a distillation term sees, and what all terms share.

A term compares the student's similarities or features with one teacher's. Rows are local, columns come from every rank
through ``gather``, and a value is the sum over local rows divided by (valid rows of the global batch / W): as in
:class:`dualenc.losses.LossOutput`. So the mean over ranks, and the averaged gradient, are those of one process.

A slot takes part if it has both modalities, a pair id, and the teacher's features of both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from dualenc.config import Section
from dualenc.distributed.gather import gather, gather_ids
from dualenc.distributed.world import rank, world_size
from dualenc.errors import ConfigError
from dualenc.losses import LossOutput
from dualenc.losses.blockwise import tiled
from dualenc.losses.blockwise.sweeps import How
from dualenc.registry import Registry


class TermConfig(Section):
    """Settings that every term has."""

    weight: Annotated[float, Field(gt=0)] = Field(1.0, description="weight of this term in the sum")
    strip_mb: Annotated[float, Field(gt=0)] | None = Field(
        default=64.0, description="MiB of a [rows, N] matrix held at once; null: all rows at once"
    )


@dataclass
class Columns:
    """A pair's student features, gathered when a term first asks; shared by all terms and teachers.

    Every term asks for the same features on every rank, so collectives run in the same order everywhere.
    """

    a: Tensor
    b: Tensor

    @cached_property
    def all_a(self) -> Tensor:
        """[N, D], with gradient to every rank."""
        return gather(self.a)

    @cached_property
    def all_b(self) -> Tensor:
        """[N, D], with gradient to every rank."""
        return gather(self.b)


@dataclass
class TeacherSide:
    """One teacher's output for the local slots; without gradient.

    Attributes:
        a, b: [B, D_t] L2-normalised fp32 features; None for a fusion teacher, which has none.
        logit_scale: factor of its cosines; logit_bias: added to its logits (0 where it has none).
        scores_ab, scores_ba: [B, N] a fusion teacher's logits of local rows against the global batch's columns; pairs
            that it did not score are −inf.
    """

    a: Tensor | None = None
    b: Tensor | None = None
    logit_scale: float = 1.0
    logit_bias: float = 0.0
    scores_ab: Tensor | None = None
    scores_ba: Tensor | None = None

    @cached_property
    def all_a(self) -> Tensor:
        """[N, D_t]."""
        return gather_ids(features_of(self.a))

    @cached_property
    def all_b(self) -> Tensor:
        """[N, D_t]."""
        return gather_ids(features_of(self.b))


def features_of(x: Tensor | None) -> Tensor:
    """A teacher's features [B, D_t]. Raises ConfigError for a fusion teacher, which has none."""
    if x is None:
        raise ConfigError(
            "distill: this term compares features, and a fusion teacher has only scores; use dcd or soft_labels"
        )
    return x


@dataclass
class Direction:
    """Local valid rows of one modality against all valid columns of the other.

    Attributes:
        rows: [n, D] student; columns: [C, D] student.
        row_ids: [n]; column_ids: [C]: equal ids are positives of each other.
        row_at: [n] local slots of the rows.
        teacher_rows: [n, D_t], or a fusion teacher's scores [n, C]; teacher_columns: [C, D_t], or None with scores.
        teacher_scale, teacher_bias: of its logits.
    """

    rows: Tensor
    columns: Tensor
    row_ids: Tensor
    column_ids: Tensor
    row_at: Tensor
    teacher_rows: Tensor
    teacher_columns: Tensor | None
    teacher_scale: float
    teacher_bias: float

    def teacher_logits(self, rows: Tensor) -> Tensor:
        """Logits [k, C] of k of ``teacher_rows``, without bias: it would cancel in a softmax."""
        if self.teacher_columns is None:
            return rows
        return self.teacher_scale * (rows @ self.teacher_columns.T)


@dataclass
class PairInputs:
    """Everything a term sees of a pair and one teacher.

    Attributes:
        a, b: [B, D] the student's features; ids: [B], −1 takes no part; logit_scale, logit_bias: [1] the student's.
        columns: the student's features of all ranks.
        teacher: what the teacher says.
        heads: the student's features projected to the teacher's space ([B, D_t] for a and b), where the term has a
            head; else the features themselves.
        pair: the modalities that a and b are of.
    """

    a: Tensor
    b: Tensor
    ids: Tensor
    logit_scale: Tensor
    logit_bias: Tensor | None
    columns: Columns
    teacher: TeacherSide
    heads: tuple[Tensor, Tensor] | None = None
    pair: tuple[str, str] = ("a", "b")

    @cached_property
    def all_ids(self) -> Tensor:
        """[N]."""
        return gather_ids(self.ids)

    @cached_property
    def count(self) -> Tensor:
        """Valid rows of the global batch (at least 1)."""
        return (self.all_ids >= 0).sum().clamp(min=1)

    @property
    def share(self) -> Tensor:
        """What a sum over local rows is divided by: valid rows of the global batch / W."""
        return self.count / world_size()

    @property
    def slots(self) -> Tensor:
        """[B] the place of each slot in the global batch, as columns are gathered."""
        return rank() * len(self.ids) + torch.arange(len(self.ids), device=self.ids.device)

    def projected(self) -> tuple[Tensor, Tensor]:
        """The student's features in the teacher's space, [B, D_t] each, L2-normalised."""
        if self.heads is None:
            return self.a, self.b
        x, y = (torch.nn.functional.normalize(h, dim=-1) for h in self.heads)
        return x, y

    def directions(self) -> Iterator[Direction]:
        """a → b, then b → a."""
        valid, present = torch.nonzero(self.ids >= 0).flatten(), torch.nonzero(self.all_ids >= 0).flatten()
        t, s = self.teacher, self.columns
        all_a, all_b = s.all_a, s.all_b
        for rows, columns, scores, side in ((self.a, all_b, t.scores_ab, "ab"), (self.b, all_a, t.scores_ba, "ba")):
            if scores is not None:
                t_rows, t_columns = scores[valid][:, present], None
            else:
                mine, others = (t.a, t.all_b) if side == "ab" else (t.b, t.all_a)
                t_rows, t_columns = features_of(mine)[valid], others[present]
            yield Direction(
                rows[valid],
                columns[present],
                self.ids[valid],
                self.all_ids[present],
                valid,
                t_rows,
                t_columns,
                t.logit_scale,
                t.logit_bias,
            )


class Term(ABC):
    """A distillation term, built from its ``Config``.

    The attributes below say what it needs from a run; a subclass overrides those that differ, as class attributes
    or in its ``__init__`` where they follow from the settings.
    """

    Config: ClassVar[type[TermConfig]] = TermConfig
    """Its settings in a recipe."""
    uses_heads: bool = False
    """It compares in the teacher's space, by ``PairInputs.projected``: see :class:`HeadTerm`."""
    needs_features: bool = False
    """It cannot work with the scores of a fusion teacher."""
    project: bool | None = None
    """With heads: whether features are projected; None: where the dimensions differ."""
    names_modalities: Mapping[str, Sequence[str]] = MappingProxyType({})
    """Setting → the modalities that its value names, which the recipe must have."""

    config: TermConfig

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def __call__(self, x: PairInputs) -> LossOutput:
        """This rank's share of the term, for a pair and one teacher."""


class HeadConfig(TermConfig):
    """Settings of a term with projections of the student's features to the teacher's dimension."""

    project: bool | None = Field(
        default=None, description="a linear map to the teacher's dimension; null: only where the dimensions differ"
    )


class HeadTerm(Term):
    """A term that compares in the teacher's space; the projections are trained with the student and then dropped."""

    Config: ClassVar[type[TermConfig]] = HeadConfig
    uses_heads = True
    needs_features = True

    config: HeadConfig

    def __init__(self, config: HeadConfig) -> None:
        super().__init__(config)
        self.project = config.project


terms: Registry[type[Term]] = Registry("distillation term", "dualenc.terms", needs=("Config",), base=Term)
"""Name → a :class:`Term`, built from one instance of its ``Config``."""


# --- pieces of several terms -------------------------------------------------------------------------------------


def kl_rows(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(softmax(teacher) ‖ softmax(student)) of each row, [n, C] logits each → [n]; −inf in both is left out."""
    q = teacher.log_softmax(1)
    p = student.log_softmax(1)
    return torch.where(q.isneginf(), 0.0, q.exp() * (q - p)).sum(1)


def how_of(x: PairInputs, strip_mb: float | None) -> How | None:
    """Tiles of at most ``strip_mb`` MiB, or None where the [B, N] matrix is no larger; the same on all ranks."""
    whole = len(x.ids) ** 2 * world_size() * x.a.element_size()
    return None if strip_mb is None or whole <= strip_mb * 2**20 else How(strip_mb, False, tiled)


def entropy_rows(logits: Tensor) -> Tensor:
    """Entropy of softmax(logits) of each row in nats, [n, C] → [n]."""
    q = logits.log_softmax(1)
    return -torch.where(q.isneginf(), 0.0, q.exp() * q).sum(1)


def metrics_of(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Detached, for :class:`LossOutput`."""
    return {k: v.detach() for k, v in values.items()}
