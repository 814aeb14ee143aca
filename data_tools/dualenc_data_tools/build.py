"""Pack a data set into shards: records of a source → checked images, audio and captions → tars with an index."""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dualenc.config import read_yaml, settings_as
from dualenc.data.shards.index import build_index
from dualenc.errors import ConfigError, DataError
from dualenc.files import write_atomically
from dualenc_data_tools.packing.assembly import Assembly, engine_of
from dualenc_data_tools.packing.journal import Journal
from dualenc_data_tools.sources import Dropped, SourceConfig, sources
from dualenc_data_tools.sources.source import OfOneSplit

HOW = {"threads", "processes"}
"""Settings that change no byte of what is built."""
WHETHER = {"overwrite", "max_dropped_share"}
"""Settings that say whether a build is kept."""


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
        resumed: shards that an earlier, stopped build had completed.
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
    resumed: int = 0

    @property
    def samples(self) -> int:
        """Samples in all splits."""
        return sum(self.written.values())


def build(
    source_kind: str,
    out: str | Path,
    options: Mapping[str, Any] | None = None,
    *,
    progress: bool = True,
    engine: str = "local",
    address: str = "auto",
    **more: Any,
) -> BuildReport:
    """Write the samples of a source as shards with an index into ``out``.

    Texts: a sample with one caption and no other fields gets ``KEY.txt``; a source with lists of captions, or with
    other fields, gets ``KEY.json`` holding ``{"captions": […], field: value, …}``, which recipes read as
    ``json:captions``. No caption is in both.

    Which sample is in which shard depends on the source's order and on sizes alone, so the bytes are the same however
    many processes pack, on whichever engine. A build that was stopped keeps its complete shards under hidden names;
    the same call goes on after them and ends in the bytes of an unbroken build.

    Args:
        source_kind: a name in :data:`dualenc_data_tools.sources.sources`.
        out: folder for the shards, ``index.json``, ``dropped-NAME.jsonl`` and ``build-NAME.yaml``, from which
            :func:`of_file` builds them again.
        options: settings of the source, checked by its ``Config``; ``more`` is added to them.
        progress: show a counter on a terminal.
        engine: local, or ray.
        address: of a running Ray cluster; auto: the one this machine belongs to, else a new one; local: a new one.

    Raises:
        ConfigError: unknown source or setting (with the nearest one), the shards already exist, or an unfinished build
            with other settings is there.
        DataError: nothing was written, or more than ``max_dropped_share`` was dropped.
    """
    kind = sources[source_kind]
    cfg: SourceConfig = settings_as(kind.config, {**(options or {}), **more}, source_kind)
    folder = Path(out)
    report = BuildReport(source_kind, folder)
    start = time.monotonic()
    label = (cfg.split if isinstance(cfg, OfOneSplit) else None) or cfg.name
    dropped_file = folder / f"dropped-{label}.jsonl"
    said = {"source": source_kind, **cfg.model_dump(mode="json", exclude_defaults=True, exclude=HOW)}
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    what = {k: v for k, v in said.items() if k not in WHETHER}
    run = Assembly(cfg, folder, Journal(folder, label, what, cfg.overwrite), engine_of(engine, cfg, address))
    try:
        if run.journal.published is None:
            with _counter(progress) as count:
                run.pack(kind.records(cfg), count)
        report.written, report.captions = run.counts()
        _judge(run.drops, dropped_file, cfg, report)
        report.shards = run.publish()
    except DroppedError:
        run.abort()
        raise
    except BaseException as e:
        if not run.journal.shards:
            run.abort()
            raise
        run.stop()
        if isinstance(e, DataError):
            raise DataError(
                f"{e} The {len(run.journal.shards):,} complete shards are kept; run the same command to resume."
            ) from e
        raise
    finally:
        run.engine.close()
        if new and not any(folder.iterdir()):  # nothing was written
            folder.rmdir()
    report.index = build_index([str(p) for p in report.shards], folder)
    report.size = sum(p.stat().st_size for p in report.shards)
    write_atomically(
        folder / f"build-{label}.yaml", yaml.safe_dump({"build": said}, sort_keys=False, allow_unicode=True)
    )
    if kind.finish is not None:
        report.notes = kind.finish(cfg, folder)
    run.journal.remove()
    report.resumed = run.resumed
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


class DroppedError(DataError):
    """So much was dropped that the source has to be looked at; nothing is kept to resume from."""


def _judge(drops: list[Dropped], path: Path, cfg: SourceConfig, report: BuildReport) -> None:
    """Write the names of the dropped records; refuse a build that dropped too many."""
    report.dropped_file = None
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
        raise DroppedError(f"{report.source}: no sample could be written ({said or 'the source is empty'}){first}")
    faults = [d for d in drops if not d.asked]
    if len(faults) > cfg.max_dropped_share * total:
        said = ", ".join(f"{n:,} × {reason}" for reason, n in Counter(d.reason for d in faults).most_common())
        raise DroppedError(
            f"{report.source}: {len(faults):,} of {total:,} records were dropped ({said}), more than max_dropped_share="
            f"{cfg.max_dropped_share:g}. {path} lists them. No shard was written; raise the share if that is fine."
        )


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
    if report.resumed:
        console.print(f"resumed: {report.resumed:,} shards were complete", highlight=False)
    for note in report.notes:
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    console.print(f"index: {report.index}", highlight=False, markup=False, soft_wrap=True)
