"""Logistic regression on frozen features: the linear probe, and the small ones of few-shot episodes.

The objective is Σ cross entropy · C + ½‖W‖² over C (the bias is free), as scikit-learn and the published CLIP probes
write it, solved by L-BFGS. Gradients are summed over blocks of rows: memory grows with N·D and C·D, not with N·C.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dualenc_evals.metrics.scores import Ints, block_starts, class_ranks

GRID = (1e-2, 1.0, 1e2, 1e4, 1e6)
"""Strengths tried first, then one ten times smaller and one ten times larger than the best. Features have norm 1."""
MAX_ITERATIONS = 300


def fit(x: Tensor, labels: Ints, classes: int, strength: float, start: Tensor | None = None) -> Tensor:
    """[C, D + 1] weights, the bias last.

    Args:
        x: [N, D] features; labels: [N] class numbers.
        strength: C, the inverse of the regularisation.
        start: weights to begin from.
    """
    y = torch.from_numpy(labels)
    weights = torch.zeros(classes, x.shape[1] + 1, dtype=torch.float64) if start is None else start.clone()
    weights.grad = torch.zeros_like(weights)
    n = len(x)
    blocks = block_starts(n, classes + x.shape[1])

    def closure() -> Tensor:
        bare = weights[:, :-1]
        loss = bare.square().sum() / (2 * strength * n)
        grad = torch.zeros_like(weights)
        grad[:, :-1] = bare / (strength * n)
        for s, e in blocks:
            d = x[s:e].double()
            logp = (d @ bare.T + weights[:, -1]).log_softmax(1)
            loss = loss - logp.gather(1, y[s:e, None]).sum() / n
            delta = logp.exp()
            delta.scatter_add_(1, y[s:e, None], -torch.ones(e - s, 1, dtype=torch.float64))
            grad[:, :-1] += delta.T @ d / n
            grad[:, -1] += delta.sum(0) / n
        assert weights.grad is not None
        weights.grad.copy_(grad)
        return loss

    _minimize([weights], closure)
    return weights.detach()


def _minimize(parameters: list[Tensor], closure: object) -> None:
    solver = torch.optim.LBFGS(
        parameters, max_iter=MAX_ITERATIONS, tolerance_grad=1e-7, tolerance_change=1e-12, history_size=10,
        line_search_fn="strong_wolfe",
    )  # fmt: skip
    solver.step(closure)  # type: ignore[arg-type, no-untyped-call]


def ranks_under(weights: Tensor, x: Tensor, labels: Ints) -> tuple[Ints, Ints]:
    """(rank of the true class [N], predicted class [N]); a tie goes to the wrong class."""
    parts = []
    for s, e in block_starts(len(x), len(weights)):
        scores = x[s:e].double() @ weights[:, :-1].T + weights[:, -1]
        parts.append(class_ranks(scores, labels[s:e]))
    return np.concatenate([r for r, _ in parts]), np.concatenate([p for _, p in parts])


def split(labels: Ints, share: float, seed: int) -> tuple[Ints, Ints]:
    """(kept, held out) rows by seed: ``share`` of each class, rounded; a class's only item is kept."""
    rng = np.random.default_rng(seed)
    held = [
        rng.permutation(np.flatnonzero(labels == c))[: min(round(share * n), n - 1)]
        for c, n in enumerate(np.bincount(labels).tolist())
        if n
    ]
    out = np.sort(np.concatenate(held)) if held else np.zeros(0, dtype=np.int64)
    return np.setdiff1d(np.arange(len(labels)), out), out


def tuned(x: Tensor, labels: Ints, classes: int, seed: int) -> tuple[Tensor, float]:
    """(weights fitted on all items, the C that was right most often on a held-out fifth; the smallest on ties)."""
    kept, held = split(labels, 0.2, seed)
    if not len(held):
        return fit(x, labels, classes, 1.0), 1.0
    rows, out = torch.from_numpy(kept), torch.from_numpy(held)
    right: dict[float, int] = {}
    last: Tensor | None = None

    def look(strength: float) -> None:
        nonlocal last
        last = fit(x[rows], labels[kept], classes, strength, last)
        right[strength] = int((ranks_under(last, x[out], labels[held])[0] == 1).sum())

    for strength in GRID:
        look(strength)
    best = min(right, key=lambda s: (-right[s], s))
    for strength in (best / 10, best * 10):
        look(strength)
    best = min(right, key=lambda s: (-right[s], s))
    return fit(x, labels, classes, best, last), best


def fit_episodes(support: Tensor, queries: Tensor, strength: float = 1.0) -> Tensor:
    """Logits [E, n, w] of ``queries [E, n, D]`` under E separate regressions on ``support [E, w, s, D]``.

    One solver for all: their objectives share no variable, so the sum's minimum is each one's.
    """
    E, w, s, D = support.shape
    x = support.flatten(1, 2)
    y = torch.arange(w).repeat_interleave(s).expand(E, -1)
    weights = torch.zeros(E, w, D, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(E, 1, w, dtype=torch.float64, requires_grad=True)

    def closure() -> Tensor:
        weights.grad = bias.grad = None
        logits = x @ weights.transpose(1, 2) + bias
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum")
        total = strength * loss + weights.square().sum() / 2
        torch.autograd.backward(total)
        return total.detach()

    with torch.enable_grad():
        _minimize([weights, bias], closure)
    return (queries @ weights.detach().transpose(1, 2)) + bias.detach()
