"""SupReMix (Wu et al. 2023, Mixup your own pairs, arXiv 2309.16633): supervised contrast for ordered labels (depth,
time, dose, rating), with mixtures of features as harder negatives and as positives. Here the anchors are of one tower
and what they are compared with of the other, in both directions.

With ℓ the labels, s_ij = α x_i·y_j, P(i) = {j: |ℓ_j − ℓ_i| ≤ same or id_j = id_i} and N(i) the other labelled columns:

    negatives (with the anchor): for j ∈ N(i), n_ij = norm(λ x_i + (1 − λ) y_j), λ ~ Beta(2, 8), nearer to x_i than y_j
    positives (without it): for the r-th label ℓ_j below ℓ_i and the r-th ℓ_k above it, both within ``window``, r = 1 …
        ``mixed``: m_ir = norm(μ ȳ_j + (1 − μ) ȳ_k), μ = (ℓ_k − ℓ_i) / (ℓ_k − ℓ_j), so that its label is ℓ_i; ȳ is the
        mean of the columns with a label

    Z_i = Σ_j e^{s_ij} + Σ_r e^{α x_i·m_ir} + Σ_{j ∈ N(i)} w_ij e^{α x_i·n_ij},   w_ij = |ℓ_i − ℓ_j| / mean_N |ℓ_i − ℓ|
    L = −1/n Σ_i mean_{p ∈ P(i) ∪ mixed} (s_ip − log Z_i)

The paper's release holds no code: Beta(2, 8), the window, and the choice of the pairs to mix are ours. λ is drawn from
the two ids and the step, so it does not depend on ranks, micro-batches or on how often a run was resumed. ``mixed: 0``
and ``mix_negatives: false`` leave SupCon on labels.

Memory: strips of [n, N], recomputed in the backward, and [n, mixed, D].
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from dualenc.config import Section
from dualenc.data.batch import present
from dualenc.distributed.gather import check_equal_shapes, gather, gather_ids
from dualenc.distributed.world import world_size
from dualenc.errors import ConfigError
from dualenc.losses.blockwise.strips import strip_sum
from dualenc.losses.loss import Extras, Loss, LossOutput, losses

_POINTS = 4096


@dataclass(frozen=True, slots=True)
class Mixing:
    """How features are mixed: see the module."""

    same: float = 0.0
    window: float = 5.0
    mixed: int = 1
    mix_negatives: bool = True
    step: int = 0


def supremix_sum(
    x: Tensor,
    y: Tensor,
    ids: tuple[Tensor, Tensor],
    labels: tuple[Tensor, Tensor],
    scale: Tensor,
    how: Mixing,
    mb: float,
) -> Tensor:
    """Σ over the anchors x [n, D] of the loss above, with columns y [C, D]; ids and labels of both ([n], [C])."""
    means, at = by_label(y, labels[1])
    below, above, there = neighbours(labels[0], at, how.same, how.window, how.mixed)
    table = beta_quantiles(x.device, x.dtype)

    def rows_sum(
        q: Tensor,
        qi: Tensor,
        ql: Tensor,
        low: Tensor,
        high: Tensor,
        t: Tensor,
        k: Tensor,
        ki: Tensor,
        kl: Tensor,
        mean: Tensor,
        at: Tensor,
        alpha: Tensor,
    ) -> Tensor:
        cosine = q @ k.T
        distance = (ql[:, None] - kl[None]).abs()
        positive = (distance <= how.same) | (qi[:, None] == ki[None])
        logits = alpha * cosine
        mu = ((at[high] - ql[:, None]) / (at[high] - at[low]).clamp(min=1e-12)).to(q.dtype)[..., None]
        mixture = normalize(torch.where(t[..., None], mu * mean[low] + (1 - mu) * mean[high], 1.0), dim=-1)
        mixed = torch.where(t, alpha * (mixture * q[:, None]).sum(-1), -float("inf"))
        parts = [logits, mixed]
        if how.mix_negatives:
            lam = drawn(qi, ki, how.step, table)
            norm = (lam**2 + (1 - lam) ** 2 + 2 * lam * (1 - lam) * cosine).clamp(min=1e-12).sqrt()
            far = torch.where(positive, 0.0, distance)
            weight = far / (far.sum(1, keepdim=True) / (~positive).sum(1, keepdim=True).clamp(min=1)).clamp(min=1e-12)
            harder = alpha * (lam + (1 - lam) * cosine) / norm + weight.clamp(min=1e-12).log().to(q.dtype)
            parts.append(harder.masked_fill(positive, -float("inf")))
        pulled = torch.where(positive, logits, 0.0).sum(1) + torch.where(t, mixed, 0.0).sum(1)
        return (torch.logsumexp(torch.cat(parts, 1), 1) - pulled / (positive.sum(1) + t.sum(1))).sum()

    rows = (x, ids[0], labels[0], below, above, there)
    shared = (y, ids[1], labels[1], means, at, scale)
    return strip_sum(rows_sum, rows, shared, 3 * len(y), mb).to(x.dtype)


def by_label(y: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of the columns y [C, D] with each distinct label, [U, D], and these labels, ascending, [U].

    A mean, so that which of several columns of one label is mixed does not depend on the order of ranks.
    """
    at, place, count = torch.unique(labels, return_inverse=True, return_counts=True)
    return y.new_zeros(len(at), y.shape[1]).index_add(0, place, y) / count[:, None], at


@torch.no_grad()
def neighbours(of: Tensor, at: Tensor, same: float, window: float, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each label [n] the places [n, count] among the ascending labels ``at`` [U] of the r-th one below it and the
    r-th above it, further than ``same`` away; and bool [n, count]: both are there, within ``window``."""
    r = torch.arange(count, device=of.device)
    low = torch.searchsorted(at, of - same, right=False)[:, None] - 1 - r
    high = torch.searchsorted(at, of + same, right=True)[:, None] + r
    there = (low >= 0) & (high < len(at))
    low, high = low.clamp(min=0), high.clamp(max=max(len(at) - 1, 0))
    if len(at):
        there &= (of[:, None] - at[low] <= window) & (at[high] - of[:, None] <= window)
    return low, high, there


@functools.cache
def beta_quantiles(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Quantiles of Beta(2, 8) at the middles of equal steps; P(X ≤ x) is that of two or more of 9 trials at x."""
    x = torch.linspace(0, 1, 65537, dtype=torch.float64)
    cdf = 1 - (1 - x) ** 9 - 9 * x * (1 - x) ** 8
    u = (torch.arange(_POINTS, dtype=torch.float64) + 0.5) / _POINTS
    return x[torch.searchsorted(cdf, u).clamp(max=len(x) - 1)].to(device, dtype)


def drawn(row_ids: Tensor, column_ids: Tensor, step: int, table: Tensor) -> Tensor:
    """A number of ``table`` for each pair of ids [n], [C] → [n, C]: a hash of both and of the step."""
    salt = row_ids.new_tensor(step) * 1442695040888963407  # a tensor's product wraps around, Python's would not fit
    h = row_ids[:, None] * -7046029254386353131 + column_ids[None] * -4417276706812531889 + salt
    h = (h ^ (h >> 29)) * -5808590958014384161
    h = (h ^ (h >> 32)) * 7191089600892374487
    return table[(h ^ (h >> 29)) & (len(table) - 1)]


@losses.register("supremix")
class SupReMix(Loss):
    """Contrast by ordered labels, with mixtures as harder negatives and as positives.

    Formula: −mean_p (s_ip − log Z_i), Z_i over columns, mixed positives and weighted mixed negatives
    Paper: SupReMix, Wu et al. 2023, arXiv 2309.16633
    Needs: a number for each sample (label)
    """

    takes_extras = True

    class Config(Section):
        """Settings."""

        label: str = Field("label", description="name of the number in data.sources.N.values")
        same: Annotated[float, Field(ge=0)] = Field(0.0, description="labels at most so far apart are positives")
        window: Annotated[float, Field(gt=0)] = Field(5.0, description="how far labels of a mixed positive may be")
        mixed: Annotated[int, Field(ge=0)] = Field(1, description="mixed positives of an anchor, at most")
        mix_negatives: bool = Field(default=True, description="mix negatives with the anchor; false: plain ones")
        strip_mb: Annotated[float, Field(gt=0)] = Field(64.0, description="MiB of [n, N] matrices held at once")

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.needs = (config.label,)

    def forward(
        self,
        a: Tensor,
        b: Tensor,
        ids: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        extras: Extras | None = None,
    ) -> LossOutput:
        """See the module; slots without the label take no part."""
        c = self.config
        label = extras.both.get(c.label) if extras is not None else None
        if label is None or label.ndim != 1:
            raise ConfigError(
                f"loss: supremix needs one number a sample as {c.label!r}; write data.sources.N.values: "
                f"{{{c.label}: {{member: json:KEY, type: float}}}}"
            )
        check_equal_shapes(a)
        use = (ids >= 0) & present(label)
        number = label.to(torch.float64)
        all_use, all_ids = gather_ids(use.to(torch.uint8)).bool(), gather_ids(ids)
        all_label = gather_ids(torch.where(use, number, 0.0))
        share = all_use.sum().clamp(min=1).to(a.dtype) / world_size()
        how = Mixing(c.same, c.window, c.mixed, c.mix_negatives, extras.step if extras is not None else 0)
        value = a.new_zeros(())
        for x, y in ((a, gather(b)), (b, gather(a))):
            given = (ids[use], all_ids[all_use]), (number[use], all_label[all_use])
            value = value + supremix_sum(x[use], y[all_use], *given, logit_scale, how, c.strip_mb)
        return LossOutput(value / (2 * share), {"labelled": all_use.float().mean()})
