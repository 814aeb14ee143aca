"""One page about several runs: their curves over one another, and what each scored and was made with.

``write_runs`` reads metrics.jsonl and recipe.yaml of each run folder; the page is one file that loads nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from dualenc.config import load_yaml
from dualenc.errors import ConfigError
from dualenc.pages import write_page
from dualenc_evals.pages.page import environment
from dualenc_evals.pages.run import HEADLINES, PALETTE, column, read_run
from dualenc_evals.pages.svg import Chart, Series, compact, line_chart, smooth
from dualenc_evals.pages.table import is_share, label, short

NAMES = {"lr": "Learning rate", "grad_norm": "Gradient norm", "samples_per_s": "Samples / s"}
SAME = ("name", "out", "description")
"""Keys of a recipe that always differ."""


def is_run(path: Path) -> bool:
    """Whether a folder is that of a run, with curves."""
    return (path / "metrics.jsonl").is_file()


def write_runs(runs: Sequence[Path], out: Path, refresh: int = 0, live: str = "") -> Path:
    """Write the page and return it.

    Args:
        refresh, live: as in :func:`dualenc_evals.pages.run.write_report`.

    Raises:
        ConfigError: more runs than the page has colours.
        DataError: a file in a run folder is damaged.
    """
    if len(runs) > PALETTE:
        raise ConfigError(f"dualenc report: a page compares at most {PALETTE} runs, got {len(runs)}")
    return write_page(out, render([read_run(Path(r)) for r in runs], refresh, live))


def render(runs: Sequence[Mapping[str, Any]], refresh: int = 0, live: str = "") -> str:
    """The page as HTML."""
    names = _names(runs)
    rows = [r["metrics"] for r in runs]
    template = environment().get_template("runs.html.j2")
    return template.render(
        title=" · ".join(names),
        refresh=refresh,
        live=live,
        runs=[{"name": n, "colour": i, **_facts(r)} for i, (n, r) in enumerate(zip(names, runs, strict=True), 1)],
        numbers=_numbers(rows),
        curves=_curves(names, rows),
        small=[c for key, title in _small(rows).items() if (c := _chart(title, key, names, rows, small=True))],
        differences=_differences([_recipe(r["recipe"]) for r in runs]),
    )


def _names(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The recipes' names, or the folders' where two are the same."""
    names = [str(_recipe(r["recipe"]).get("name") or r["name"]) for r in runs]
    return names if len(set(names)) == len(names) else [str(r["name"]) for r in runs]


def _recipe(text: str) -> dict[str, Any]:
    try:
        got = load_yaml(text) if text else {}
    except yaml.YAMLError:
        return {}
    return got if isinstance(got, dict) else {}


def _facts(run: Mapping[str, Any]) -> dict[str, Any]:
    steps = [r["step"] for r in run["metrics"] if "step" in r]
    seen = [r["samples_seen"] for r in run["metrics"] if "samples_seen" in r]
    loss = column(run["metrics"], "loss")[1]
    return {
        "steps": f"{max(steps):,}" if steps else "–",
        "samples": f"{max(seen):,}" if seen else "–",
        "loss": f"{smooth(loss)[-1]:.4f}" if loss else "–",
    }


def _measured(rows: Sequence[Sequence[Mapping[str, Any]]]) -> list[str]:
    """Metrics measured while training, of all runs."""
    keys = dict.fromkeys(k for run in rows for r in run for k in r if k.startswith("eval/"))
    return [k for k in keys if is_share(k.rpartition("/")[2]) and short(k.rpartition("/")[2]) in HEADLINES]


def _numbers(rows: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """For each metric the last and the best value of every run; the best last value is marked."""
    out = []
    for key in _measured(rows):
        task, _, metric = key.removeprefix("eval/").rpartition("/")
        found = [column(run, key)[1] for run in rows]
        top = max((y[-1] for y in found if y), default=None)
        alone = sum(bool(y) and y[-1] == top for y in found) == 1 and len(found) > 1
        cells = [
            {"value": f"{100 * y[-1]:.1f}", "peak": f"{100 * max(y):.1f}", "best": alone and y[-1] == top}
            if y
            else None
            for y in found
        ]
        out.append({"task": task, "metric": label(metric), "cells": cells})
    return out


def _curves(names: Sequence[str], rows: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    charts = [_chart("Training loss, smoothed", "loss", names, rows, smoothed=True)]
    for key in _measured(rows):
        task, _, metric = key.removeprefix("eval/").rpartition("/")
        charts.append(_chart(f"{task}: {label(metric)}", key, names, rows, percent=True))
    return [c for c in charts if c]


def _small(rows: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, str]:
    scales = dict.fromkeys(k for run in rows for r in run for k in r if k.startswith("logit_scale/"))
    return NAMES | {k: f"Logit scale {k.partition('/')[2].replace('-', ' – ')}" for k in scales}


def _chart(
    title: str,
    key: str,
    names: Sequence[str],
    rows: Sequence[Sequence[Mapping[str, Any]]],
    *,
    smoothed: bool = False,
    percent: bool = False,
    small: bool = False,
) -> dict[str, Any] | None:
    """One metric of all runs that have it."""
    series = []
    for n, (name, run) in enumerate(zip(names, rows, strict=True), 1):
        x, y = column(run, key)
        if x:
            series.append(Series(name, x, smooth(y) if smoothed and len(y) >= 20 else y, n))
    if not series:
        return None
    show = (lambda v: f"{100 * v:g} %") if percent else compact
    clock = "samples seen" if any("samples_seen" in r for run in rows for r in run) else "steps"
    chart = Chart(
        series, "" if small else clock, show, *((300, 130) if small else (440, 250)), zero=percent, small=small
    )
    return {"title": title, "svg": Markup(line_chart(chart))}


def _differences(recipes: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Keys that the recipes do not have in common, with every run's value."""
    flat = [dict(_leaves(r)) for r in recipes]
    keys = dict.fromkeys(k for f in flat for k in f)
    out = []
    for k in keys:
        values = [f.get(k, "–") for f in flat]
        if len(set(values)) > 1 and k.split(".")[0] not in SAME:
            out.append((k, values))
    return out


def _leaves(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    if isinstance(value, Mapping):
        return [leaf for k, v in value.items() for leaf in _leaves(v, f"{prefix}.{k}" if prefix else str(k))]
    if isinstance(value, list) and any(isinstance(v, Mapping) for v in value):
        return [leaf for i, v in enumerate(value) for leaf in _leaves(v, f"{prefix}.{i}")]
    return [(prefix, ", ".join(map(str, value)) if isinstance(value, list) else str(value))]
