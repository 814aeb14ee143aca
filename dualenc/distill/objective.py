"""The student's loss: its own task and the distillation terms, as one :class:`dualenc.losses.Loss`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dualenc.config import Distill, settings_as
from dualenc.data.batch import ABSENT
from dualenc.distill.terms.term import Columns, PairInputs, TeacherSide, Term, terms
from dualenc.losses import Extras, Loss, LossOutput
from dualenc.losses.loss import SideName


@dataclass(frozen=True)
class TeacherInfo:
    """What the loss needs to know about a teacher.

    Attributes:
        name: of its rows in :attr:`dualenc.data.batch.Batch.teachers`.
        weight: relative, among the teachers of a pair.
        scale, bias: of its logits, by pair of the student.
        fusion: it gives scores, not features.
    """

    name: str
    weight: float
    scale: Mapping[tuple[str, str], float]
    bias: Mapping[tuple[str, str], float]
    fusion: bool = False


class Distillation(Loss):
    """``hard`` · loss + Σ weight · (mean over teachers of a term).

    It has no parameters: heads are the model's (see :func:`head_name`), and reach it among the extras.
    """

    takes_extras = True

    def __init__(self, config: Distill, hard: Loss, teachers: Sequence[TeacherInfo]) -> None:
        super().__init__()
        self.weight, self.hard, self.teachers = config.hard, hard, list(teachers)
        self.terms = build_terms(config)

    def gathers(self, global_batch: int, device: torch.device) -> Collection[SideName]:
        """What the recipe's own loss gathers; terms that ask later gather by themselves."""
        return self.hard.gathers(global_batch, device) if self.weight else ()

    def forward(
        self,
        a: Tensor,
        b: Tensor,
        ids: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        *,
        extras: Extras,
    ) -> LossOutput:
        """As :class:`dualenc.losses.Loss`; ``extras`` brings the teachers' output and the projected features."""
        value, metrics = logit_scale.new_zeros(()), {}
        if self.weight:
            more = {"extras": extras} if self.hard.takes_extras else {}
            out = self.hard(a, b, ids, logit_scale, logit_bias, **more)
            value = value + self.weight * out.value
            metrics = {**out.metrics, "hard": out.value.detach()}
        columns = Columns(a, b)
        present = [t for t in self.teachers if extras.pair in t.scale]
        total = sum(t.weight for t in present)
        sides = [(t, *self._side(t, extras, ids)) for t in present]
        inputs = [PairInputs(a, b, i, logit_scale, logit_bias, columns, side, pair=extras.pair) for _, side, i in sides]
        for k, (name, term) in enumerate(self.terms):
            for (teacher, _, _), x in zip(sides, inputs, strict=True):
                head = head_name(k, teacher.name)
                x.heads = (extras.a[head], extras.b[head]) if head in extras.a else None
                out = term(x)
                share = teacher.weight / total
                value = value + term.config.weight * share * out.value
                for key, number in {f"distill_{name}": out.value.detach(), **out.metrics}.items():
                    metrics[key] = metrics.get(key, 0.0) + share * number
        return LossOutput(value, metrics)

    def _side(self, t: TeacherInfo, extras: Extras, ids: Tensor) -> tuple[TeacherSide, Tensor]:
        """The teacher's features of a pair, and the ids, absent where the teacher has no features."""
        scale, bias = t.scale[extras.pair], t.bias.get(extras.pair, 0.0)
        (a, b), rows = extras.pair, extras.teachers[t.name]
        kept = torch.where(rows.has[a] & rows.has[b], ids, ABSENT)
        if t.fusion:
            return TeacherSide(None, None, scale, bias, rows.scores[a, b], rows.scores[b, a]), kept
        return TeacherSide(rows.features[a], rows.features[b], scale, bias), kept


def build_terms(config: Distill) -> list[tuple[str, Term]]:
    """The recipe's terms; a term that is listed twice gets a number.

    Raises:
        ConfigError: for an unknown name (with the nearest known one) or setting.
    """
    out: list[tuple[str, Term]] = []
    names = [c.name for c in config.terms]
    for k, component in enumerate(config.terms):
        cls = terms[component.name]
        term: Term = cls(settings_as(cls.Config, component.settings, f"distill.terms.{k}"))
        twice = names.count(component.name) > 1
        out.append((f"{component.name}{k}" if twice else component.name, term))
    return out


def head_name(term: int, teacher: str) -> str:
    """The group of the model's outputs with the features projected for one term and one teacher."""
    return f"distill{term}_{teacher}"
