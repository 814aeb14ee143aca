"""A teacher that is the student's own moving average, some virtual steps ahead (FST, Du et al. 2022).

At every step, with the student θ and the average φ: θ' ← θ; then ``steps`` times θ' ← θ' − lr · ∇L(θ', φ) on the batch
and φ ← d φ + (1 − d) θ', d = min(1 − 1/(t+1), decay). The real step learns from the φ of the future. ``steps: 0`` is
the mean teacher (arXiv 1703.01780): φ follows θ itself.

Virtual steps are plain SGD on a copy of the weights, so the real optimizer's moments, step count and shards are not
touched (the released code restores weights only, and counts K + 1 steps for one). Gradients are averaged over ranks.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dualenc.config import LookAhead, Recipe
from dualenc.data.batch import Batch, TeacherRows, map_tensors
from dualenc.data.dataset import TeacherView
from dualenc.data.shards.index import ShardSet
from dualenc.distill.objective import TeacherInfo
from dualenc.distributed.world import world_size
from dualenc.encoders import DualEncoder
from dualenc.errors import ConfigError
from dualenc.losses import Loss, objective
from dualenc.losses.objective import mark, to_slots
from dualenc.model import Bundle

_CHUNK = 256


class LookAheadTeacher:
    """See the module; a :class:`~dualenc.distill.teachers.teacher.TeacherSource` that follows the student.

    Raises:
        ConfigError: for engines that shard parameters, or for virtual steps with micro-batches.
    """

    def __init__(self, config: LookAhead, recipe: Recipe, bundle: Bundle, device: torch.device) -> None:
        engine = recipe.engine
        if engine.parallel == "fsdp2" or (engine.kind == "deepspeed" and engine.zero_stage == 3):
            raise ConfigError(
                "distill.look_ahead needs whole weights on every rank: use engine.parallel ddp or zero_stage 0 to 2"
            )
        if config.steps and recipe.batch.micro is not None:
            raise ConfigError(
                "distill.look_ahead.steps: virtual steps need the whole batch; leave batch.micro out, or set steps: 0"
            )
        self.name, self.config, self.pairs, self.device = "look_ahead", config, recipe.pairs, device
        self.embed_dim = bundle.embed_dim
        self.modalities = {m: m for m in bundle.modalities}
        self.views: dict[str, TeacherView] = {}
        self.redraw: dict[str, tuple[int, int]] = {}
        self.scale: dict[tuple[str, str], float] = dict.fromkeys(recipe.pairs, 1.0)
        self.bias: dict[tuple[str, str], float] = {}
        self.info = TeacherInfo(self.name, config.weight, self.scale, self.bias)
        self.average: DualEncoder | None = None
        self.updates = 0

    def attach(self, model: DualEncoder) -> None:
        """Start from the student, once it has its heads and its weights."""
        self.average = copy.deepcopy(model).requires_grad_(False).to(self.device)

    def follow(self, module: nn.Module, batch: Batch, loss: Loss) -> None:
        """Move the average; call it before a step, with the other teachers' features in the batch."""
        average = self._whole()
        if self.config.steps == 0:
            self._move(module)
            return
        virtual = copy.deepcopy(average)
        virtual.load_state_dict(module.state_dict())
        for p, q in zip(virtual.parameters(), module.parameters(), strict=True):
            p.requires_grad_(q.requires_grad)
        virtual.train()
        trained = [p for p in virtual.parameters() if p.requires_grad]
        for _ in range(self.config.steps):
            taught = replace(batch, teachers={**batch.teachers, self.name: self.features(batch)})
            value = objective(virtual(batch.inputs), taught, self.pairs, loss).value
            grads = torch.autograd.grad(value, trained, allow_unused=True)
            whole = [torch.zeros_like(p) if g is None else g for p, g in zip(trained, grads, strict=True)]
            with torch.no_grad():
                for p, g in zip(trained, averaged(whole), strict=True):
                    p.sub_(g, alpha=self.config.lr)
            self._move(virtual)
        # One real step counts once, whatever the number of virtual ones.
        self.updates -= self.config.steps - 1

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
    def _move(self, towards: nn.Module) -> None:
        decay = min(1 - 1 / (self.updates + 1), self.config.decay)
        self.updates += 1
        now = towards.state_dict()
        for name, x in self._whole().state_dict().items():
            if x.is_floating_point():
                x.lerp_(now[name].to(x.dtype), 1 - decay)
            else:
                x.copy_(now[name])


def averaged(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The mean over ranks of each tensor, in one reduction."""
    if world_size() == 1:
        return list(tensors)
    flat = torch.cat([t.flatten() for t in tensors])
    torch.distributed.all_reduce(flat)
    flat /= world_size()
    return [x.view_as(t) for x, t in zip(torch.split(flat, [t.numel() for t in tensors]), tensors, strict=True)]
