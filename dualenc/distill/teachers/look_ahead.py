"""A teacher that is the student's own moving average, some virtual steps ahead (FST, Du et al. 2022).

At every step, with the student θ and the average φ: θ' ← θ; then ``steps`` times θ' ← θ' − lr · ∇L(θ', φ) on the batch
and φ ← d φ + (1 − d) θ', d = min(1 − 1/(t+1), decay). The real step learns from the φ of the future. ``steps: 0`` is
the mean teacher (arXiv 1703.01780): φ follows θ itself.

Virtual steps are plain SGD on a copy of the weights, so the real optimizer's moments, step count and shards are not
touched (the released code restores weights only, and counts K + 1 steps for one). Gradients are averaged over ranks.
Average and copy are whole on every rank, whichever engine cuts the student: its weights are asked for by name.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dualenc.config import LookAhead, Recipe
from dualenc.data.batch import Batch, TeacherRows, map_tensors
from dualenc.data.dataset import TeacherView
from dualenc.data.shards.index import ShardSet
from dualenc.distill.objective import TeacherInfo
from dualenc.distributed.world import mean_of_ranks
from dualenc.encoders import DualEncoder
from dualenc.encoders.dual_encoder import telling_rows
from dualenc.losses import Loss, LossOutput, objective
from dualenc.losses.grad_cache import Outputs, cached_backward
from dualenc.losses.objective import mark, to_slots
from dualenc.model import Bundle

_CHUNK = 256

Weights = Callable[[str], Tensor]
"""A name of the student's state dict → the whole tensor. All ranks ask for the same ones in turn."""


class LookAheadTeacher:
    """See the module; a :class:`~dualenc.distill.teachers.teacher.TeacherSource` that follows the student."""

    def __init__(self, config: LookAhead, recipe: Recipe, bundle: Bundle, device: torch.device) -> None:
        self.name, self.config, self.pairs, self.device = "look_ahead", config, recipe.pairs, device
        self.micro = recipe.batch.micro
        self.embed_dim = bundle.embed_dim
        self.modalities = {m: m for m in bundle.modalities}
        self.views: dict[str, TeacherView] = {}
        self.redraw: dict[str, tuple[int, int]] = {}
        self.scale: dict[tuple[str, str], float] = dict.fromkeys(recipe.pairs, 1.0)
        self.bias: dict[tuple[str, str], float] = {}
        self.info = TeacherInfo(self.name, config.weight, self.scale, self.bias)
        self.average: DualEncoder | None = None
        self.trained: set[str] = set()
        self.updates = 0

    def attach(self, model: DualEncoder) -> None:
        """Start from the student, once it has its heads and its weights and before an engine cuts it."""
        self.trained = {name for name, p in model.named_parameters() if p.requires_grad}
        self.average = copy.deepcopy(model).requires_grad_(False).to(self.device)

    def follow(self, weights: Weights, batch: Batch, loss: Loss) -> None:
        """Move the average; call it before a step, with the other teachers' features in the batch."""
        average = self._whole()
        if self.config.steps == 0:
            self._move(weights)
            return
        virtual = VirtualStudent(average, weights, self.trained)
        for _ in range(self.config.steps):
            taught = replace(batch, teachers={**batch.teachers, self.name: self.features(batch)})
            self._gradient(virtual, taught, loss)
            virtual.step(self.config.lr)
            self._move(virtual.weight)
        # One real step counts once, whatever the number of virtual ones.
        self.updates -= self.config.steps - 1

    def _gradient(self, virtual: VirtualStudent, batch: Batch, loss: Loss) -> None:
        def value(outputs: Outputs, of: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            out: LossOutput = objective(outputs, of, self.pairs, loss)
            return out.value, {}

        if self.micro is None or self.micro >= batch.size:
            with telling_rows(virtual.module, batch.rows):
                outputs = virtual.forward(batch.inputs)
            virtual.backward(value(outputs, batch)[0])
        else:
            cached_backward(virtual, batch.chunks(self.micro), batch, value)

    @torch.no_grad()
    def features(self, batch: Batch) -> TeacherRows:
        """Of the average, on the student's own inputs."""
        average = self._whole().eval()
        for pair, scale in self.scale.items():
            key = "-".join(pair)
            self.scale[pair] = float(average.logit_scale(*average.bounds)[key]) if scale else scale
            biases = average.logit_bias()
            if key in biases:
                self.bias[pair] = float(biases[key])
        out = TeacherRows({})
        for m in self.modalities:
            if m not in batch.inputs:
                continue
            rows = batch.rows[m]
            parts = [
                average.encode(m, map_tensors(batch.inputs[m], lambda v, k=k: v[k : k + _CHUNK]))
                for k in range(0, max(len(rows), 1), _CHUNK)
            ]
            out.features[m] = to_slots(torch.cat(parts), rows, batch.size)
            out.has[m] = mark(rows, batch.size)
        return out

    def covers(self, sets: Sequence[ShardSet]) -> None:
        """Nothing to check: it runs on any data."""

    def describe(self) -> dict[str, Any]:
        """Its settings."""
        return self.config.model_dump(mode="json")

    def state_dict(self) -> dict[str, Tensor]:
        """The average, and how often it moved."""
        return {**self._whole().state_dict(), "updates": torch.tensor([self.updates])}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Set what :meth:`state_dict` gave."""
        own = dict(state)
        self.updates = int(own.pop("updates"))
        self._whole().load_state_dict(own)

    def _whole(self) -> DualEncoder:
        if self.average is None:
            raise RuntimeError("attach the look-ahead teacher to the student first")
        return self.average

    @torch.no_grad()
    def _move(self, towards: Weights) -> None:
        decay = min(1 - 1 / (self.updates + 1), self.config.decay)
        self.updates += 1
        for name, x in self._whole().state_dict().items():
            now = towards(name).to(x.dtype)
            if x.is_floating_point():
                x.lerp_(now, 1 - decay)
            else:
                x.copy_(now)


class VirtualStudent:
    """A copy of the student that plain SGD moves; see :class:`dualenc.losses.grad_cache.Runs`.

    Args:
        like: whose modules are copied.
        weights: the student's.
        trained: names of the parameters that move.
    """

    def __init__(self, like: DualEncoder, weights: Weights, trained: set[str]) -> None:
        self.module: nn.Module = copy.deepcopy(like)
        self.state: dict[str, Tensor] = self.module.state_dict()
        with torch.no_grad():
            for name, x in self.state.items():
                x.copy_(weights(name))
        self.trained = [p.requires_grad_() for name, p in self.module.named_parameters() if name in trained]
        self.module.train()
        self.device = self.trained[0].device

    def weight(self, name: str) -> Tensor:
        """A tensor of its state dict."""
        return self.state[name]

    def forward(self, inputs: Mapping[str, Any]) -> Outputs:
        """Run it."""
        outputs: Outputs = self.module(inputs)
        return outputs

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Nothing is reduced before :meth:`step`."""
        yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss``."""
        loss.backward()  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """θ ← θ − lr · gradient, averaged over ranks."""
        whole = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.trained]
        for p, g in zip(self.trained, mean_of_ranks(whole), strict=True):
            p.sub_(g, alpha=lr)
            p.grad = None
