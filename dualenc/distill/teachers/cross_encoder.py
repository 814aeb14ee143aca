"""Fusion teachers: cross-encoders that score pairs and have no features of their own (ViLT, METER in DCD's paper).

To score all N² pairs of a batch costs N² forwards. Instead each row is scored against its positives and ``fusion``
other columns of the global batch; a pair that is not scored is −inf, not a candidate. The choice is a function of
(seed, step, the two pair ids), not of ranks or micro-batches, so the loss is the same on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from dualenc.config import Recipe, Teacher
from dualenc.data.batch import ABSENT, Batch, TeacherRows, map_tensors
from dualenc.data.dataset import TeacherView
from dualenc.data.modalities import ModalityInput
from dualenc.data.shards.index import ShardSet
from dualenc.distill.objective import TeacherInfo
from dualenc.distill.teachers.cache import as_student_sees
from dualenc.distributed.gather import gather_ids
from dualenc.errors import ConfigError
from dualenc.losses.objective import mark
from dualenc.model.bundle import build_input, state_digest

_PAIRS = 64
"""Pairs scored at once."""


class PairScorer(Protocol):
    """A cross-encoder.

    Attributes:
        modalities: the two it takes.
        settings: modality → settings of its input.
    """

    modalities: tuple[str, str]
    settings: dict[str, dict[str, Any]]

    def encode(self, modality: str, x: Any) -> Tensor:
        """Collated rows → [n, …]: what :meth:`score` needs of an item; the trailing shape is always the same.
        It is sent between ranks."""
        ...

    def score(self, a: Tensor, b: Tensor) -> Tensor:
        """Logits [n] of n items with n others, row by row."""
        ...


class FusionTeacher:
    """See the module; a :class:`~dualenc.distill.teachers.teacher.TeacherSource` that gives scores."""

    def __init__(
        self,
        k: int,
        config: Teacher,
        recipe: Recipe,
        student: Mapping[str, ModalityInput],
        device: torch.device,
        where: str,
        scorer: PairScorer | None = None,
    ) -> None:
        if config.model is None or config.cache is not None or config.fusion is None:
            raise ConfigError(f"{where}.fusion: a fusion teacher runs next to the student; give model, not cache")
        from dualenc.encoders.adapters.vilt import load_scorer

        self.scorer = scorer or load_scorer(config.model)
        if isinstance(self.scorer, torch.nn.Module):
            self.scorer.to(device).eval()
        self.name, self.config, self.seed, self.others = f"teacher{k}", config, recipe.seed, config.fusion
        theirs = {config.modalities.get(m, m): m for m in student}
        if any(m not in theirs for m in self.scorer.modalities):
            raise ConfigError(
                f"{where}: {config.model} has {', '.join(self.scorer.modalities)}, the student has "
                f"{', '.join(student)}; name another teacher, or map the names with modalities"
            )
        self.modalities = {theirs[m]: m for m in self.scorer.modalities}
        self.pair = next(((a, b) for a, b in recipe.pairs if a in self.modalities and b in self.modalities), ("", ""))
        if not self.pair[0]:
            raise ConfigError(
                f"{where}: the student does not contrast {list(self.modalities)}, which {config.model} scores"
            )
        self.embed_dim = 0
        scale = {self.pair: 1.0}
        self.info = TeacherInfo(self.name, config.weight, scale, {}, fusion=True)
        self.redraw: dict[str, tuple[int, int]] = {}
        self.views = {}
        for m, t in self.modalities.items():
            own = build_input(t, self.scorer.settings[t], f"{where}: input of {t}")
            self.views[f"{self.name}/{m}"] = TeacherView(m, as_student_sees(own, student[m]), m in config.plain)

    @torch.no_grad()
    def features(self, batch: Batch) -> TeacherRows:
        """Scores of both directions [B, N], and which slots have both items."""
        a, b = self.pair
        items = {m: self._slots(m, batch) for m in self.pair}
        has = {m: mark(batch.rows[m], batch.size) for m in self.pair}
        ids = torch.where(has[a] & has[b], batch.ids, ABSENT)
        everywhere = gather_ids(ids)
        out = TeacherRows(has)
        for mine, other in ((a, b), (b, a)):
            columns = gather_ids(items[other])
            rows, at = self.chosen(ids, everywhere, batch.step)
            scores = torch.full((batch.size, len(everywhere)), float("-inf"), device=ids.device)
            for k in range(0, len(rows), _PAIRS):
                r, c = rows[k : k + _PAIRS], at[k : k + _PAIRS]
                both = {mine: items[mine][r], other: columns[c]}
                named = {self.modalities[m]: x for m, x in both.items()}
                first, second = (named[m] for m in self.scorer.modalities)
                scores[r, c] = self.scorer.score(first, second) * (self.config.logit_scale or 1.0)
            out.scores[mine, other] = scores
        return out

    def chosen(self, ids: Tensor, everywhere: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """(row, column) of every pair to be scored: each valid row's positives and ``fusion`` other columns."""
        valid = torch.nonzero(ids >= 0).flatten()
        mine = ids[valid, None]
        positive = mine == everywhere[None]
        # 64-bit multiplications that wrap: a hash of the two ids, not of where they stand.
        salt = ((self.seed + step) * 0x5851F42D4C957F2D) & 0x7FFFFFFFFFFFFFFF
        mixed = mine * 0x9E3779B97F4A7C1 + everywhere[None] * 0x2545F4914F6CDD1D + salt
        mixed = (mixed ^ (mixed >> 29)) * 0x1B873593CC9E2D51
        order = (mixed ^ (mixed >> 32)) & 0x7FFFFFFFFFFFFFFF
        nobody = positive | (everywhere < 0)[None]
        order = torch.where(nobody, torch.iinfo(torch.int64).max, order)
        count = min(self.others, len(everywhere))
        picked = torch.zeros_like(positive).scatter(1, order.topk(count, dim=1, largest=False).indices, True)
        row, column = torch.nonzero(positive | (picked & ~nobody), as_tuple=True)
        return valid[row], column

    def _slots(self, m: str, batch: Batch) -> Tensor:
        x = batch.views[f"{self.name}/{m}"]
        parts = [
            self.scorer.encode(self.modalities[m], map_tensors(x, lambda t, k=k: t[k : k + 256]))
            for k in range(0, max(len(batch.rows[m]), 1), 256)
        ]
        encoded = torch.cat(parts)
        out = encoded.new_zeros(batch.size, *encoded.shape[1:])
        return out.index_copy(0, batch.rows[m], encoded[: len(batch.rows[m])])

    def covers(self, sets: Sequence[ShardSet]) -> None:
        """Nothing to check: it runs on any data."""

    def describe(self) -> dict[str, Any]:
        """The weights' hash, and how many other columns a row is scored against."""
        module = self.scorer
        weights = state_digest(module.state_dict()) if isinstance(module, torch.nn.Module) else ""
        return {"weights": weights, "fusion": self.others, "plain": self.config.plain}
