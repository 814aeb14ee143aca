"""Learned views in a run: rows made before a step, and the network's own steps of Adam.

The engine sees rows that are data, so its gradient is exact as with any others. The network is outside of it: whole on
every rank, trained through a copy of the tower whose weights do not move, with its gradient averaged over ranks. So it
is the same under every engine, on any number of ranks and in micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dualenc.checkpoint.ranges import Piece, Stored
from dualenc.data.batch import ABSENT, Batch, map_tensors
from dualenc.distributed.world import mean_of_ranks
from dualenc.encoders import DualEncoder
from dualenc.losses.grad_cache import Outputs, cached_backward
from dualenc.losses.objective import mark, to_slots
from dualenc.memory import LearnedView, Replicated, SlowModel, SlowTowers, ViewMaker

BETAS, EPS = (0.9, 0.999), 1e-8


class ViewLearner:
    """The network of a learned view and its optimizer.

    Args:
        asked: by the loss.
        model: before an engine cuts it.
        rows: some collated rows of the modality.
        device: ``meta`` gives sizes and takes no memory.

    Raises:
        ConfigError: the modalities do not fit.
    """

    def __init__(self, asked: LearnedView, model: DualEncoder, rows: Any, device: torch.device | str) -> None:
        asked.check(model.shared, model.pairs)
        self.asked = asked
        self.network: ViewMaker = asked.build(rows).to(device)
        self.tower = SlowModel(model, SlowTowers(0.0, modalities=(asked.of,)), device)
        self.parameters = dict(self.network.named_parameters())
        moments = {f"{k}/{n}": torch.zeros_like(p) for n, p in self.parameters.items() for k in ("first", "second")}
        count = {"steps": torch.zeros(1, device=device)}
        self.now = Replicated({n: p.detach() for n, p in self.parameters.items()} | moments | count)

    def due(self, step: int, held_back: bool) -> bool:
        """Whether it is trained at ``step``, after the engine's step (``held_back``) or before it."""
        return held_back == self.asked.held_back and step % self.asked.every == 0

    @torch.no_grad()
    def make(self, batch: Batch, chunk: int | None) -> Batch:
        """The batch with the view's rows in place of those that the loader brought."""
        of, into = self.asked.of, self.asked.into
        size = max(len(batch.rows[of]), 1)
        numbers, parts = self._numbers(batch), []
        for k in range(0, size, chunk or size):
            rows = map_tensors(batch.inputs[of], lambda v, k=k: v[k : k + (chunk or size)])
            parts.append(self.network(rows, numbers[k : k + (chunk or size)], batch.step)[0])
        made = parts[0] if len(parts) == 1 else _joined(parts)
        return replace(batch, inputs={**batch.inputs, into: made}, rows={**batch.rows, into: batch.rows[of]})

    def _numbers(self, batch: Batch) -> Tensor:
        """The number of each row's sample; one 0 for a dummy row."""
        rows = batch.rows[self.asked.of]
        if not len(rows):
            return rows.new_zeros(1)
        return batch.numbers[rows] if batch.numbers is not None else rows

    def train(self, batch: Batch, weights: Callable[[str], Tensor], micro: int | None, bf16: bool = False) -> None:
        """One step of Adam on a batch; a gradient that is not finite on any rank changes nothing.

        Args:
            weights: a name of the model's state dict → the whole tensor. All ranks ask for the same ones in turn.
        """
        of, into = self.asked.of, self.asked.into
        self.tower.start(weights)
        rows, numbers = batch.rows[of], self._numbers(batch)
        inputs = {of: {"rows": batch.inputs[of], "numbers": numbers}, into: numbers}
        work = Batch(batch.size, inputs, {of: rows, into: rows}, batch.ids, batch.keys, batch.step)
        run = _Outside(self, batch.step, bf16)

        def value(outputs: Outputs, one: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            here = mark(one.rows[of], one.size)
            ids = torch.where(here, one.ids, ABSENT)
            a, b = (to_slots(outputs["features"][m], one.rows[m], one.size) for m in (of, into))
            about = to_slots(outputs["about"][into], one.rows[into], one.size)
            return self.asked.objective(a, b, ids, about), {}

        with torch.enable_grad():
            if micro is None or micro >= batch.size:
                run.backward(value(run.forward(work.inputs), work)[0])
            else:
                cached_backward(run, work.chunks(micro), work, value)
        self._adam()

    @torch.no_grad()
    def _adam(self) -> None:
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters.values()]
        grads = mean_of_ranks(found)
        finite = torch.stack([g.isfinite().all() for g in grads]).all()
        now = self.now.now
        steps = now["steps"] + 1
        new = {"steps": steps}
        for (name, p), g in zip(self.parameters.items(), grads, strict=True):
            first = now[f"first/{name}"].lerp(g, 1 - BETAS[0])
            second = now[f"second/{name}"].lerp(g * g, 1 - BETAS[1])
            move = (first / (1 - BETAS[0] ** steps)) / ((second / (1 - BETAS[1] ** steps)).sqrt() + EPS)
            new |= {f"first/{name}": first, f"second/{name}": second, name: p - self.asked.lr * move}
            p.grad = None
        self.now.propose(new)
        self.now.commit(~finite)

    def pieces(self, name: str, rank: int, ranks: int) -> list[Piece]:
        """What this rank writes: network and optimizer. The tower's copy is made again from the model."""
        return self.now.pieces(name, rank, ranks)

    def load(self, name: str, saved: Stored) -> None:
        """Set what :meth:`pieces` of all ranks wrote."""
        self.now.load(name, saved)

    def bytes(self) -> int:
        """On this rank, the tower's copy included."""
        return self.now.bytes() + self.tower.bytes()


class _Outside:
    """Network and tower as one model; see :class:`dualenc.losses.grad_cache.Runs`."""

    def __init__(self, learner: ViewLearner, step: int, bf16: bool) -> None:
        self.learner, self.step, self.bf16 = learner, step, bf16
        self.module: nn.Module = learner.network
        self.device = next(iter(learner.parameters.values())).device

    def forward(self, inputs: Mapping[str, Any]) -> Outputs:
        """``features`` of the rows and of their view, and the numbers ``about`` the view."""
        of, into = self.learner.asked.of, self.learner.asked.into
        rows, encode = inputs[of]["rows"], self.learner.tower.model.encode
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            made, about = self.learner.network(rows, inputs[of]["numbers"], self.step)
            with torch.no_grad():
                plain = encode(of, rows)
            features = {of: plain, into: encode(of, made)}
        return {"features": features, "about": {into: about.float()}, "logit_scale": {}, "logit_bias": {}}

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Gradients are averaged over ranks after the last backward."""
        yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss``."""
        loss.backward()  # type: ignore[no-untyped-call]


def _joined(parts: list[Any]) -> Any:
    """Collated rows one after another."""
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    return {k: _joined([p[k] for p in parts]) for k in parts[0]}
