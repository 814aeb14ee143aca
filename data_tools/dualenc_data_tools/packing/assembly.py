"""Packed samples → shards: which sample goes where, what is journaled, and how a stopped build goes on."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from dualenc.errors import ConfigError, DataError, did_you_mean
from dualenc_data_tools.packing.engines import Local, PackingEngine
from dualenc_data_tools.packing.journal import Journal, ShardLine
from dualenc_data_tools.packing.pack import Chunk, Numbered, Outcome, Packed, chunks
from dualenc_data_tools.sources import Dropped, Record, SourceConfig
from dualenc_data_tools.writer import ShardWriter, partial

MAX_SPLITS = 32


def engine_of(name: str, cfg: SourceConfig, address: str) -> PackingEngine:
    """The engine of a name.

    Raises:
        ConfigError: another name; ray is not installed or cannot be reached.
    """
    if name == "local":
        return Local(cfg)
    if name == "ray":
        from dualenc_data_tools.packing.on_ray import OnRay

        return OnRay(cfg, address)
    raise ConfigError(f"unknown engine {name!r}; use local or ray. {did_you_mean(name, ['local', 'ray'])}")


@dataclass
class _Split:
    """A split that is being written: its writer, the line of the shard that is open, lines of shards being written."""

    writer: ShardWriter
    line: ShardLine
    waiting: deque[ShardLine] = field(default_factory=deque)


@dataclass
class Assembly:
    """One build.

    Attributes:
        drops: every dropped record, in the source's order, once :meth:`pack` has run.
        resumed: shards that were complete before.
    """

    cfg: SourceConfig
    folder: Path
    journal: Journal
    engine: PackingEngine
    drops: list[Dropped] = field(default_factory=list)
    resumed: int = 0
    _splits: dict[str, _Split] = field(default_factory=dict)
    _through: dict[str, int] = field(default_factory=dict)
    _first: dict[str, int] = field(default_factory=dict)
    _dropped: list[tuple[int, str, str, str, bool]] = field(default_factory=list)
    _checks: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.resumed = len(self.journal.shards)
        for line in self.journal.shards:
            self._through[line.split] = line.through
            self._checks[line.through] = line.names
            self._dropped += [(n, a, b, c, d) for n, a, b, c, d in line.drops]
            for number, digest in line.digests:
                self._first[digest] = min(number, self._first.get(digest, number))
        if self.journal.published is not None:
            self._dropped = [(n, a, b, c, d) for n, a, b, c, d in self.journal.published["publish"]]
            self._sort_drops()

    def pack(self, records: Iterable[Record | Dropped], count: Callable[[], None]) -> None:
        """Write every sample that is in no complete shard yet.

        Raises:
            ConfigError: too many splits. DataError: the source has changed since the build was stopped.
        """
        before = (-1, "")
        for chunk, outcomes in self.engine.pack(self._checked(chunks(records, self.cfg)), self._needed):
            for item, outcome in itertools.zip_longest(chunk, outcomes):
                count()
                if outcome is not None:
                    self._take(item, outcome, before)
                before = (item.number, item.names)
            self._journal()
        for split in self._splits.values():
            self._end(split, *before)
        self._journal(wait=True)
        self._sort_drops()

    def publish(self) -> list[Path]:
        """Give the shards their names; return them."""
        published = self.journal.published is not None
        if not published:
            self.journal.publish(self._dropped)
        first = {line.split: line.first for line in reversed(self.journal.shards)}
        out: list[Path] = []
        for name in sorted(first, key=lambda s: first[s]):
            split = self._splits.get(name)
            complete = len(self.journal.done(name))
            writer = split.writer if split is not None else ShardWriter(
                self.folder, split=name, overwrite=True, complete=complete
            )  # fmt: skip
            out += writer.close(index=False, published=published)
        return out

    def counts(self) -> tuple[dict[str, int], int]:
        """Samples of each split, in the order in which they begin, and captions of all."""
        samples: dict[str, int] = {}
        begin: dict[str, int] = {}
        lines = [*self.journal.shards, *(line for s in self._splits.values() for line in [*s.waiting, s.line])]
        for line in lines:
            if line.samples:
                samples[line.split] = samples.get(line.split, 0) + line.samples
                begin.setdefault(line.split, line.first)
        return {s: samples[s] for s in sorted(samples, key=lambda s: begin[s])}, sum(line.captions for line in lines)

    def stop(self) -> None:
        """Close what is open; the complete shards stay for a resumed build."""
        for split in self._splits.values():
            split.writer.end_shard()

    def abort(self) -> None:
        """Delete everything that was written; shards that were there before stay."""
        for split in self._splits.values():
            split.writer.abort()
        self.journal.discard()

    # --- one record ------------------------------------------------------------------------------------------------

    def _needed(self, chunk: Chunk) -> bool:
        """Whether a record of a chunk is in no complete shard. All of the chunk is packed then, as it was before."""
        return any(self._open(item) for item in chunk)

    def _open(self, item: Numbered) -> bool:
        return item.number > self._through.get(item.split, -1)

    def _checked(self, all_chunks: Iterable[Chunk]) -> Iterable[Chunk]:
        """The chunks, once their names are what they were before the build was stopped."""
        for chunk in all_chunks:
            for item in chunk:
                if self._checks.get(item.number, item.names) != item.names:
                    raise DataError(
                        f"{self.folder}: the source has changed since this build was stopped (record {item.number:,}, "
                        f"{item.key}); pass overwrite=true to begin anew"
                    )
            yield chunk

    def _take(self, item: Numbered, outcome: Outcome, before: tuple[int, str]) -> None:
        """``before``: number of the record before this one, and the digest of the names up to it."""
        if not self._open(item):
            return
        if (
            isinstance(outcome, Packed)
            and outcome.digest
            and self._first.setdefault(outcome.digest, item.number) < item.number
        ):
            outcome = Dropped(item.record.name, f"repeated {self.cfg.distinct}", outcome.digest, True)
        split = self._split(item) if item.split else None
        if isinstance(outcome, Dropped):
            drop = (item.number, outcome.name, outcome.reason, outcome.detail, outcome.asked)
            self._dropped.append(drop)
            if split is not None:
                split.line.drops.append(drop)
            return
        if split is None:
            raise AssertionError(f"record {item.number} has no split")
        if split.writer.is_full_for(outcome.members):
            self._end(split, *before)
        if not split.line.samples:
            split.line.first = item.number
        split.writer.write(outcome.key, outcome.members)
        split.line.samples += 1
        split.line.captions += outcome.captions
        if outcome.digest:
            split.line.digests.append((item.number, outcome.digest))

    def _split(self, item: Numbered) -> _Split:
        name = item.split
        if name not in self._splits:
            if len(self._splits) >= MAX_SPLITS:
                some = ", ".join(list(self._splits)[:4])
                raise ConfigError(f"split_field: more than {MAX_SPLITS} splits ({some}, …); set split_field=null")
            complete = len(self.journal.done(name))
            self._splits[name] = _Split(self.engine.writer(self.folder, name, complete), ShardLine(name, complete))
        return self._splits[name]

    # --- one shard -------------------------------------------------------------------------------------------------

    def _end(self, split: _Split, through: int, names: str) -> None:
        """End the shard that is open; its line is journaled once it is complete."""
        if not split.line.samples:
            return
        split.writer.end_shard()
        split.line.through, split.line.names = through, names
        split.waiting.append(split.line)
        split.line = ShardLine(split.line.split, split.line.shard + 1)
        self._journal()

    def _journal(self, wait: bool = False) -> None:
        for split in self._splits.values():
            finished = split.writer.finished(wait)
            while split.waiting and split.waiting[0].shard < finished:
                line = split.waiting.popleft()
                line.bytes = partial(self.folder / line.file).stat().st_size
                self.journal.add(line)

    def _sort_drops(self) -> None:
        self._dropped.sort(key=lambda d: d[0])
        self.drops = [Dropped(name, reason, detail, asked) for _, name, reason, detail, asked in self._dropped]
