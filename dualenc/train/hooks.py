"""Hooks that run after a step: each says when it is due and does one thing.

The loop asks them in one fixed order (:class:`dualenc.train.loop.Run`). Between two *looks* nothing is read from the
device and no rank asks another one whether to go on: see :class:`Agree`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dualenc.distributed.world import all_reduce_sum
from dualenc.errors import DivergenceError, Interrupted
from dualenc.train.build import Parts
from dualenc.train.flops import peak_memory, speed
from dualenc.train.step import StepResult
from dualenc.train.stop import StopFlag
from dualenc.train.tracking import metrics_at

PROMPT_S = 2.0
"""Ranks look about this often (in seconds): a signal or a timed checkpoint waits no longer than this plus one step."""
MOST_STEPS = 16
"""… and at least every so many steps, however short they are."""


@dataclass(slots=True)
class Moment:
    """The step that was just done, as the hooks see it. Its values are the same on all ranks.

    Attributes:
        looking: after this step the device is read and the ranks agree.
        stopping: a rank was asked to stop.
        save_due: by the clock, a checkpoint is due.
        written: no rank still writes a checkpoint in the background; known at a look.
        fallen: the guard stops the run.
        ends_phase: another phase begins after it, or the run ends.
    """

    step: int
    last: bool
    result: StepResult
    looking: bool = False
    stopping: bool = False
    save_due: bool = False
    written: bool = False
    fallen: bool = False
    ends_phase: bool = False


class Hook(Protocol):
    """One thing done after some steps. ``pauses``: its time does not count towards the training speed."""

    pauses: bool

    def due(self, now: Moment) -> bool:
        """Whether to run after this step; the same on all ranks."""
        ...

    def run(self, now: Moment) -> None:
        """Do it; all ranks together."""
        ...


class KeepAverage:
    """Updates the average of the weights."""

    pauses = False

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def due(self, now: Moment) -> bool:
        return self._parts.average is not None

    def run(self, now: Moment) -> None:
        p = self._parts
        assert p.average is not None
        p.average.update(p.engine.module, p.recipe.batch.size, now.result.skipped)


class Agree:
    """A look: shares what one rank knows with all ranks, and reads the device.

    Signals reach ranks at different steps and their clocks differ, so a flag that is up on any rank is up on all after
    a look. One is due where numbers are read anyway (``also``: before logging, saving, measuring, at the end) and at
    least every k steps: k = what fits into ``PROMPT_S`` seconds, from 1 to ``MOST_STEPS``, by the mean speed of the
    ranks. A single process sees its own flags after every step.
    """

    pauses = False

    def __init__(
        self,
        parts: Parts,
        stop: StopFlag,
        save_due: Callable[[], bool],
        written: Callable[[], bool],
        also: Callable[[Moment], bool],
    ) -> None:
        self._parts, self._stop, self._save_due, self._written, self._also = parts, stop, save_due, written, also
        self._next = self._step = parts.state.step + 1
        self._since = time.perf_counter()

    def due(self, now: Moment) -> bool:
        alone = self._parts.world.world_size == 1 and (self._stop.raised or self._save_due())
        return alone or now.step >= self._next or self._also(now)

    def run(self, now: Moment) -> None:
        seconds = (time.perf_counter() - self._since) / max(now.step - self._step, 1)
        self._since, self._step = time.perf_counter(), now.step
        world = self._parts.world
        flags = [self._stop.raised, self._save_due(), not self._written(), seconds]
        stop, save, writing, total = all_reduce_sum(torch.tensor(flags, dtype=torch.float64), world).tolist()
        now.looking, now.stopping, now.save_due, now.written = True, stop > 0, save > 0, writing == 0
        fit = int(PROMPT_S * world.world_size / max(total, 1e-9))
        self._next = now.step + min(max(fit, 1), MOST_STEPS)


class Finite:
    """Counts the steps that were skipped because they were not finite, and ends a run that does not recover.

    Whether a step is skipped is decided on the device and read at the next look, so a run that diverges continues for
    up to k − 1 steps (see :class:`Agree`) after the one that ends it, and changes no weight in them.

    Attributes:
        in_a_row: how many of the last steps were not finite.
        proven: the newest step whose weights gave a finite loss and gradient in a later step: a checkpoint of it, or
            of an earlier one, is good.
    """

    pauses = False

    def __init__(self, parts: Parts, set_aside: Callable[[int], str]) -> None:
        self._parts, self._set_aside = parts, set_aside
        self._pending: list[tuple[int, list[str], Tensor]] = []
        self.in_a_row = 0
        self.proven = parts.state.step - 1

    def note(self, step: int, samples: list[str], skipped: Tensor) -> None:
        """Remember a step until its outcome is read."""
        self._pending.append((step, samples, skipped))

    def due(self, now: Moment) -> bool:
        return now.looking

    def run(self, now: Moment) -> None:
        """Read what is pending.

        Raises:
            DivergenceError: ``engine.max_nonfinite`` steps in a row, or the last ones of the run, were not finite.
        """
        pending, self._pending = self._pending, []
        for (step, samples, _), skipped in zip(pending, _read([s for _, _, s in pending]), strict=True):
            if not skipped:
                self.in_a_row, self.proven = 0, step - 1
                continue
            self.in_a_row += 1
            self._write_down(step, samples)
            if self.in_a_row >= self._parts.recipe.engine.max_nonfinite:
                self.give_up(f"{self.in_a_row} non-finite steps in a row (engine.max_nonfinite), up to step {step}.")
        if now.last and self.in_a_row:
            self.give_up(f"The last {self.in_a_row} step(s) of the run were not finite.")

    def give_up(self, why: str) -> None:
        """End the run.

        Raises:
            DivergenceError: always; says what to change and where the same command resumes.
        """
        engine = self._parts.recipe.engine
        or_fp32 = "" if engine.precision == "fp32" else ", or use engine.precision=fp32"
        raise DivergenceError(
            f"{why} {self._set_aside(self.proven)} Lower optim.lr{or_fp32}, then run the same command again. The "
            f"samples of the skipped steps are in {self._parts.run_dir}/nonfinite-rank*.jsonl."
        )

    def _write_down(self, step: int, samples: list[str]) -> None:
        p = self._parts
        p.state.nonfinite_steps += 1
        with (p.run_dir / f"nonfinite-rank{p.world.rank}.jsonl").open("a", encoding="utf-8") as f:
            f.write(json.dumps({"step": step, "samples": samples}) + "\n")
        p.tracker.say(f"Step {step}: loss or gradient is not finite; step skipped on all ranks, sample ids recorded.")


class Log:
    """Writes the numbers of the steps since the last line; the only place where metrics are read from the device."""

    pauses = False

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self.begin()

    def begin(self) -> None:
        """Start the clock."""
        self._losses: list[Tensor] = []
        self._wait, self._since = 0.0, time.perf_counter()

    def begin_phase(self) -> None:
        """Mark the phase where it begins, once: a run that was killed there has marked it already."""
        p = self._parts
        if p.whole.phases and p.state.step == p.span.start:
            number = p.span.number
            if metrics_at(p.run_dir / "metrics.jsonl", p.state.step).get("phase") != number:
                p.tracker.log(p.state.step, {"samples_seen": p.state.samples_seen, "phase": number})

    def note(self, loss: Tensor, wait_s: float) -> None:
        """Add a step; ``wait_s``: seconds that it waited for its batch."""
        self._losses.append(loss)
        self._wait += wait_s

    def exclude(self, seconds: float) -> None:
        """Do not count ``seconds`` towards the training speed."""
        self._since += seconds

    def due(self, now: Moment) -> bool:
        return self.by_step(now) or now.stopping

    def by_step(self, now: Moment) -> bool:
        """Whether a line is due by the step number alone."""
        return now.step % self._parts.recipe.tracking.log_every == 0 or now.last or now.ends_phase

    def run(self, now: Moment) -> None:
        """Write a line.

        Raises:
            DataError: a source lost more than ``data.max_bad_share`` of its samples.
        """
        p = self._parts
        counts = p.ledger.sum_over_ranks(p.world)
        p.ledger.check(counts, final=now.last)
        losses, steps = self._losses, len(self._losses)
        numbers = _read([*losses, now.result.grad_norm, *now.result.metrics.values()])
        seconds = max(time.perf_counter() - self._since, 1e-9)  # after reading: the device has caught up
        values = {
            "samples_seen": p.state.samples_seen,
            "loss": sum(numbers[:steps]) / steps,
            "lr": p.engine.lr,
            "samples_per_s": steps * p.recipe.batch.size / seconds,
            **speed(p.flops.per_sample, steps * p.recipe.batch.size / seconds, p.world.world_size, p.engine.device),
            "peak_memory": peak_memory(p.engine.device),
            "data_wait_share": self._wait / seconds,
            "grad_norm": numbers[steps],
            **dict(zip(now.result.metrics, numbers[steps + 1 :], strict=True)),
            **{f"lost/{source}": bad for source, (_, bad) in counts.items() if bad},
        }
        p.tracker.log(now.step, values)
        self.begin()


class Stop:
    """Ends a run that was asked to stop."""

    pauses = False

    def __init__(self, parts: Parts, stop: StopFlag, saved: Callable[[], str]) -> None:
        self._parts, self._stop, self._saved = parts, stop, saved

    def due(self, now: Moment) -> bool:
        return now.stopping and not now.last

    def run(self, now: Moment) -> None:
        """End the run.

        Raises:
            Interrupted: always.
        """
        raise Interrupted(
            f"Stopped by {self._stop.name or 'a signal to another rank'}; {self._saved()}. Run the same command to "
            "resume."
        )


def _read(numbers: list[Tensor]) -> list[float]:
    """Scalar tensors as floats, in one copy from the device."""
    found: list[float] = torch.stack([x.detach().double() for x in numbers]).tolist() if numbers else []
    return found
