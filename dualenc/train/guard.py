"""The guard: what a fine-tuned model could do before the first step, it must still be able to do.

The numbers before the first step stand in the training save, so a resumed run compares with them and not with where it
went on. In metrics.jsonl they are ``guard/TASK/METRIC``, at step 0 and at every check.
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
    """Compares with the beginning.

    Args:
        state: ``before`` (task/metric → value before the first step), ``step`` of that measurement and ``fallen``
            (the last check was beyond the bound); changed in place, and kept in the training save.
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
        """Whether to measure before the next step: nothing is known yet, or the run was stopped for a fall."""
        return "before" not in self.state or bool(self.state.get("fallen"))

    def check(self, values: Mapping[str, float], step: int) -> dict[str, float]:
        """The numbers that are watched; :attr:`sentence` says which fell too far. The first call sets the mark.

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
                f"eval.guard: this run began by watching {', '.join(before)}; {gone[0]} is not measured any more. Put "
                "tasks and metric back, or start anew: checkpoint.resume=none."
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
            f"Stopped by eval.guard and saved in {save}: {self.sentence}. Lower optim.lr, lock a tower, or say what "
            "may be lost: eval.guard.max_fall=POINTS, or eval.guard.action=warn; the same command then "
            "goes on from there."
        )


def watched(values: Mapping[str, float], metric: str | None) -> dict[str, float]:
    """One number a task: ``metric``, or else top1, or the first R@1.

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
                f"eval.guard.metric: {task} has no share {metric or 'top1 or R@1'!r}; it has {', '.join(names)}."
            )
        out[f"{task}/{found}"] = float(values[f"{task}/{found}"])
    return out
