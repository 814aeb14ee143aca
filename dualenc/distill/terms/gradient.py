"""Gradient distillation (CLIP-KD's GD, arXiv 2307.12732): matches the loss's gradient at the features to the teacher's.

The gradient of the symmetric InfoNCE Σ_i ½ (ℓ_i(a→b) + ℓ_i(b→a)) at a feature, written out,

    g^a_i = ½ α ( Σ_j p^ab_ij b_j + Σ_j p^ba_ji b_j ) − α·(mean of the positives' b, from both sides)

is taken for the student's features (projected to the teacher's space, with its scale α) and for the teacher's, and

    ℓ_i = ½ ( ‖g^a_i − ĝ^a_i‖² + ‖g^b_i − ĝ^b_i‖² )

p^ba_ji needs the normaliser of row j, which may be on another rank: log-sum-exps are gathered, with gradient.
CLIP-KD divides by the batch size inside g; here it is left out, so that the term does not fade as N².
"""

from __future__ import annotations

import torch
from torch import Tensor

from dualenc.distill.terms.term import HeadTerm, PairInputs, features_of, terms
from dualenc.distributed.gather import gather, gather_ids
from dualenc.losses import LossOutput
from dualenc.losses.blockwise.strips import strip_size, strip_sum


@terms.register("gradient")
class Gradient(HeadTerm):
    """The loss's gradient at the features pulled to the teacher's.

    ``{name: gradient}``; with a projection to the teacher's dimension (training only).

    Raises:
        ConfigError: with a fusion teacher, which has no features.

    Formula: ½ (‖g^a − ĝ^a‖² + ‖g^b − ĝ^b‖²), g the gradient of InfoNCE at the features
    Paper: CLIP-KD, arXiv 2307.12732
    Needs: a teacher with features
    """

    def __call__(self, x: PairInputs) -> LossOutput:
        """See the module."""
        strip = self.config.strip_mb
        a, b = x.projected()
        t = x.teacher
        ta, tb = features_of(t.a), features_of(t.b)
        all_a, all_b = gather(a), gather(b)
        scale_t = x.logit_scale.new_full((1,), t.logit_scale)
        student = (a, b, all_a, all_b, *_normalisers(a, b, all_a, all_b, x, x.logit_scale, strip))
        with torch.no_grad():
            teacher = (ta, tb, t.all_a, t.all_b, *_normalisers(ta, tb, t.all_a, t.all_b, x, scale_t, strip))
        keep, present = x.ids >= 0, x.all_ids >= 0
        ids, all_ids = x.ids[keep], x.all_ids[present]
        _, group, size = torch.unique(all_ids, return_inverse=True, return_counts=True)
        counts = size[group].to(a.dtype)
        total = x.logit_scale.new_zeros(())
        for rows, columns, own, other in ((0, 3, 4, 7), (1, 2, 5, 6)):

            def distance(
                i: Tensor, r: Tensor, rl: Tensor, tr: Tensor, tl: Tensor,
                c: Tensor, cl: Tensor, tc: Tensor, tcl: Tensor, scale: Tensor,
            ) -> Tensor:  # fmt: skip
                positive = (i[:, None] == all_ids[None]).to(r.dtype)
                target = positive / positive.sum(1, keepdim=True) + positive / counts
                g = _gradient(r, c, rl, cl, target, scale)
                with torch.no_grad():
                    wanted = _gradient(tr, tc, tl, tcl, target, scale_t)
                return (g - wanted).square().sum()

            total = total + strip_sum(
                distance,
                (ids, student[rows][keep], student[own][keep], teacher[rows][keep], teacher[own][keep]),
                (
                    student[columns][present],
                    student[other][present],
                    teacher[columns][present],
                    teacher[other][present],
                    x.logit_scale,
                ),
                len(all_ids),
                strip,
            )
        return LossOutput(total / (2 * x.share))


def _gradient(rows: Tensor, columns: Tensor, own: Tensor, other: Tensor, target: Tensor, scale: Tensor) -> Tensor:
    """g of some rows: [k, D], from both directions' softmax; ``own`` [k] and ``other`` [C] are log-sum-exps."""
    logits = scale * (rows @ columns.T)
    p = (logits - own[:, None]).exp() + (logits - other[None]).exp()
    return scale / 2 * ((p - target) @ columns)


def _normalisers(
    a: Tensor, b: Tensor, all_a: Tensor, all_b: Tensor, x: PairInputs, scale: Tensor, strip: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log Σ_j exp of each local row a → b [B] and b → a [B] (0 where the slot takes no part), then of all ranks [N]."""
    out = []
    for rows, columns in ((a, all_b), (b, all_a)):
        present = columns[x.all_ids >= 0]
        keep = torch.nonzero(x.ids >= 0).flatten()
        zero = rows[:0].sum() + columns[:0].sum() + scale[:0].sum()
        lse = rows.new_zeros(len(rows)) + zero
        if len(keep):
            lse = lse.index_copy(0, keep, _lse(rows[keep], present, scale, strip))
        out.append(lse)
    mine, other = out
    join = gather if mine.requires_grad else gather_ids
    return mine, other, join(mine), join(other)


def _lse(rows: Tensor, columns: Tensor, scale: Tensor, strip_mb: float | None) -> Tensor:
    from torch.utils.checkpoint import checkpoint

    def fn(r: Tensor, c: Tensor, s: Tensor) -> Tensor:
        return torch.logsumexp(s * (r @ c.T), 1)

    size = len(rows) if strip_mb is None else strip_size(len(columns), strip_mb)
    if size >= len(rows):
        return fn(rows, columns, scale)
    parts = [
        checkpoint(fn, rows[k : k + size], columns, scale, use_reentrant=False, preserve_rng_state=False)
        for k in range(0, len(rows), size)
    ]
    return torch.cat(parts)
