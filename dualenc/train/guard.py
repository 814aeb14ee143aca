"""The guard: what a fine-tuned model could do before the first step, it must still be able to do.

The numbers before the first step are kept in the checkpoint, so a resumed run compares with them and not with the step
it resumed from. In metrics.jsonl they are ``guard/TASK/METRIC``, at step 0 and at every check.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dualenc.config import Guard
from dualenc.errors import ConfigError, GuardError

Measure = Callable[[], Mapping[str, float]]
"""All ranks together: task/metric → value, the same on every rank."""


class Watch:
    """Compares the watched metrics with their values before the first step.

    Args:
        state: ``before`` (task/metric → value before the first step), ``step`` of that measurement and ``fallen``
            (the last check was beyond the bound); changed in place, and kept in the checkpoint.
    """

    def __init__(self, conf: Guard, state: dict[str, Any]) -> None:
        self.conf, self.state = conf, state
        self.sentence: str | None = None

    def due(self, step: int, last: bool) -> bool:
        """Whether to measure after this step."""
        every = self.conf.every_steps
        return last or bool(every and step % every == 0)

    @property
    def before_going_on(self) -> bool:
        """Whether to measure before the next step: nothing is measured yet, or the guard stopped the run."""
        return "before" not in self.state or bool(self.state.get("fallen"))

    def check(self, values: Mapping[str, float], step: int) -> dict[str, float]:
        """The watched numbers; :attr:`sentence` says which fell too far. The first call sets the reference.

        Raises:
            ConfigError: if a task has no such metric.
        """
        now = watched(values, self.conf.metric)
        if "before" not in self.state:
            self.state |= {"before": now, "step": step, "fallen": False}
        before = self.state["before"]
        gone = [k for k in before if k not in now]
        if gone:
            raise ConfigError(
                f"eval.guard: this run started with {', '.join(before)}; {gone[0]} is no longer measured. Restore the "
                "tasks and metric, or start from scratch: checkpoint.resume=none."
            )
        falls = {k: 100 * (v - now[k]) for k, v in before.items()}
        worst = max(falls, key=lambda k: falls[k])
        self.state["fallen"] = falls[worst] > self.conf.max_fall
        task, _, metric = worst.rpartition("/")
        said = (
            f"{task}: {metric.replace('_', ' ')} was {100 * before[worst]:.1f} % at step {self.state['step']} and is "
            f"{100 * now[worst]:.1f} % at step {step}, {falls[worst]:.1f} points lower (eval.guard.max_fall: "
            f"{self.conf.max_fall:g})"
        )
        self.sentence = said if self.state["fallen"] else None
        return now

    def refuse(self, save: Path) -> None:
        """Stop the run.

        Raises:
            GuardError: always.
        """
        raise GuardError(
            f"Stopped by eval.guard: {self.sentence}. Checkpoint: {save}. Lower optim.lr, lock a tower, or allow a "
            "larger fall: eval.guard.max_fall=POINTS, or eval.guard.action=warn. Then run the same command to resume."
        )


def watched(values: Mapping[str, float], metric: str | None) -> dict[str, float]:
    """One number per task: ``metric``, else top1, else the first R@1.

    Raises:
        ConfigError: naming the metrics that the task has.
    """
    tasks: dict[str, list[str]] = {}
    for key in values:
        tasks.setdefault(key.rpartition("/")[0], []).append(key.rpartition("/")[2])
    out = {}
    for task, names in tasks.items():
        if metric is not None:
            found = metric if metric in names else None
        else:
            found = "top1" if "top1" in names else next((n for n in names if n.endswith("_R@1")), None)
        if found is None or not 0 <= values[f"{task}/{found}"] <= 1:
            raise ConfigError(
                f"eval.guard.metric: {task} has no metric {metric or 'top1 or R@1'!r} between 0 and 1; it has "
                f"{', '.join(names)}."
            )
        out[f"{task}/{found}"] = float(values[f"{task}/{found}"])
    return out
