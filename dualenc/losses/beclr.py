"""Positives from a clustered memory (BECLR's dynamic clustered memory, Poulakakis-Daktylidis and Jamali-Rad 2024,
arXiv 2402.02444), between two towers.

Towers, projectors, predictors h and slow copies are those of BYOLIP (:mod:`dualenc.losses.byolip`). Of either side the
newest slow projections are remembered, and K centroids c of them. For row i let P_i be its partner's slow projection
z̃_i and, of the memory in z̃_i's cluster, the k nearest to z̃_i:

    L = −1/n Σ_i ½ ( mean_{z ∈ P^b_i} cos(h(z^a_i), z) + mean_{z ∈ P^a_i} cos(h(z^b_i), z) )

A projection is in the cluster of its nearest centroid. After a step c_k ← norm(m c_k + (1 − m) mean_i Q_ik z̃_i), where
Q are Sinkhorn's balanced assignments of the batch, so no cluster dies. ``neighbours: 0`` is BYOLIP. The paper adds
a repulsion of 0.1 · log mean exp(z·z′/2): here a loss of its own, ``loss: [info_nce, beclr, {name: uniformity, …}]``.

The release assigns by distances where similarities are meant, so items go to far clusters, and takes places in a
cluster for places in the memory, so what it retrieves is arbitrary. How centroids start is ours: seeded directions,
where the paper runs k-means once. Neighbours only help once features mean something: ``warmup_samples``.

Memory: [B, M] cosines in strips; M and K are alike on all ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from dualenc.config import Positive, pair_name
from dualenc.distributed.gather import all_sum
from dualenc.errors import ConfigError
from dualenc.losses.blockwise.strips import strip_size
from dualenc.losses.byolip import BYOLIP, PREDICTED, TARGET
from dualenc.losses.loss import Extras, LossOutput, losses
from dualenc.losses.rowwise import shared_out
from dualenc.losses.swalip import assignments
from dualenc.memory import KeyQueue, LossState, Replicated, RunShape
from dualenc.seeds import derive_seed

CENTROIDS = "centroids"


@losses.register("beclr")
class BECLR(BYOLIP):
    """Each tower predicts the slow copy of the other, and its neighbours in a clustered memory.

    Formula: −½ (mean_{z∈P_b} cos(h(z_a), z) + mean_{z∈P_a} cos(h(z_b), z)), P: the partner and its k nearest
    Paper: BECLR, arXiv 2402.02444
    Needs: nothing; it trains a projector and a predictor for each tower
    """

    class Config(BYOLIP.Config):
        """Settings."""

        memory: Positive = Field(default=4096, description="M: slow projections kept for each side")
        clusters: Positive = Field(default=128, description="K: centroids for each side")
        neighbours: Annotated[int, Field(ge=0)] = Field(3, description="k: further positives of each row")
        momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="m: momentum of the centroids per step")
        epsilon: Annotated[float, Field(ge=0.02)] = Field(default=0.05, description="ε of the Sinkhorn assignments")
        warmup_samples: Annotated[int, Field(ge=0)] = Field(
            default=0, description="samples seen before neighbours become positives"
        )
        strip_mb: Annotated[float, Field(gt=0)] = Field(64.0, description="MiB of a [B, M] matrix held at once")

    config: Config

    def memory(self, run: RunShape) -> Mapping[str, LossState]:
        """Projections and centroids of each side of each pair."""
        c = self.config
        self.kept: dict[str, tuple[KeyQueue, Replicated]] = {}
        for pair in run.pairs:
            for side in "ab":
                name = f"{pair_name(pair)}/{side}"
                start = torch.randn(
                    c.clusters, c.project, generator=torch.Generator().manual_seed(derive_seed("beclr", name))
                )
                centroids = normalize(start, dim=1).to(run.device, run.dtype)
                self.kept[name] = (KeyQueue(c.memory, run, dim=c.project), Replicated({CENTROIDS: centroids}))
        return {
            f"{what}/{name}": state
            for name, both in self.kept.items()
            for what, state in zip(("memory", "clusters"), both, strict=True)
        }

    def forward(
        self,
        a: Tensor,
        b: Tensor,
        ids: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        extras: Extras | None = None,
    ) -> LossOutput:
        """See the module; scale and bias are not used."""
        if extras is None or TARGET not in extras.a:
            raise ConfigError("loss: beclr needs slow towers and projectors, which dualenc train keeps")
        _, share = shared_out(ids, a.dtype)
        there, c = ids >= 0, self.config
        warm = extras.samples_seen(len(ids)) >= c.warmup_samples
        value, used = a.new_zeros(()), a.new_zeros(())
        for own, other, side in ((extras.a, extras.b, "b"), (extras.b, extras.a, "a")):
            guess = normalize(torch.where(there[:, None], own[PREDICTED].chunk(2, 1)[1], 1.0), dim=1)
            target = normalize(torch.where(there[:, None], other[TARGET].detach().chunk(2, 1)[0], 1.0), dim=1)
            queue, clusters = self.kept[f"{pair_name(extras.pair)}/{side}"]
            centroids = clusters.now[CENTROIDS].to(target.dtype)
            total, count = (guess * target).sum(1), torch.ones_like(guess[:, 0])
            if c.neighbours and warm:
                near, found = nearest(target, queue, centroids, c.neighbours, c.strip_mb)
                total = total + (torch.einsum("ne,nke->nk", guess, near) * found).sum(1)
                count = count + found.sum(1)
            value = value - 0.5 * torch.where(there, total / count, 0.0).sum() / share
            used = used + 0.5 * torch.where(there, count - 1, 0.0).sum() / share
            queue.propose(target, ids)
            clusters.propose({CENTROIDS: moved(target, ids, centroids, c.momentum, c.epsilon)})
        return LossOutput(value, {"prediction": -value.detach(), "neighbours": used.detach()})


@torch.no_grad()
def nearest(rows: Tensor, queue: KeyQueue, centroids: Tensor, k: int, strip_mb: float) -> tuple[Tensor, Tensor]:
    """The k nearest keys of each row's cluster, [n, k, E], and which of them are there, 1 or 0 [n, k].

    Args:
        rows: [n, E] unit vectors; centroids: [K, E].
    """
    keys = queue.keys.to(rows.dtype)
    k = min(k, len(keys))
    of_keys = torch.where(queue.ids >= 0, (keys @ centroids.T).argmax(1), -1)
    numbers, cosines = [], []
    size = strip_size(len(keys), strip_mb)
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        alike = (part @ centroids.T).argmax(1)[:, None] == of_keys
        found = torch.topk((part @ keys.T).masked_fill(~alike, -torch.inf), k, dim=1)
        numbers.append(found.indices)
        cosines.append(found.values)
    if not numbers:
        return keys.new_zeros(0, k, keys.shape[1]), keys.new_zeros(0, k)
    there = ~torch.cat(cosines).isneginf()
    return keys[torch.cat(numbers)] * there[:, :, None], there.to(rows.dtype)


@torch.no_grad()
def moved(rows: Tensor, ids: Tensor, centroids: Tensor, momentum: float, epsilon: float) -> Tensor:
    """Centroids [K, E] after the rows [B, E] of all ranks, assigned in equal shares; alike on all ranks."""
    rows = torch.where((ids >= 0)[:, None], rows, 0.0)
    shares = assignments(rows @ centroids.T, ids, epsilon, iterations=3)
    mean = all_sum(shares.T @ rows) / all_sum(shares.sum(0)).clamp(min=torch.finfo(rows.dtype).tiny)[:, None]
    return normalize(momentum * centroids + (1 - momentum) * mean, dim=1)
