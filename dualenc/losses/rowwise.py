"""What losses on rows of one tower, or on rows alone, share: which slots take part, and their number."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from dualenc.config import Section
from dualenc.distributed.gather import gather_ids
from dualenc.distributed.world import world_size


class TowerConfig(Section):
    """Settings of a loss on the rows of one tower at a time."""

    side: Literal["both", "a", "b"] = Field("both", description="towers of the pair it is for; both: their mean")

    def of(self, a: Tensor, b: Tensor) -> list[tuple[str, Tensor]]:
        """The sides it is for, by the last letter of their metrics."""
        return [(name, x) for name, x in (("a", a), ("b", b)) if self.side in ("both", name)]


class StripConfig(TowerConfig):
    """The same, with a [n, N] matrix that is held in strips."""

    strip_mb: Annotated[float, Field(gt=0)] = Field(64.0, description="MiB of an [n, N] matrix held at once")


def shared_out(ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The pair ids [N] of all ranks, and what a sum over local valid rows is divided by: valid rows / W (at least 1/W).

    Sums divided so have the mean over ranks that one process has.
    """
    all_ids = gather_ids(ids)
    return all_ids, (all_ids >= 0).sum().clamp(min=1).to(dtype) / world_size()
