"""Filters: what gives every sample of some shards a score. A filter decides nothing and rewrites nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from dualenc.config import Section, Source, settings_as
from dualenc.data.modalities import modalities
from dualenc.data.shards.index import ShardSet, expand, open_source
from dualenc.data.shards.reader import Reader, SampleError
from dualenc.data.shards.remote import ShardCache, is_local
from dualenc.data.shards.selection import SCORES, Values, file_of, starts, write_scores
from dualenc.errors import ConfigError, DataError
from dualenc.registry import Registry

if TYPE_CHECKING:
    from dualenc_data_tools.choose.kept_scores import KeptScores

CHUNK = 256
"""Samples handed to a filter at once; chunks begin anew with every shard, so a shard's scores depend on it alone."""
TEXT = tuple(modalities["text"].default_members)
IMAGE = tuple(modalities["image"].default_members)
AUDIO = tuple(modalities["audio"].default_members)

Score = float | str | None
"""None: this sample has no such score."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One sample: its key, the raw values that were read of it by name, and why they could not be read, or ''."""

    key: str
    values: Mapping[str, Any]
    problem: str = ""

    @property
    def captions(self) -> list[str]:
        """The texts of the sample; undecodable bytes are replaced."""
        value = self.values.get("text")
        texts = value if isinstance(value, list) else [] if value is None else [value]
        return [t.decode("utf-8", "replace") if isinstance(t, bytes) else str(t) for t in texts]


class Filter:
    """Base of all filters.

    A subclass has ``Config`` (its settings), ``reads`` (name → member endings, tried in order), and :meth:`score`, a
    pure function of a few rows, so that rows can be scored on any number of machines.
    """

    Config: ClassVar[type[Section]] = Section
    reads: Mapping[str, Sequence[str]] = {"text": TEXT}
    neighbours: ClassVar[bool] = False
    """Whether a sample's score depends on the samples that it is scored with."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def score(self, rows: Sequence[Candidate]) -> dict[str, list[Score]]:
        """Name of a score → its value for every row."""
        raise NotImplementedError

    def finish(self, values: dict[str, Values]) -> dict[str, Values]:
        """From the scores of all samples to those that are kept; default: as they are."""
        return values


filters: Registry[type[Filter]] = Registry("filter", "dualenc.filters", base=Filter)
"""Name → class."""


@dataclass
class Opened:
    """Shards that are open for choosing among their samples."""

    shards: ShardSet
    reader: Reader
    _cache: ShardCache | None

    @classmethod
    def of(cls, patterns: str | Sequence[str]) -> Opened:
        """Open shards.

        Raises:
            DataError: as :func:`dualenc.data.shards.index.open_source`.
        """
        shards = open_source(Source(name="shards", shards=list(expand(patterns))))
        cache = None if all(is_local(u) for u in shards.urls) else ShardCache.temporary(50.0, 3)
        return cls(shards, Reader([shards], cache, 3), cache)

    @property
    def total(self) -> int:
        """Samples of all shards."""
        return sum(self.shards.counts)

    def index_of(self, shard: int) -> Any:
        """The index of a shard. Raises DataError: it cannot be read."""
        try:
            return self.reader.index(0, shard)
        except SampleError as e:
            raise DataError(f"{self.shards.urls[shard]}: {e}") from e

    def rows(self, shard: int, reads: Mapping[str, Sequence[str]]) -> Iterator[list[Candidate]]:
        """The samples of a shard in stored order, ``CHUNK`` at a time."""
        count = self.shards.infos[shard].samples
        for start in range(0, count, CHUNK):
            yield [self.row(shard, i, reads) for i in range(start, min(start + CHUNK, count))]

    def row(self, shard: int, i: int, reads: Mapping[str, Sequence[str]]) -> Candidate:
        """One sample; what cannot be read is told in it."""
        key = f"{self.shards.names[shard]}/#{i}"
        try:
            sample = self.reader.locate(0, shard, i)
            key = f"{self.shards.names[shard]}/{sample.key}"
            return Candidate(key, self.reader.find(0, shard, sample, reads).values)
        except SampleError as e:
            return Candidate(key, {}, str(e))

    def key(self, line: int) -> str:
        """Shard and key of a sample by its number among all."""
        shard = int(np.searchsorted(starts(self.shards), line, side="right")) - 1
        return f"{self.shards.names[shard]}/{self.index_of(shard).key(line - int(starts(self.shards)[shard]))}"

    def close(self) -> None:
        """Close files, remove what was fetched."""
        self.reader.close()
        if self._cache is not None:
            self._cache.remove()


def build_filter(name: str, settings: Mapping[str, Any] | None = None) -> Filter:
    """A filter by name.

    Raises:
        ConfigError: no such filter, an unknown setting (with the nearest).
    """
    kind = filters[name]
    return kind(settings_as(kind.Config, dict(settings or {}), name))


def score_rows(name: str, filter: Filter, opened: Opened) -> tuple[dict[str, Values], KeptScores]:
    """The scores of every sample, name → values in stored order; a row's problem leaves it without a score.

    Each shard's are kept once it is done, for a run that is stopped; the caller removes what is kept.
    """
    from dualenc_data_tools.choose.kept_scores import KeptScores

    parts: dict[str, list[Score]] = {}
    kept, done = KeptScores(name, filter, opened), 0
    for shard in range(len(opened.shards.names)):
        scores = kept.done(shard)
        if scores is None:
            scores = {}
            for rows in opened.rows(shard, filter.reads):
                for n, values in filter.score(rows).items():
                    scores.setdefault(n, []).extend(values)
            kept.add(shard, scores)
        for n, values in scores.items():
            parts.setdefault(n, [None] * done).extend(values)
        done += int(opened.shards.infos[shard].samples)
    return filter.finish({n: as_values(v) for n, v in parts.items()}), kept


def as_values(scores: Sequence[Score]) -> Values:
    """Scores as an array: float64 with NaN, or texts."""
    if any(isinstance(s, str) for s in scores):
        return np.array([None if s is None else str(s) for s in scores], object)
    return np.array([np.nan if s is None else float(s) for s in scores], np.float64)


def run_filters(
    patterns: str | Sequence[str], names: Sequence[str], settings: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, tuple[str, Values]]:
    """Run filters over shards and write their scores beside them; a stopped run resumes after the shards it has done.

    Returns:
        Name of a score → (its file, its values).

    Raises:
        ConfigError: as :func:`build_filter`; settings of a filter that is not run.
        DataError: shards that cannot be opened, scores that cannot be written.
    """
    stray = [n for n in settings or {} if n not in names]
    if stray:
        raise ConfigError(f"--set {stray[0]}.…: {stray[0]!r} is not run; add --with {stray[0]}")
    built = {n: build_filter(n, (settings or {}).get(n)) for n in names}
    opened = Opened.of(patterns)
    out: dict[str, tuple[str, Values]] = {}
    try:
        for n, filter in built.items():
            about = f"{n} {filter.config.model_dump_json()}"
            scores, kept = score_rows(n, filter, opened)
            for name, values in scores.items():
                path = file_of(name, opened.shards, SCORES)
                write_scores(Path(path), opened.shards, opened.index_of, values, about)
                out[name] = (path, values)
            kept.remove()
    finally:
        opened.close()
    return out
