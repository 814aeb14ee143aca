"""Charts as SVG: sharp at any size, coloured by the page's CSS variables, so they follow light and dark."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

Format = Callable[[float], str]


@dataclass(slots=True)
class Series:
    """One line. ``colour`` is a number of the page's palette (1 …); ``style``: line, faint (raw values), dashed."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 1
    style: str = "line"
    labels: Sequence[str] = ()
    """Text next to each point; empty: none."""


@dataclass(slots=True)
class Chart:
    """A line chart with one y axis."""

    series: list[Series]
    x_label: str = ""
    y_format: Format = field(default=lambda v: f"{v:g}")
    width: int = 440
    height: int = 250
    zero: bool = False
    small: bool = False
    log_x: Sequence[float] = ()
    """Marks of a logarithmic x axis; empty: linear, round marks."""
    marks: Sequence[tuple[float, str]] = ()
    """Vertical lines at x with a word each: where a phase begins."""


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2, 5 × a power of ten) that cover ``low … high`` in about ``count`` steps.

    >>> ticks(0, 1, 5)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    span = high - low
    if span <= 0:
        return [low]
    raw = span / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.8)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def distinct(values: Sequence[float], show: Format) -> list[str]:
    """The values as text, with as many digits as tell them apart.

    >>> distinct([1.0, 2.0], compact), distinct([0.0012345, 0.0012346], compact)
    (['1', '2'], ['0.0012345', '0.0012346'])
    """
    texts = [show(v) for v in values]
    for digits in range(3, 13):
        if len(set(texts)) == len(set(values)):
            break
        unit = " %" if texts[0].endswith("%") else ""
        texts = [f"{100 * v if unit else v:.{digits}g}{unit}" for v in values]
    return texts


def compact(value: float) -> str:
    """12,800 → 12.8k.

    >>> compact(12800), compact(3.0), compact(0.0004)
    ('12.8k', '3', '4e-04')
    """
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0e}" if 0 < abs(value) < 0.001 else f"{value:.3g}"


def smooth(y: Sequence[float], share: float = 0.04) -> list[float]:
    """Centred moving average over ``share`` of the curve; the ends use what is there."""
    half = max(1, round(len(y) * share / 2))
    sums = [0.0]
    for v in y:
        sums.append(sums[-1] + v)
    out = []
    for i in range(len(y)):
        w = min(half, i, len(y) - 1 - i)
        out.append((sums[i + w + 1] - sums[i - w]) / (2 * w + 1))
    return out


def line_chart(chart: Chart) -> str:
    """The chart as one ``<svg>``; its numbers are in ``data-series`` for the page's hover line."""
    series = [_finite(s) for s in chart.series]
    series = [s for s in series if s.x]
    if not series:
        return ""
    left, right, top, bottom = (44, 10, 8, 22) if chart.small else (52, 16, 12, 38)
    w, h = chart.width - left - right, chart.height - top - bottom
    ys = [v for s in series for v in s.y]
    low, high = (min(0.0, *ys) if chart.zero else min(ys)), max(ys)
    if high - low < 1e-12:
        low, high = low - abs(low) * 0.1 - 1e-9, high + abs(high) * 0.1 + 1e-9
    marks = ticks(low, high, 3 if chart.small else 5)
    low, high = marks[0], marks[-1]
    x_low, x_high = min(min(s.x) for s in series), max(max(s.x) for s in series)
    place: Callable[[float], float] = math.log10 if chart.log_x else float
    x_span = (place(x_high) - place(x_low)) or 1.0

    def at(x: float, y: float) -> tuple[float, float]:
        share = (place(x) - place(x_low)) / x_span if x_high > x_low else 0.5  # a single point stands in the middle
        return left + share * w, top + (high - y) / (high - low) * h

    parts = []
    for v, text in zip(marks, distinct(marks, chart.y_format), strict=True):
        y = at(x_low, v)[1]
        parts.append(f'<line class="grid" x1="{left}" x2="{left + w}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    x_marks = list(chart.log_x) or _x_marks(x_low, x_high, 3 if chart.small else 5)
    for v, text in zip(x_marks, distinct(x_marks, compact), strict=True):
        x = at(v, low)[0]
        parts.append(f'<text class="tick" x="{x:.1f}" y="{top + h + 16}" text-anchor="middle">{text}</text>')
    if chart.x_label and not chart.small:
        parts.append(
            f'<text class="axis" x="{left + w / 2:.0f}" y="{chart.height - 4}" text-anchor="middle">'
            f"{escape(chart.x_label)}</text>"
        )
    for v, text in chart.marks:
        if x_low < v < x_high:
            x = at(v, low)[0]
            parts.append(f'<line class="grid mark" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{top + h}"/>')
            parts.append(f'<text class="tick" x="{x + 4:.1f}" y="{top + 10}">{escape(text)}</text>')
    for s in series:
        places = [at(x, y) for x, y in zip(s.x, s.y, strict=True)]
        parts.append(_path(s, places))
        for (x, y), text in zip(places, s.labels, strict=False):
            parts.append(f'<text class="tick" x="{x + 6:.1f}" y="{y - 6:.1f}">{escape(text)}</text>')
    shown = [s for s in series if s.style != "faint"]
    data = {
        "frame": [left, top, w, h],
        "x": [x_low, x_high],
        "log": bool(chart.log_x),
        "series": [
            {"name": s.name, "c": s.colour, "x": _short(s.x), "t": [chart.y_format(v) for v in s.y]} for s in shown
        ],
    }
    label = escape(", ".join(s.name for s in shown))
    return (
        f'<svg class="chart" viewBox="0 0 {chart.width} {chart.height}" role="img" aria-label="{label}" '
        f"data-series='{escape(json.dumps(data), quote=True)}'>{''.join(parts)}"
        f'<line class="cursor" y1="{top}" y2="{top + h}" x1="0" x2="0"/></svg>'
    )


def legend(series: Sequence[Series]) -> str:
    """Colour keys for a chart with several lines."""
    items = [
        f'<span class="key"><i class="c{s.colour} {s.style}"></i>{escape(s.name)}</span>'
        for s in series
        if s.style != "faint"
    ]
    return f'<div class="legend">{"".join(items)}</div>' if len(items) > 1 else ""


def _finite(s: Series) -> Series:
    keep = [i for i, (x, y) in enumerate(zip(s.x, s.y, strict=True)) if math.isfinite(x) and math.isfinite(y)]
    labels = [s.labels[i] for i in keep] if s.labels else ()
    return Series(s.name, [s.x[i] for i in keep], [s.y[i] for i in keep], s.colour, s.style, labels)


def _x_marks(low: float, high: float, count: int) -> list[float]:
    return [v for v in ticks(low, high, count) if low - 1e-9 <= v <= high + 1e-9]


def _path(s: Series, points: list[tuple[float, float]]) -> str:
    if len(points) == 1 or (len(points) <= 12 and s.style == "line"):
        dots = "".join(f'<circle class="dot c{s.colour}" cx="{x:.1f}" cy="{y:.1f}" r="3.2"/>' for x, y in points)
    else:
        dots = ""
    d = "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<path class="line c{s.colour} {s.style}" d="{d}"/>{dots}'


def _short(values: Sequence[float]) -> list[float]:
    return [float(f"{v:.6g}") for v in values]
