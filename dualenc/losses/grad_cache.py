"""GradCache (Gao et al., arXiv 2101.06983): the exact gradient of a large batch with the activations of a small one.

First the features of every chunk without a graph, then the loss and its gradient at the features, then each chunk again
with the same random numbers and its cached gradient. The chunks' gradients add up and are reduced over ranks once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dualenc.data.batch import Batch
from dualenc.encoders.dual_encoder import telling_rows
from dualenc.losses.objective import zero_path

Outputs = Mapping[str, Mapping[str, Tensor]]
"""What a model's forward returns: groups of rows by modality, and the scales and biases by pair."""

Value = Callable[[Outputs, Batch], tuple[Tensor, dict[str, Tensor]]]
"""The model's outputs and their batch → the scalar to differentiate, and the numbers of the global batch."""

PER_PAIR = ("logit_scale", "logit_bias")
"""Groups of the outputs that are one number a pair; all others are rows by modality, in the order of the inputs."""


class Runs(Protocol):
    """What runs a model and adds up its gradients: an engine, or a copy of the model outside of one."""

    device: torch.device
    module: nn.Module

    def forward(self, inputs: Mapping[str, Any]) -> Outputs:
        """Run the model."""
        ...

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """Around one forward and its backward; only the ``last`` may reduce gradients over ranks."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss``."""
        ...


def cached_backward(engine: Runs, chunks: list[Batch], batch: Batch, value: Value) -> dict[str, Tensor]:
    """Backward of ``value`` of the whole batch with the activations of one chunk at a time; returns its numbers."""
    draws = []
    encoded = []
    with torch.no_grad(), kept_running_statistics(engine.module):
        for chunk in chunks:
            draws.append(RandomState(engine.device))
            with telling_rows(engine.module, chunk.rows):
                encoded.append(engine.forward(chunk.inputs))
    leaves, joined = join(encoded, chunks, batch)
    loss, numbers = value(leaves, joined)
    loss.backward()  # type: ignore[no-untyped-call]
    done = dict.fromkeys(leaves["features"], 0)
    for k, chunk in enumerate(chunks):
        last = k == len(chunks) - 1
        with draws[k].replayed(), engine.accumulating(last):
            with telling_rows(engine.module, chunk.rows):
                outputs = engine.forward(chunk.inputs)
            # Every output stays in every chunk's graph; scales and biases get their gradient once.
            surrogate = zero_path(x for group in outputs.values() for x in group.values())
            for m in done:
                n = len(chunk.rows[m])
                for group in row_groups(leaves):
                    if m in leaves[group]:
                        grad = _grad(leaves[group][m])[done[m] : done[m] + n]
                        surrogate = surrogate + (outputs[group][m][:n] * grad).sum()
                done[m] += n
            if last:
                for group in PER_PAIR:
                    for key, leaf in leaves[group].items():
                        surrogate = surrogate + (outputs[group][key] * _grad(leaf)).sum()
            engine.backward(surrogate)
    return numbers


def join(
    encoded: Sequence[Outputs], chunks: Sequence[Batch], batch: Batch
) -> tuple[dict[str, dict[str, Tensor]], Batch]:
    """The chunks' outputs as leaves that collect gradients, and the batch whose rows are in their order."""
    starts = [sum(c.size for c in chunks[:k]) for k in range(len(chunks))]
    leaves: dict[str, dict[str, Tensor]] = {}
    for group in row_groups(encoded[0]):
        leaves[group] = {}
        for m in encoded[0][group]:
            parts = [e[group][m][: len(c.rows[m])] for e, c in zip(encoded, chunks, strict=True)]
            leaves[group][m] = torch.cat(parts).detach().requires_grad_()
    rows = {
        m: torch.cat([c.rows[m] + start for c, start in zip(chunks, starts, strict=True)])
        for m in encoded[0]["features"]
    }
    for group in PER_PAIR:
        leaves[group] = {k: x.detach().clone().requires_grad_() for k, x in encoded[0][group].items()}
    return leaves, replace(batch, inputs={}, rows=rows)


def row_groups(outputs: Mapping[str, Any]) -> list[str]:
    """``features`` and any other output that has a row for each sample."""
    return [group for group in outputs if group not in PER_PAIR]


def _grad(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


class RandomState:
    """The state of torch's generators (CPU and the device) at one moment."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        """Set the generators back to that moment."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Inside, the generators draw again what they drew then; afterwards they are as before."""
        now = RandomState(self.device)
        self.restore()
        try:
            yield
        finally:
            now.restore()


@contextmanager
def kept_running_statistics(model: nn.Module) -> Iterator[None]:
    """Batch norms see every chunk twice; their running statistics are updated in the second pass only."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    kept = [(x, x.clone()) for m in norms for x in m.buffers(recurse=False)]
    try:
        yield
    finally:
        for x, value in kept:
            x.copy_(value)
