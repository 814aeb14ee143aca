"""Contrasts of two towers, their slow copies, and queues of earlier keys (CoCoSoDa, Shi et al. 2023, arXiv 2204.03293).

With x, y the two sides and x̃, ỹ what slow copies of their towers say, each block is InfoNCE over the keys of the batch
and a queue:

    x → y, y → x       between the towers; gradient on both sides
    x → ỹ, y → x̃       against the slow towers
    x → x̃, y → ỹ       ``within`` a modality

and the loss is their mean. The queues hold slow keys: x → y and x → ỹ share the queue of ỹ. (The released code queues
what the trained towers gave for the first block, gathers nothing, and its script never switches the last two on.)

Within a modality both sides see one row, so what makes it a task is what the slow towers are not given: dropout is off
in them. For a masked or otherwise augmented view train a pair of views with ``moco`` beside this:
``loss: [cocosoda, {name: moco, pairs: [[text, text2]]}]`` where ``modalities.text2.shares: text``.

Queued keys of a row's own pair id are neither positive nor negative.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from dualenc.config import pair_name
from dualenc.distributed.world import world_size
from dualenc.losses.contrast import ContrastConfig, FurtherColumns, contrast
from dualenc.losses.loss import Extras, LossOutput, losses
from dualenc.losses.moco import QUEUED, AgainstSlowTowers, BatchPair, against, columns_of, keys_of, wrong_items
from dualenc.losses.targets import SoftTarget


@losses.register("cocosoda")
class CoCoSoDa(AgainstSlowTowers):
    """InfoNCE between towers, against slow towers and, if asked for, within each modality, with queues.

    Formula: mean of NCE(x,y), NCE(y,x), NCE(x,ỹ), NCE(y,x̃) [, NCE(x,x̃), NCE(y,ỹ)], each over batch and queue
    Paper: CoCoSoDa, arXiv 2204.03293
    Needs: nothing
    """

    class Config(ContrastConfig):
        """Settings."""

        queue: Annotated[int, Field(ge=0)] = Field(1024, description="keys kept for each side; 0: none")
        decay: Annotated[float, Field(ge=0, lt=1)] = Field(0.999, description="decay of the slow towers per step")
        within: bool = Field(False, description="also contrast each side with its own slow tower")

    def forward(
        self,
        a: Tensor,
        b: Tensor,
        ids: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        extras: Extras | None = None,
    ) -> LossOutput:
        """See the module; ``logit_bias`` is ignored."""
        keys_a, keys_b = keys_of(extras, "cocosoda")
        assert extras is not None
        queues = self.queues.get(pair_name(extras.pair))
        of_a, of_b = wrong_items(extras, ids, "a"), wrong_items(extras, ids, "b")
        if queues is not None:
            of_a, of_b = [*of_a, columns_of(queues[0])], [*of_b, columns_of(queues[1])]
        flipped = [replace(x, side="a") for x in of_a]
        row_loss = SoftTarget(BatchPair(), push=against(in_batch=True, lanes=False))

        def block(x: Tensor, y: Tensor, columns: list[FurtherColumns], both: bool = False) -> LossOutput:
            how = self.config.choose(len(a) * world_size(), a.device)
            back, values = row_loss if both else None, {QUEUED: torch.zeros_like(ids)}
            return contrast(x, y, ids, logit_scale, row_loss, back, values=values, columns=columns, how=how)

        towers = block(a, b, [*of_b, *flipped], both=True)
        found = [block(a, keys_b, of_b), block(b, keys_a, of_a)]
        if self.config.within:
            found += [block(a, keys_a, of_a), block(b, keys_b, of_b)]
        value = (2 * towers.value + torch.stack([x.value for x in found]).sum()) / (2 + len(found))
        if queues is not None:
            for keys, queue in zip((keys_a, keys_b), queues, strict=True):
                queue.propose(keys, ids)
        return LossOutput(value, towers.metrics)
