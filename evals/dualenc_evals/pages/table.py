"""Results as a table on the terminal."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

FILE_ONLY = ("MRR", "mean_rank", "calibration_error")
"""Only in the file and the report; a terminal has no room for them."""
CLASSES = ("classification", "dense", "multilabel", "probe")
TAILS = ("median_rank", "mean_rank", "mean_per_class_recall")
GEOMETRY = ("modality_gap", "alignment", "mean_offdiagonal_cosine", "uniformity", "fisher_ratio", "silhouette")
SHARES = (
    "top1",
    "top5",
    "mean_per_class_recall",
    "mAP",
    "_score",
    "all_correct",
    "calibration_error",
    "AURC",
    "knn_gain",
    "mIoU",
    "mIoU_foreground",
    "pixel_accuracy",
)


def is_share(metric: str) -> bool:
    """Metrics that are shown in percent."""
    last = metric.rpartition("_to_")[2]
    return (
        metric.endswith(SHARES)
        or any(f"{m}@" in f"_{metric}" for m in ("_R", "_mAP", "_nDCG", "top1"))
        or last.endswith("_MRR")
    )


def is_geometry(metric: str) -> bool:
    """Numbers on the geometry of the features: without chance level, neither better nor worse by themselves."""
    return metric.startswith(GEOMETRY)


def label(metric: str) -> str:
    """``image_to_text_R@1`` → ``image → text R@1``."""
    return metric.replace("_to_", " → ").replace("_", " ")


def number(metric: str, value: float | None) -> str:
    """A number as people write it: shares in percent, ranks as they are."""
    if value is None:
        return "–"
    if is_share(metric):
        return f"{100 * value:.1f} %"
    return f"{value:.3f}" if is_geometry(metric) else f"{value:,.1f}"


def directions(task: dict[str, Any]) -> dict[str, list[str]]:
    """Direction → its metrics that the terminal shows; classification has one, named after what is classified."""
    out: dict[str, list[str]] = {}
    plain = f"{task['modalities'][0]} → class" if task["kind"] in CLASSES else " and ".join(task["modalities"])
    plain = f"{task['modalities'][0]} → {task['modalities'][0]}" if task["kind"] == "instances" else plain
    for metric in task["metrics"]:
        if not is_geometry(metric) and short(metric) not in FILE_ONLY:
            head = metric[: len(metric) - len(short(metric)) - 1] if "_to_" in metric else ""
            out.setdefault(label(head) or plain, []).append(metric)
    return out


def short(metric: str) -> str:
    """``image_to_text_median_rank`` → ``median_rank``."""
    return next((t for t in TAILS if metric.endswith(t)), metric.rpartition("_")[2] if "_to_" in metric else metric)


def head(metric: str) -> str:
    """A column's head; it has the percent sign of shares, so the cells need none."""
    name = {"mean_per_class_recall": "per class", "median_rank": "median"}.get(short(metric), short(metric))
    name = name.replace("_", " ")
    return f"{name} %" if is_share(metric) else f"{name} rank"


def print_table(results: dict[str, Any], console: Console | None = None) -> None:
    """Every number, its 95 % bootstrap interval and what chance gives; then notes about the data."""
    out = console or Console()
    tables: dict[tuple[str, ...], Table] = {}
    for name, task in results["tasks"].items():
        n = " × ".join(f"{v:,}" for v in task["n"].values())
        for i, (direction, names) in enumerate(directions(task).items()):
            heads = tuple(head(m) for m in names)
            table = tables.get(heads) or _new_table(heads)
            tables[heads] = table
            left = (Text(name, style="bold") + Text(f"\n{n}", style="dim")) if i == 0 else Text("")
            middle = Text(f"{direction}\n") + Text("95 %\nchance", style="dim")
            table.add_row(left, middle, *(_cell(task, m) for m in names))
            table.add_section()
    for table in tables.values():
        out.print(table)
    for name, task in results["tasks"].items():
        for ref in task.get("reference", []):
            value = number(ref["metric"], ref["value"])
            out.print(
                f"{name}: reference {ref['model']}: {label(ref['metric'])} {value} ({ref['source']})", highlight=False
            )
        for note in task["notes"]:
            out.print(f"{name}: {note}", highlight=False, markup=False)


def _new_table(heads: tuple[str, ...]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("task", no_wrap=True)
    table.add_column("", no_wrap=True)
    for h in heads:
        table.add_column(h, justify="right", no_wrap=True)
    return table


def _cell(task: dict[str, Any], metric: str) -> Text:
    ci, chance = task["ci"].get(metric), task["chance"].get(metric)

    def bare(v: float) -> str:
        return number(metric, v).removesuffix(" %")

    interval = f"{bare(ci[0])}–{bare(ci[1])}" if ci else ""
    return Text(bare(task["metrics"][metric]), style="bold") + Text(
        f"\n{interval}\n{'' if chance is None else bare(chance)}", style="dim"
    )
