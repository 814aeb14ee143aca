"""A run's distillation, put together from the recipe: teachers, heads, loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dualenc.config import Recipe, pair_name
from dualenc.data.batch import Batch
from dualenc.data.dataset import TeacherView
from dualenc.data.shards.index import ShardSet
from dualenc.distill.objective import Distillation, build_terms, head_name
from dualenc.distill.teachers.look_ahead import LookAheadTeacher, Weights
from dualenc.distill.teachers.teacher import TeacherSource, build_teacher, with_teachers
from dualenc.errors import ConfigError, did_you_mean
from dualenc.losses import Loss
from dualenc.model import Bundle
from dualenc.model.bundle import seeded


class Distiller:
    """The distillation of a run.

    Attributes:
        teachers: in the recipe's order.
        views: what the loader brings for online teachers.
        redraw: modality → (seed, passes) for cached ones.
    """

    def __init__(self, recipe: Recipe, bundle: Bundle, device: torch.device) -> None:
        assert recipe.distill is not None
        self.config, self.recipe = recipe.distill, recipe
        self.teachers: list[TeacherSource] = [
            build_teacher(k, t, recipe, bundle.inputs, device) for k, t in enumerate(self.config.teachers)
        ]
        self.follower: LookAheadTeacher | None = None
        if self.config.look_ahead is not None:
            self.follower = LookAheadTeacher(self.config.look_ahead, recipe, bundle, device)
            self.teachers.append(self.follower)
        self.views: dict[str, TeacherView] = {name: v for t in self.teachers for name, v in t.views.items()}
        self.redraw = self._redraw()
        self._check_pairs()
        self._check_modalities()
        self._add_heads(bundle)
        if self.follower is not None:
            self.follower.attach(bundle.model)

    def loss(self, hard: Loss) -> Distillation:
        """The student's loss, around the recipe's own."""
        return Distillation(self.config, hard, [t.info for t in self.teachers])

    def covers(self, sets: Sequence[ShardSet]) -> None:
        """Refuse data that a cached teacher has no features of."""
        for t in self.teachers:
            t.covers(sets)

    def prepare(self, batch: Batch, weights: Weights, loss: Loss) -> Batch:
        """The batch with every teacher's features. A teacher that follows the student asks for its ``weights`` first:
        a name of its state dict → the whole tensor."""
        batch = with_teachers(batch, [t for t in self.teachers if t is not self.follower])
        if self.follower is not None:
            self.follower.follow(weights, batch, loss)
            batch = with_teachers(batch, [self.follower])
        return batch

    def describe(self) -> list[dict[str, Any]]:
        """What must stay the same in every teacher when the run is resumed."""
        return [t.describe() for t in self.teachers]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Tensors of a teacher that changes during the run; empty where all are frozen."""
        return self.follower.state_dict() if self.follower is not None else {}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Set what :meth:`state_dict` gave."""
        if self.follower is not None:
            self.follower.load_state_dict(state)

    def _redraw(self) -> dict[str, tuple[int, int]]:
        out: dict[str, tuple[int, int]] = {}
        for k, t in enumerate(self.teachers):
            for m, how in t.redraw.items():
                if out.setdefault(m, how) != how:
                    raise ConfigError(
                        f"distill.teachers.{k}.cache: its views of {m} were drawn with (seed, views) {how}, another "
                        f"teacher's with {out[m]}: the student can follow only one; write one of the caches again"
                    )
        return out

    def _check_pairs(self) -> None:
        for pair in self.recipe.pairs:
            if not self.config.hard and not any(tuple(pair) in t.info.scale for t in self.teachers):
                raise ConfigError(
                    f"distill.hard is 0 and no teacher has both sides of {pair_name(pair)}: nothing would train this "
                    "pair; raise distill.hard or add a teacher for it"
                )

    def _check_modalities(self) -> None:
        for k, (_, term) in enumerate(build_terms(self.config)):
            for setting, named in term.names_modalities.items():
                for m in named:
                    if m not in self.recipe.modalities:
                        raise ConfigError(
                            f"distill.terms.{k}.{setting}: there is no modality {m!r}. "
                            f"{did_you_mean(m, self.recipe.modalities)}"
                        )

    def _add_heads(self, bundle: Bundle) -> None:
        """A linear map to each teacher's space for every term that compares there."""
        dim = bundle.embed_dim
        for k, (_, term) in enumerate(build_terms(self.config)):
            for t in self.teachers:
                if t.info.fusion and term.needs_features:
                    raise ConfigError(
                        f"distill.terms.{k}: {self.config.terms[k].name} compares features, and {t.name} is a fusion "
                        "teacher, which has only scores; write dcd or soft_labels"
                    )
                if not term.uses_heads:
                    continue
                if term.project is False and t.embed_dim != dim:
                    raise ConfigError(
                        f"distill.terms.{k}.project: false needs equal dimensions, but the student has {dim} and "
                        f"{t.name} {t.embed_dim}; leave project out"
                    )
                if term.project is False or (term.project is None and t.embed_dim == dim):
                    continue
                name = head_name(k, t.name)
                head = {}
                for m in t.modalities:
                    with seeded(self.recipe.seed, name, m):
                        head[m] = nn.Linear(dim, t.embed_dim, bias=False)
                bundle.model.add_head(name, head)
