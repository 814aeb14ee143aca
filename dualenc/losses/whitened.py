"""Shuffled group whitening (WhitenedCSE, Zhuo et al. 2023, arXiv 2305.17746): the batch's features are made isotropic
before they are compared.

For each of ``shuffles``: permute the D dimensions (of both towers alike), cut them into ``groups``, centre each group
over the valid rows of the global batch and multiply it by the inverse square root of its covariance (ZCA), undo the
permutation, normalise. L is the mean of the loss inside over the shuffles, each tower whitened by its own statistics.

The release shares one shuffle among all its positives by mistake; here they differ, drawn from ``seed`` and the step
alone. Sums over ranks make covariance and value those of one process. As published the whitening is used in training
only: evaluation sees the plain features.

Memory: groups · (D / groups)² numbers of covariance, and the loss inside, once for each shuffle.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from dualenc.config import Positive
from dualenc.distributed.gather import gather_ids, total
from dualenc.errors import ConfigError
from dualenc.losses.loss import Extras, LossOutput, losses
from dualenc.losses.wrapper import Wrapper, WrapperConfig


class InverseRoot(torch.autograd.Function):
    """A^(−1/2) of symmetric positive matrices [G, g, g]. Its gradient solves a Lyapunov equation, in which equal
    eigenvalues are no division by zero, as they are in the gradient of eigenvectors."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(a)
        root = values.sqrt()
        ctx.save_for_backward(root, vectors)
        out: Tensor = (vectors / root[:, None, :]) @ vectors.mT
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        root, v = ctx.saved_tensors
        # d(S⁻¹) = −S⁻¹ dS S⁻¹ and S dS + dS S = dA, both in the basis of the eigenvectors.
        inner = v.mT @ ((grads[0] + grads[0].mT) / 2) @ v
        inner = -inner / (root[:, :, None] * root[:, None, :]) / (root[:, :, None] + root[:, None, :])
        out: Tensor = v @ inner @ v.mT
        return out


def whitened(x: Tensor, ids: Tensor, groups: int, order: Tensor, eps: float) -> Tensor:
    """x [B, D] → [B, D] whose groups of the dimensions ``order`` [D] have covariance I over all ranks' valid rows."""
    valid = (ids >= 0)[:, None]
    n = (gather_ids(ids) >= 0).sum().clamp(min=1).to(x.dtype)
    y = torch.where(valid, x, 0.0)[:, order]
    y = torch.where(valid, y - total(y.sum(0)) / n, 0.0).view(len(x), groups, -1).transpose(0, 1)  # [G, B, g]
    covariance = total(y.mT @ y) / n
    unit = torch.eye(y.shape[2], dtype=x.dtype, device=x.device)
    ridge = eps * covariance.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    root: Tensor = InverseRoot.apply(covariance + ridge * unit)
    return (y @ root).transpose(0, 1).flatten(1)[:, torch.argsort(order)]


@losses.register("whitened")
class Whitened(Wrapper):
    """A loss on features whose groups of dimensions are whitened over the batch.

    Formula: mean over shuffles of L(norm(W_a a), norm(W_b b)), W = groupwise covariance^(−1/2), L another loss
    Paper: WhitenedCSE, Zhuo et al. 2023, arXiv 2305.17746
    Needs: nothing; it stands around another loss
    """

    class Config(WrapperConfig):
        """Settings."""

        groups: Positive = Field(32, description="divides embed_dim; 1: full ZCA; embed_dim: standardised dimensions")
        shuffles: Positive = Field(default=2, description="permutations of the dimensions, averaged over")
        eps: Annotated[float, Field(gt=0)] = Field(1e-3, description="added to the covariance, times its mean variance")
        seed: int = Field(default=0, description="of the permutations")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.config = config

    def forward(
        self,
        a: Tensor,
        b: Tensor,
        ids: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        extras: Extras | None = None,
    ) -> LossOutput:
        """See the module."""
        c, dim = self.config, a.shape[1]
        if dim % c.groups:
            raise ConfigError(f"loss.groups: {c.groups} does not divide the {dim} dimensions of embed_dim")
        step = extras.step if extras is not None else 0
        draw = torch.Generator().manual_seed((c.seed << 40) + step)
        value, metrics = a.new_zeros(()), {}
        for _ in range(c.shuffles):
            order = torch.randperm(dim, generator=draw).to(a.device)
            x, y = (normalize(whitened(z, ids, c.groups, order, c.eps), dim=1) for z in (a, b))
            out = self.inside(x, y, ids, logit_scale, logit_bias, extras)
            value, metrics = value + out.value / c.shuffles, out.metrics
        return LossOutput(value, metrics)
