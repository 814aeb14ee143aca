"""What an ``index.json`` holds, as columns: a million shards take about 100 MB, not several objects each."""

from __future__ import annotations

import codecs
import json
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from dualenc.errors import DataError
from dualenc.files import write_atomically

Ints = NDArray[np.int64]

VERSION = 1
_PIECE = 1 << 20
_ROWS = 4096
_SPACE = re.compile(r"[ \t\n\r]*")


class _Block:
    """Strings on their way into one block of memory."""

    def __init__(self) -> None:
        self._blob, self._ends = bytearray(), array("q", [0])

    def add(self, some: list[str]) -> None:
        """Append strings."""
        joined = "".join(some)
        # File names that are not UTF-8 reach Python as lone surrogates.
        sizes = map(len, some) if joined.isascii() else (len(t.encode("utf-8", "surrogatepass")) for t in some)
        self._ends.extend((len(self._blob) + np.cumsum(np.fromiter(sizes, np.int64, len(some)))).tolist())
        self._blob += joined.encode("utf-8", "surrogatepass")

    def done(self) -> tuple[bytes, Ints]:
        """All bytes, and where each string ends, after a 0."""
        return bytes(self._blob), np.array(self._ends, np.int64)


class Texts(Sequence[str]):
    """Strings in one block of memory. Reading one decodes it; nothing is kept."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, texts: Iterable[str] = ()) -> None:
        block, rest = _Block(), iter(texts)
        while some := list(islice(rest, _ROWS)):
            block.add(some)
        self._blob, self._ends = block.done()

    @classmethod
    def of(cls, block: _Block) -> Texts:
        """The strings that were added to a block."""
        out = cls.__new__(cls)
        out._blob, out._ends = block.done()
        return out

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> list[str]: ...
    def __getitem__(self, i: int | slice) -> str | list[str]:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(f"{i} of {len(self)}")
        i %= len(self)
        return self._blob[self._ends[i] : self._ends[i + 1]].decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        start = 0
        for first in range(1, len(self._ends), _ROWS):
            for end in self._ends[first : first + _ROWS].tolist():
                yield self._blob[start:end].decode("utf-8", "surrogatepass")
                start = end

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Texts):
            return self._blob == other._blob and bool(np.array_equal(self._ends, other._ends))
        if not isinstance(other, list | tuple):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    def __repr__(self) -> str:
        return f"Texts({self[:3]}{', …' if len(self) > 3 else ''}, {len(self)})"

    def find(self, wanted: Iterable[str], count: int) -> Ints:
        """Where each of ``count`` strings is; −1 if it is not here, the last place if it is here several times."""
        if not len(self):
            return np.full(count, -1, np.int64)
        mine = hashes(self, len(self))
        order = np.argsort(mine, kind="stable")
        mine = mine[order]
        out, rest, done = np.full(count, -1, np.int64), iter(wanted), 0
        while some := list(islice(rest, _ROWS)):
            keys = hashes(some, len(some))
            last = np.searchsorted(mine, keys, side="right") - 1
            at = order[np.maximum(last, 0)]
            spans = zip(self._ends[at].tolist(), self._ends[at + 1].tolist(), strict=True)
            for j, (text, (start, stop)) in enumerate(zip(some, spans, strict=True)):
                if self._blob[start:stop] == text.encode("utf-8", "surrogatepass"):
                    out[done + j] = at[j]
                    continue
                k = int(last[j])
                while k >= 0 and mine[k] == keys[j]:  # equal hashes of different strings: one in 10^7 large indexes
                    if self[int(order[k])] == text:
                        out[done + j] = order[k]
                        break
                    k -= 1
            done += len(some)
        return out

    def repeated(self) -> str | None:
        """A string that is here more than once; None if there is none."""
        values, counts = np.unique(hashes(self, len(self)), return_counts=True)
        if len(values) == len(self):
            return None
        suspects, seen = set(values[counts > 1].tolist()), set()
        for text in self:
            if hash(text) in suspects:
                if text in seen:
                    return text
                seen.add(text)
        return None


def hashes(texts: Iterable[str], count: int) -> Ints:
    """Python's hash of each: the same within one process."""
    return np.fromiter(map(hash, texts), np.int64, count)


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """One shard: its URL (or name, in an index beside the shards), samples and bytes.

    ``digest`` is its SHA-256 where that was taken, ``headers`` the digest of its headers (as in its sidecar); None in
    an index of an early version.
    """

    url: str
    samples: int
    bytes: int
    digest: str | None = None
    headers: str | None = None


class ShardTable(Sequence[ShardInfo]):
    """Shards by column: ``urls``, and int64 ``samples`` and ``bytes``. An item is made when it is asked for.

    Args:
        rows: what :class:`ShardInfo` holds, as mappings; a digest may be absent.

    Raises:
        ValueError, KeyError, TypeError, AttributeError, OverflowError: for a row that is not one of a shard.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        texts = {name: _Block() for name in ("url", "digest", "headers")}
        numbers = {name: array("q") for name in ("samples", "bytes")}
        rest = iter(rows)
        while some := list(islice(rest, _ROWS)):
            texts["url"].add([str(r["url"]) for r in some])
            for name in ("digest", "headers"):
                texts[name].add([r.get(name) or "" for r in some])
            for name, column in numbers.items():
                column.extend([int(r[name]) for r in some])
        self.urls, self._digests, self._headers = (Texts.of(t) for t in texts.values())
        self.samples, self.bytes = (np.array(n, np.int64) for n in numbers.values())
        wrong = np.flatnonzero((self.samples < 0) | (self.bytes < 0))
        if len(wrong):
            row = self[int(wrong[0])]
            raise ValueError(f"{row.url} has {row.samples} samples in {row.bytes} bytes")

    def __len__(self) -> int:
        return len(self.urls)

    @overload
    def __getitem__(self, i: int) -> ShardInfo: ...
    @overload
    def __getitem__(self, i: slice) -> list[ShardInfo]: ...
    def __getitem__(self, i: int | slice) -> ShardInfo | list[ShardInfo]:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        return ShardInfo(
            self.urls[i],
            int(self.samples[i]),
            int(self.bytes[i]),
            self._digests[i] or None,
            self._headers[i] or None,
        )


@dataclass(slots=True)
class ShardIndex:
    """What ``index.json`` holds."""

    shards: ShardTable

    @property
    def total(self) -> int:
        """Samples in all shards."""
        return int(self.shards.samples.sum())

    def write(self, path: str | Path) -> None:
        """Write atomically: a reader sees the old index or the new one."""
        rows = [{k: v for k, v in asdict(s).items() if v is not None} for s in self.shards]
        text = json.dumps({"version": VERSION, "shards": rows}, indent=1)
        write_atomically(path, text)


# --- reading -------------------------------------------------------------------------------------------------------


def read_listing(read: Callable[[int], bytes], path: str) -> ShardTable:
    """The shards that an ``index.json`` lists, read a piece at a time.

    Args:
        read: like a file's: at most so many further bytes, none at the end.
        path: for messages.

    Raises:
        DataError: it is not an index, or of a version that this one does not read.
    """
    try:
        text = _Json(read)
        version, table = None, None
        for key in text.entries():
            if key == "shards":
                table = ShardTable(text.items())
            elif key == "version":
                version = text.value()
            else:
                text.value()
        if version is None or table is None:
            raise KeyError("version" if version is None else "shards")
        if version != VERSION:
            raise DataError(f"{path} has version {version}, this version reads {VERSION}.")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as e:
        raise DataError(
            f"{path} is not a shard index ({type(e).__name__}: {e}); write it with: dualenc shards index"
        ) from e
    return table


class _Json:
    """A JSON object whose values are parsed one at a time, so that the text is never held whole."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read, self._decoder = read, json.JSONDecoder()
        self._utf8 = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._at, self._ended = "", 0, False

    def entries(self) -> Iterator[str]:
        """Each key of the object; its value has to be taken before the next one."""
        self._expect("{")
        if self._peek() == "}":
            self._at += 1
        else:
            while True:
                key = self.value()
                if not isinstance(key, str):
                    raise ValueError(f"{key!r} is not a key")
                self._expect(":")
                yield key
                if self._expect(",}") == "}":
                    break
        if self._peek(end=True):
            raise ValueError("there is more after the end of the object")

    def items(self) -> Iterator[Any]:
        """Each value of the array that comes next."""
        self._expect("[")
        if self._peek() == "]":
            self._at += 1
            return
        whole = True
        while True:
            # A piece's rows in one call are three times as fast as one by one; where what ends at the piece's last
            # brace is no sequence of rows, the rest is parsed one by one.
            self._peek()
            end = self._text.rfind("}", self._at) + 1 if whole else 0
            rows: list[Any] = []
            if end:
                try:
                    rows = json.loads(f"[{self._text[self._at : end]}]")
                except json.JSONDecodeError:
                    whole = False
            if rows:
                self._at = end
                yield from rows
            else:
                yield self.value()
            if self._expect(",]") == "]":
                return

    def value(self) -> Any:
        """The value that comes next."""
        self._peek()
        piece = _PIECE
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError:  # perhaps it goes on in the next piece
                if not self._more(piece):
                    raise
            else:
                if end < len(self._text) or not self._more(piece):  # a number at the end may go on, too
                    self._at = end
                    return value
            piece *= 2

    def _expect(self, characters: str) -> str:
        found = self._peek()
        if found not in characters:
            raise ValueError(f"{found!r} where one of {characters!r} belongs")
        self._at += 1
        return found

    def _peek(self, end: bool = False) -> str:
        """The next character that is not space; "" at an expected end."""
        while True:
            match = _SPACE.match(self._text, self._at)
            assert match is not None
            self._at = match.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more(_PIECE):
                if end:
                    return ""
                raise ValueError("it ends early")

    def _more(self, size: int) -> bool:
        if self._ended:
            return False
        raw = self._read(size)
        self._ended = not raw
        self._text, self._at = self._text[self._at :] + self._utf8.decode(raw, final=not raw), 0
        return True
