"""Read and decode every sample of some shards once, and say what is wrong with them."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from dualenc.data.modalities import DecodeError
from dualenc.data.modalities.audio import AudioInput
from dualenc.data.modalities.camera import CameraConfig, CameraInput
from dualenc.data.modalities.lidar import LidarConfig, LidarInput
from dualenc.data.shards.index import expand, short_names
from dualenc.data.shards.reader import REFUSED
from dualenc.data.shards.remote import ReadFailed, ShardCache, is_local, local_path
from dualenc.data.shards.tar import Sample, index_tar, unsafe
from dualenc.errors import DataError
from dualenc_data_tools import sounds
from dualenc_data_tools.images import MAX_PIXELS, decode, open_picture
from dualenc_data_tools.sources.source import BadMedia

IMAGE = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
AUDIO = tuple(AudioInput.default_members)
CAPTIONS = ("captions", "caption", "text")
_CAMERAS, _LIDAR = CameraInput(CameraConfig()), LidarInput(LidarConfig(features=[]))
SHOWN = 8
_WORTH_A_PROCESS = 64_000_000
"""Bytes of shards: a new process needs seconds before it reads its first."""
TENTHS_BINS = (2, 5, 10, 20, 50, 100, 200, 300, 600, 3000)
"""Of a second: what most sounds are longer than."""
PIXEL_BINS = (32, 64, 128, 224, 256, 384, 512, 1024, 2048)
WORD_BINS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)

PROBLEMS = (
    "broken shard",
    "missing member",
    "broken image",
    "broken sound",
    "broken camera",
    "broken lidar",
    "too large",
    "broken text",
    "empty caption",
    "duplicate key",
    "unsafe name",
    "pickled member",
)
"""What makes shards not ok; each is counted and its first cases are named."""


@dataclass(slots=True)
class ShardStats:
    """What one shard holds (or several, after :meth:`add`)."""

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

    def problem(self, what: str, where: str) -> None:
        """Count a problem and keep its first cases."""
        self.problems[what] += 1
        shown = self.examples.setdefault(what, [])
        if len(shown) < SHOWN:
            shown.append(where)

    def add(self, other: ShardStats, name: str) -> None:
        """Add another shard's numbers; keys that are in both count as duplicates."""
        self.samples += other.samples
        self.size += other.size
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
            self.problem("duplicate key", f"{name}: {len(twice)} keys are in an earlier shard too")
        self.keys |= other.keys
        for kind, lacking in other.lacking.items():
            self.lacking.setdefault(kind, []).extend(lacking)


@dataclass(slots=True)
class CheckReport:
    """The numbers of all shards together.

    Attributes:
        shards: how many were read.
        stats: counts over all of them; ``stats.problems`` says what is wrong.
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
        """Share of captions that some other sample (or place) has too."""
        repeated = sum(n for n in self.stats.captions.values() if n > 1)
        return repeated / self.total_captions if self.total_captions else 0.0


def check(
    shards: str | Sequence[str], *, max_pixels: int = MAX_PIXELS, workers: int | None = None, progress: bool = True
) -> CheckReport:
    """Read every sample of ``shards`` once, decode its picture and sound, and look at its texts and names.

    Args:
        shards: paths, brace patterns, ``pipe:`` commands, URLs; remote shards are fetched whole, one after the other.
        max_pixels: larger pictures are a problem (found by their header, never decoded).
        workers: processes; default: one for every 64 MB, at most the CPUs and the shards.

    Raises:
        DataError: no shard is named, or a local one is not there. A shard that is there but broken is counted.
    """
    urls = expand(shards)
    missing = next((u for u in urls if is_local(u) and not Path(local_path(u)).is_file()), None)
    if missing is not None:
        raise DataError(f"There is no shard {missing}.")
    names = short_names(urls)
    total = ShardStats()
    if workers is None:
        size = sum(os.path.getsize(local_path(u)) if is_local(u) else _WORTH_A_PROCESS for u in urls)
        workers = min(os.cpu_count() or 1, 1 + size // _WORTH_A_PROCESS)
    count = min(workers, len(urls))
    by_number: dict[int, ShardStats] = {}
    for i, stats in _run(urls, names, max_pixels, count, progress):
        by_number[i] = stats
    for i in sorted(by_number):  # in the order of the shards, so that the report is the same every time
        total.add(by_number[i], names[i])
    # Only the whole says which members a sample should have: what most samples have.
    for kind, lacking in sorted(total.lacking.items()):
        if 2 * total.kinds[kind] > total.samples:
            for key in lacking:
                total.problem("missing member", f"{key}: no {kind}")
    return CheckReport(len(urls), total)


def _run(
    urls: list[str], names: list[str], max_pixels: int, count: int, progress: bool
) -> Iterator[tuple[int, ShardStats]]:
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not (progress and console.is_terminal)) as bar:
        task = bar.add_task("checking shards", total=len(urls))
        if count == 1:
            for i, url in enumerate(urls):
                yield i, check_shard(url, names[i], max_pixels)
                bar.advance(task)
            return
        # spawn: torch and Pillow's threads do not survive a fork.
        with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
            jobs = {pool.submit(check_shard, url, names[i], max_pixels): i for i, url in enumerate(urls)}
            for job in as_completed(jobs):
                yield jobs[job], job.result()
                bar.advance(task)


def check_shard(url: str, name: str, max_pixels: int = MAX_PIXELS) -> ShardStats:
    """One shard's numbers. A shard that cannot be read as a tar counts as one broken shard."""
    stats = ShardStats()
    cache = None if is_local(url) else ShardCache.temporary(50.0, 3)
    try:
        path = local_path(url) if cache is None else str(cache.get(url))
        stats.size = os.path.getsize(path)
        fd = os.open(path, os.O_RDONLY)
        try:
            index = index_tar(lambda at, n: os.pread(fd, n, at), stats.size, name)
            for i in range(len(index)):
                _check_sample(fd, index.sample(i), name, max_pixels, stats)
        finally:
            os.close(fd)
    except (DataError, ReadFailed, OSError) as e:
        stats.problem("broken shard", str(e))
    finally:
        if cache is not None:
            cache.remove()
    return stats


def _check_sample(fd: int, sample: Sample, shard: str, max_pixels: int, stats: ShardStats) -> None:
    where = f"{shard}/{sample.key}"
    stats.samples += 1
    stats.members.update(list(sample.members))
    if unsafe(sample.key):
        stats.problem("unsafe name", where)
    digest = hashlib.blake2b(sample.key.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    if digest in stats.keys:
        stats.problem("duplicate key", where)
    stats.keys.add(digest)
    for ending in sample.members:
        if ending.rsplit(".", 1)[-1] in REFUSED:
            stats.problem("pickled member", f"{where}.{ending}")

    def read(ending: str) -> bytes:
        offset, size = sample.members[ending]
        return os.pread(fd, size, offset)

    picture = next((e for e in IMAGE if e in sample.members), None)
    if picture is None:
        stats.lacking.setdefault("image", []).append(where)
    else:
        stats.kinds["image"] += 1
        try:
            opened = open_picture(read(picture), max_pixels)
            stats.pixels[max(opened.size)] += 1
            decode(opened)
        except BadMedia as e:
            stats.problem(e.reason, f"{where}.{picture}: {e.detail}")
    _check_sound(sample, read, where, stats)
    _check_sensors(sample, read, where, stats)
    texts = _texts(sample, read, where, stats)
    if texts is None:
        stats.lacking.setdefault("text", []).append(where)
        return
    stats.kinds["text"] += 1
    stats.per_sample[len(texts)] += 1
    for text in texts or [""]:
        folded = " ".join(text.split()).lower()
        if not folded:
            stats.problem("empty caption", where)
            continue
        stats.words[len(folded.split())] += 1
        stats.captions[hashlib.blake2b(folded.encode(), digest_size=8).digest()] += 1


def _check_sound(sample: Sample, read: Any, where: str, stats: ShardStats) -> None:
    ending = next((e for e in AUDIO if e in sample.members), None)
    if ending is None:
        stats.lacking.setdefault("audio", []).append(where)
        return
    stats.kinds["audio"] += 1
    try:
        sound = sounds.open_sound(read(ending))
        sounds.decode(sound)
    except BadMedia as e:
        stats.problem(e.reason, f"{where}.{ending}: {e.detail}")
        return
    stats.rates[sound.rate] += 1
    if sound.frames is not None:
        stats.tenths[round(10 * sound.seconds)] += 1


def _check_sensors(sample: Sample, read: Any, where: str, stats: ShardStats) -> None:
    """Calibrated cameras and sweeps, as training would read them."""
    if "lidar.npy" not in sample.members or "json" not in sample.members:
        return
    try:
        doc = json.loads(read("json"))
        sweep = {"json:lidar": doc.get("lidar"), "lidar.npy": read("lidar.npy")}
        rig = {"json:cameras": doc.get("cameras"), **{e: read(e) for e in sample.members if e.startswith("cam")}}
    except (ValueError, AttributeError):
        return  # the text's check says so
    try:
        _LIDAR.decode(sweep)
    except DecodeError as e:
        stats.problem("broken lidar", f"{where}: {e}")
    try:
        for shot in _CAMERAS.decode(rig):
            if shot.picture is not None:
                shot.picture.rgb()
    except DecodeError as e:
        stats.problem("broken camera", f"{where}: {e}")


def _texts(sample: Sample, read: Any, where: str, stats: ShardStats) -> list[str] | None:
    """The captions of a sample; None when it has no text member."""
    if "txt" in sample.members:
        try:
            return [read("txt").decode("utf-8")]
        except UnicodeDecodeError as e:
            stats.problem("broken text", f"{where}.txt: not UTF-8 ({e.reason})")
            return ["?"]
    if "json" not in sample.members:
        return None
    try:
        doc = json.loads(read("json"))
    except ValueError as e:
        stats.problem("broken text", f"{where}.json: {e}")
        return ["?"]
    value = next((doc[k] for k in CAPTIONS if k in doc), None) if isinstance(doc, dict) else None
    if value is None:
        return None
    return [value] if isinstance(value, str) else [str(v) for v in value] if isinstance(value, list) else [str(value)]


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
        console.print(f"{sum(stats.tenths.elements()) / 36000:.2f} hours of sound: {rates}", highlight=False)
    if stats.words:
        _histogram(console, "caption length, words", stats.words, WORD_BINS)
        counts = ", ".join(f"{n:,} with {k}" for k, n in sorted(stats.per_sample.items())[:8])
        console.print(f"captions a sample: {counts}", highlight=False)
        console.print(
            f"{report.total_captions:,} captions, {report.distinct_captions:,} distinct; "
            f"{report.duplicate_share:.1%} stand more than once (positives of each other need equal pair ids)",
            highlight=False,
        )
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
    """Bars of how many values are at most each bin (and more than the one before)."""
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
