"""A comparison of methods as a table for a terminal or a page of docs, and as an HTML page."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dualenc.pages import write_page
from dualenc_evals.pages.page import environment
from dualenc_evals.pages.run import HEADLINES
from dualenc_evals.pages.svg import compact
from dualenc_evals.pages.table import is_share, label, short

SIGNS = {"better": "▲", "worse": "▼", "noise": ""}


@dataclass
class MethodResult:
    """One method, in the units of the metrics.

    Attributes:
        values: metric → value by seed, in the order of the study's seeds.
        differences: metric → (mean, low, high, verdict) against the control; the control has none.
        equal: metric → value by seed at equal compute; the values of ``values`` where a step costs the same.
        equal_steps: steps of those runs; None where no run of their own was needed.
        compute: operations of a step, over the control's; None where they were not counted.
    """

    name: str
    note: str = ""
    values: Mapping[str, Sequence[float]] = field(default_factory=dict)
    differences: Mapping[str, tuple[float, float, float, str]] = field(default_factory=dict)
    equal: Mapping[str, Sequence[float]] = field(default_factory=dict)
    equal_steps: int | None = None
    compute: float | None = None
    steps: int = 0
    samples: int = 0
    cpu_seconds: float = 0.0
    loss: tuple[float, float] | None = None
    problem: str = ""


@dataclass
class MethodTable:
    """What a comparison found.

    Attributes:
        methods: the first is the control.
        chance: metric → chance level, where it is known.
        settings: (what, values) that all methods have in common.
    """

    name: str
    methods: Sequence[MethodResult]
    seeds: Sequence[int]
    chance: Mapping[str, float] = field(default_factory=dict)
    settings: Sequence[tuple[str, Sequence[str]]] = ()

    @property
    def metrics(self) -> list[str]:
        """R@10, top-1 and other headline numbers of each task; R@1 and R@5 only where there is no R@10."""
        keys = dict.fromkeys(k for m in self.methods for k in m.values)
        shown = [
            k for k in keys if is_share(k.rpartition("/")[2]) and short(k.rpartition("/")[2]) in (*HEADLINES, "R@10")
        ]
        tens = [k for k in shown if k.endswith("_R@10")]
        short_of = {k.removesuffix("R@10") for k in tens}
        return [k for k in shown if k in tens or not any(k.startswith(p) and "_R@" in k for p in short_of)]

    @property
    def has_equal(self) -> bool:
        """Whether any method was trained again at equal compute."""
        return any(m.compute is not None for m in self.methods)


def mean_of(values: Sequence[float]) -> str:
    """``36.5 ± 0.4``: percent, mean and standard deviation over seeds."""
    mean = f"{100 * statistics.mean(values):.1f}"
    return f"{mean} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else mean


def difference_of(found: tuple[float, float, float, str]) -> str:
    """``+1.2 [0.3, 2.1] ▲`` in points."""
    mean, low, high, verdict = found
    interval = f" [{100 * low:+.1f}, {100 * high:+.1f}]" if math.isfinite(low) else ""
    return f"{100 * mean:+.1f}{interval} {SIGNS[verdict]}".rstrip()


def titles(table: MethodTable) -> list[str]:
    """Column heads of the metrics: ``quickstart_val_style: image → text R@10``."""
    several = len({k.rpartition("/")[0] for k in table.metrics}) > 1
    return [f"{k.rpartition('/')[0]}: {label(k.rpartition('/')[2])}" if several else label(k.rpartition("/")[2])
            for k in table.metrics]  # fmt: skip


def markdown(table: MethodTable) -> str:
    """One row a method: every metric with its difference from the control, cost, and the same at equal compute."""
    heads = ["method", *(f"{t}, %" for t in titles(table)), "loss, first → last", "CPU s"]
    if table.has_equal:
        heads += ["compute of a step", *(f"{t} at equal compute, %" for t in titles(table))]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for m in table.methods:
        if m.problem:
            lines.append(f"| {m.name} | {m.problem.replace('|', '/')} |" + " |" * (len(heads) - 2))
            continue
        cells = [m.name]
        for k in table.metrics:
            value = mean_of(m.values[k]) if k in m.values else "–"
            cells.append(value + (f", {difference_of(m.differences[k])}" if k in m.differences else ""))
        cells.append(f"{m.loss[0]:.3f} → {m.loss[1]:.3f}" if m.loss else "–")
        cells.append(f"{m.cpu_seconds:.0f}")
        if table.has_equal:
            again = "" if m.equal_steps is None else f", {m.equal_steps:,} steps"
            cells.append("–" if m.compute is None else f"{m.compute:.2f} ×{again}")
            cells += [mean_of(m.equal[k]) if k in m.equal else "–" for k in table.metrics]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def explained(table: MethodTable) -> str:
    """What the signs of the table mean."""
    seeds = len(table.seeds)
    if seeds == 1:
        return "One seed: nothing says which differences are noise."
    return (
        f"Mean ± standard deviation over {seeds} seeds, then the difference from {table.methods[0].name} at equal "
        f"seeds with its 95 % interval for all comparisons at once. ▲ better, ▼ worse; without a sign it may be noise."
    )


def write_method_table(table: MethodTable, out: Path) -> Path:
    """Write the page and return its path."""
    return write_page(out, render(table))


def render(table: MethodTable) -> str:
    """The page as HTML."""
    panels = [_panel(table, k, t) for k, t in zip(table.metrics, titles(table), strict=True)]
    return (
        environment()
        .get_template("methods.html.j2")
        .render(
            title=table.name,
            table=table,
            note=explained(table),
            panels=panels,
            costs=[_cost(m) for m in table.methods],
            problems=[m for m in table.methods if m.problem],
        )
    )


def _panel(table: MethodTable, metric: str, title: str) -> dict[str, Any]:
    """One metric of all methods, best first, on a common axis that covers the seeds and the intervals."""
    have = [m for m in table.methods if metric in m.values]
    control = table.methods[0]
    base = statistics.mean(control.values[metric]) if metric in control.values else None
    ends = [v for m in have for v in m.values[metric]]
    if base is not None:
        ends += [
            base + e for m in have if metric in m.differences for e in m.differences[metric][1:3] if math.isfinite(e)
        ]
    chance = table.chance.get(metric)
    low, high = _axis(ends)

    def at(value: float) -> str:
        return f"{min(max(100 * (value - low) / (high - low), 0.0), 100.0):.2f}"

    rows = []
    for m in sorted(have, key=lambda m: -statistics.mean(m.values[metric])):
        found = m.differences.get(metric)
        interval = None
        if found is not None and base is not None and math.isfinite(found[1]):
            left, right = at(base + found[1]), at(base + found[2])
            interval = {"left": left, "width": f"{float(right) - float(left):.2f}"}
        rows.append({
            "name": m.name, "note": m.note, "control": m is control, "value": mean_of(m.values[metric]),
            "difference": "control" if m is control else difference_of(found) if found else "",
            "verdict": found[3] if found else "noise",
            "dots": [at(v) for v in m.values[metric]], "mean": at(statistics.mean(m.values[metric])),
            "interval": interval,
            "equal": mean_of(m.equal[metric]) if metric in m.equal else "–",
        })  # fmt: skip
    return {
        "title": title, "rows": rows, "low": f"{100 * low:g}", "high": f"{100 * high:g}",
        "chance": "" if chance is None else f"chance {100 * chance:.1f} %",
        "chance_at": at(chance) if chance is not None and low <= chance <= high else None,
        "base_at": None if base is None else at(base),
    }  # fmt: skip


def _axis(values: Sequence[float]) -> tuple[float, float]:
    """Whole fives of percent around the values, within 0 and 100."""
    low, high = min(values), max(values)
    step = 0.05 if high - low > 0.1 else 0.01
    low, high = math.floor(low / step) * step, math.ceil(high / step) * step
    return max(round(low, 4), 0.0), min(round(max(high, low + step), 4), 1.0)


def _cost(m: MethodResult) -> dict[str, str]:
    return {
        "name": m.name,
        "steps": f"{m.steps:,}",
        "samples": compact(m.samples),
        "cpu": f"{m.cpu_seconds:,.0f}",
        "compute": "–" if m.compute is None else f"{m.compute:.2f} ×",
        "loss": f"{m.loss[0]:.3f} → {m.loss[1]:.3f}" if m.loss else "–",
    }
