"""Shards with the same bytes for the same samples, which appear only once they are complete."""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol, runtime_checkable

from dualenc.data.shards.index import INDEX_NAME, SIDECAR, build_index, load_index
from dualenc.data.shards.listing import ShardIndex, ShardTable
from dualenc.data.shards.reader import REFUSED
from dualenc.data.shards.tar import unsafe
from dualenc.errors import ConfigError, DataError

PATTERN = "{split}-{shard:06d}.tar"
_PARTIAL = ".partial"
_NAME_BYTES = 100
"""Longest member name in a ustar header without a prefix, which every reader supports."""


class ShardWriter:
    """Writes samples into ``split-000000.tar``, ``split-000001.tar``, … of one folder.

    webdataset's writer writes them, with headers free of anything that varies between runs (mtime 0, uid and gid 0, no
    names, mode 644); samples and members are stored in the order given. Until :meth:`close` the shards have hidden
    names; then all of them appear and replaced ones are deleted. An exception inside ``with`` leaves the folder as it
    was.

    Args:
        out_dir: the folder; created if missing.
        pattern: the shards' names, with ``{split}`` and ``{shard:06d}``.
        max_samples, max_bytes: a shard ends before it would hold more (a single sample may be larger).
        overwrite: replace existing shards of the same split.
        complete: so many shards were completed by an earlier writer that was stopped; they keep their hidden names.

    Raises:
        ConfigError: a bad pattern, or shards of this split exist already.
    """

    def __init__(
        self,
        out_dir: str | Path,
        pattern: str = PATTERN,
        max_samples: int = 1000,
        max_bytes: float = 500e6,
        split: str = "train",
        overwrite: bool = False,
        complete: int = 0,
    ) -> None:
        self.out = Path(out_dir)
        self.pattern, self.split = _checked(pattern), safe_split(split)
        self.max_samples, self.max_bytes = max_samples, max_bytes
        self.out.mkdir(parents=True, exist_ok=True)
        self._replaced = self._existing()
        if self._replaced and not overwrite:
            first = self._replaced[0].name
            raise ConfigError(f"{self.out} already holds {first}: choose another folder, or pass overwrite=true")
        self._paths: list[Path] = [self.out / self._name(i) for i in range(complete)]
        for left in self.out.glob("." + self._name("*") + _PARTIAL):
            if left not in {partial(p) for p in self._paths}:
                left.unlink()
        self.samples = 0
        self._file: IO[bytes] | None = None
        self._tar: Any = None
        self._in_shard = self._bytes = 0
        self._last = ""

    def write(self, key: str, members: Mapping[str, bytes]) -> None:
        """Append a sample: ``KEY.ENDING`` for every ending, in the order of ``members``.

        Raises:
            DataError: the key or an ending is not valid in a member name, or a member would hold pickled objects.
        """
        _check_names(key, members)
        if key == self._last:
            raise DataError(f"The key {key!r} is given twice in a row: readers would merge the two samples")
        self._last = key
        if self.is_full_for(members):
            self.end_shard()
        if not self._in_shard:
            self._begin_shard()
        self._append(key, members)
        self._bytes += stored(members)
        self._in_shard += 1
        self.samples += 1

    def is_full_for(self, members: Mapping[str, bytes]) -> bool:
        """Whether these members begin a new shard: a function of the samples before them alone."""
        full = self._in_shard >= self.max_samples or self._bytes + stored(members) > self.max_bytes
        return self._in_shard > 0 and full

    @property
    def shards(self) -> int:
        """Shards begun."""
        return len(self._paths)

    def finished(self, wait: bool = False) -> int:
        """How many shards, from the first, are complete; ``wait`` for those that are still being written."""
        return len(self._paths) - (self._in_shard > 0)

    def close(self, index: bool = True, published: bool = False) -> list[Path]:
        """Give the shards their names and (by default) write the folder's index; return their paths.

        ``published``: an earlier writer may have been stopped while it did so.
        """
        self.end_shard()
        self.finished(wait=True)
        gone = {p.name for p in self._replaced} - {p.name for p in self._paths}
        for path in self._paths:
            if published and path.is_file() and not partial(path).is_file():
                continue
            partial(path).replace(path)
        for path in self._replaced:
            Path(f"{path}{SIDECAR}").unlink(missing_ok=True)
            if path.name in gone:
                path.unlink()
        self._forget(gone)
        if index and self._paths:
            build_index([str(p) for p in self._paths], self.out)
        return self._paths

    def abort(self) -> None:
        """Delete what was written; existing shards stay."""
        self.end_shard()
        self.finished(wait=True)
        for path in self._paths:
            partial(path).unlink(missing_ok=True)
        self._paths = []

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    # --- inside ---------------------------------------------------------------------------------------------------

    def _begin_shard(self) -> None:
        path = self.out / self._name(len(self._paths))
        self._paths.append(path)
        self._open(partial(path))

    def end_shard(self) -> None:
        """End the shard that is being written, if there is one; the next sample begins another."""
        if self._in_shard:
            self._close()
        self._in_shard = self._bytes = 0

    def _open(self, path: Path) -> None:
        self._file = path.open("wb")
        self._tar = tar_writer(self._file)

    def _append(self, key: str, members: Mapping[str, bytes]) -> None:
        for ending, raw in members.items():
            # One call per member: webdataset would sort a sample's endings, and their order is kept here.
            self._tar.write({"__key__": key, ending: raw})

    def _close(self) -> None:
        self._tar.close()
        if self._file is not None:
            self._file.close()
        self._file = self._tar = None

    def _name(self, shard: int | str) -> str:
        if isinstance(shard, int):
            return self.pattern.format(split=self.split, shard=shard)
        return re.sub(r"\{shard[^}]*\}", shard, self.pattern).format(split=self.split)

    def _existing(self) -> list[Path]:
        number = re.compile(re.escape(self._name("\0")).replace(re.escape("\0"), r"\d+"))
        return sorted(p for p in self.out.iterdir() if number.fullmatch(p.name))

    def _forget(self, names: set[str]) -> None:
        """Remove deleted shards from the index."""
        path = self.out / INDEX_NAME
        if not names or not path.is_file():
            return
        index = load_index(str(path))
        kept = ShardTable(asdict(s) for s in index.shards if s.url not in names)
        ShardIndex(kept).write(path)


def tar_writer(file: IO[bytes]) -> Any:
    """webdataset's writer, with headers free of anything that varies between runs."""
    from webdataset import TarWriter

    return TarWriter(file, user="", group="", mode=0o644, encoder=False, keep_meta=True, mtime=0)


def stored(members: Mapping[str, bytes]) -> int:
    """Bytes of a sample in a tar: each member has a header and is filled up to a multiple of 512."""
    sizes = members.lengths() if isinstance(members, HasLengths) else map(len, members.values())
    return sum(512 + -(-n // 512) * 512 for n in sizes)


@runtime_checkable
class HasLengths(Protocol):
    """Members whose bytes are not here, but whose lengths are known."""

    def lengths(self) -> Iterable[int]:
        """Bytes of each member."""
        ...


def safe_split(split: str) -> str:
    """A split's name as part of a file name.

    Raises:
        ConfigError: for anything but letters, digits, ``_``, ``-`` and ``.`` (not as the first character).
    """
    if not re.fullmatch(r"[A-Za-z0-9_\-][A-Za-z0-9_\-.]{0,63}", split):
        raise ConfigError(
            f"split {split!r} cannot be part of a file name: use letters, digits, _ and -, such as 'train'"
        )
    return split


def _checked(pattern: str) -> str:
    fields = [(name, spec) for _, name, spec, _ in string.Formatter().parse(pattern) if name is not None]
    if not pattern.endswith(".tar") or "/" in pattern or {n for n, _ in fields} - {"split"} != {"shard"}:
        raise ConfigError(
            f"pattern {pattern!r}: write a file name with {{shard:06d}} that ends in .tar, such as {PATTERN!r}"
        )
    return pattern


def partial(path: Path) -> Path:
    """The hidden name of a shard until all are complete."""
    return path.with_name(f".{path.name}{_PARTIAL}")


def _check_names(key: str, members: Mapping[str, bytes]) -> None:
    if not key or "." in key.rsplit("/", 1)[-1] or unsafe(key) or not key.isprintable():
        raise DataError(
            f"{key!r} is not a valid key: use no dots (a key ends at the first one), no leading slash and no '..'"
        )
    if not members:
        raise DataError(f"sample {key!r} has no members")
    for ending in members:
        if ending.lower().rsplit(".", 1)[-1] in REFUSED:
            raise DataError(
                f"{key}.{ending}: pickled objects can run code when read; store plain bytes, json or npy instead"
            )
        if not re.fullmatch(r"[a-z0-9_][a-z0-9_.\-]*", ending):
            raise DataError(
                f"{key}.{ending}: an ending may have lower-case letters, digits, '_', '-' and '.', such as 'jpg'"
            )
        if len(f"{key}.{ending}".encode()) > _NAME_BYTES:
            raise DataError(f"{key}.{ending}: the name is longer than {_NAME_BYTES} bytes; shorten the key")
