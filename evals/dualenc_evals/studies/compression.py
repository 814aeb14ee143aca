"""Retrieval with compressed features: every width (Matryoshka) at every precision, their size, and an index's recall.

Queries stay float; the gallery is compressed, as it is where embeddings are deployed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from markupsafe import Markup
from torch import Tensor

from dualenc.distributed.world import World
from dualenc.encoders.dual_encoder import prefix
from dualenc.errors import ConfigError
from dualenc.features.compress import Gallery
from dualenc.features.disk_index import usearch_recall
from dualenc.model import load_model
from dualenc.pages import write_page
from dualenc_evals.features import Store
from dualenc_evals.harness import Checker, environment, write_json
from dualenc_evals.kinds.retrieval import Retrieval, RetrievalTask
from dualenc_evals.pages import page as pages
from dualenc_evals.pages.svg import Chart, Series, legend, line_chart
from dualenc_evals.ranks import ranks_of
from dualenc_evals.read.shards import read_rows
from dualenc_evals.task import Task

WAYS: dict[str, tuple[str, int, bool]] = {
    "float": ("float", 0, False),
    "int8": ("int8", 0, False),
    "binary": ("binary", 0, False),
    "binary, rescored by its bits": ("binary", 4, False),
    "binary, rescored by int8": ("binary", 4, True),
}
"""Name → precision, candidates per result that are rescored, and whether int8 codes beside the bits do it."""
KS = (1, 10)


def compression(
    model: str,
    task: Task,
    dims: Sequence[int],
    out: Path,
    world: World | None = None,
    device: str = "cpu",
    batch_size: int = 64,
    cache_dir: Path | None = None,
) -> dict[str, Any]:
    """Measure ``model`` on a retrieval task at every width and precision; write ``out``/compression.json and .html.

    Args:
        dims: widths; the full one is added.
        cache_dir: as of :func:`dualenc_evals.harness.evaluate`.

    Returns:
        ``{"model", "task", "n", "points": [{"dim", "way", "bytes_per_item", "metrics"}], "index", "environment"}``;
        metrics are R@1 and R@10 of both directions, the gallery compressed.

    Raises:
        ConfigError: a task of another kind, or a width that the model does not have.
    """
    if not isinstance(task, RetrievalTask):
        raise ConfigError(f"task {task.name} is of kind {task.kind}; compression is measured on retrieval tasks")
    ranks = ranks_of(world)
    embedder = load_model(model, device).embedder()
    widths = sorted({*dims, embedder.embed_dim})
    for dim in widths:
        prefix(torch.ones(1, embedder.embed_dim), dim)
    store = Store(embedder, ranks, Checker(embedder), batch_size, cache_dir)
    pairs = Retrieval().collect(task, ranks.agree(lambda: read_rows(task)), store)
    first, second = task.modalities
    x, y = store.features(first, pairs.a, pairs.a_digests), store.features(second, pairs.b, pairs.b_digests)
    points = []
    for dim in widths:
        for way in WAYS:
            there = _recalls(x, y, pairs.right, dim, way)
            back = _recalls(y, x, pairs.reverse(), dim, way)
            metrics = {f"{first}_to_{second}_{k}": v for k, v in there.items()}
            metrics |= {f"{second}_to_{first}_{k}": v for k, v in back.items()}
            points.append({"dim": dim, "way": way, "bytes_per_item": bytes_of(dim, way), "metrics": metrics})
    result = {
        "model": model,
        "task": task.name,
        "n": {first: len(x), second: len(y)},
        "points": points,
        "index": usearch_recall(x, y),
        "environment": environment(0, batch_size),
    }
    if ranks.is_main:
        write_json(out / "compression.json", result)
        write_page(out / "compression.html", render(result))
    return result


def bytes_of(dim: int, way: str) -> int:
    """What an item of the gallery takes."""
    precision, _, finer = WAYS[way]
    size = {"float": 4 * dim, "int8": dim, "binary": -(-dim // 8)}[precision]
    return size + (dim if finer else 0)


def _recalls(queries: Tensor, gallery: Tensor, right: Sequence[Sequence[int]], dim: int, way: str) -> dict[str, float]:
    precision, rescore, finer = WAYS[way]
    codes = Gallery.of(gallery, dim, precision)
    beside = Gallery.of(gallery, dim, "int8") if finer else None
    _, rows = codes.search(queries, max(KS), rescore, beside)
    found = rows.tolist()
    out = {}
    for k in KS:
        hits = [bool(set(row[:k]) & set(answers)) for row, answers in zip(found, right, strict=True)]
        out[f"R@{k}"] = round(sum(hits) / len(hits), 6)
    return out


def markdown(result: Mapping[str, Any]) -> str:
    """A row for each width and precision, recall in percent."""
    names = list(result["points"][0]["metrics"])
    lines = ["| width | gallery | bytes per item | " + " | ".join(n.replace("_", " ") for n in names) + " |"]
    lines.append("|---" * (len(names) + 3) + "|")
    for p in result["points"]:
        cells = [f"{100 * p['metrics'][n]:.1f}" for n in names]
        lines.append(f"| {p['dim']} | {p['way']} | {p['bytes_per_item']:,} | " + " | ".join(cells) + " |")
    if result["index"] is not None:
        said = "; ".join(f"{k}: {100 * v:.1f} %" for k, v in result["index"].items())
        lines.append(f"\nRecall@10 of usearch's index against exact search: {said}.")
    return "\n".join(lines)


def render(result: Mapping[str, Any]) -> str:
    """The page as HTML, with a curve for each direction."""
    charts = []
    for name in [n for n in result["points"][0]["metrics"] if n.endswith("R@10")]:
        series = []
        for i, way in enumerate(WAYS, 1):
            own = [p for p in result["points"] if p["way"] == way]
            values = [100 * p["metrics"][name] for p in own]
            series.append(Series(way, [float(p["dim"]) for p in own], values, i))
        svg = line_chart(Chart(series, "width of the features", lambda v: f"{v:g} %", width=520, height=320))
        charts.append({"title": name.replace("_", " "), "svg": Markup(svg), "legend": Markup(legend(series))})
    names = list(result["points"][0]["metrics"])
    rows = [
        [str(p["dim"]), p["way"], f"{p['bytes_per_item']:,}", *(f"{100 * p['metrics'][n]:.1f} %" for n in names)]
        for p in result["points"]
    ]
    template = pages.environment().get_template("compression.html.j2")
    heads = [n.replace("_", " ") for n in names]
    flat = pages.flat(result["environment"])
    return template.render(result=result, heads=heads, rows=rows, charts=charts, environment=flat)
