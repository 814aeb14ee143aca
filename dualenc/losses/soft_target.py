"""Contrast with soft targets: one function that a target builder and a function of the logits make into many losses.

The loss of a row is in :mod:`dualenc.losses.targets`. InfoNCE: T = own pair. SupCon: T = same label. CWCL: T =
similarity in a frozen encoder. A new loss of this kind is a small class of targets, or a function of a tile, and its
test.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from dualenc.losses.blockwise.sweeps import How
from dualenc.losses.contrast import FurtherColumns, contrast
from dualenc.losses.info_nce import info_nce
from dualenc.losses.loss import LossOutput
from dualenc.losses.targets import SamePair, SoftTarget, Targets, TileFunction


def soft_target_nce(
    a: Tensor,
    b: Tensor,
    ids: Tensor,
    logit_scale: Tensor,
    targets: Targets | tuple[Targets, Targets] = SamePair(),  # noqa: B008 (it has no state)
    logits: TileFunction | None = None,
    *,
    pull: TileFunction | None = None,
    smoothing: float = 0.0,
    excess: bool = False,
    values: Mapping[str, Tensor] | None = None,
    columns: Sequence[FurtherColumns] = (),
    how: How | None = None,
) -> LossOutput:
    """That loss in both directions, for the batch of all ranks.

    Args:
        a, b: [B, D] L2-normalised features; ids: [B] pair ids, −1 takes no part; logit_scale: [1].
        targets: of both directions, or of rows of ``a`` and of rows of ``b``.
        logits: ``push``, the logits of the denominator; pull: those of the numerator; smoothing: ε.
        values, columns, how: as in :func:`~dualenc.losses.contrast.contrast`.

    Returns:
        As there; with ``excess`` also ``excess_ab``, ``excess_ba``.
    """
    ab, ba = targets if isinstance(targets, tuple) else (targets, targets)
    if isinstance(ab, SamePair) and isinstance(ba, SamePair) and not (logits or pull or columns or excess):
        # The same numbers by a hand-written gradient (and Triton's kernels): positives are found by sorting ids.
        return info_nce(a, b, ids, logit_scale, smoothing, how)
    row_losses = [SoftTarget(t, logits, pull, smoothing, excess and not isinstance(t, SamePair)) for t in (ab, ba)]
    return contrast(a, b, ids, logit_scale, *row_losses, values=values, columns=columns, how=how)
