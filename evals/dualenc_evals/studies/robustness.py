"""How a camera/LiDAR model's numbers fall as its sensors fail: a curve for each kind of failure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from dualenc.data.driving.corruption import Corruption
from dualenc.distributed.world import World
from dualenc.errors import ConfigError
from dualenc.model import load_model
from dualenc.pages import write_page
from dualenc_evals.harness import environment, evaluate, write_json
from dualenc_evals.pages import page as pages
from dualenc_evals.pages.svg import Chart, Series, legend, line_chart
from dualenc_evals.ranks import ranks_of
from dualenc_evals.studies.interpolation import headlines, named
from dualenc_evals.task import Task

LEVELS: dict[str, tuple[float, ...]] = {
    "beams": (0.25, 0.5, 0.75),
    "pictures": (0.1, 0.25, 0.5),
    "turned_deg": (0.5, 1, 2, 5),
    "fog": (0.005, 0.01, 0.02, 0.05),
}
TITLES = {"beams": "Silent beams", "pictures": "Black images", "turned_deg": "Wrong calibration", "fog": "Fog"}
AXES = {
    "beams": "share of beams that are silent",
    "pictures": "share of images that are black",
    "turned_deg": "calibration error, degrees (standard deviation)",
    "fog": "fog: 1 / metres until 63 % of the beams are lost",
}


def robustness(
    model: str,
    tasks: Sequence[Task],
    out: Path,
    kinds: Sequence[str] = tuple(LEVELS),
    world: World | None = None,
    device: str = "cpu",
    batch_size: int = 64,
    cache_dir: Path | None = None,
) -> dict[str, Any]:
    """Evaluate with intact sensors, then with each kind of failure at each of its ``LEVELS``; write
    ``out``/robustness.json and .html.

    Args:
        model: a MODEL as in ``dualenc eval``.
        tasks: of kitti or nuscenes.
        kinds: fields of :class:`dualenc.data.driving.corruption.Corruption`.

    Returns:
        ``{"model", "tasks", "clean": {task/metric: value}, "chance": likewise, "curves": {kind: [{"level", "metrics":
        {task/metric: value}}]}, "environment"}``.

    Raises:
        ConfigError: no task, or one whose source has no sensors.
    """
    if not tasks:
        raise ConfigError("--tasks: name at least one task of kitti or nuscenes, such as kitti_frames")
    for t in tasks:
        if not t.source.has_sensors:
            raise ConfigError(f"task {t.name}: source.kind is {t.source.kind}; sensor failures need kitti or nuscenes")
    bundle = load_model(model, device=device)

    def run(corrupt: Corruption | None) -> dict[str, Any]:
        changed = [t.model_copy(update={"source": t.source.model_copy(update={"corrupt": corrupt})}) for t in tasks]
        more: dict[str, Any] = {"batch_size": batch_size, "progress": False, "details": False}
        done = evaluate(bundle.embedder(), changed, world=world, cache_dir=cache_dir, **more)
        return dict(done["tasks"])

    clean = run(None)
    result = {
        "model": model,
        "tasks": [t.name for t in tasks],
        "clean": _flat(clean, "metrics"),
        "chance": _flat(clean, "chance"),
        "curves": {
            kind: [{"level": x, "metrics": _flat(run(Corruption(**{kind: x})), "metrics")} for x in LEVELS[kind]]
            for kind in kinds
        },
        "environment": environment(0, batch_size),
    }
    if ranks_of(world).is_main:
        write_json(out / "robustness.json", result)
        write_page(out / "robustness.html", render(result))
    return result


def _flat(tasks: Mapping[str, Any], what: str) -> dict[str, float]:
    return {f"{n}/{k}": float(v) for n, r in tasks.items() for k, v in (r.get(what) or {}).items()}


def table(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Column heads and rows, in percent: intact sensors first, then each failure at each level."""
    keys = headlines(result["tasks"], result["clean"])

    def cells(metrics: Mapping[str, float]) -> list[str]:
        return [f"{100 * metrics[k]:.1f}" if k in metrics else "–" for k in keys]

    rows = [["intact", *cells(result["clean"])], ["chance", *cells(result["chance"])]]
    for kind, points in result["curves"].items():
        rows += [[f"{kind} {p['level']:g}", *cells(p["metrics"])] for p in points]
    return ["sensors", *(named(k) for k in keys)], rows


def markdown(result: Mapping[str, Any]) -> str:
    """:func:`table` as Markdown."""
    heads, rows = table(result)
    return "\n".join([f"| {' | '.join(r)} |" for r in [heads, ["---"] * len(heads), *rows]])


def render(result: Mapping[str, Any]) -> str:
    """The page as HTML; it loads nothing from anywhere."""
    keys = headlines(result["tasks"], result["clean"])
    charts = []
    for kind, points in result["curves"].items():
        levels = [0.0, *(p["level"] for p in points)]
        series = [
            Series(named(k), levels, [100 * x[k] for x in (result["clean"], *(p["metrics"] for p in points))], n)
            for n, k in enumerate(keys[:6], 1)
        ]
        if len(keys) == 1 and keys[0] in result["chance"]:
            by_chance = [100 * result["chance"][keys[0]]] * len(levels)
            series.append(Series("chance", levels, by_chance, 2, style="dashed"))
        svg = line_chart(Chart(series, AXES[kind], lambda v: f"{v:g} %", width=520, height=300, zero=True))
        charts.append({"title": TITLES[kind], "svg": Markup(svg), "legend": Markup(legend(series))})
    heads, rows = table(result)
    template = pages.environment().get_template("robustness.html.j2")
    return template.render(
        result=result, heads=heads, rows=rows, charts=charts, environment=pages.flat(result["environment"])
    )
