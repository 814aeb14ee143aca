"""Read and decode every sample of some shards once, with training's own reader, and report problems."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from dualenc.config import Recipe, Source
from dualenc.data.modalities import DecodeError
from dualenc.data.modalities.modality import of_one_item
from dualenc.data.shards.index import expand, open_source, open_sources, refuse_pipes, short_names
from dualenc.data.shards.reader import REFUSED, Reader, SampleError
from dualenc.data.shards.remote import ShardCache, is_local, local_path
from dualenc.data.shards.tar import Sample, ends_properly, unsafe
from dualenc.errors import DataError
from dualenc_data_tools.images import decode, open_picture
from dualenc_data_tools.sources.source import BadMedia
from dualenc_data_tools.wanted import MAX_PIXELS, Wanted, advice, of_recipe, usual

SHOWN = 8
_WORTH_A_PROCESS = 64_000_000
"""Bytes of shards per process: a new process takes seconds to start."""
TENTHS_BINS = (2, 5, 10, 20, 50, 100, 200, 300, 600, 3000)
"""Bins of clip lengths, in tenths of a second."""
PIXEL_BINS = (32, 64, 128, 224, 256, 384, 512, 1024, 2048)
WORD_BINS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)

PROBLEMS = (
    "broken shard",
    "no pair",
    "missing member",
    "scattered members",
    "broken image",
    "broken sound",
    "broken camera",
    "broken lidar",
    "broken item",
    "too large",
    "broken text",
    "empty caption",
    "duplicate key",
    "unsafe name",
    "pickled member",
)
"""What makes shards not ok; each is counted and its first cases are listed."""
_BROKEN = {
    "image": "broken image",
    "audio": "broken sound",
    "text": "broken text",
    "camera": "broken camera",
    "lidar": "broken lidar",
}


@dataclass(slots=True)
class ShardStats:
    """Statistics of one shard (or of several, after :meth:`add`)."""

    samples: int = 0
    size: int = 0
    members: Counter[str] = field(default_factory=Counter)
    problems: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    pixels: Counter[int] = field(default_factory=Counter)
    tenths: Counter[int] = field(default_factory=Counter)
    rates: Counter[int] = field(default_factory=Counter)
    words: Counter[int] = field(default_factory=Counter)
    captions: Counter[bytes] = field(default_factory=Counter)
    per_sample: Counter[int] = field(default_factory=Counter)
    keys: set[bytes] = field(default_factory=set)
    kinds: Counter[str] = field(default_factory=Counter)
    lacking: dict[str, list[str]] = field(default_factory=dict)
    paired: int = 0
    unpaired: dict[str, str] = field(default_factory=dict)

    def problem(self, what: str, where: str) -> None:
        """Count a problem and keep its first cases."""
        self.problems[what] += 1
        shown = self.examples.setdefault(what, [])
        if len(shown) < SHOWN:
            shown.append(where)

    def add(self, other: ShardStats, name: str) -> None:
        """Add another shard's numbers; keys in both count as duplicates."""
        self.samples += other.samples
        self.size += other.size
        self.paired += other.paired
        self.unpaired |= other.unpaired
        for mine, theirs in (
            (self.members, other.members),
            (self.problems, other.problems),
            (self.pixels, other.pixels),
            (self.tenths, other.tenths),
            (self.rates, other.rates),
            (self.words, other.words),
            (self.captions, other.captions),
            (self.per_sample, other.per_sample),
            (self.kinds, other.kinds),
        ):
            mine.update(theirs)  # type: ignore[arg-type]
        for what, cases in other.examples.items():
            shown = self.examples.setdefault(what, [])
            shown += cases[: SHOWN - len(shown)]
        twice = self.keys & other.keys
        for _ in twice:
            self.problem("duplicate key", f"{name}: {len(twice)} keys are also in an earlier shard")
        self.keys |= other.keys
        for kind, lacking in other.lacking.items():
            self.lacking.setdefault(kind, []).extend(lacking)


@dataclass(slots=True)
class CheckReport:
    """The numbers of all shards together.

    Attributes:
        shards: number of shards read.
        stats: counts over all of them; ``stats.problems`` lists what is wrong.
        distinct_captions, total_captions: after folding case and spaces.
    """

    shards: int
    stats: ShardStats

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.stats.problems

    @property
    def total_captions(self) -> int:
        """Texts in all samples."""
        return self.stats.captions.total()

    @property
    def distinct_captions(self) -> int:
        """Different texts."""
        return len(self.stats.captions)

    @property
    def duplicate_share(self) -> float:
        """Share of captions that occur more than once."""
        repeated = sum(n for n in self.stats.captions.values() if n > 1)
        return repeated / self.total_captions if self.total_captions else 0.0


def check(
    shards: str | Sequence[str],
    *,
    max_pixels: int = MAX_PIXELS,
    workers: int | None = None,
    progress: bool = True,
    wanted: Wanted | None = None,
) -> CheckReport:
    """Read every sample of ``shards`` once as training would, decode what it would use, and check texts and names.

    Args:
        shards: paths, brace patterns, ``pipe:`` commands, URLs; remote shards are downloaded whole, one by one.
        max_pixels: larger images are a problem (found by their header, never decoded).
        workers: processes; default: one for every 64 MB, at most the CPUs and the shards.
        wanted: members and pairs, as :func:`of_recipe` gives them; default: those of a recipe without ``members``.

    Raises:
        DataError: no shard is named, or a local one is missing. A broken shard is only counted.
    """
    urls = expand(shards)
    missing = next((u for u in urls if is_local(u) and not Path(local_path(u)).is_file()), None)
    if missing is not None:
        raise DataError(f"There is no shard {missing}.")
    names = short_names(urls)
    wanted = wanted or usual(max_pixels)
    total = ShardStats()
    if workers is None:
        size = sum(os.path.getsize(local_path(u)) if is_local(u) else _WORTH_A_PROCESS for u in urls)
        workers = min(os.cpu_count() or 1, 1 + size // _WORTH_A_PROCESS)
    count = min(workers, len(urls))
    by_number: dict[int, ShardStats] = {}
    for i, stats in _run(urls, names, wanted, count, progress):
        by_number[i] = stats
    for i in sorted(by_number):  # in the order of the shards, so that the report is the same every time
        total.add(by_number[i], names[i])
    _judge_pairs(total, wanted)
    return CheckReport(len(urls), total)


def check_recipe(recipe: Recipe, *, workers: int | None = None, progress: bool = True) -> CheckReport:
    """Check every source of a recipe with its own members and pairs. All samples are read, also those that the source's
    selection leaves out.

    Raises:
        ConfigError: whatever training would refuse, such as ``pipe:`` shards that are not allowed.
        DataError: as :func:`check`; a selection is missing, or its shards have changed since.
    """
    total, shards = ShardStats(), 0
    if any(s.selection is not None for s in recipe.data.sources):
        open_sources(recipe.data)
    for i, source in enumerate(recipe.data.sources):
        refuse_pipes(source.shards, recipe.data.allow_pipe, "data.allow_pipe=true")
        one = check(source.shards, workers=workers, progress=progress, wanted=of_recipe(recipe, i))
        shards += one.shards
        total.add(one.stats, source.name)
    return CheckReport(shards, total)


def _judge_pairs(total: ShardStats, wanted: Wanted) -> None:
    """Problems visible only over all shards: members that most samples have and some lack, samples without pairs."""
    flagged = set()
    for m, lacking in sorted(total.lacking.items()):
        if 2 * total.kinds[m] > total.samples:
            for key in lacking:
                total.problem("missing member", f"{key}: no {m}")
            flagged.update(lacking)
    total.lacking.clear()
    unpaired, total.unpaired = total.unpaired, {}
    if total.samples and not total.paired and unpaired:
        total.problem(
            "no pair", f"training could use none of the {total.samples:,} samples: {advice(total.members, wanted)}"
        )
        return
    for key, there in unpaired.items():
        if key not in flagged:
            total.problem("missing member", f"{key}: no pair (it has {there})")


def _run(
    urls: list[str], names: Sequence[str], wanted: Wanted, count: int, progress: bool
) -> Iterator[tuple[int, ShardStats]]:
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not (progress and console.is_terminal)) as bar:
        task = bar.add_task("checking shards", total=len(urls))
        if count == 1:
            for i, url in enumerate(urls):
                yield i, check_shard(url, names[i], wanted)
                bar.advance(task)
            return
        # spawn: torch and Pillow's threads do not survive a fork.
        with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
            jobs = {pool.submit(check_shard, url, names[i], wanted): i for i, url in enumerate(urls)}
            for job in as_completed(jobs):
                yield jobs[job], job.result()
                bar.advance(task)


def check_shard(url: str, name: str, wanted: Wanted) -> ShardStats:
    """One shard's statistics. A shard that training could not read, or would stop at, counts as one broken shard."""
    stats = ShardStats()
    cache = None if is_local(url) else ShardCache.temporary(50.0, 3)
    reader = None
    try:
        path = local_path(url) if cache is None else str(cache.get(url))
        stats.size = os.path.getsize(path)
        opened = open_source(Source(name="check", shards=[path]), scan_remote=True)
        with open(path, "rb") as f:
            if not ends_properly(lambda at, n: os.pread(f.fileno(), n, at), stats.size):
                stats.problem(
                    "broken shard", f"{name} has no end-of-archive mark: it was cut short, or its writer was stopped"
                )
        reader = Reader([opened], None, retries=0)
        apart = set(reader.index(0, 0).scattered())
        for key in sorted(apart):
            stats.problem("scattered members", f"{name}/{key}: its members are not adjacent")
        for i in range(opened.infos[0].samples):
            _check_sample(reader, reader.locate(0, 0, i), name, wanted, apart, stats)
    except (DataError, SampleError, OSError) as e:
        stats.problem("broken shard", str(e))
    finally:
        if reader is not None:
            reader.close()
        if cache is not None:
            cache.remove()
    return stats


def _check_sample(
    reader: Reader, sample: Sample, shard: str, wanted: Wanted, apart: set[str], stats: ShardStats
) -> None:
    where = f"{shard}/{sample.key}"
    stats.samples += 1
    stats.members.update(list(sample.members))
    digest = hashlib.blake2b(sample.key.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    if digest in stats.keys and sample.key not in apart:
        stats.problem("duplicate key", where)
    stats.keys.add(digest)
    for ending in sample.members:
        if ending.rsplit(".", 1)[-1] in REFUSED:
            stats.problem("pickled member", f"{where}.{ending}")
    if unsafe(sample.key):
        stats.problem("unsafe name", where)
        return
    found = set()
    for m, endings in wanted.members.items():
        kind = wanted.kind(m)
        # The json beside images, audio and text may not describe sensors: then it is not read as such.
        if wanted.pairs is None and kind in ("camera", "lidar") and "lidar.npy" not in sample.members:
            continue
        try:
            got = reader.find(0, 0, sample, {m: endings})
            if m in got.values:
                found.add(m)
                _look(got.values[m], m, f"{where}.{got.members[m]}", wanted, stats)
            elif sample.key not in apart and kind in ("image", "audio", "text"):
                stats.lacking.setdefault(m, []).append(where)
        except SampleError as e:
            found.add(m)
            stats.problem(_BROKEN.get(kind, "broken item"), f"{where}.{e}")
    stats.kinds.update(found)
    if wanted.paired(found):
        stats.paired += 1
    elif sample.key not in apart:
        stats.unpaired[where] = ", ".join(f".{e}" for e in list(sample.members)[:4])


def _look(raw: Any, modality: str, where: str, wanted: Wanted, stats: ShardStats) -> None:
    """Decode one value of a sample and count its properties."""
    kind = wanted.kind(modality)
    try:
        with of_one_item():
            try:
                _decode(raw, modality, where, wanted, stats)
            except BadMedia as e:
                stats.problem(e.reason, f"{where}: {e.detail}")
    except DecodeError as e:
        stats.problem(_BROKEN.get(kind, "broken item"), f"{where}: {e}")


def _decode(raw: Any, modality: str, where: str, wanted: Wanted, stats: ShardStats) -> None:
    kind = wanted.kind(modality)
    if kind == "text":
        _look_at_text(raw, where, stats)
    elif kind == "image":
        opened = open_picture(raw, wanted.max_pixels)
        stats.pixels[max(opened.size)] += 1
        decode(opened)
    elif kind == "audio":
        from dualenc_data_tools import sounds

        sound = sounds.open_sound(raw)
        sounds.decode(sound)
        stats.rates[sound.rate] += 1
        if sound.frames is not None:
            stats.tenths[round(10 * sound.seconds)] += 1
    else:
        part = wanted.inputs[modality]
        part.eval(part.decode(raw))  # decoders may put work off until the row is made


def _look_at_text(raw: Any, where: str, stats: ShardStats) -> None:
    if isinstance(raw, bytes):
        try:
            raw = raw.decode("utf-8")
        except UnicodeDecodeError as e:
            stats.problem("broken text", f"{where}: not UTF-8 ({e.reason})")
            raw = "?"
    texts = [str(t) for t in raw] if isinstance(raw, list) else [str(raw)]
    stats.per_sample[len(texts)] += 1
    for text in texts or [""]:
        folded = " ".join(text.split()).lower()
        if not any(c.isprintable() and not c.isspace() for c in folded):
            stats.problem("empty caption", where)
            continue
        stats.words[len(folded.split())] += 1
        stats.captions[hashlib.blake2b(folded.encode("utf-8", "surrogatepass"), digest_size=8).digest()] += 1


# --- printing ----------------------------------------------------------------------------------------------------


def print_check(report: CheckReport) -> None:
    """Print a report as tables: members, sizes, captions, problems, and one last line: ok or not."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console, stats = Console(), report.stats
    console.print(f"{stats.samples:,} samples in {report.shards:,} shards, {stats.size / 1e6:,.1f} MB", highlight=False)
    members = ", ".join(f"{n:,} .{e}" for e, n in stats.members.most_common(12))
    console.print(f"members: {members}", highlight=False, markup=False)
    if stats.pixels:
        _histogram(console, "longest side, px", stats.pixels, PIXEL_BINS)
    if stats.tenths:
        _histogram(console, "length, tenths of a second", stats.tenths, TENTHS_BINS)
        rates = ", ".join(f"{n:,} at {rate:,} Hz" for rate, n in stats.rates.most_common(8))
        console.print(f"{sum(stats.tenths.elements()) / 36000:.2f} hours of audio: {rates}", highlight=False)
    if stats.words:
        _histogram(console, "caption length, words", stats.words, WORD_BINS)
        counts = ", ".join(f"{n:,} with {k}" for k, n in sorted(stats.per_sample.items())[:8])
        console.print(f"captions per sample: {counts}", highlight=False)
        console.print(
            f"{report.total_captions:,} captions, {report.distinct_captions:,} distinct; "
            f"{report.duplicate_share:.1%} occur more than once (only equal pair ids make them positives)",
            highlight=False,
        )
    console.print(f"training finds a pair in {stats.paired:,} of {stats.samples:,} samples", highlight=False)
    if report.ok:
        console.print("[bold green]ok[/]")
        return
    table = Table("problem", "count", "where", title_justify="left")
    for what in PROBLEMS:
        if stats.problems[what]:
            cases = stats.examples[what]
            more = stats.problems[what] - len(cases[:3])
            shown = [*cases[:3], f"… and {more:,} more"] if more else cases[:3]
            table.add_row(what, f"{stats.problems[what]:,}", escape("\n".join(shown)))
    console.print(table)
    console.print(f"[bold red]not ok[/]: {stats.problems.total():,} problems", highlight=False)


def _histogram(console: Any, title: str, counts: Counter[int], bins: Sequence[int]) -> None:
    """A bar per bin: how many values are at most the bin and more than the previous one."""
    rows: Counter[int] = Counter()
    for value, n in counts.items():
        rows[next((i for i, b in enumerate(bins) if value <= b), len(bins))] += n
    top, total = max(rows.values()), sum(rows.values())
    console.print(f"{title}:", highlight=False)
    for i in range(min(rows), max(rows) + 1):
        low = bins[i - 1] + 1 if i else 0
        name = f"> {bins[-1]}" if i == len(bins) else f"{low}–{bins[i]}" if low < bins[i] else str(bins[i])
        bar = "█" * round(32 * rows[i] / top) or ("▏" if rows[i] else "")
        console.print(f"  {name:>10} {rows[i]:>9,} {rows[i] / total:>5.0%} [cyan]{bar}[/]", highlight=False)
