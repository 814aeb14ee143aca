"""Weights between a model and its fine-tuned version, evaluated (WiSE-FT, Wortsman et al. 2022): numbers and page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from dualenc.distributed.world import World
from dualenc.errors import ConfigError
from dualenc.model import load_model
from dualenc.model.average_weights import Interpolation
from dualenc.pages import write_page
from dualenc_evals.harness import environment, evaluate, write_json
from dualenc_evals.pages import page as pages
from dualenc_evals.pages.svg import Chart, Series, legend, line_chart
from dualenc_evals.pages.table import is_share, label
from dualenc_evals.ranks import ranks_of
from dualenc_evals.task import Task

DOTS = 12
"""A curve with more points than this is drawn without markers (dualenc_evals.pages.svg)."""


def interpolate(
    a: str,
    b: str,
    alphas: Sequence[float],
    tasks: Sequence[Task],
    out: Path,
    keep: float | None = None,
    world: World | None = None,
    device: str = "cpu",
    batch_size: int = 64,
    cache_dir: Path | None = None,
    precision: str = "fp32",
) -> dict[str, Any]:
    """Evaluate (1 − α) A + α B at every α; write ``out``/interpolate.json and .html, and the model at ``keep``.

    Args:
        a, b: MODELs as in ``dualenc eval``: the released model and what it was fine-tuned to.
        alphas: between 0 (``a``) and 1 (``b``).
        tasks: the first is the source, what ``a`` was good at; the others are targets.
        keep: the α whose model is saved in ``out``/model, so that ``out`` is a MODEL.
        cache_dir: as of :func:`dualenc_evals.harness.evaluate`; every α has a hash of its own.
        precision: what the models compute in: fp32, bf16, or fp16 on a GPU.

    Returns:
        ``{"a", "b", "tasks", "points": [{"alpha", "weights", "metrics": {task/metric: value}}], "kept",
        "precision", "environment"}``.

    Raises:
        ConfigError: no α, one outside of 0…1, or two models that differ in a field, which is named.
    """
    wanted = sorted(dict.fromkeys(float(x) for x in alphas))
    if not wanted:
        raise ConfigError("--alphas: name at least one, such as 0,0.5,1")
    line = Interpolation(load_model(a), load_model(b))
    line.bundle.to(device)
    points, seen = [], {}  # type: ignore[var-annotated]
    for alpha in wanted:
        embedder = line.at(alpha).embedder(precision=precision)
        results = evaluate(
            embedder,
            tasks,
            world=world,
            cache_dir=cache_dir,
            batch_size=batch_size,
            progress=False,
            details=False,
            seen=seen,
        )
        metrics = {f"{n}/{k}": float(v) for n, r in results["tasks"].items() for k, v in r["metrics"].items()}
        points.append({"alpha": alpha, "weights": line.bundle.weights_hash, "metrics": metrics})
    result = {
        "a": a,
        "b": b,
        "tasks": [t.name for t in tasks],
        "points": points,
        "kept": keep,
        "precision": precision,
        "environment": environment(0, batch_size),
    }
    if ranks_of(world).is_main:
        if keep is not None:
            line.at(keep).save(out / "model", provenance={"a": a, "b": b})
        write_json(out / "interpolate.json", result)
        write_page(out / "interpolate.html", render(result))
    return result


def headlines(tasks: Sequence[str], metrics: Mapping[str, float]) -> list[str]:
    """One task/metric key per task: top1, or else the first R@1, or else the first share."""
    keys, out = list(metrics), []
    for task in tasks:
        own = [k for k in keys if k.startswith(f"{task}/")]
        shares = [k for k in own if is_share(k)]
        ends = [k for end in ("/top1", "_R@1") for k in shares if k.endswith(end)]
        out += [*ends, *shares][:1]
    return out


def markdown(result: Mapping[str, Any]) -> str:
    """A table with a row for each α and a column for each task, in percent."""
    keys = headlines(result["tasks"], result["points"][0]["metrics"])
    lines = ["| α | " + " | ".join(keys) + " |", "|---" * (len(keys) + 1) + "|"]
    for p in result["points"]:
        cells = [f"{100 * p['metrics'][k]:.1f}" for k in keys]
        lines.append(f"| {p['alpha']:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def charts(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every task against α, and each target against the source, on the way from ``a`` to ``b``."""
    points, keys = result["points"], headlines(result["tasks"], result["points"][0]["metrics"])
    alphas = [p["alpha"] for p in points]
    values = {k: [100 * p["metrics"][k] for p in points] for k in keys}
    over = [Series(named(k), alphas, values[k], n) for n, k in enumerate(keys[:6], 1)]
    out = [_chart("Metrics by α", over, "α: 0 is the first model, 1 the second")]
    if len(keys) > 1:
        source, marks = keys[0], [f"{x:g}" for x in alphas] if len(alphas) <= DOTS else ()
        way = [Series(named(k), values[source], values[k], n, labels=marks) for n, k in enumerate(keys[1:6], 2)]
        title = f"{named(keys[1])} against the source" if len(keys) == 2 else "Targets against the source"
        out.append(_chart(title, way, f"{named(source)}, %"))
    return out


def named(key: str) -> str:
    """A task/metric key as people read it."""
    task, _, metric = key.rpartition("/")
    return f"{task} {label(metric)}"


def _chart(title: str, series: list[Series], x_label: str) -> dict[str, Any]:
    svg = line_chart(Chart(series, x_label, lambda v: f"{v:g} %", width=520, height=320))
    return {"title": title, "svg": Markup(svg), "legend": Markup(legend(series))}


def render(result: Mapping[str, Any]) -> str:
    """The page as HTML; it loads nothing from anywhere."""
    keys = headlines(result["tasks"], result["points"][0]["metrics"])
    rows = [[f"{p['alpha']:g}", *(f"{100 * p['metrics'][k]:.1f} %" for k in keys)] for p in result["points"]]
    kept = [f"{p['alpha']:g}" for p in result["points"] if p["alpha"] == result["kept"]]
    return (
        pages.environment()
        .get_template("interpolate.html.j2")
        .render(
            result=result,
            heads=[named(k) for k in keys],
            rows=rows,
            kept=kept,
            charts=charts(result) if keys else [],
            environment=pages.flat(result["environment"]),
        )
    )
