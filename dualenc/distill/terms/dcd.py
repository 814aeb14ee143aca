"""Dynamic contrastive distillation (Rao et al., arXiv 2207.01426), for dual encoders.

**Which samples the student's contrast sees.** C_i = the positives of row i and the H other columns of the global batch
that the *teacher* scores highest. Everything below is over C_i, so the columns of teacher and student are the same ones
by construction, whatever the teacher's order.

**What is learned from them.**

    KD_i  = T² · KL(softmax_C(l^T/T) ‖ softmax_C(l/T)),   or the mean over C_i of (l^T − l)²     (l: scale · cosine)
    NCE_i = −mean_{j positive} log softmax_C(l)_j                                              (the student's own task)
    L     = 1/n Σ_i ( a · k_i · KD_i + (1 − a) · o_i · NCE_i )      over the global batch, both directions, ½ each

**How much of each, by sample.** k, o carry no gradient.

    teacher   e_i = H_i / Σ H, the entropy of softmax_C(l^T): row i's share of the teacher's total uncertainty.
              k_i = n · softmax_i((1 − e_i)² / τ): a confident teacher counts more; o_i = n · e_i: where it is unsure,
              the student's own task does.
    student   k_i = 1 − exp(−CE^S_i / CE^T_i), the cross-entropies of student and teacher on C_i: near 1 while the
              student is far behind, falling as it catches up, so the mixture moves with the student's own state from
              the teacher's targets to its own task; o_i as above.
    none      k_i = o_i = 1.

Plain knowledge distillation, the control, is ``candidates: all, dynamic: none``: the same recipe, one line.

The released code (a cross-encoder student) differs: its dynamic KD weight multiplies a batch mean by weights that sum
to 1, which changes nothing; its softmax over (1 − e)² has no temperature and is nearly flat; it orders the teacher's
scores by rank and the student's with the positive first, so the targets are swapped wherever the teacher did not rank
the positive first; its own task is a binary cross-entropy. ``student`` is the weight of a second distiller in that
code, which nothing calls. What "dynamic" is in the paper beyond its abstract could not be checked.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from dualenc.config import Positive, Share
from dualenc.distill.terms.term import Direction, PairInputs, Term, TermConfig, entropy_rows, kl_rows, metrics_of, terms
from dualenc.distributed.gather import gather_ids
from dualenc.losses import LossOutput
from dualenc.losses.blockwise.strips import nce_rows, strip_size, strip_sum


@terms.register("dcd")
class DCD(Term):
    """Dynamic contrastive distillation: the teacher's hard negatives, weights by sample. Use it with ``hard: 0``.

    ``{name: dcd, candidates: 31, dynamic: student}``. It contains the student's own task, hence ``hard: 0``.

    Formula: a k_i KD_i + (1 − a) o_i NCE_i over the positives and the H columns that the teacher scores highest
    Paper: Dynamic contrastive distillation, arXiv 2207.01426
    Needs: a teacher, with features or scores
    """

    class Config(TermConfig):
        """Settings."""

        candidates: Positive | Literal["all"] = Field(
            default=31, description="H: hard negatives per row; all: every column"
        )
        dynamic: Literal["student", "teacher", "none"] = Field(
            default="student", description="whose entropy weights a row; none: equal weights"
        )
        a: Share = Field(default=0.5, description="share of the distillation term")
        kd: Literal["kl", "mse"] = Field(default="kl", description="distance between the distributions")
        temperature: Annotated[float, Field(gt=0)] = Field(default=1.0, description="softens both distributions")
        weight_temperature: Annotated[float, Field(gt=0)] = Field(
            default=1.0, description="τ of the softmax over (1 − e)²; the smaller, the more the weights differ"
        )

    config: Config

    def __call__(self, x: PairInputs) -> LossOutput:
        """See the module."""
        value, metrics = x.logit_scale.new_zeros(()), []
        for d in x.directions():
            total, numbers = self._direction(x, d)
            value = value + total / 2
            metrics.append(numbers)
        mean = {k: torch.stack([m[k] for m in metrics]).mean() for k in metrics[0]}
        return LossOutput(value, metrics_of(mean))

    def _direction(self, x: PairInputs, d: Direction) -> tuple[Tensor, dict[str, Tensor]]:
        where, member = choose(d, self.config.candidates, self.config.strip_mb)
        state = row_state(d, where, member, x.logit_scale.detach(), self.config)
        kd, own = self._weights(x, d, state)

        def rows_sum(
            rows: Tensor, t_rows: Tensor, at: Tensor, inside: Tensor, ids: Tensor, k: Tensor, o: Tensor,
            columns: Tensor, scale: Tensor,
        ) -> Tensor:  # fmt: skip
            student, teacher, positive = on_candidates(d, rows, t_rows, at, inside, ids, columns, scale)
            return torch.stack(
                [
                    (k * distance_rows(student, teacher, self.config)).sum(),
                    (o * nce_rows(student, positive)).sum(),
                ]
            )

        parts = strip_sum(
            rows_sum,
            (d.rows, d.teacher_rows, where, member, d.row_ids, kd, own),
            (d.columns, x.logit_scale),
            len(d.columns),
            self.config.strip_mb,
        )
        both = parts.expand(2) / x.share if parts.ndim == 0 else parts / x.share  # no row here: one zero for both
        taught, alone = self.config.a * both[0], (1 - self.config.a) * both[1]
        numbers = {
            "kd_weight": kd.sum() / x.share,
            "kd_weight_sd": spread(x, d, kd),
            "own_weight_sd": spread(x, d, own),
            "kd_part": taught,
            "own_part": alone,
        }
        return taught + alone, numbers

    def _weights(self, x: PairInputs, d: Direction, state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """k and o of the local valid rows, [n] each."""
        entropy = state["entropy"]
        one = torch.ones_like(entropy)
        if self.config.dynamic == "none":
            return one, one
        everybody = over_ranks(x, d, entropy)
        total = everybody.sum()
        n = x.count.to(entropy.dtype)
        own = n * entropy / total if float(total) > 0 else one
        if self.config.dynamic == "student":
            return 1 - torch.exp(-state["student_ce"] / state["teacher_ce"].clamp(min=1e-6)), own
        there = x.all_ids >= 0
        power = (1 - everybody[there] / total.clamp(min=1e-30)).square() / self.config.weight_temperature
        mine = (1 - entropy / total.clamp(min=1e-30)).square() / self.config.weight_temperature
        return n * torch.exp(mine - torch.logsumexp(power, 0)) if len(mine) else one, own


# --- the pieces, as functions on one direction -------------------------------------------------------------------


@torch.no_grad()
def choose(d: Direction, candidates: int | str, strip_mb: float | None) -> tuple[Tensor, Tensor]:
    """Columns of each row's C_i: their positions [n, K], and which of the K are in it, bool [n, K].

    K = H + the most positives that any local row has. Positives come first, then the teacher's ranking. With ``all`` K
    is 0: nothing is chosen, and no [n, N] table of positions is made (see :func:`on_candidates`).
    """
    if candidates == "all":
        nothing = torch.zeros(len(d.rows), 0, dtype=torch.long, device=d.rows.device)
        return nothing, nothing.bool()
    count = torch.zeros(len(d.rows), dtype=torch.long, device=d.rows.device)
    size = strip_size(len(d.columns), strip_mb)
    strips = [slice(k, k + size) for k in range(0, len(d.rows), size)]
    for s in strips:
        count[s] = (d.row_ids[s, None] == d.column_ids[None]).sum(1)
    hard = int(candidates)
    width = min(hard + (int(count.max()) if len(count) else 0), len(d.columns))
    where = torch.zeros(len(d.rows), width, dtype=torch.long, device=d.rows.device)
    scored = torch.zeros(len(d.rows), width, dtype=torch.bool, device=d.rows.device)
    for s in strips:
        scores = d.teacher_logits(d.teacher_rows[s])
        positive = d.row_ids[s, None] == d.column_ids[None]
        best, where[s] = scores.masked_fill(positive, float("inf")).topk(width, dim=1)
        scored[s] = ~best.isneginf()
    member = scored & (torch.arange(width, device=where.device)[None] < (count + hard)[:, None])
    return where, member


def on_candidates(
    d: Direction, rows: Tensor, t_rows: Tensor, at: Tensor, inside: Tensor, ids: Tensor, columns: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Student's and teacher's logits on C_i, [k, K] each (−inf outside), and which are positives, bool [k, K].

    With no choice made (``at`` is [k, 0]) C_i is every column that the teacher scored.
    """
    student, teacher = scale * (rows @ columns.T), d.teacher_logits(t_rows)
    positive = ids[:, None] == d.column_ids[None]
    if at.shape[1]:
        student, teacher, positive = (x.gather(1, at) for x in (student, teacher, positive))
        outside = ~inside
    else:
        outside = teacher.isneginf()
    never = float("-inf")
    return student.masked_fill(outside, never), teacher.masked_fill(outside, never), positive & ~outside


def distance_rows(student: Tensor, teacher: Tensor, config: DCD.Config) -> Tensor:
    """KD_i of each row, [k]."""
    if config.kd == "kl":
        t = config.temperature
        return t * t * kl_rows(student / t, teacher / t)
    inside = ~teacher.isneginf()
    difference = torch.where(inside, student, 0.0) - torch.where(inside, teacher, 0.0)
    return difference.square().sum(1) / inside.sum(1)


@torch.no_grad()
def row_state(d: Direction, where: Tensor, member: Tensor, scale: Tensor, config: DCD.Config) -> dict[str, Tensor]:
    """The teacher's entropy and both cross-entropies on C_i, [n] each."""
    if config.dynamic == "none":
        return {"entropy": d.rows.new_ones(len(d.rows))}
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    size = strip_size(len(d.columns), config.strip_mb)
    for k in range(0, len(d.rows), size):
        s = slice(k, k + size)
        student, teacher, positive = on_candidates(
            d, d.rows[s], d.teacher_rows[s], where[s], member[s], d.row_ids[s], d.columns, scale
        )
        teacher = teacher / config.temperature
        parts.append((entropy_rows(teacher), nce_rows(student, positive), nce_rows(teacher, positive)))
    names = ("entropy", "student_ce", "teacher_ce")
    if not parts:
        return {name: d.rows.new_zeros(0) for name in names}
    return {name: torch.cat([p[i] for p in parts]) for i, name in enumerate(names)}


def over_ranks(x: PairInputs, d: Direction, values: Tensor) -> Tensor:
    """Values [n] of the local valid rows as [N] of all ranks' slots, 0 where a slot takes no part; no gradient."""
    local = values.new_zeros(len(x.ids)).index_copy(0, d.row_at, values)
    return gather_ids(local)


def spread(x: PairInputs, d: Direction, weights: Tensor) -> Tensor:
    """Standard deviation of a weight over the rows of the global batch, divided by its mean."""
    there = over_ranks(x, d, weights)[x.all_ids >= 0]
    if len(there) < 2:
        return weights.new_zeros(())
    return there.std(correction=0) / there.mean().clamp(min=1e-12)
