"""One page about a run: what it scored, how it got there, what it retrieves, what it was made with.

``write_report`` reads the run folder (recipe.yaml, metrics.jsonl, results.json, environment.json, quarantine.jsonl)
and writes a single HTML file that loads nothing from anywhere. A missing file is not an error:
the page says so.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from markupsafe import Markup

from dualenc.errors import DataError
from dualenc.pages import write_page
from dualenc_evals.pages.page import confusion_view, environment, flat, read_json
from dualenc_evals.pages.svg import Chart, Series, compact, legend, line_chart, smooth
from dualenc_evals.pages.table import directions, is_share, label, short

HEADLINES = ("R@1", "R@10", "top1", "mean_per_class_recall", "mIoU")
PALETTE = 6
DISTILL = ("kd_weight", "own_weight", "kd_part", "own_part", "distill_")
"""Prefixes of the metrics that distillation writes."""


def write_report(run_dir: Path, out: Path | None = None, refresh: int = 0, live: str = "") -> Path:
    """Write ``out`` (default ``run_dir/report.html``) and return it.

    Args:
        refresh: the page loads itself again after so many seconds (0: not).
        live: a line at the top of the page of a run that goes on.

    Raises:
        DataError: ``run_dir`` holds nothing that a report can show, or a file in it is damaged.
    """
    run_dir = Path(run_dir)
    page = out or run_dir / "report.html"
    html = render(read_run(run_dir), refresh, live)
    return write_page(page, html)


def read_run(run_dir: Path) -> dict[str, Any]:
    """The files of a run folder as data; missing ones are empty."""
    recipe = run_dir / "recipe.yaml"
    files = {
        "name": run_dir.resolve().name,
        "recipe": recipe.read_text(encoding="utf-8") if recipe.is_file() else "",
        "metrics": json_lines(run_dir / "metrics.jsonl"),
        "results": read_json(run_dir / "results.json"),
        "environment": read_json(run_dir / "environment.json"),
        "lost": [row for p in sorted(run_dir.glob("quarantine*.jsonl")) for row in json_lines(p)],
    }
    if not (files["recipe"] or files["metrics"] or files["results"]):
        raise DataError(
            f"{run_dir} holds no recipe.yaml, metrics.jsonl or results.json: there is nothing to report on."
        )
    return files


def render(run: Mapping[str, Any], refresh: int = 0, live: str = "") -> str:
    """The page as HTML."""
    tasks = run["results"].get("tasks", {})
    env = environment()
    recipe = _recipe(run["recipe"])
    return env.get_template("report.html.j2").render(
        name=recipe.get("name") or run["name"],
        description=recipe.get("description") or "",
        facts=facts(run, recipe),
        refresh=refresh,
        live=live,
        cards=cards(tasks) if tasks else cards_while_training(run["metrics"]),
        measured_at=max((r.get("step", 0) for r in run["metrics"] if _evals(r)), default=0),
        held_out=bool(tasks) and all(is_held_out(t) for t in tasks.values()),
        curves=training_curves(run["metrics"]),
        small=small_curves(run["metrics"]),
        progress=zero_shot_curves(run["metrics"], tasks),
        guard=guard_view(run["metrics"], recipe),
        tasks=[task_view(n, t) for n, t in tasks.items()],
        recipe=highlight_yaml(run["recipe"]),
        environment=flat(run["environment"]),
        evaluation=flat(run["results"].get("environment", {})),
        model=flat(run["results"].get("model", {})),
        lost=lost_samples(run["lost"]),
    )


# --- reading ------------------------------------------------------------------------------------------------------


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file, none if there is no file. Raises DataError for a damaged line before the last."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="backslashreplace").splitlines()
    rows = []
    for n, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as e:
            if n < len(lines):
                raise DataError(f"{path}, line {n}, is damaged: {e}") from e
            # A kill may cut the last line in the middle; only that line is lost.
    return rows


def _recipe(text: str) -> dict[str, Any]:
    import yaml

    from dualenc.config import load_yaml

    try:
        got = load_yaml(text) if text else {}
    except yaml.YAMLError:  # shown as it is; only its name is unknown
        return {}
    return got if isinstance(got, dict) else {}


# --- parts of the page --------------------------------------------------------------------------------------------


def facts(run: Mapping[str, Any], recipe: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The line under the title: how long, how much, on what."""
    out: list[tuple[str, str]] = []
    steps = [r["step"] for r in run["metrics"] if "step" in r]
    seen = [r["samples_seen"] for r in run["metrics"] if "samples_seen" in r]
    if steps:
        out.append(("steps", f"{max(steps):,}"))
    if seen:
        out.append(("samples seen", f"{max(seen):,}"))
    batch = recipe.get("batch")
    if isinstance(batch, dict) and "size" in batch:
        out.append(("global batch", f"{batch['size']:,}" if isinstance(batch["size"], int) else str(batch["size"])))
    parameters = run["results"].get("model", {}).get("parameters")
    if isinstance(parameters, int):
        out.append(("parameters", compact(parameters)))
    world = run["environment"].get("world_size")
    if world:
        out.append(("rank" if world == 1 else "ranks", str(world)))
    date = str(run["environment"].get("date") or run["results"].get("run", {}).get("date") or "")
    if date:
        out.append(("date", date[:10]))
    return out


def cards(tasks: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Headline numbers: R@1 and R@10 of each retrieval task's first direction, top-1 of each classification."""
    out = []
    for name, task in tasks.items():
        first = next(iter(directions(task).items()), None)
        if first is None:
            continue
        direction, metrics = first
        for metric in [m for m in metrics if short(m) in HEADLINES][:2]:
            value, chance, ci = task["metrics"][metric], task["chance"].get(metric), task["ci"].get(metric)
            out.append(
                {
                    "task": name,
                    "what": short(metric).replace("_", " ") if short(metric) != "top1" else "top-1 accuracy",
                    "direction": direction,
                    "value": f"{100 * value:.1f}",
                    "share": value,
                    "ci": ci,
                    "interval": f"{100 * ci[0]:.1f} – {100 * ci[1]:.1f}" if ci else "",
                    "chance": chance,
                    "chance_text": f"{100 * chance:.1f} %" if chance is not None else "",
                    "times": _times(value, chance),
                    "seen": _seen(task),
                    "before": "",
                }
            )
    return out


def _evals(row: Mapping[str, Any]) -> list[str]:
    return [k for k in row if k.startswith("eval/")]


def cards_while_training(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same of a run without results: what it last measured, and what it measured first."""
    out: list[dict[str, Any]] = []
    for key in dict.fromkeys(k for r in rows for k in _evals(r)):
        task, _, metric = key.removeprefix("eval/").rpartition("/")
        if not is_share(metric) or short(metric) not in HEADLINES or sum(c["task"] == task for c in out) >= 2:
            continue
        values = [r[key] for r in rows if isinstance(r.get(key), int | float)]
        what = short(metric)
        direction = label(metric[: -len(what) - 1]) if "_to_" in metric else "class"
        out.append(
            {
                "task": task,
                "what": "top-1 accuracy" if what == "top1" else what.replace("_", " "),
                "direction": direction,
                "value": f"{100 * values[-1]:.1f}",
                "share": values[-1],
                "seen": "",
                "ci": None,
                "interval": "",
                "chance": None,
                "chance_text": "",
                "times": "",
                "before": f"at first {100 * values[0]:.1f} %" if len(values) > 1 else "",
            }
        )
    return out


def is_held_out(task: Mapping[str, Any]) -> bool:
    """Whether the results say that items were compared with all training shards, and that none occurs in them."""
    seen = task.get("in_training")
    return seen is not None and seen["of"] > 0 and seen["count"] == 0 and bool(seen["complete"]) and not seen["unread"]


def _seen(task: Mapping[str, Any]) -> str:
    """A line on items that the training shards hold, if any."""
    seen = task.get("in_training")
    if not seen or not seen["count"]:
        return ""
    return f"{seen['count']:,} of {seen['of']:,} items occur in the training shards"


def _times(value: float, chance: float | None) -> str:
    if not chance:
        return ""
    ratio = value / chance
    return f"{ratio:.0f}× chance" if ratio >= 10 else f"{ratio:.1f}× chance"


def training_curves(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The loss: raw and smoothed."""
    x, y = column(rows, "loss")
    if not x:
        return []
    series = [Series("loss", x, y, 1, "faint"), Series("loss, smoothed", x, smooth(y), 1)]
    if len(x) < 20:
        series = [Series("loss", x, y, 1)]
    svg = line_chart(Chart(series, _clock(rows), compact, marks=phase_marks(rows)))
    title = "Training loss"
    return [{"title": title, "svg": Markup(svg), "legend": "", "last": f"{y[-1]:.3f}"}]


def zero_shot_curves(rows: Sequence[Mapping[str, Any]], tasks: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Metrics measured while training, one chart a metric, a line for each task and direction; dashed: chance."""
    groups: dict[str, list[str]] = {}
    for key in dict.fromkeys(k for r in rows for k in r if k.startswith("eval/")):
        metric = key.rpartition("/")[2]
        if is_share(metric) and short(metric) in HEADLINES:
            groups.setdefault(short(metric), []).append(key)
    out = []
    for kind, keys in groups.items():
        series, levels = [], []
        for n, key in enumerate(keys[:PALETTE], 1):
            task, _, metric = key.removeprefix("eval/").rpartition("/")
            x, y = column(rows, key)
            direction = label(metric[: -len(short(metric)) - 1]) if "_to_" in metric else ""
            series.append(Series(f"{task} {direction}".strip(), x, y, n))
            chance = tasks.get(task, {}).get("chance", {}).get(metric)
            if chance is not None and x:
                levels.append(Series("chance", [x[0], x[-1]], [chance, chance], n, "dashed"))
        chart = Chart([*levels, *series], _clock(rows), lambda v: f"{100 * v:g} %", zero=True, marks=phase_marks(rows))
        title = f"Zero-shot {kind.replace('_', ' ')}" if kind != "top1" else "Zero-shot top-1"
        out.append({"title": title, "svg": Markup(line_chart(chart)), "legend": Markup(legend(series)), "last": ""})
    return out


def guard_view(rows: Sequence[Mapping[str, Any]], recipe: Mapping[str, Any]) -> dict[str, Any] | None:
    """What eval.guard tracked: before the first step, at its lowest, at the end; and the curve, the bound dashed."""
    conf = (recipe.get("eval") or {}).get("guard") or {}
    bound = float(conf.get("max_fall", 5.0))
    out, series, levels = [], [], []
    for n, key in enumerate(dict.fromkeys(k for r in rows for k in r if k.startswith("guard/")), 1):
        task, _, metric = key.removeprefix("guard/").rpartition("/")
        x, y = column(rows, key)
        change = 100 * (y[-1] - y[0])
        out.append(
            {
                "task": task,
                "metric": metric,
                "before": y[0],
                "lowest": min(y),
                "after": y[-1],
                "change": f"{change:+.1f}".replace("-", "−"),
                "fallen": change < -bound,
                "measured": len(y),
            }
        )
        if n <= PALETTE:
            series.append(Series(f"{task} {label(metric)}", x, y, n))
            floor = max(y[0] - bound / 100, 0.0)
            levels.append(Series("bound", [x[0], x[-1]], [floor, floor], n, "dashed"))
    if not out:
        return None
    chart = Chart([*levels, *series], _clock(rows), lambda v: f"{100 * v:g} %", zero=True)
    return {
        "rows": out,
        "bound": f"{bound:g}",
        "action": str(conf.get("action", "stop")),
        "fallen": [r["task"] for r in out if r["fallen"]],
        "svg": Markup(line_chart(chart)),
        "legend": Markup(legend(series)),
    }


def small_curves(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Learning rate, temperature, gradient norm, speed, each part of a summed loss: what explains a run."""
    names = {"lr": "Learning rate", "grad_norm": "Gradient norm", "samples_per_s": "Samples / s"}
    names |= {"data_wait_share": "Waiting for data", "mfu": "MFU", "tflops_per_s": "TFLOP / s"}
    names |= {"peak_memory": "Peak memory, bytes a rank"}
    keys = [k for r in rows for k in r if k.startswith(("logit_scale/", "logit_bias/", "acc/", *DISTILL))]
    keys += [k for r in rows for k in r if k.startswith("loss/") and k.count("/") == 2]  # the parts of a weighted sum
    for k in dict.fromkeys(keys):
        what, _, pair = k.replace("loss/", "loss ", k.count("/") - 1).partition("/")
        names[k] = f"{what.replace('_', ' ').capitalize()} {pair.replace('-', ' – ')}"
    out = []
    for key, title in names.items():
        x, y = column(rows, key)
        if x:
            percent = key in ("data_wait_share", "mfu") or key.startswith("acc/")
            show = (lambda v: f"{100 * v:.3g} %") if percent else compact
            chart = Chart([Series(title, x, y, 1)], "", show, 300, 130, zero=percent, small=True)
            out.append({"title": title, "svg": Markup(line_chart(chart)), "last": show(y[-1])})
    return out


def phase_marks(rows: Sequence[Mapping[str, Any]]) -> list[tuple[float, str]]:
    """Where each later phase of a run begins."""
    return [(x, f"phase {k:g}") for x, k in zip(*column(rows, "phase"), strict=True) if k]


def _clock(rows: Sequence[Mapping[str, Any]]) -> str:
    return "samples seen" if any("samples_seen" in r for r in rows) else "steps"


def column(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """(samples seen, or steps where rows do not say; values) of the rows that have the metric ``key``."""
    clock = "samples_seen" if _clock(rows) == "samples seen" else "step"
    points = [(r[clock], r[key]) for r in rows if isinstance(r.get(key), int | float) and clock in r]
    return [float(x) for x, _ in points], [float(y) for _, y in points]


def task_view(name: str, task: Mapping[str, Any]) -> dict[str, Any]:
    """One task as the template shows it."""
    details = task.get("details") or {}
    return {
        "name": name,
        "task": task,
        "n": " × ".join(f"{v:,} {k}" for k, v in task["n"].items()),
        "details": details,
        "things": details.get("items", {}),
        "curve": recall_chart(details.get("recall_curves", [])),
        "confusion": confusion_view(details),
        "heat": heat_view(details),
        "apart": distance_view(details),
        "risk": risk_chart(details.get("risk_coverage")),
    }


def recall_chart(curves: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Recall at every k, both directions, with chance dashed; k on a logarithmic axis is marked at its points."""
    if not curves:
        return None
    series = []
    for n, c in enumerate(curves, 1):
        series += [Series(c["name"], c["k"], c["recall"], n), Series("chance", c["k"], c["chance"], n, "dashed")]
    chart = Chart(
        series, "k (number of candidates)", lambda v: f"{100 * v:g} %", width=520, zero=True, log_x=curves[0]["k"]
    )
    named = [s for s in series if s.style == "line"]
    return {"svg": Markup(line_chart(chart)), "legend": Markup(legend(named))}


def risk_chart(curve: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Share of wrong answers among the most confident ones at every coverage; dashed: the best order, and none."""
    if not curve:
        return None
    x, risk = curve["coverage"], curve["risk"]
    series = [
        Series("most confident first", x, risk, 1),
        Series("best possible order", x, curve["best"], 2, "dashed"),
        Series("no order", [x[0], x[-1]], [risk[-1]] * 2, 3, "dashed"),
    ]
    chart = Chart(series, "coverage (share of the items answered)", lambda v: f"{100 * v:.3g} %", width=520, zero=True)
    return {"svg": Markup(line_chart(chart)), "legend": Markup(legend(series))}


def heat_view(details: Mapping[str, Any]) -> dict[str, Any] | None:
    """Similarities scaled to the page's colours; the range is written next to them."""
    heat = details.get("similarity")
    if not heat or not heat["matrix"]:
        return None
    values = [v for row in heat["matrix"] for v in row]
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    cells = [[{"s": f"{v:.2f}", "v": (v - low) / span} for v in row] for row in heat["matrix"]]
    top = [max(range(len(row)), key=row.__getitem__) == i for i, row in enumerate(heat["matrix"])]
    return {
        "rows": list(zip(heat["rows"], cells, strict=True)),
        "columns": heat["columns"],
        "low": f"{low:.2f}",
        "high": f"{high:.2f}",
        "hits": sum(top),
        "of": len(top),
    }


def distance_view(details: Mapping[str, Any]) -> dict[str, Any] | None:
    """Distances between the class means, scaled to the page's colours; the range is written next to them."""
    matrix = details.get("centroid_distances") or []
    known = [v for row in matrix for v in row if v is not None]
    if not known:
        return None
    high = max(known) or 1.0
    rows = [
        {
            "name": name,
            "cells": [{"s": "" if v is None else f"{v:.2f}", "v": (v or 0.0) / high} for v in row],
        }
        for name, row in zip(details["classes"], matrix, strict=True)
    ]
    return {"rows": rows, "classes": details["classes"], "high": f"{high:.2f}", "numbers": len(rows) <= 16}


def lost_samples(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts per source and the first few by name."""
    counts = Counter(str(r.get("source", "?")) for r in rows)
    return {"total": len(rows), "counts": dict(counts), "first": list(rows[:20])}


def highlight_yaml(text: str) -> Markup:
    """Keys, comments, numbers and strings in colour; everything escaped first."""
    lines = []
    for raw in text.splitlines():
        body, mark, comment = raw.partition(" #") if not raw.lstrip().startswith("#") else ("", "", raw)
        line = escape(body, quote=False)
        line = re.sub(r"^(\s*(?:- )?)([\w.\-]+)(:)(?= |$)", r'\1<b class="k">\2</b>\3', line)
        line = re.sub(
            r"(?<=[ \[,:])(-?\d[\d_.]*(?:e[-+]?\d+)?|true|false|null)(?=[\],\s}]|$)", r'<b class="n">\1</b>', line
        )
        if mark or comment:
            line += f'<i class="c">{escape(mark + comment, quote=False)}</i>'
        lines.append(line)
    return Markup("\n".join(lines))
