"""Parameters that no output depends on: a pooler that nobody asks, a projection of another task.

DDP waits for the gradient of every parameter. Looking for those that get none costs a walk of the graph and a
collective in every step, so it is done once, before the first, and DDP looks only where there is one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dualenc.encoders.trainable.rows import untouched


def unused_parameters(model: nn.Module, inputs: Mapping[str, Any]) -> list[str]:
    """Names of trained parameters from which no output of the model in training mode has a path.

    Args:
        model: a :class:`~dualenc.encoders.DualEncoder`; its buffers and torch's generator are left as they are.
        inputs: modality → a few collated rows, of every modality.
    """
    was = model.training
    model.train()
    with untouched(model), torch.enable_grad():
        outputs = model(inputs)
    model.train(was)
    reached = _leaves([x for group in outputs.values() for x in group.values()])
    return [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in reached]


def _leaves(tensors: list[Tensor]) -> set[int]:
    """ids of the leaf tensors that have a path to any of ``tensors``."""
    waiting: list[Any] = [x.grad_fn for x in tensors if x.grad_fn is not None]
    seen, out = set(), {id(x) for x in tensors if x.grad_fn is None}
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.name() == "torch::autograd::AccumulateGrad":
            out.add(id(node.variable))
        waiting += [n for n, _ in node.next_functions if n is not None]
    return out
