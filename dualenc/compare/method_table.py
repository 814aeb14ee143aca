"""From the runs of a study to the table of its methods."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from dualenc.compare.intervals import differences
from dualenc.compare.study_runs import Study
from dualenc_evals.pages.comparison import MethodResult, MethodTable


def table_of(study: Study) -> MethodTable:
    """Every method with its numbers by seed, its differences from the control, and its costs."""
    comparison = study.comparison
    control = comparison.control
    metrics = dict.fromkeys(k for by in study.runs.values() for run in by.values() for k in run.get("metrics", {}))
    values = {k: study.values(k) for k in metrics}
    equal = {k: study.values(k, equal=True) for k in metrics} if study.flops else {}
    against = {k: differences(v, control) if control in v else {} for k, v in values.items()}
    methods = []
    for name, method in comparison.methods.items():
        runs = list(study.runs.get(name, {}).values())
        done = [r for r in runs if r["state"] == "done"]
        failed = [r["error"] for r in runs if r["state"] == "failed"]
        again = list(study.equal.get(name, {}).values())
        note = method.note or (method.recipe if Path(method.recipe).suffix not in (".yaml", ".yml") else "")
        diverged = sum(not r["finite"] for r in done)
        methods.append(
            MethodResult(
                name=name,
                note=note,
                values={k: v[name] for k, v in values.items() if name in v},
                differences={
                    k: (d[name].mean, d[name].low, d[name].high, d[name].verdict)
                    for k, d in against.items()
                    if name in d
                },
                equal={k: v[name] for k, v in equal.items() if name in v},
                equal_steps=again[0].get("steps") if again else None,
                compute=study.flops[name] / study.flops[control]
                if name in study.flops and control in study.flops
                else None,
                steps=done[0]["steps"] if done else 0,
                samples=done[0]["samples"] if done else 0,
                cpu_seconds=statistics.mean(r["cpu_seconds"] for r in done) if done else 0.0,
                loss=_loss(done),
                problem=failed[0] if failed else f"{diverged} runs had a loss that is not finite" if diverged else "",
            )
        )
    settings: list[tuple[str, list[str]]] = []
    if comparison.overrides:
        settings.append(("All runs", comparison.overrides))
    if comparison.ranks > 1:
        settings.append(("Ranks of a run", [str(comparison.ranks)]))
    return MethodTable(comparison.name, methods, comparison.seeds, study.chance, settings)


def _loss(done: list[dict[str, Any]]) -> tuple[float, float] | None:
    found = [(r["first"], r["last"]) for r in done if r["first"] is not None]
    if not found:
        return None
    first, last = zip(*found, strict=True)
    return statistics.mean(first), statistics.mean(last)
