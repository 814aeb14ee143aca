"""Few-shot episodes: classes drawn at random, a few labelled items of each, queries to be told apart.

``prototype``: the nearest class mean. ``opta``: the same after optimal transport moved the class means towards the
queries (OpTA of BECLR, Poulakakis-Daktylidis & Jamali-Rad, ICLR 2024, seed S37). ``fewshot``: logistic regression on
the labelled items. ``context``: an attention head without parameters over the labelled items, the class of each read
with the weight softmax(cosine / 0.07) (matching networks, Vinyals et al., arXiv 1606.04080; in SINC, seed S55, a
trained transformer reads them). OpTA sees all queries at once and assumes that classes are equally frequent among
them, as they are in an episode: so its number is always reported next to the inductive one on the same episodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dualenc_evals.metrics.linear import fit_episodes
from dualenc_evals.metrics.scores import Floats, Ints, class_ranks

EPSILON = 0.05
"""Entropic regularisation of the transport, of costs scaled to at most 1."""
ITERATIONS = 200
TAU = 0.07
"""Temperature of the attention in :func:`in_context`."""
OWN_SHARE = 0.7
"""Weight of a class mean of several items in :func:`opta`; 0.7 and 0.3 are this project's choice."""
TOGETHER = 50
"""Episodes computed at once."""


@dataclass(frozen=True)
class Episodes:
    """E episodes of w classes: ``support [E, w, s]`` and ``queries [E, w, q]``, rows of the two feature tables."""

    support: Ints
    queries: Ints


def draw_episodes(
    train: Ints, test: Ints, *, ways: int, shots: int, queries: int, episodes: int, seed: int
) -> Episodes | None:
    """Draw episodes by seed; labelled items from ``train [N]`` labels, queries from ``test [M]``.

    Classes need ``shots`` items in one and at least one in the other. If there are fewer classes than ``ways``, or
    fewer items than ``queries``, as many as there are. None when not even two classes qualify.
    """
    have = np.bincount(train, minlength=int(max(train.max(), test.max())) + 1)
    held = np.bincount(test, minlength=len(have))
    usable = np.flatnonzero((have >= shots) & (held >= 1))
    if len(usable) < 2:
        return None
    ways, queries = min(ways, len(usable)), min(queries, int(held[usable].min()))
    rng = np.random.default_rng(seed)
    of_train = {int(c): np.flatnonzero(train == c) for c in usable}
    of_test = {int(c): np.flatnonzero(test == c) for c in usable}
    support = np.empty((episodes, ways, shots), dtype=np.int64)
    asked = np.empty((episodes, ways, queries), dtype=np.int64)
    for e in range(episodes):
        for w, c in enumerate(rng.choice(usable, ways, replace=False).tolist()):
            support[e, w] = rng.choice(of_train[c], shots, replace=False)
            asked[e, w] = rng.choice(of_test[c], queries, replace=False)
    return Episodes(support, asked)


def standardized(x: Tensor) -> Tensor:
    """Each row of ``x [..., D]`` to mean 0 and variance 1 over its D numbers, fp64."""
    d = x.double()
    d = d - d.mean(-1, keepdim=True)
    return d / d.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)


def sinkhorn(cost: Tensor, epsilon: float, iterations: int = ITERATIONS) -> Tensor:
    """Entropic transport plans [..., n, m] with uniform margins for ``cost [..., n, m]`` (Cuturi 2013).

    Everything in logarithms: a small ``epsilon`` cannot overflow.
    """
    n, m = cost.shape[-2:]
    kernel = -cost / epsilon
    v = torch.zeros_like(cost[..., :1, :])
    u = -np.log(n) - (kernel + v).logsumexp(-1, keepdim=True)
    for _ in range(iterations):
        v = -np.log(m) - (kernel + u).logsumexp(-2, keepdim=True)
        before, u = u, -np.log(n) - (kernel + v).logsumexp(-1, keepdim=True)
        if float((u - before).abs().max()) < 1e-7:
            break
    plan: Tensor = (kernel + u + v).exp()
    return plan


def transported(prototypes: Tensor, queries: Tensor, epsilon: float = EPSILON) -> Tensor:
    """Class means ``[..., w, D]`` moved to the queries ``[..., q, D]`` that transport sends to them.

    The plan's rows, normalised, weigh the queries; the cost is the squared distance, scaled to at most 1. As
    ``epsilon`` → 0 and with queries = prototypes nothing moves; as it grows all go to the queries' mean.
    """
    cost = torch.cdist(prototypes, queries).square()
    plan = sinkhorn(cost / cost.amax((-2, -1), keepdim=True).clamp_min(1e-12), epsilon)
    weights: Tensor = plan / plan.sum(-1, keepdim=True)
    return weights @ queries


def opta(prototypes: Tensor, queries: Tensor, shots: int, epsilon: float = EPSILON) -> Tensor:
    """Five rounds of transport if a class has one item; else one round, mixed with the class mean itself."""
    if shots > 1:
        return OWN_SHARE * prototypes + (1 - OWN_SHARE) * transported(prototypes, queries, epsilon)
    for _ in range(5):
        prototypes = transported(prototypes, queries, epsilon)
    return prototypes


def in_context(support: Tensor, queries: Tensor, tau: float = TAU) -> Tensor:
    """Logarithms [..., q, w] of the attention of queries ``[..., q, D]`` to the labelled items of each class
    ``[..., w, s, D]``, up to a constant for each query. One item a class: its nearest one."""
    own, items = (torch.nn.functional.normalize(t, dim=-1) for t in (queries, support))
    # One product at a time: equal items are exactly equally near.
    near = [(own[..., :, None, :] * items[..., None, :, s, :]).sum(-1) for s in range(support.shape[-2])]
    return torch.stack(near, -1).div(tau).logsumexp(-1)


def accuracies(x: Tensor, y: Tensor, episodes: Episodes, methods: Sequence[str]) -> dict[str, Floats]:
    """Share of right queries of each episode, [E] by method (``prototype``, ``opta``, ``fewshot``, ``context``).

    Args:
        x: [N, D] features of the labelled items; y: [M, D] those of the queries.
    """
    out: dict[str, list[Floats]] = {m: [] for m in methods}
    shots = episodes.support.shape[2]
    for start in range(0, len(episodes.support), TOGETHER):
        chosen = slice(start, start + TOGETHER)
        support = standardized(x[torch.from_numpy(episodes.support[chosen])])
        queries = standardized(y[torch.from_numpy(episodes.queries[chosen])])
        flat = queries.flatten(1, 2)
        means = support.mean(2)
        for method in methods:
            if method == "fewshot":
                scores = fit_episodes(support, flat)
            elif method == "context":
                scores = in_context(support, flat)
            else:
                centres = opta(means, flat, shots) if method == "opta" else means
                # One difference at a time: equal centres are exactly equally far.
                scores = -(flat[:, :, None] - centres[:, None]).square().sum(-1)
            out[method].append(_right(scores, queries.shape[2]))
    return {m: np.concatenate(v) for m, v in out.items()}


def _right(scores: Tensor, queries: int) -> Floats:
    """[E] share of queries whose class (queries are sorted by class) scores strictly highest."""
    E, n, ways = scores.shape
    labels = np.tile(np.repeat(np.arange(ways), queries), E)
    ranks, _ = class_ranks(scores.reshape(E * n, ways), labels)
    return np.asarray((ranks == 1).reshape(E, n).mean(1))
