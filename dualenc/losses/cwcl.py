"""Continuously weighted contrastive loss (CWCL, Srinivasa et al., NeurIPS 2023) for a tower matched to a locked one.

With f_i the unit embedding of row i by the *frozen encoder itself* (before any learned projection), for the direction
whose anchors x are the locked modality's features and whose columns y are the other's

    w_ij = ⟨f_i, f_j⟩/2 + 1/2,    w̄_ij = w_ij / Σ_k w_ik,    ℓ_i = −Σ_j w̄_ij log softmax_j(s · x_i·y_j)

over the valid columns of the global batch. The other direction, y → x, is plain InfoNCE (several positives by pair
id). The paper adds the two directions; here they are averaged, so that the value and the learning rate compare with
InfoNCE's.

The target is nearly uniform: unrelated rows have w ≈ ½, so a row's own pair carries about 2/N of the mass, and ℓ is
near log N whatever the model does. Watch ``excess``, ℓ minus the entropy of w̄ (a KL divergence, 0 at best).
``sharpen`` (w to that power; not in the paper) is 1 by default.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dualenc.config import Section
from dualenc.distributed.gather import gather, gather_ids
from dualenc.distributed.world import world_size
from dualenc.errors import ConfigError
from dualenc.losses.info_nce import info_nce_rows
from dualenc.losses.loss import Extras, Loss, LossOutput, losses


def cwcl(
    a: Tensor,
    b: Tensor,
    ids: Tensor,
    logit_scale: Tensor,
    frozen: tuple[Tensor | None, Tensor | None],
    sharpen: float = 1.0,
    strip_mb: float = 64.0,
) -> LossOutput:
    """This rank's rows of the loss above.

    Args:
        a, b: [B, D] normalised features; the columns are gathered from all ranks.
        ids: [B] pair ids, −1 for a slot that takes no part.
        logit_scale: [1].
        frozen: for ``a`` and for ``b`` the frozen encoder's normalised embeddings [B, W], or None where that side is
            trained. With both, both directions are weighted.
        sharpen: exponent of w; 1 is the paper's.
        strip_mb: MiB of logits (and as much again of targets) held at once.

    Returns:
        value = Σ_{local valid i} ½ (ℓ_i(a→b) + ℓ_i(b→a)) / (n / W) with n valid rows in the global batch; the share of
        rows whose best column is a positive (``top1_ab``, ``top1_ba``), and for a weighted direction ``excess_ab`` or
        ``excess_ba``, likewise.

    Raises:
        ConfigError: neither side is frozen.
    """
    if frozen[0] is None and frozen[1] is None:
        raise ConfigError(
            "loss: cwcl takes its targets from a locked tower, and neither tower of this pair is locked: "
            "set modalities.NAME.lock: true for one of them, or write loss: {name: info_nce}"
        )
    all_ids = gather_ids(ids)
    share = (all_ids >= 0).sum().clamp(min=1) / world_size()
    total = a.new_zeros(())
    metrics: dict[str, Tensor] = {}
    for rows, columns, f, name in ((a, gather(b), frozen[0], "ab"), (b, gather(a), frozen[1], "ba")):
        strips = torch.split(torch.arange(len(rows), device=rows.device), rows_of(strip_mb, columns))
        # Recomputed in the backward: a strip's logits and targets are never kept.
        parts: list[tuple[Tensor, ...]]
        if f is None:
            parts = [
                checkpoint(info_nce_rows, rows[i], columns, ids[i], all_ids, logit_scale, 0.0, use_reentrant=False)
                for i in strips
            ]
        else:
            given = (columns, all_ids, logit_scale, gather_frozen(f), sharpen)
            parts = [checkpoint(cwcl_rows, rows[i], ids[i], f[i], *given, use_reentrant=False) for i in strips]
            metrics[f"excess_{name}"] = torch.stack([p[2] for p in parts]).sum() / share
        total = total + torch.stack([p[0] for p in parts]).sum() / (2 * share)
        metrics[f"top1_{name}"] = torch.stack([p[1] for p in parts]).sum() / share
    return LossOutput(total, metrics)


def cwcl_rows(
    rows: Tensor,
    row_ids: Tensor,
    row_frozen: Tensor,
    columns: Tensor,
    column_ids: Tensor,
    logit_scale: Tensor,
    column_frozen: Tensor,
    sharpen: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Σ ℓ_i over valid rows, the number of rows with a positive above every negative, and Σ (ℓ_i − entropy of w̄_i).

    Args:
        rows: [B, D]; columns: [N, D]; row_ids: [B]; column_ids: [N]; logit_scale: [1].
        row_frozen: [B, W]; column_frozen: [N, W]: unit embeddings of the anchors' modality, of every slot.
    """
    valid, present = row_ids >= 0, column_ids >= 0
    logits = logit_scale * (rows[valid] @ columns[present].T)
    if not len(logits):  # a zero that still runs the gather's backward with the other ranks
        return logit_scale[:0].sum() + rows[:0].sum() + columns[:0].sum(), logits.new_zeros(()), logits.new_zeros(())
    # A cosine a rounding error below −1 would give a negative weight.
    weight = ((row_frozen[valid] @ column_frozen[present].T) / 2 + 0.5).clamp(min=0).to(logits.dtype)
    weight = weight if sharpen == 1 else weight**sharpen
    target = weight / weight.sum(1, keepdim=True)
    per_row = torch.logsumexp(logits, dim=1) - (target * logits).sum(1)
    positive, seen = row_ids[valid, None] == column_ids[None, present], logits.detach()
    hits = (seen.amax(1) > seen.masked_fill(positive, -float("inf")).amax(1)).sum().to(logits.dtype)
    return per_row.sum(), hits, (per_row.detach() + torch.xlogy(target, target).sum(1)).sum()


def gather_frozen(f: Tensor) -> Tensor:
    """The frozen embeddings [W·B, W] of all ranks; they are data: no gradient."""
    with torch.no_grad():
        return gather(f.detach())


def rows_of(strip_mb: float, columns: Tensor) -> int:
    """How many rows make a strip of at most ``strip_mb`` MiB of logits, at least 16."""
    return max(int(strip_mb * 2**20 / columns.element_size() / max(len(columns), 1)), 16)


@losses.register("cwcl")
class CWCL(Loss):
    """CWCL as a recipe's ``loss: {name: cwcl}``, with ``lock: true`` (or ``trunk``) on one tower of each pair.

    It has no parameters. Strips are recomputed in the backward, so nothing of size B·N is kept.
    """

    takes_extras = True

    class Config(Section):
        """Settings."""

        sharpen: Annotated[float, Field(gt=0)] = Field(1.0, description="power of the weights; 1 as published")
        strip_mb: Annotated[float, Field(gt=0)] = Field(64.0, description="MiB of logits held at once")

    def __init__(self, config: Config) -> None:
        super().__init__()
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
        """See :func:`cwcl`; ``logit_bias`` adds the same to all logits of a row and is ignored."""
        frozen = (extras.a.get("frozen"), extras.b.get("frozen")) if extras is not None else (None, None)
        return cwcl(a, b, ids, logit_scale, frozen, self.config.sharpen, self.config.strip_mb)
