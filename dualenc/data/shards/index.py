"""Shards and their index: how many samples and bytes each shard has, and where every sample is.

``index.json`` is stored beside the shards and lists samples and bytes of each; ``NAME.tar.idx.npz`` beside it holds the
offsets of one shard's members. Local shards without an index are indexed in memory; shards behind ``pipe:``, http(s) or
s3 need a written one (``dualenc shards index``), because counting them means reading them whole.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import compress
from pathlib import Path

import numpy as np

from dualenc.config import Data, Source
from dualenc.data.order import Plan, Refs
from dualenc.data.plans import plan_for
from dualenc.data.selected_order import Chosen, SelectedOrder
from dualenc.data.shards.kept_values import KeptValues, depend_on_scores, names_in
from dualenc.data.shards.listing import Ints, ShardIndex, ShardInfo, ShardTable, Texts, read_listing
from dualenc.data.shards.names import expand, hash_of, short_names
from dualenc.data.shards.remote import Bounds, ShardCache, fetch_bytes, filesystem, is_local, is_pipe, local_path
from dualenc.data.shards.selection import read_chosen
from dualenc.data.shards.tar import TarIndex, ends_properly, index_tar
from dualenc.errors import ConfigError, DataError, did_you_mean
from dualenc.files import write_atomically

__all__ = [
    "Plan",
    "Refs",
    "ShardIndex",
    "ShardInfo",
    "ShardSet",
    "build_index",
    "build_plan",
    "expand",
    "index_file",
    "load_index",
    "open_source",
    "refuse_pipes",
    "samples_per_pass",
    "short_names",
]

logger = logging.getLogger(__name__)

INDEX_NAME = "index.json"
SIDECAR = ".idx.npz"

Progress = Callable[[int, int], None]
"""Called with (done, total) shards."""


@dataclass(slots=True)
class ShardSet:
    """The shards of one source, ready to be read: ``urls[i]`` has ``infos[i]`` and the short name ``names[i]``.

    ``folders[folder_of[i]]`` is where its sidecar is kept, or would be (−1: nowhere); ``memory`` holds the places of
    members that were found in this process. ``remote``: whether a shard is not a file on this machine.
    """

    source: str
    urls: Texts
    names: Texts
    infos: ShardTable
    folders: list[str]
    folder_of: Ints
    memory: dict[int, TarIndex]
    remote: bool
    chosen: Chosen | None = None
    """What the source's selection selects; None: every sample."""
    scores: dict[str, KeptValues] = field(default_factory=dict)

    def score(self, name: str) -> KeptValues:
        """The values of NAME.scores.parquet, read once. Raises as :meth:`KeptValues.read`."""
        if name not in self.scores:
            self.scores[name] = KeptValues.read(name, self)
        return self.scores[name]

    @property
    def drawn(self) -> int:
        """Samples that training reads: those selected, or all."""
        return self.total if self.chosen is None else max(1, len(self.chosen))

    @property
    def counts(self) -> list[int]:
        """Samples of each shard."""
        return [int(n) for n in self.infos.samples]

    @property
    def total(self) -> int:
        """Samples in all shards."""
        return int(self.infos.samples.sum())

    @property
    def bytes(self) -> int:
        """Bytes of all shards."""
        return int(self.infos.bytes.sum())

    def sidecar(self, i: int) -> str | None:
        """Where the places of a shard's members are kept, or would be."""
        folder = int(self.folder_of[i])
        return None if folder < 0 else f"{self.folders[folder]}{sidecar_name(self.infos.urls[i])}"


# --- reading an index --------------------------------------------------------------------------------------------


def index_file(url: str) -> str:
    """Where the index of a shard is looked for by default: ``index.json`` in its folder."""
    return url.split("?")[0].rsplit("/", 1)[0] + "/" + INDEX_NAME if "/" in url else INDEX_NAME


def load_index(path: str, retries: int = 3, bounds: Bounds | None = None) -> ShardIndex:
    """Read an ``index.json`` (local path or URL).

    Raises:
        DataError: if it is not there or not an index.
    """
    if is_local(path):
        if not Path(local_path(path)).is_file():
            raise DataError(f"There is no shard index {path}; write one with: dualenc shards index")
        with open(local_path(path), "rb") as f:
            return ShardIndex(read_listing(f.read, path))
    return ShardIndex(read_listing(io.BytesIO(fetch_bytes(path, retries, bounds=bounds)).read, path))


def refuse_pipes(shards: str | Sequence[str], allow: bool, setting: str) -> None:
    """Refuse ``pipe:`` shards unless they are allowed: reading them runs the shell command in the file.

    Raises:
        ConfigError: showing the command, and the setting that allows it.
    """
    pipe = next((u for u in ([shards] if isinstance(shards, str) else shards) if is_pipe(u.strip())), None)
    if pipe is not None and not allow:
        raise ConfigError(f"Reading {pipe.strip()!r} would run that command in a shell; to allow it, write {setting}.")


def open_sources(data: Data) -> list[ShardSet]:
    """All sources of a recipe's ``data`` section.

    Raises:
        ConfigError: for ``pipe:`` shards without ``allow_pipe``.
        DataError: as :func:`open_source`; a selection is missing, or its shards have changed.
    """
    for source in data.sources:
        refuse_pipes(source.shards, data.allow_pipe, "data.allow_pipe=true (or add --allow-pipe)")
    sets = [open_source(s, data.retries, bounds=Bounds.of(data)) for s in data.sources]
    for source, opened in zip(data.sources, sets, strict=True):
        if source.selection is not None:
            opened.chosen = read_chosen(source.selection, opened, data.retries, Bounds.of(data))
        opened.scores = {n: KeptValues.read(n, opened) for n in names_in(source)}  # once, for all workers
    return sets


def open_source(source: Source, retries: int = 3, scan_remote: bool = False, bounds: Bounds | None = None) -> ShardSet:
    """Find the shards of a source and their counts.

    ``scan_remote``: read the headers of remote shards that are in no index by byte ranges, as evaluation does, instead
    of asking for an index.

    Raises:
        DataError: for a missing shard or index, an empty shard, a file that is no tar or does not match its index.
    """
    urls = Texts(expand(source.shards))
    listed = _listed(source, urls, retries, bounds)
    names = short_names(urls)
    unindexed = [urls[int(i)] for i in np.flatnonzero(listed.row < 0)]
    _refuse_unindexed(source, urls, unindexed, scan_remote)
    memory: dict[int, TarIndex] = {}
    sizes = listed.bytes()
    remote = False
    for i, url in enumerate(urls):
        local, known = is_local(url), listed.row[i] >= 0
        remote = remote or not local
        if local:
            size = _local_size(url)
            if known and sizes[i] != size:
                change = "was cut short or replaced" if size < sizes[i] else "was changed or replaced"
                raise DataError(
                    f"Source {source.name!r}: {url} has {size:,} bytes and its index says {sizes[i]:,}, so it "
                    f"{change} after it was indexed. Copy it again; if the change is intended, run: "
                    f"dualenc shards index '{url}'"
                )
        if not known:
            memory[i] = index_local(url) if local else index_remote(url)
            _say_scattered(memory[i], url)
    infos = listed.infos(memory, urls)
    empty = np.flatnonzero(infos.samples <= 0)
    if len(empty):
        raise DataError(f"{urls[int(empty[0])]} holds no samples: leave it out of source {source.name!r}.")
    return ShardSet(source.name, urls, names, infos, listed.folders, listed.file, memory, remote)


def _refuse_unindexed(source: Source, urls: Texts, unindexed: list[str], scan_remote: bool) -> None:
    """Remote shards that no index lists, unless their headers are to be read; a line for local ones."""
    remote = [u for u in unindexed if is_pipe(u) or not (is_local(u) or scan_remote)]
    if remote:
        raise DataError(
            f"Source {source.name!r}: {remote[0]} is not indexed, and counting remote shards means reading them whole; "
            f"run once: dualenc shards index '{source.shards if isinstance(source.shards, str) else urls[0]}', "
            "and name the file it writes as `index`."
        )
    if unindexed and not scan_remote:
        logger.info(
            "Source %r: %d of %d shards are not indexed; reading their headers (dualenc shards index saves this).",
            source.name,
            len(unindexed),
            len(urls),
        )


def build_plan(data: Data, sets: Sequence[ShardSet], seed: int) -> Plan:
    """The order of a recipe's ``data`` section over opened sources, of which some may have a selection.

    Raises:
        ConfigError: a plan of a plugin that is no ``Plan`` cannot take a selection, or values of scores.
        DataError: a selection is empty.
    """
    plan = plan_for(
        data.sampling,
        [s.source for s in sets],
        [s.infos.samples for s in sets],
        seed,
        weights=[s.weight for s in data.sources],
        lanes=data.lanes,
        window=window_of(data, sets),
    )
    for i, s in enumerate(sets):
        depend_on_scores(plan, i, s.scores)
        if s.chosen is None:
            continue
        if not isinstance(plan, Plan):
            raise ConfigError(f"data.sources.{i}.selection: the plan {data.sampling!r} derives from no dualenc Plan")
        replace = plan.sources[i].replace
        order = SelectedOrder(s.source, s.chosen, seed, replace, data.lanes, window_of(data, sets))
        plan.reorder(i, order)
    return plan


_WINDOW = 1_000_000
_OF_CACHE = 0.8


def window_of(data: Data, sets: Sequence[ShardSet]) -> int:
    """``data.window``; ``auto`` is the default, or less if the shards that it spans would fill over 80 % of the cache.

    A pure function of the recipe and the indexes, as the order is.
    """
    if data.window != "auto":
        return data.window
    remote = [s for s in sets if s.remote]
    room = data.cache_gb * 1e9 * _OF_CACHE
    if sum(s.bytes for s in remote) <= room:
        return _WINDOW
    shard, sample = 0.0, 0.0
    for s in remote:
        shard, sample = shard + s.bytes / len(s.infos), sample + s.bytes / s.drawn
    return max(1, min(_WINDOW, int((room - shard) / sample / data.lanes)))


def fits(shards: ShardSet, span: int, max_bytes: int) -> bool:
    """Whether the shards that ``span`` samples, read in random order, are in fit into the cache; if not, they are read
    by byte range."""
    total, samples = shards.bytes, shards.drawn
    return min(total, total / samples * span + total / len(shards.infos)) <= max_bytes


def how_read(data: Data, sets: Sequence[ShardSet]) -> list[str]:
    """A line for each source with remote shards: how they are read, and what to write for whole shards."""
    lines = []
    window = window_of(data, sets)
    for s in sets:
        if not s.remote or all(is_local(u) or is_pipe(u) for u in s.urls):
            continue
        total = s.bytes
        about = f"Source {s.source!r}: {len(s.urls)} remote shards, {total / 1e9:.3g} GB: "
        if fits(s, window * data.lanes, int(data.cache_gb * 1e9)):
            lines.append(
                f"{about}whole shards are fetched into the cache (data.cache_gb={data.cache_gb:g}), window {window:,}, "
                f"lanes {data.lanes}"
            )
            continue
        auto = window_of(data.model_copy(update={"window": "auto"}), sets)
        lines.append(
            f"{about}a window of {window:,} samples in {data.lanes} lane(s) spans more than the cache "
            f"(data.cache_gb={data.cache_gb:g}), so samples are fetched by byte range; data.window=auto ({auto:,}) or "
            f"data.cache_gb={total / 1e9 * 1.1:.3g} reads whole shards"
        )
    return lines


def samples_per_pass(data: Data) -> int:
    """Samples of an epoch of all sources, read from their indexes and selections; nothing else is opened.

    Raises:
        ConfigError, DataError: as :func:`open_sources` and :func:`build_plan`.
    """
    return build_plan(data, open_sources(data), seed=0).samples_per_pass


def index_local(url: str, contents: bool = False) -> TarIndex:
    """Index a tar on this machine by reading its headers; ``contents``: also take a checksum of every member.

    Raises:
        DataError: missing, not a tar, cut short, or without samples.
    """
    size = _local_size(url)
    fd = os.open(local_path(url), os.O_RDONLY)

    def read_at(at: int, n: int) -> bytes:
        return os.pread(fd, n, at)

    try:
        index = index_tar(read_at, size, url)
        if not ends_properly(read_at, size):
            logger.warning("%s has no end-of-archive mark: it was cut short, or its writer was stopped.", url)
        if contents:
            index.read_contents(read_at)
        return index
    finally:
        os.close(fd)


def index_remote(url: str) -> TarIndex:
    """Index a tar behind a URL by reading its headers by byte ranges.

    Raises:
        DataError: there is nothing, the server does not support byte ranges, or it is not a complete tar.
    """
    fs, path = filesystem(url)
    try:
        with fs.open(path, "rb") as f:
            size = f.seek(0, os.SEEK_END)

            def read_at(at: int, n: int) -> bytes:
                f.seek(at)
                raw: bytes = f.read(n)
                return raw

            return index_tar(read_at, size, url)
    except FileNotFoundError as e:
        raise DataError(f"There is no shard {url}.") from e
    except DataError:
        raise
    except Exception as e:
        # Errors of aiohttp, botocore and fsspec share no base class; whatever it was, the shard could not be read.
        raise DataError(f"Cannot read {url} by byte ranges: {type(e).__name__}: {e}") from e


def _say_scattered(index: TarIndex, where: str) -> None:
    """Warn of samples that are split: each part is read as a separate sample that lacks the other parts' members."""
    keys = index.scattered()
    if keys:
        logger.warning(
            "%s: the members of %d keys (%s, …) are not adjacent, so each part is read as a sample of "
            "its own; pack the shard again with members of one sample together.",
            where,
            len(keys),
            keys[0],
        )


def _local_size(url: str) -> int:
    try:
        found = os.stat(local_path(url))
    except (FileNotFoundError, NotADirectoryError):
        found = None
    if found is None or not stat.S_ISREG(found.st_mode):
        path = Path(local_path(url))
        near = did_you_mean(path.name, [p.name for p in path.parent.glob("*.tar")]) if path.parent.is_dir() else ""
        raise DataError(f"There is no shard {url}. {near if near.startswith('Did') else ''}".strip())
    if found.st_size == 0:
        raise DataError(f"{url} is an empty file, not a tar.")
    return found.st_size


@dataclass(slots=True)
class _Listed:
    """Which row of which index each shard has: ``file[i]`` and ``row[i]``, −1 if none lists it."""

    tables: list[ShardTable]
    folders: list[str]
    file: Ints
    row: Ints

    def bytes(self) -> Ints:
        """Bytes by shard, as its index says."""
        out = np.zeros(len(self.row), np.int64)
        for k, table in enumerate(self.tables):
            here = self.file == k
            out[here] = table.bytes[self.row[here]]
        return out

    def infos(self, found: Mapping[int, TarIndex], urls: Texts) -> ShardTable:
        """All shards: from the indexes, and those that were ``found`` by reading their headers."""
        if len(self.tables) == 1 and not found:
            (table,) = self.tables
            if len(table) == len(self.row) and bool((np.diff(self.row) == 1).all()):
                return table
        return ShardTable(
            asdict(self.tables[f][r])
            if f >= 0
            else {"url": urls[i], "samples": len(found[i]), "bytes": found[i].tar_bytes}
            for i, (f, r) in enumerate(zip(self.file.tolist(), self.row.tolist(), strict=True))
        )


def _listed(source: Source, urls: Texts, retries: int, bounds: Bounds | None) -> _Listed:
    """The rows of the shards in the source's index, or in the indexes beside them."""
    files = [source.index] if source.index else list(dict.fromkeys(index_file(u) for u in urls if not is_pipe(u)))
    out = _Listed([], [], np.full(len(urls), -1, np.int64), np.full(len(urls), -1, np.int64))
    for file in files:
        if not source.index and is_local(file) and not Path(local_path(file)).is_file():
            continue
        try:
            index = load_index(file, retries, bounds)
        except FileNotFoundError as e:
            if source.index:
                raise DataError(f"Source {source.name!r}: there is no index {file}.") from e
            continue
        folder = file.split("?")[0][: file.rfind("/") + 1]
        rows = _rows_of(urls, index.shards.urls, folder, any_folder=source.index is not None)
        out.row[rows >= 0], out.file[rows >= 0] = rows[rows >= 0], len(out.tables)
        out.tables.append(index.shards)
        out.folders.append(folder)
    return out


def _rows_of(urls: Texts, listed: Texts, folder: str, any_folder: bool) -> Ints:
    """Where each URL is listed: as it is, without the index's folder or, with ``any_folder``, by its base name (an
    index written elsewhere has the shards' names from there); −1: nowhere."""
    names = Texts(u.removeprefix(folder) for u in urls)
    bases = Texts(u.split("?")[0].rsplit("/", 1)[-1] for u in urls)
    # The usual case, without a look-up: the index lists the shards by name, in this order. It lists no path, so
    # nothing longer than a name is in it.
    if listed == bases and (any_folder or names == bases) and not any("/" in n for n in listed):
        return np.arange(len(urls))
    rows = listed.find(urls, len(urls))
    for shorter in (names, bases) if any_folder else (names,):
        rest = rows < 0
        if rest.any():
            rows[rest] = listed.find(compress(shorter, rest.tolist()), int(rest.sum()))
    return rows


# --- writing an index --------------------------------------------------------------------------------------------


def build_index(
    urls: Iterable[str],
    folder: str | Path | None = None,
    digests: bool = False,
    contents: bool = True,
    progress: Progress | None = None,
    cache: ShardCache | None = None,
    retries: int = 3,
) -> Path:
    """Write ``index.json`` and a sidecar for each shard; return the path of the index.

    Args:
        urls: shards, already expanded.
        folder: where to write; default: the shards' own folder (they must be local and in one folder).
        digests: also take the SHA-256 of every shard (reads them whole).
        contents: also take a checksum of every member, which training checks as it reads (reads the shards whole).
        cache: where remote shards are kept while they are read; default: a temporary folder.

    Shards that the folder's index already lists and that are not in ``urls`` stay listed.

    Raises:
        DataError: for a missing, empty or broken shard, or if ``folder`` is needed and not given.
    """
    urls = list(urls)
    folders = {os.path.dirname(local_path(u)) or "." for u in urls if is_local(u)}
    if folder is None and (len(folders) != 1 or not all(is_local(u) for u in urls)):
        raise DataError("Say where to write the index: the shards are remote or in several folders.")
    out = Path(folder if folder is not None else folders.pop())
    out.mkdir(parents=True, exist_ok=True)
    target = out / INDEX_NAME
    rows = {r.url: r for r in load_index(str(target)).shards} if target.is_file() else {}
    own_cache = None
    if cache is None and not all(is_local(u) for u in urls):
        cache = own_cache = ShardCache.temporary(50.0, retries)
    try:
        for done, url in enumerate(urls):
            path = local_path(url) if is_local(url) else str(cache.get(url))  # type: ignore[union-attr]
            index = index_local(path, contents)
            _say_scattered(index, url)
            beside = is_local(url) and os.path.abspath(os.path.dirname(path) or ".") == str(out.resolve())
            name = os.path.basename(path) if beside else url
            digest = _sha256(path) if digests else None
            write_atomically(out / sidecar_name(name), index.to_bytes())
            rows[name] = ShardInfo(name, len(index), index.tar_bytes, digest, index.digest)
            if progress is not None:
                progress(done + 1, len(urls))
    finally:
        if own_cache is not None:
            own_cache.remove()
    ShardIndex(ShardTable(map(asdict, rows.values()))).write(target)
    return target


def sidecar_name(url: str) -> str:
    """File name of a shard's sidecar; shards from elsewhere get a hash, as base names may collide."""
    base = url.split("?")[0].rsplit("/", 1)[-1]
    if is_pipe(url):
        return f"pipe-{hash_of(url)}{SIDECAR}"
    return f"{base}{SIDECAR}" if "/" not in url else f"{base}-{hash_of(url)}{SIDECAR}"


def _sha256(path: str) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
