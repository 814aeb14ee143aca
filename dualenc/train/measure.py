"""Measuring the model during a run: evaluation, and the guard's comparison with the start of the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from dualenc.checkpoint import save as ckpt
from dualenc.config import Guard
from dualenc.distributed.world import World, any_true
from dualenc.model import Embedder
from dualenc.train.build import Parts
from dualenc.train.guard import Watch
from dualenc.train.hooks import Moment
from dualenc.train.tracking import metrics_at

HEADLINE = ("_R@1", "_R@10", "top1")
"""Endings of the metrics that are worth a line on the terminal; all of them go to metrics.jsonl."""

Evaluation = Callable[[Embedder, World], Mapping[str, float]]
"""Given a way to embed and the world, all ranks together: task/metric → value."""


class Evaluate:
    """Zero-shot evaluation at intervals, at the end, and where asked for before the first step."""

    pauses = True

    def __init__(self, parts: Parts, evaluation: Evaluation | None) -> None:
        self._parts, self._evaluation = parts, evaluation

    def due(self, now: Moment) -> bool:
        return now.last or self._by_step(now.step)

    def run(self, now: Moment) -> None:
        self.now(now.step)

    def at_start(self) -> None:
        """Before the first step of a run that asks for it; or what a run that was killed after its save owes."""
        p = self._parts
        asked = p.recipe.eval.at_start and p.state.step == 0
        if asked or (p.resumed_from is not None and self._by_step(p.state.step) and not self._stands(p.state.step)):
            self.now(p.state.step)

    def _by_step(self, step: int) -> bool:
        every = self._parts.recipe.eval.every_steps
        return step == self._parts.total_steps or bool(every and step % every == 0)

    def _stands(self, step: int) -> bool:
        """Whether metrics.jsonl has the evaluation after a step; the same on all ranks."""
        p = self._parts
        found = p.world.rank == 0 and any(k.startswith("eval/") for k in metrics_at(p.run_dir / "metrics.jsonl", step))
        return any_true(found, p.world)

    def now(self, step: int) -> None:
        """Measure, write the numbers to metrics.jsonl and print the main ones."""
        if self._evaluation is None:
            return
        values = measure(self._parts, self._evaluation)
        write(self._parts, "eval", values)
        for task in dict.fromkeys(k.split("/")[0] for k in values):
            own = {k.split("/")[1]: v for k, v in values.items() if k.startswith(f"{task}/")}
            shown = [f"{k.replace('_', ' ')} {100 * v:.1f}" for k, v in own.items() if k.endswith(HEADLINE)]
            self._parts.tracker.say(f"step {step}  {task}: {', '.join(shown)} %")


class CheckGuard:
    """Compares with the start of the run (:class:`dualenc.train.guard.Watch`) and says whether the run must stop."""

    pauses = True

    def __init__(self, parts: Parts, conf: Guard | None, evaluation: Evaluation | None) -> None:
        self._parts, self._evaluation = parts, evaluation
        self._watch = Watch(conf, parts.state.guard) if conf is not None and evaluation is not None else None

    def due(self, now: Moment) -> bool:
        return self._watch is not None and self._watch.due(now.step, now.last)

    def run(self, now: Moment) -> None:
        now.fallen = self._fallen(now.step)

    def at_start(self) -> None:
        """Before the first step: measure the reference, or check whether a run that was stopped may continue now.

        Raises:
            GuardError: it may not.
        """
        if self._watch is not None and self._watch.before_going_on and self._fallen(self._parts.state.step):
            self.refuse(self._parts.state.step)

    def refuse(self, step: int) -> None:
        """End the run.

        Raises:
            GuardError: always.
        """
        assert self._watch is not None
        self._watch.refuse(ckpt.folder_of(self._parts.run_dir, step))

    def _fallen(self, step: int) -> bool:
        """The same on all ranks."""
        assert self._watch is not None
        assert self._evaluation is not None
        write(self._parts, "guard", self._watch.check(measure(self._parts, self._evaluation), step))
        stop, said = self._watch.conf.action == "stop", self._watch.sentence
        if said is not None and not stop:
            self._parts.tracker.say(f"eval.guard: {said}.")
        return any_true(stop and said is not None, self._parts.world)


class Refuse:
    """Ends a run whose guard has fallen, after everything else was done."""

    pauses = False

    def __init__(self, guard: CheckGuard) -> None:
        self._guard = guard

    def due(self, now: Moment) -> bool:
        return now.fallen

    def run(self, now: Moment) -> None:
        self._guard.refuse(now.step)


def measure(parts: Parts, evaluation: Evaluation) -> Mapping[str, float]:
    """Evaluate the model as it is now; all ranks together."""
    parts.engine.eval()
    try:
        embedder = Embedder.from_bundle(parts.bundle, forward=parts.engine.forward, device=parts.engine.device)
        with torch.no_grad():
            return evaluation(embedder, parts.world)
    finally:
        parts.engine.train()


def write(parts: Parts, what: str, values: Mapping[str, float]) -> None:
    """One line of numbers under ``what/``."""
    rows = {f"{what}/{k}": v for k, v in values.items()}
    parts.tracker.log(parts.state.step, {"samples_seen": parts.state.samples_seen} | rows)
