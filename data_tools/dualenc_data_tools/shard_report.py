"""One HTML page about the samples of shards: what they look like, how they are distributed, what filters would drop."""

from __future__ import annotations

import math
import os
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dualenc.data.shards.remote import is_local, local_path
from dualenc.data.shards.selection import SCORES, Floats, Values, file_of, read_scores, starts
from dualenc.errors import ConfigError, DataError
from dualenc.pages import environment, write_page
from dualenc_data_tools.choose.filter import AUDIO, IMAGE, TEXT, Opened, as_values, build_filter
from dualenc_data_tools.view import TEMPLATES, Card, show

MEASURES = {
    "caption_words": "words of the longest caption",
    "caption_chars": "characters of the longest caption",
    "captions": "captions of a sample",
    "shorter": "shorter side, px",
    "aspect": "longer side / shorter side",
    "seconds": "seconds of the clip",
    "rate": "sample rate, Hz",
}
"""Scores that are measured of the samples looked at."""
MEASURING = ("caption_length", "size", "duration", "language")
JUDGING = ("caption_rules", "datacomp_basic")
"""Filters that say ok or what is wrong; run on the samples looked at unless their scores are beside the shards."""
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
BARS = 30
EXAMPLES, PAIRS, REASONS = 6, 12, 8
_REPEATS = ("duplicate", "duplicate_of")


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar: where it begins, its width and height in percent, and what it says."""

    x: float
    width: float
    height: float
    said: str


@dataclass(slots=True)
class Distribution:
    """How a number is distributed: a histogram with the values at its ends and its middle."""

    title: str
    bars: list[Bar]
    low: str
    high: str
    facts: str


@dataclass(slots=True)
class Ranked:
    """A score: its distribution, and samples at its quantiles."""

    name: str
    distribution: Distribution
    cards: list[tuple[str, Card]] = field(default_factory=list)


@dataclass(slots=True)
class Reason:
    """One thing a filter finds wrong: how many samples, and some of them."""

    reason: str
    count: int
    share: str
    cards: list[Card]


@dataclass(slots=True)
class Judged:
    """What a filter would drop."""

    name: str
    looked: int
    dropped: int
    reasons: list[Reason]


def shard_report(
    patterns: str | Sequence[str], out: str | Path, looked: int = 2000, sheet: int = 36, seed: int = 0
) -> Path:
    """Write the page.

    Args:
        looked: samples that are measured, drawn by ``seed`` over all shards; scores beside the shards are shown whole.
        sheet: samples on the contact sheet.

    Raises:
        DataError: as :func:`dualenc.data.shards.index.open_source`.
    """
    opened = Opened.of(patterns)
    try:
        lines = sorted(random.Random(seed).sample(range(opened.total), min(looked, opened.total)))
        pages = _Pages(opened)
        measured = _measure(opened, lines, [*MEASURING, *JUDGING])
        beside = _beside(opened)
        whole = np.arange(opened.total)
        numbers = {n: v for n, v in measured.items() if n in MEASURES and v.dtype != object}
        ranked = [_ranked(pages, n, v, whole) for n, v in beside.items() if v.dtype != object and n not in MEASURES]
        verdicts = {n: (v, np.array(lines)) for n, v in measured.items() if n in JUDGING}
        verdicts |= {n: (v, whole) for n, v in beside.items() if v.dtype == object and "ok" in v and n not in _REPEATS}
        picked = random.Random(seed + 1).sample(lines, min(sheet, len(lines)))
        html = environment(TEMPLATES).get_template("shards.html.j2").render(
            title=opened.shards.names[0] if len(opened.shards.names) == 1 else _title(opened),
            facts=_facts(opened, measured, len(lines)),
            sheet=[pages.card(i) for i in sorted(picked)],
            distributions=[d for n, v in numbers.items() if (d := _distribution(MEASURES[n], v)) is not None],
            languages=_languages(measured.get("language")),
            ranked=[r for r in ranked if r is not None],
            judged=[_judged(pages, n, v, at) for n, (v, at) in verdicts.items()],
            pairs=_pairs(pages, opened, beside),
            looked=len(lines),
            total=opened.total,
        )  # fmt: skip
        return write_page(Path(out), html)
    finally:
        opened.close()


class _Pages:
    """Cards of samples by their number among all."""

    def __init__(self, opened: Opened) -> None:
        self.opened, self.begin = opened, starts(opened.shards)
        self._cards: dict[int, Card] = {}

    def card(self, line: int) -> Card:
        if line not in self._cards:
            shard = int(np.searchsorted(self.begin, line, side="right")) - 1
            self._cards[line] = show(self.opened.reader, self.opened.shards, shard, line - int(self.begin[shard]))
        return self._cards[line]

    def line_of(self, key: str) -> int | None:
        """The number of a sample by shard and key."""
        name, _, rest = key.partition(".tar/")
        for shard, known in enumerate(self.opened.shards.names):
            if known == f"{name}.tar":
                index = self.opened.index_of(shard)
                count = self.opened.shards.infos[shard].samples
                return next((int(self.begin[shard]) + i for i in range(count) if index.key(i) == rest), None)
        return None


def _measure(opened: Opened, lines: Sequence[int], names: Sequence[str]) -> dict[str, Values]:
    """Scores of the samples ``lines`` by cheap filters; those that need what is not installed are left out."""
    filters = []
    for name in names:
        try:
            filters.append(build_filter(name))
        except ConfigError:  # language needs a package of its own; the page says nothing of languages then
            continue
    begin, out = starts(opened.shards), dict[str, list[Any]]()
    reads = {"image": IMAGE, "audio": AUDIO, "text": TEXT}
    for start in range(0, len(lines), 256):
        rows = []
        for line in lines[start : start + 256]:
            shard = int(np.searchsorted(begin, line, side="right")) - 1
            rows.append(opened.row(shard, line - int(begin[shard]), reads))
        has = {m: any(m in r.values for r in rows) for m in reads}
        for f in filters:
            scores = f.score(rows)
            if not all(has[m] for m in f.reads):  # no image at all: nothing to say of sizes
                scores = {n: [None] * len(rows) for n in scores}
            for name, values in scores.items():
                out.setdefault(name, []).extend(values)
    return {n: as_values(v) for n, v in out.items() if any(x is not None for x in v)}


def _beside(opened: Opened) -> dict[str, Values]:
    """Scores that are stored beside the shards and are of these shards."""
    folder = os.path.dirname(local_path(file_of("x", opened.shards))) or "."
    if not is_local(folder) or not os.path.isdir(folder):
        return {}
    out = {}
    for name in sorted(f.removesuffix(SCORES) for f in os.listdir(folder) if f.endswith(SCORES)):
        try:
            out[name] = read_scores(name, opened.shards)
        except DataError:  # of other shards in this folder
            continue
    return out


# --- numbers ---------------------------------------------------------------------------------------------------------


def _distribution(title: str, values: Floats) -> Distribution | None:
    there = values[~np.isnan(values)]
    if not len(there):
        return None
    if there.min() == there.max():
        same = _say(float(there[0]))
        return Distribution(title, [Bar(40, 20, 100, f"{same}: {len(there):,}")], "", "", f"{same} for every sample")
    low, high = (float(q) for q in np.quantile(there, [0.0, 1.0]))
    # A few values far out would leave one bar for all others: the last bar takes what is beyond the 99th per cent.
    cut = float(np.quantile(there, 0.99)) if high > 4 * max(abs(float(np.quantile(there, 0.99))), 1e-12) else high
    whole = bool(np.all(there == np.rint(there)))
    count = int(min(BARS, cut - low + 1)) if whole else BARS
    edges = np.linspace(low, max(cut, low + 1e-9) + (1 if whole else 0), max(1, count) + 1)
    counts, _ = np.histogram(np.minimum(there, cut), edges)
    most = max(1, int(counts.max()))
    width = 100 / len(counts)
    bars = [
        Bar(
            round(i * width, 3),
            round(width * 0.86, 3),
            round(100 * n / most, 2),
            f"{_say(edges[i])} … {_say(edges[i + 1])}: {n:,}",
        )
        for i, n in enumerate(counts.tolist())
    ]
    marks = [_say(float(q)) for q in np.quantile(there, [0.05, 0.5, 0.95])]
    facts = f"median {marks[1]} · 5 % {marks[0]} · 95 % {marks[2]}"
    if len(there) < len(values):
        facts += f" · {len(values) - len(there):,} without"
    return Distribution(title, bars, _say(low), _say(cut) + ("+" if cut < high else ""), facts)


def _say(value: float) -> str:
    if value == round(value) and abs(value) < 1e7:
        return f"{round(value):,}"
    return f"{value:.3g}"


def _ranked(pages: _Pages, name: str, values: Floats, lines: Any) -> Ranked | None:
    drawn = _distribution(name, values)
    there = np.flatnonzero(~np.isnan(values))
    if drawn is None:
        return None
    order = there[np.argsort(values[there], kind="stable")]
    cards = []
    for q in QUANTILES:
        i = int(order[min(len(order) - 1, math.floor(q * (len(order) - 1) + 0.5))])
        label = {0.0: "lowest", 0.5: "median", 1.0: "highest"}.get(q, f"{100 * q:.0f} %")
        cards.append((f"{label} · {_say(float(values[i]))}", pages.card(int(lines[i]))))
    return Ranked(name, drawn, cards)


def _languages(values: Values | None) -> list[tuple[str, int, float]]:
    """Language, samples, percent of the most frequent one."""
    if values is None:
        return []
    counts = Counter(v for v in values.tolist() if v is not None).most_common(12)
    return [(str(n), c, round(100 * c / counts[0][1], 1)) for n, c in counts]


# --- verdicts --------------------------------------------------------------------------------------------------------


def _judged(pages: _Pages, name: str, values: Values, lines: Any) -> Judged:
    said = values.tolist()
    counts = Counter(v for v in said if v not in (None, "ok"))
    looked = sum(v is not None for v in said)
    reasons = []
    for reason, count in counts.most_common(REASONS):
        at = [i for i, v in enumerate(said) if v == reason][:EXAMPLES]
        share = f"{100 * count / max(1, looked):.3g} %"
        reasons.append(Reason(str(reason), count, share, [pages.card(int(lines[i])) for i in at]))
    return Judged(name, looked, sum(counts.values()), reasons)


def _pairs(pages: _Pages, opened: Opened, beside: dict[str, Values]) -> dict[str, Any] | None:
    """Duplicates side by side; None: they have not been looked for."""
    kind, of = (beside.get(n) for n in _REPEATS)
    if kind is None or of is None:
        return None
    repeats = [i for i, k in enumerate(kind.tolist()) if k not in ("ok", "none", "broken", None)]
    counts = Counter(str(kind[i]) for i in repeats)
    # Some of every kind: near ones are those that have to be looked at.
    kinds = sorted(counts)
    each = [[i for i in repeats if kind[i] == k][: -(-PAIRS // max(1, len(kinds)))] for k in kinds]
    shown = []
    for i in sorted(i for some in each for i in some)[:PAIRS]:
        line = pages.line_of(str(of[i]))
        if line is not None:
            shown.append((str(kind[i]), pages.card(line), pages.card(i)))
    return {"counts": [(k, n) for k, n in sorted(counts.items())], "shown": shown}


# --- words -----------------------------------------------------------------------------------------------------------


def _title(opened: Opened) -> str:
    names = opened.shards.names
    return f"{names[0].removesuffix('.tar')} … {names[-1].removesuffix('.tar')}"


def _facts(opened: Opened, measured: dict[str, Values], looked: int) -> list[tuple[str, str]]:
    size = opened.shards.bytes
    out = [
        (f"{opened.total:,}", "samples"),
        (f"{len(opened.shards.names):,}", "shards"),
        (f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB", "in all"),
        (f"{size / max(1, opened.total) / 1e3:,.1f} kB", "a sample"),
    ]
    if "captions" in measured:
        out.append((f"{np.nanmean(measured['captions']):.2g}", "captions a sample"))
    if "seconds" in measured:
        out.append((f"{np.nanmean(measured['seconds']) * opened.total / 3600:,.2g} h", "of audio (estimated)"))
    return [*out, (f"{looked:,}", "looked at")]
