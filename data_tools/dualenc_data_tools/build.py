"""Pack a data set into shards: records of a source → checked images, audio and captions → tars with an index."""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dualenc.config import read_yaml, settings_as
from dualenc.data.shards.index import build_index
from dualenc.errors import ConfigError, DataError
from dualenc.files import write_atomically
from dualenc_data_tools import images, sounds
from dualenc_data_tools.sources import BadMedia, Dropped, Keys, Record, SourceConfig, sources
from dualenc_data_tools.sources.source import OfOneSplit
from dualenc_data_tools.writer import ShardWriter

MAX_SPLITS = 32
PREPARE = {"image": images.prepare, "audio": sounds.prepare}
"""Kinds of media that are checked and may be re-encoded; anything else is packed as it is."""


@dataclass(slots=True)
class BuildReport:
    """What a build wrote and what it left out.

    Attributes:
        written: split → samples.
        shards: the tars, in order.
        size: bytes of all tars.
        captions: number of texts in all samples.
        dropped: reason → number of records left out; ``dropped_file`` lists them.
        notes: remarks of the source.
    """

    source: str
    out: Path
    written: dict[str, int] = field(default_factory=dict)
    shards: list[Path] = field(default_factory=list)
    size: int = 0
    captions: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    dropped_file: Path | None = None
    index: Path | None = None
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def samples(self) -> int:
        """Samples in all splits."""
        return sum(self.written.values())


@dataclass(frozen=True, slots=True)
class _Packed:
    key: str
    split: str
    members: dict[str, bytes]
    captions: int


def build(
    source_kind: str, out: str | Path, options: Mapping[str, Any] | None = None, *, progress: bool = True, **more: Any
) -> BuildReport:
    """Write the samples of a source as shards with an index into ``out``.

    Texts: a sample with one caption and no other fields gets ``KEY.txt``; a source with lists of captions, or with
    other fields, gets ``KEY.json`` holding ``{"captions": […], field: value, …}``, which recipes read as
    ``json:captions``. No caption is in both.

    Args:
        source_kind: a name in :data:`dualenc_data_tools.sources.sources`.
        out: folder for the shards, ``index.json``, ``dropped-NAME.jsonl`` and ``build-NAME.yaml``, from which
            :func:`of_file` builds them again.
        options: settings of the source, checked by its ``Config``; ``more`` is added to them.
        progress: show a counter on a terminal.

    Raises:
        ConfigError: unknown source or setting (with the nearest one), or the shards already exist.
        DataError: nothing was written, or more than ``max_dropped_share`` was dropped.
    """
    kind = sources[source_kind]
    cfg: SourceConfig = settings_as(kind.config, {**(options or {}), **more}, source_kind)
    folder = Path(out)
    report = BuildReport(source_kind, folder)
    start = time.monotonic()
    writers: dict[str, ShardWriter] = {}
    label = (cfg.split if isinstance(cfg, OfOneSplit) else None) or cfg.name
    dropped_file = folder / f"dropped-{label}.jsonl"
    try:
        drops = _pack(kind.records(cfg), cfg, folder, writers, report, progress)
        _judge(drops, dropped_file, cfg, report)
        for writer in writers.values():
            report.shards += writer.close(index=False)
    except BaseException:
        for writer in writers.values():
            writer.abort()
        raise
    report.index = build_index([str(p) for p in report.shards], folder)
    report.size = sum(p.stat().st_size for p in report.shards)
    said = {"build": {"source": source_kind, **cfg.model_dump(mode="json", exclude_defaults=True)}}
    write_atomically(folder / f"build-{label}.yaml", yaml.safe_dump(said, sort_keys=False, allow_unicode=True))
    if kind.finish is not None:
        report.notes = kind.finish(cfg, folder)
    report.seconds = time.monotonic() - start
    return report


def of_file(path: str | Path) -> tuple[str, dict[str, Any]]:
    """The source and its settings that the ``build:`` section of a YAML file names; ``./`` paths are relative to it.

    Raises:
        ConfigError: no such file, no such section, another key beside it.
    """
    raw, _ = read_yaml(Path(path))
    section = raw.get("build")
    if set(raw) != {"build"} or not isinstance(section, dict) or not isinstance(section.get("source"), str):
        raise ConfigError(f"{path}: write one section, build: {{source: NAME, path: …, and other settings of NAME}}")
    return section["source"], {k: v for k, v in section.items() if k != "source"}


def _pack(
    records: Iterable[Record | Dropped],
    cfg: SourceConfig,
    folder: Path,
    writers: dict[str, ShardWriter],
    report: BuildReport,
    progress: bool,
) -> list[Dropped]:
    """Write every good record; return the dropped ones."""
    drops: list[Dropped] = []
    with _counter(progress) as count:
        for done in _in_order(_limited(records, cfg.limit), cfg):
            count()
            if isinstance(done, Dropped):
                drops.append(done)
                continue
            if done.split not in writers:
                if len(writers) >= MAX_SPLITS:
                    some = ", ".join(list(writers)[:4])
                    raise ConfigError(f"split_field: more than {MAX_SPLITS} splits ({some}, …); set split_field=null")
                writers[done.split] = ShardWriter(
                    folder,
                    max_samples=cfg.shard_samples,
                    max_bytes=cfg.shard_mb * 1e6,
                    split=done.split,
                    overwrite=cfg.overwrite,
                )
            writers[done.split].write(done.key, done.members)
            report.written[done.split] = report.written.get(done.split, 0) + 1
            report.captions += done.captions
    return drops


def _judge(drops: list[Dropped], path: Path, cfg: SourceConfig, report: BuildReport) -> None:
    """Write the names of the dropped records; refuse a build that dropped too many."""
    report.dropped = dict(Counter(d.reason for d in drops).most_common())
    path.unlink(missing_ok=True)
    if drops:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = (
            json.dumps({"name": d.name, "reason": d.reason, "detail": d.detail}, ensure_ascii=False) for d in drops
        )
        path.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="backslashreplace")
        report.dropped_file = path
    total = report.samples + len(drops)
    said = ", ".join(f"{n:,} × {reason}" for reason, n in report.dropped.items())
    if not report.samples:
        first = f"; the first: {drops[0].name}: {drops[0].detail or drops[0].reason}" if drops else ""
        raise DataError(f"{report.source}: no sample could be written ({said or 'the source is empty'}){first}")
    if len(drops) > cfg.max_dropped_share * total:
        raise DataError(
            f"{report.source}: {len(drops):,} of {total:,} records were dropped ({said}), more than max_dropped_share="
            f"{cfg.max_dropped_share:g}. {path} lists them. No shard was written; raise the share if that is fine."
        )


# --- one record --------------------------------------------------------------------------------------------------


def _in_order(records: Iterable[Record | Dropped], cfg: SourceConfig) -> Iterator[_Packed | Dropped]:
    """Pack records in threads (decoders release the GIL) and yield them in order, with few in memory."""
    keys: dict[str, Keys] = {}
    waiting: deque[Future[_Packed | Dropped]] = deque()
    with ThreadPoolExecutor(cfg.threads) as pool:
        try:
            for number, record in enumerate(records):
                if isinstance(record, Dropped):
                    future: Future[_Packed | Dropped] = Future()
                    future.set_result(record)
                else:
                    held_out = cfg.val_every is not None and number % cfg.val_every == 0
                    split = "val" if held_out else record.split or cfg.name
                    key = record.name if record.exact_key else keys.setdefault(split, Keys()).make(record.name)
                    future = pool.submit(_pack_one, record, key, split, cfg)
                waiting.append(future)
                if len(waiting) >= 4 * cfg.threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _pack_one(record: Record, key: str, split: str, cfg: SourceConfig) -> _Packed | Dropped:
    members: dict[str, bytes] = {}
    for what, value in record.media.items():
        try:
            raw = value.read_bytes() if isinstance(value, Path) else value
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return Dropped(record.name, f"{what} file missing", str(value))
        except OSError as e:
            return Dropped(record.name, f"{what} file unreadable", str(e))
        if what in PREPARE:
            try:
                ending, raw = PREPARE[what](raw, cfg)
            except BadMedia as e:
                return Dropped(record.name, e.reason, e.detail)
            members[ending] = raw
        else:
            members[what] = raw
    members |= record.members
    texts = text_members(record, cfg)
    if isinstance(texts, Dropped):
        return texts
    return _Packed(key, split, members | texts, len(record.captions))


def text_members(record: Record, cfg: SourceConfig) -> dict[str, bytes] | Dropped:
    """The .txt or .json member of a record (see :func:`build` for which)."""
    layout = cfg.text
    if layout == "auto":
        layout = "json" if record.many or record.fields or len(record.captions) > 1 else "txt"
    if not record.captions and not record.fields:
        return {}
    if layout == "txt":
        if len(record.captions) != 1:
            return Dropped(record.name, "several captions", f"text=txt holds one caption, not {len(record.captions)}")
        return {"txt": record.captions[0].encode()}
    doc: dict[str, Any] = {"captions": list(record.captions)} if record.captions or record.many else {}
    doc |= {k: v for k, v in record.fields.items() if k != "captions"}
    return {"json": json.dumps(doc, ensure_ascii=False).encode()}


def _limited(records: Iterable[Record | Dropped], limit: int | None) -> Iterator[Record | Dropped]:
    for i, record in enumerate(records):
        if limit is not None and i >= limit:
            return
        yield record


@contextlib.contextmanager
def _counter(show: bool) -> Iterator[Any]:
    """A counter on stderr, where that is a terminal."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not show or not console.is_terminal:
        yield lambda: None
        return
    columns = (
        SpinnerColumn(),
        TextColumn("packing"),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("packing", total=None, rate="")

        def step() -> None:
            speed = bar.tasks[0].finished_speed or bar.tasks[0].speed
            bar.update(task, advance=1, rate=f"{speed:,.0f} samples/s" if speed else "")

        yield step


def print_report(report: BuildReport) -> None:
    """Print a report as a table."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("split", "samples", "shards", title=f"{report.source} → {report.out}", title_justify="left")
    for split, n in report.written.items():
        shards = sum(p.name.rsplit("-", 1)[0] == split for p in report.shards)
        table.add_row(split, f"{n:,}", f"{shards:,}")
    console.print(table)
    rate = report.samples / report.seconds if report.seconds else 0.0
    size, each = report.size / 1e6, report.captions / report.samples
    console.print(
        f"{report.samples:,} samples, {report.captions:,} captions ({each:.1f} each), {size:,.1f} MB in "
        f"{report.seconds:.1f} s ({rate:,.0f} samples/s)",
        highlight=False,
    )
    for reason, n in report.dropped.items():
        console.print(f"[yellow]dropped[/] {n:,} × {reason}", highlight=False)
    if report.dropped_file is not None:
        console.print(f"dropped records: {report.dropped_file}", highlight=False, markup=False, soft_wrap=True)
    for note in report.notes:
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    console.print(f"index: {report.index}", highlight=False, markup=False, soft_wrap=True)
