"""A teacher and its students on one page: held-out numbers by recipe and seed, size, operations, measured speed.

Held-out numbers are those a run wrote at its last step if it evaluated itself on the task; else they are computed.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from markupsafe import Markup

from dualenc.data.batch import map_tensors
from dualenc.data.modalities.text import TextInput
from dualenc.errors import ConfigError
from dualenc.files import write_atomically
from dualenc.flop_counter import counting
from dualenc.model import Bundle, load_model
from dualenc.pages import write_page
from dualenc_evals.harness import environment, evaluate
from dualenc_evals.pages import page as pages
from dualenc_evals.pages.run import column, json_lines
from dualenc_evals.pages.svg import Chart, Series, compact, legend, line_chart
from dualenc_evals.task import Task

BATCHES = (1, 64)
WEIGHTS = {
    "kd_weight": "KD weight, mean",
    "kd_weight_sd": "KD weight, spread",
    "own_weight_sd": "own-task weight, spread",
}
PARTS = {"kd_part": "distillation", "own_part": "own task"}


def compare(
    models: Sequence[str], tasks: Sequence[Task], out: Path, batch_size: int = 64, repeats: int = 15, threads: int = 1
) -> dict[str, Any]:
    """Measure models, the first of which is the teacher, and write ``out`` (HTML) and ``out`` with ending .json.

    Args:
        models: MODELs as in ``dualenc eval``; run folders are grouped by their recipe's name.
        tasks: what to score them on.
        repeats: timed forwards per measurement; the median is given.
        threads: CPU threads of the timed forwards.

    Returns:
        ``{"teacher", "groups": [{"name", "models", "metrics": {task/metric: [values]}, "cost"}], "environment"}``.

    Raises:
        ConfigError: without a teacher and a student.
    """
    if len(models) < 2:
        raise ConfigError("dualenc compare: name the teacher first, then at least one student")
    groups: dict[str, dict[str, Any]] = {}
    for spec in models:
        name = group_name(spec)
        group = groups.setdefault(name, {"name": name, "models": [], "metrics": {}, "cost": {}})
        group["models"].append(spec)
        values, bundle = scores(spec, tasks, batch_size)
        for key, value in values.items():
            group["metrics"].setdefault(key, []).append(value)
        if not group["cost"]:  # once per architecture
            group["cost"] = cost(bundle or load_model(spec), repeats, threads)
    first = next(iter(groups.values()))
    for group in groups.values():
        group["times"] = times(first["cost"], group["cost"])
    result = {
        "teacher": models[0],
        "groups": list(groups.values()),
        "environment": {**environment(0, batch_size), "threads": threads},
    }
    write_atomically(out.with_suffix(".json"), json.dumps(result, indent=1, default=str))
    write_page(out, render(result))
    return result


def group_name(spec: str) -> str:
    """A run's recipe name, so that its seeds are grouped; any other MODEL is a group of its own."""
    recipe = Path(spec) / "recipe.yaml"
    if not recipe.is_file():
        return spec
    return str(yaml.safe_load(recipe.read_text(encoding="utf-8")).get("name", spec))


def scores(spec: str, tasks: Sequence[Task], batch_size: int) -> tuple[dict[str, float], Bundle | None]:
    """task/metric → value; and the model, if it had to be loaded."""
    rows = json_lines(Path(spec) / "metrics.jsonl")
    last = max((r["step"] for r in rows if "loss" in r), default=None)
    own = {k.removeprefix("eval/"): float(v) for r in rows if r["step"] == last for k, v in r.items() if "eval/" in k}
    if tasks and all(any(k.startswith(f"{t.name}/") for k in own) for t in tasks):
        names = tuple(f"{t.name}/" for t in tasks)
        return {k: v for k, v in own.items() if k.startswith(names)}, None
    bundle = load_model(spec)
    results = evaluate(bundle.embedder(), tasks, batch_size=batch_size, progress=False, details=False)
    return {f"{n}/{k}": float(v) for n, r in results["tasks"].items() for k, v in r["metrics"].items()}, bundle


# --- what it costs -----------------------------------------------------------------------------------------------


def cost(bundle: Bundle, repeats: int, threads: int) -> dict[str, dict[str, Any]]:
    """By modality and in total: parameters, multiply-adds of one item (×2: FLOPs), milliseconds at each batch size.

    Items are the input's dummy row; captions are as long as the context, so that lengths are equal for all models.
    """
    bundle.model.eval()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        parts = {m: _cost_of(bundle, m, repeats) for m in bundle.modalities}
    finally:
        torch.set_num_threads(before)
    whole = {k: sum(p[k] for p in parts.values()) for k in ("parameters", "flops")}
    ms = {b: sum(p["ms"][b] for p in parts.values()) for b in BATCHES}
    return {**parts, "all": {**whole, "ms": ms, "per_s": {b: 1000 * b / ms[b] for b in BATCHES}}}


def _cost_of(bundle: Bundle, m: str, repeats: int) -> dict[str, Any]:
    one = full_length(bundle, m)
    with torch.no_grad(), counting() as counter:
        bundle.model.encode(m, one)
    ms = {}
    for b in BATCHES:
        x = map_tensors(one, lambda t, b=b: t.repeat(b, *[1] * (t.ndim - 1)))

        def run(x: Any = x) -> None:
            with torch.no_grad():
                bundle.model.encode(m, x)

        ms[b] = median_ms(run, repeats)
    return {
        "parameters": sum(p.numel() for p in bundle.model.tower(m).parameters()),
        "flops": int(counter.get_total_flops()),
        "ms": ms,
        "per_s": {b: 1000 * b / ms[b] for b in BATCHES},
    }


def full_length(bundle: Bundle, m: str) -> Any:
    """One row of a modality; token ids are repeated up to the context, all real."""
    source = bundle.inputs[m]
    x = source.collate([source.dummy()])
    if not (isinstance(source, TextInput) and isinstance(x, Mapping)):
        return x
    assert isinstance(x, dict)
    ids = x["ids"][:, :1].repeat(1, source.context_length)
    ids[:, -1] = source.eot_id
    return {"ids": ids, "mask": torch.ones_like(ids, dtype=torch.bool)}


def median_ms(run: Callable[[], None], repeats: int) -> float:
    """Median time of a call, after two that are not counted."""
    for _ in range(2):
        run()
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        found.append(1000 * (time.perf_counter() - start))
    return statistics.median(found)


def times(teacher: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, float]:
    """How many times smaller, cheaper and faster than the teacher, all modalities together."""
    t, o = teacher["all"], other["all"]
    out = {k: t[k] / max(o[k], 1) for k in ("parameters", "flops")}
    return out | {f"speed_{b}": t["ms"][b] / o["ms"][b] for b in BATCHES}


# --- the page ----------------------------------------------------------------------------------------------------


def mean_sd(values: Sequence[float]) -> str:
    """Percent: mean ± standard deviation over seeds."""
    mean = f"{100 * statistics.mean(values):.1f}"
    return f"{mean} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else mean


def shown_metrics(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """The metrics worth a column: R@1, R@10 and top-1 of each task."""
    keys = dict.fromkeys(k for g in groups for k in g["metrics"])
    return [k for k in keys if k.endswith(("_R@1", "_R@10", "top1"))]


def markdown(result: Mapping[str, Any]) -> str:
    """The held-out table and the cost table as Markdown."""
    keys = shown_metrics(result["groups"])
    lines = ["| model | seeds | " + " | ".join(keys) + " |", "|---" * (len(keys) + 2) + "|"]
    for g in result["groups"]:
        cells = [mean_sd(g["metrics"][k]) if k in g["metrics"] else "–" for k in keys]
        lines.append(f"| {g['name']} | {len(g['models'])} | " + " | ".join(cells) + " |")
    lines += ["", "| model | parameters | GFLOPs per pair | ms, batch 1 | ms, batch 64 | pairs/s, batch 64 | × smaller "
              "| × fewer FLOPs | × faster, batch 1 | × faster, batch 64 |", "|---" * 10 + "|"]  # fmt: skip
    for g in result["groups"]:
        c, t = g["cost"]["all"], g["times"]
        lines.append(
            f"| {g['name']} | {c['parameters'] / 1e6:.2f} M | {c['flops'] / 1e9:.3f} | {c['ms'][1]:.1f} | "
            f"{c['ms'][64]:.0f} | {c['per_s'][64]:.0f} | {t['parameters']:.1f} | {t['flops']:.1f} | "
            f"{t['speed_1']:.1f} | {t['speed_64']:.1f} |"
        )
    return "\n".join(lines)


def weight_charts(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """How DCD's weights change, for the first run of every group that has any."""
    out = []
    for g in groups:
        rows = json_lines(Path(g["models"][0]) / "metrics.jsonl")
        for title, wanted in (("Weights by sample", WEIGHTS), ("Parts of the loss", PARTS)):
            series = []
            for n, (key, label) in enumerate(wanted.items(), 1):
                name = next((k for r in rows for k in r if k.split("/")[0] == key), None)
                x, y = column(rows, name) if name else ([], [])
                if x:
                    series.append(Series(label, x, y, n))
            if series:
                svg = line_chart(Chart(series, "samples seen", compact, zero=True))
                out.append({"title": f"{g['name']}: {title}", "svg": Markup(svg), "legend": Markup(legend(series))})
    return out


def render(result: Mapping[str, Any]) -> str:
    """The page as HTML; it loads nothing from anywhere."""
    tables = []
    for block in markdown(result).split("\n\n"):
        lines = [[c.strip() for c in line.strip("|").split("|")] for line in block.splitlines()]
        tables.append({"head": lines[0], "rows": lines[2:]})
    return (
        pages.environment()
        .get_template("compare.html.j2")
        .render(
            teacher=result["teacher"],
            tables=tables,
            charts=weight_charts(result["groups"]),
            environment=result["environment"],
        )
    )
