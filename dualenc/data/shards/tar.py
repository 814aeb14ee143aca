"""Where every sample of a tar shard lies, so that one sample can be read by seeking.

The headers of a tar are read one by one, skipping the data between them; members are grouped into samples as
webdataset groups them: the key is the path up to the first dot of its base name, the rest is the ending (lower case),
and consecutive members of one key are one sample. A second member with the same key and ending begins a new sample.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dualenc.errors import DataError

BLOCK = 512
_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$", re.DOTALL)
_META = re.compile(r"__[^/]*__($|/)")
_REGULAR = b"0\0007"
_MAX_HEADER = 1 << 20
_FORMAT = 1

ReadAt = Callable[[int, int], bytes]
"""(offset, size) → up to size bytes."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample's place: its key and, by ending, (offset, size) of the member's data in the tar."""

    key: str
    members: dict[str, tuple[int, int]]


class TarIndex:
    """All samples of one shard, in a few flat arrays (about 40 bytes a sample).

    Attributes:
        tar_bytes: size of the tar this was made from; another size means the index is stale.
        offset, size: [members] place of each member's data.
        ending: [members] which of ``endings``.
        first: [samples + 1] the members of sample i are ``first[i] : first[i + 1]``.
    """

    def __init__(self, tar_bytes: int, endings: list[str], arrays: dict[str, NDArray[Any]]) -> None:
        self.tar_bytes = tar_bytes
        self.endings = endings
        self.offset, self.size = arrays["offset"], arrays["size"]
        self.ending, self.first = arrays["ending"], arrays["first"]
        self.key_end, self.keys = arrays["key_end"], arrays["keys"]

    def __len__(self) -> int:
        return len(self.first) - 1

    @property
    def nbytes(self) -> int:
        """Memory held."""
        arrays = (self.offset, self.size, self.ending, self.first, self.key_end, self.keys)
        return sum(a.nbytes for a in arrays)

    def key(self, i: int) -> str:
        """Key of sample i."""
        start = int(self.key_end[i - 1]) if i else 0
        return self.keys[start : int(self.key_end[i])].tobytes().decode("utf-8", "surrogateescape")

    def sample(self, i: int) -> Sample:
        """Key and members of sample i."""
        a, b = int(self.first[i]), int(self.first[i + 1])
        rows = zip(self.ending[a:b].tolist(), self.offset[a:b].tolist(), self.size[a:b].tolist(), strict=True)
        return Sample(self.key(i), {self.endings[e]: (o, s) for e, o, s in rows})

    def to_bytes(self) -> bytes:
        """As a NumPy ``.npz`` (arrays only, never pickled objects)."""
        out = io.BytesIO()
        np.savez_compressed(
            out,
            header=np.array([_FORMAT, self.tar_bytes], np.int64),
            endings=np.frombuffer("\n".join(self.endings).encode("utf-8", "surrogateescape"), np.uint8),
            offset=self.offset,
            size=self.size,
            ending=self.ending,
            first=self.first,
            key_end=self.key_end,
            keys=self.keys,
        )
        return out.getvalue()

    @classmethod
    def from_bytes(cls, raw: bytes, where: str) -> TarIndex:
        """Read what :meth:`to_bytes` wrote.

        Raises:
            DataError: if it is damaged or of another format.
        """
        try:
            with np.load(io.BytesIO(raw), allow_pickle=False) as f:
                version, tar_bytes = (int(v) for v in f["header"])
                arrays = {k: f[k] for k in ("offset", "size", "ending", "first", "key_end", "keys")}
                text = f["endings"].tobytes().decode("utf-8", "surrogateescape")
        except (ValueError, KeyError, OSError, EOFError) as e:
            raise DataError(f"{where} is damaged ({e}); write it anew with: dualenc shards index") from e
        except Exception as e:
            # zipfile.BadZipFile and zlib.error share no base class below Exception.
            if type(e).__module__ not in ("zipfile", "zlib"):
                raise
            raise DataError(f"{where} is damaged ({e}); write it anew with: dualenc shards index") from e
        if version != _FORMAT:
            raise DataError(f"{where} has format {version}, this version reads {_FORMAT}: run dualenc shards index")
        return cls(tar_bytes, text.split("\n") if text else [], arrays)


def index_tar(read_at: ReadAt, total: int, where: str) -> TarIndex:
    """Make the index of a tar of ``total`` bytes by reading its headers.

    Raises:
        DataError: if it is not a tar, is cut short, or holds no sample.
    """
    offsets: list[int] = []
    sizes: list[int] = []
    kinds: list[int] = []
    first: list[int] = []
    keys: list[bytes] = []
    endings: dict[str, int] = {}
    key: str | None = None
    seen: set[str] = set()
    for name, offset, size in tar_members(read_at, total, where):
        match = _NAME.match(name)
        if match is None or _META.match(name):
            continue
        base, ending = match.group(1), match.group(2).lower()
        if base != key or ending in seen:
            key, seen = base, set()
            first.append(len(offsets))
            keys.append(base.encode("utf-8", "surrogateescape"))
        seen.add(ending)
        offsets.append(offset)
        sizes.append(size)
        kinds.append(endings.setdefault(ending, len(endings)))
    if not keys:
        raise DataError(f"{where} holds no sample: every shard needs at least one KEY.ENDING member.")
    arrays: dict[str, NDArray[Any]] = {
        "offset": np.array(offsets, np.int64),
        "size": np.array(sizes, np.int64),
        "ending": np.array(kinds, np.uint32),
        "first": np.array([*first, len(offsets)], np.int64),
        "key_end": np.cumsum([len(k) for k in keys], dtype=np.int64),
        "keys": np.frombuffer(b"".join(keys), np.uint8),
    }
    return TarIndex(total, list(endings), arrays)


def tar_members(read_at: ReadAt, total: int, where: str) -> Iterator[tuple[str, int, int]]:
    """Name, data offset and size of every regular member (ustar, GNU long names, pax).

    Raises:
        DataError: for a broken header, or when a member reaches beyond the end.
    """
    at = 0
    long_name: str | None = None
    pax: dict[str, str] = {}
    while at < total:
        head = read_at(at, BLOCK)
        if len(head) == BLOCK and not head.strip(b"\0"):
            break
        kind, name, size = _parse_header(head, at, where)
        data = at + BLOCK
        if kind in b"LKxgX":
            if size > _MAX_HEADER or data + size > total:
                raise DataError(f"{where} has a broken header at byte {at}: it is no tar, or damaged.")
            body = read_at(data, size)
            if kind == b"L":
                long_name = _text(body)
            elif kind in b"xX":
                pax = _parse_pax(body, at, where)
            at = data + _padded(size)
            continue
        name = pax.get("path", long_name if long_name is not None else name)
        if "size" in pax:
            if not pax["size"].isdigit():
                raise DataError(f"{where} has a broken pax header in front of byte {at}.")
            size = int(pax["size"])
        if kind == b"S" or "GNU.sparse.major" in pax:
            raise DataError(f"{where}: member {name!r} is a sparse file, which shards cannot hold; pack it again.")
        if kind in b"123456":
            size = 0
        if data + size > total:
            raise DataError(f"{where} is cut short: member {name!r} reaches to byte {data + size} of {total}.")
        if kind in _REGULAR and not (kind == b"\0" and name.endswith("/")):
            yield name, data, size
        long_name, pax = None, {}
        at = data + _padded(size)


def check_member(block: bytes, name: str, size: int, where: str) -> bytes:
    """Check that the 512-byte header in front of a member is that member's; return the data behind it.

    Tars are padded to multiples of 10 KiB, so a rewritten shard often has the size of the old one: only the
    header tells that the index still fits. Costs one comparison of two short fields.

    Raises:
        DataError: if the index is stale.
    """
    field = block[:100].split(b"\0", 1)[0].decode("utf-8", "surrogateescape").lower()
    full = name.lower()
    digits = block[124:136].strip(b"\0 ")
    same_size = bool(block[124] & 0x80) or (digits.isdigit() and int(digits, 8) in (size, 0))
    # ustar splits a long name into prefix and tail, GNU and pax leave its first 100 bytes; pax writers may put other
    # bytes for letters beyond ASCII, so such names are not compared.
    same_name = not full.isascii() or full.endswith(field) or full.startswith(field[:90])
    if len(block) < BLOCK + size or not same_size or not same_name:
        raise DataError(
            f"The index of {where} is stale: {name!r} is not where it says; write it anew with: dualenc shards index"
        )
    return block[BLOCK : BLOCK + size]


def unsafe(key: str) -> bool:
    """Whether a key is an absolute path or climbs out of its folder; such samples are refused."""
    return key.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", key)


def _padded(size: int) -> int:
    return (size + BLOCK - 1) // BLOCK * BLOCK


def _text(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _parse_header(head: bytes, at: int, where: str) -> tuple[bytes, str, int]:
    """Type, name and size of one header block, after checking its sum."""
    try:
        if len(head) < BLOCK:
            raise ValueError("short block")
        stated = int(head[148:156].strip(b"\0 "), 8)
        actual = sum(head) - sum(head[148:156]) + 8 * 32
        if stated != actual:
            raise ValueError("wrong checksum")
        raw = head[124:136]
        size = int.from_bytes(raw[1:], "big") if raw[0] & 0x80 else int(raw.strip(b"\0 ") or b"0", 8)
    except ValueError as e:
        what = "is not a tar" if at == 0 else f"is damaged or cut short at byte {at}"
        raise DataError(f"{where} {what}: no valid header there.") from e
    name = _text(head[:100])
    prefix = _text(head[345:500])
    if prefix and head[257:263] == b"ustar\0":
        name = f"{prefix}/{name}"
    return head[156:157], name, size


def _parse_pax(body: bytes, at: int, where: str) -> dict[str, str]:
    """Records ``LENGTH KEY=VALUE\\n`` of a pax header."""
    out: dict[str, str] = {}
    while body.strip(b"\0"):
        length, space, _ = body.partition(b" ")
        if not space or not length.isdigit() or not len(length) + 1 < int(length) <= len(body):
            raise DataError(f"{where} has a broken pax header at byte {at}.")
        key, _, value = body[len(length) + 1 : int(length) - 1].partition(b"=")
        out[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        body = body[int(length) :]
    return out
