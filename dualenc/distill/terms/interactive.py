"""Interactive contrast (CLIP-KD's ICL, arXiv 2307.12732): student queries on teacher keys.

    ℓ_i = ½ ( NCE(α P_a a_i · t^b_j) + NCE(α P_b b_i · t^a_j) )

over all valid columns j; positives are equal pair ids. The keys carry no gradient, so no feature has to be gathered
with one. It is the contrast of CALICO's regions (:mod:`dualenc.losses.regions`), a region being a pair id.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dualenc.distill.terms.term import HeadTerm, PairInputs, features_of, terms
from dualenc.losses import LossOutput
from dualenc.losses.regions import Part, contrast_sum


def query_sum(
    queries: Tensor, keys: Tensor, ids: Tensor, key_ids: Tensor, logit_scale: Tensor, strip_mb: float | None = None
) -> Tensor:
    """Σ over valid rows of −mean_{positives j} log softmax_j(scale · q_i·k_j).

    Args:
        queries: [B, D]; keys: [N, D] of all ranks; ids: [B]; key_ids: [N]; −1 takes no part. A query whose id is not
            among the keys is left out.
    """
    keep = (ids >= 0) & torch.isin(ids, key_ids)
    present = key_ids >= 0
    names = (ids[keep], key_ids[present])
    return contrast_sum(queries[keep], keys[present], [Part(1.0, "region")], logit_scale, names, strip_mb=strip_mb)


@terms.register("interactive")
class Interactive(HeadTerm):
    """Interactive contrast: student queries on the teacher's keys.

    ``{name: interactive}``; with a projection to the teacher's dimension (training only).

    Formula: ½ (NCE(α P a · t^b) + NCE(α P b · t^a))
    Paper: CLIP-KD, arXiv 2307.12732
    Needs: a teacher with features
    """

    def __call__(self, x: PairInputs) -> LossOutput:
        """See the module."""
        a, b = x.projected()
        t, strip = x.teacher, self.config.strip_mb
        features_of(t.a)
        keys_b, keys_a = t.all_b, t.all_a
        total = query_sum(a, keys_b, x.ids, x.all_ids, x.logit_scale, strip)
        total = total + query_sum(b, keys_a, x.ids, x.all_ids, x.logit_scale, strip)
        return LossOutput(total / (2 * x.share))
