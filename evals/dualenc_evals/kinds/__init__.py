"""The kinds of evaluation tasks."""

from __future__ import annotations

from typing import Any

from dualenc.registry import Registry

kinds: Registry[Any] = Registry(
    "task kind",
    "dualenc.tasks",
    needs=("Task", "collect", "evaluate"),
    builtin={
        "classification": "dualenc_evals.kinds.classification",
        "multilabel": "dualenc_evals.kinds.multilabel",
        "retrieval": "dualenc_evals.kinds.retrieval",
        "compositional": "dualenc_evals.kinds.compositional",
        "probe": "dualenc_evals.kinds.probes",
    },
)
"""Name → what has ``Task`` (the model of a task's YAML: a subclass of :class:`dualenc_evals.task.Task` with the kind's
own keys), ``collect(task, rows, store)`` (rows → the data that is measured) and ``evaluate(task, data, store, seed,
details)`` (→ metrics, intervals, chance)."""

__all__ = ["kinds"]
