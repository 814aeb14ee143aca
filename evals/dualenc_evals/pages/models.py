"""One page about several models on the same tasks: numbers side by side, the same queries, each model's mistakes.

``write_comparison`` reads what ``dualenc eval … --out FILE.json`` wrote; the page is one file that loads nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dualenc.errors import ConfigError, DataError
from dualenc.pages import write_page
from dualenc_evals.pages.page import confusion_view, environment, flat, media, read_json, shown
from dualenc_evals.pages.table import directions, is_geometry, is_share, label, number, short

HEADLINES = ("R@1", "R@5", "top1", "top5", "mean_per_class_recall", "mAP", "mIoU", "_score", "all_correct")
LOWER_IS_BETTER = ("median_rank", "mean_rank", "calibration_error", "AURC")
MOST_MODELS = 6
"""The page has this many colours."""


def write_comparison(paths: Sequence[Path], out: Path) -> Path:
    """Compare the results in ``paths`` (files, or folders that hold a results.json) on one page; return ``out``.

    Raises:
        ConfigError: no file, or more than ``MOST_MODELS``.
        DataError: a file that holds no results.
    """
    if not 1 <= len(paths) <= MOST_MODELS:
        raise ConfigError(f"dualenc report: a page compares 1 to {MOST_MODELS} results, got {len(paths)}")
    return write_page(out, render([read_results(Path(p)) for p in paths]))


def read_results(path: Path) -> dict[str, Any]:
    """One results file, with a name for it in case several models have the same name."""
    file = path / "results.json" if path.is_dir() else path
    if not file.is_file():
        raise DataError(f"{path} holds no results: dualenc eval MODEL --tasks … --out {file} writes them.")
    results = read_json(file)
    if not isinstance(results.get("tasks"), dict) or not isinstance(results.get("model"), dict):
        raise DataError(f"{file} is not a results file of dualenc eval: it has no 'model' and 'tasks'")
    called = file.parent.name if file.stem == "results" else file.stem
    return {**results, "file": called}


def render(all_results: Sequence[Mapping[str, Any]]) -> str:
    """The page as HTML."""
    models = model_views(all_results)
    names = list(dict.fromkeys(n for r in all_results for n in r["tasks"]))
    tasks = [task_view(n, [r["tasks"].get(n) for r in all_results], models) for n in names]
    dates = sorted(str(r.get("run", {}).get("date", ""))[:10] for r in all_results)
    return (
        environment()
        .get_template("models.html.j2")
        .render(
            title=" · ".join(m["name"] for m in models),
            models=models,
            date=dates[-1] if dates else "",
            overview=[row for n in names for row in overview(n, [r["tasks"].get(n) for r in all_results], models)],
            tasks=tasks,
        )
    )


def model_views(all_results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Name, colour and provenance of each model; equal names are told apart by their files."""
    names = [str(r["model"].get("name") or r["file"]) for r in all_results]
    counts = Counter(names)
    out = []
    for n, (name, r) in enumerate(zip(names, all_results, strict=True), 1):
        unique = name if counts[name] == 1 else f"{name} ({r['file']})"
        facts = flat(r["model"]) + flat(r.get("environment", {}))
        out.append({"name": unique, "colour": n, "facts": facts})
    return out


def overview(name: str, results: Sequence[Mapping[str, Any] | None], models: list[dict[str, Any]]) -> list[Any]:
    """A row for each headline metric of a task: every model's value, interval and place on a line from 0 to 1."""
    first = next(r for r in results if r)
    rows: list[dict[str, Any]] = []
    for direction, metrics in directions(dict(first)).items():
        for metric in metrics:
            if not (is_share(metric) and short(metric).endswith(HEADLINES)):
                continue
            values = [r["metrics"].get(metric) if r else None for r in results]
            best = alone_at_top([v for v in values if v is not None], len(values))
            cells = []
            for m, r, v in zip(models, results, values, strict=True):
                ci = r["ci"].get(metric) if r else None
                cells.append(
                    v is not None
                    and {
                        "value": f"{100 * v:.1f}",
                        "share": v,
                        "ci": ci,
                        "interval": f"{100 * ci[0]:.1f}–{100 * ci[1]:.1f}" if ci else "",
                        "best": v == best,
                        "colour": m["colour"],
                        "name": m["name"],
                    }
                )
            chance = first["chance"].get(metric)
            what = short(metric).replace("mean_per_class_recall", "per class").replace("_", " ")
            rows.append(
                {
                    "task": name,
                    "first": not rows,
                    "what": f"{direction}, {what}",
                    "cells": cells,
                    "chance": chance,
                    "chance_text": "" if chance is None else f"{100 * chance:.1f}",
                }
            )
    return rows


def alone_at_top(known: Sequence[float], models: int, low: bool = False) -> float | None:
    """The best value, if there are several models and only one of them has it."""
    best = (min if low else max)(known, default=None)
    return best if models > 1 and list(known).count(best) == 1 else None  # type: ignore[arg-type]


def task_view(name: str, results: Sequence[Mapping[str, Any] | None], models: list[dict[str, Any]]) -> dict[str, Any]:
    """One task of all models as the template shows it."""
    first = next(r for r in results if r)
    have = [(m, r) for m, r in zip(models, results, strict=True) if r]
    confusions = []
    for m, r in have:
        details = r.get("details") or {}
        view = confusion_view(details)
        if view is not None:
            confusions.append({"model": m, "view": view, "most": details.get("most_confused", [])})
    return {
        "name": name,
        "description": first["description"],
        "n": " × ".join(f"{v:,} {k}" for k, v in first["n"].items()),
        "version": first["version"],
        "data_digest": first["data_digest"],
        "reference": first["reference"],
        "warnings": warnings(have),
        "rows": metric_rows(results),
        "grids": grids(have),
        "confusions": confusions,
        "worst": worst_views(have),
    }


def warnings(have: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> list[str]:
    """What makes the models' numbers not comparable, and each one's own notes."""
    out = []
    names = {"data_digest": "data", "version": "task version", "templates": "prompts"}
    for key, what in names.items():
        if len({repr(r.get(key)) for _, r in have}) > 1:
            out.append(f"The models were not measured on the same {what}: their numbers are not comparable.")
    notes = dict.fromkeys(note for _, r in have for note in r["notes"])
    for note in notes:
        who = [str(m["name"]) for m, r in have if note in r["notes"]]
        out.append(note if len(who) == len(have) else f"{', '.join(who)}: {note}")
    return out


def metric_rows(results: Sequence[Mapping[str, Any] | None]) -> list[dict[str, Any]]:
    """Every metric that any model has, one cell per model; the best is highlighted."""
    rows = []
    for metric in dict.fromkeys(k for r in results if r for k in r["metrics"]):
        values = [r["metrics"].get(metric) if r else None for r in results]
        known = [v for v in values if v is not None]
        best = None
        if not is_geometry(metric):
            best = alone_at_top(known, len(values), metric.endswith(LOWER_IS_BETTER))
        chance = next((r["chance"][metric] for r in results if r and metric in r["chance"]), None)
        cells = [None if v is None else {"text": number(metric, v), "best": v == best} for v in values]
        rows.append(
            {
                "label": label(metric),
                "quiet": is_geometry(metric),
                "cells": cells,
                "chance": "" if chance is None else number(metric, chance),
            }
        )
    return rows


def grids(have: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], most: int = 6) -> list[dict[str, Any]]:
    """The first queries that every model was shown, with each one's answers side by side."""
    detailed = [(m, r["details"]) for m, r in have if r.get("details")]
    if not detailed:
        return []
    out = []
    for n, example in enumerate(detailed[0][1].get("examples", [])):
        sides = [(m, d, {row["query"]: row for row in d["examples"][n]["rows"]}) for m, d in detailed]
        common = [q for q in sides[0][2] if all(q in rows for _, _, rows in sides)][:most]
        rows = []
        for q in common:
            things = sides[0][1]["items"]
            answer = things.get(sides[0][2][q]["answer"], {})
            contest = [{"model": m, "row": by[q], "things": d["items"]} for m, d, by in sides]
            text = "" if media(answer) else shown(answer)
            rows.append({"query": q, "item": things.get(q, {}), "answer_text": text, "sides": contest})
        if rows:
            first = rows[0]["sides"][0]
            of_media = any(media(first["things"].get(h["item"], {})) for h in first["row"]["hits"])
            out.append({"query": example["query"], "gallery": example["gallery"], "rows": rows, "of_media": of_media})
    return out


def worst_views(have: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], most: int = 4) -> list[dict[str, Any]]:
    """Each model's worst mistakes in each direction."""
    detailed = [(m, r, r["details"]) for m, r in have if r.get("details")]
    if not detailed:
        return []
    out = []
    for n, example in enumerate(detailed[0][2].get("examples", [])):
        sides = [
            {"model": m, "rows": d["examples"][n].get("worst", [])[:most], "things": d["items"]} for m, _, d in detailed
        ]
        ranked = detailed[0][1]["kind"] == "retrieval"
        why = (
            "The queries whose right answer is ranked lowest."
            if ranked
            else "The most confident ones: the wrong class beats the right one by the widest margin."
        )
        out.append({"query": example["query"], "gallery": example["gallery"], "why": why, "sides": sides})
    return out
