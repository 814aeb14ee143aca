"""The weights of a zero-shot classifier (CLIP, Radford et al. 2021, arXiv 2103.00020, 3.1.4)."""

from __future__ import annotations

import torch
from torch import Tensor


def classifier(prompts: Tensor, owners: Tensor, classes: int) -> Tensor:
    """[C, D] unit weights: mean of each class's prompt features ``prompts [P, D]``, ``owners [P]`` their class."""
    sums = torch.zeros(classes, prompts.shape[1], dtype=torch.float64).index_add_(0, owners, prompts.double())
    counts = torch.bincount(owners, minlength=classes)[:, None]
    return torch.nn.functional.normalize(sums / counts, dim=1).float()
