"""Where every sample of a tar shard is, so that one sample can be read by seeking: the only tar reader here.

The headers of a tar are read one by one, skipping the data between them; members are grouped into samples as
webdataset groups them: the key is the path up to the first dot of its base name, the rest is the ending (lower case),
and consecutive members of one key are one sample. A second member with the same key and ending begins a new sample.
Names that begin with a dot (``._a.jpg``, which macOS adds, ``.DS_Store``) and ``__meta__`` names are not samples.
"""

from __future__ import annotations

import hashlib
import io
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dualenc.errors import DataError

BLOCK = 512
_NAME = re.compile(r"^((?:.*/|)[^./]+)[.]([^/]*)$", re.DOTALL)
_META = re.compile(r"__[^/]*__($|/)")
_REGULAR = b"0\0007"
_MAX_HEADER = 1 << 20
_CHUNK = 1 << 20
_FORMAT = 1
_ANEW = "rewrite it with: dualenc shards index"
_PACKED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ\x00": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
    b"PK\x03\x04": ("zip", "unzip it and pack the files with: dualenc shards build folder"),
}
"""First bytes of compressed files → their format and the command that unpacks them."""

ReadAt = Callable[[int, int], bytes]
"""(offset, size) → up to size bytes."""


class Member(NamedTuple):
    """One regular member of a tar: its name, the offset and size of its data, and the CRC-32 of its header block."""

    name: str
    offset: int
    size: int
    header: int


@dataclass(frozen=True, slots=True)
class Sample:
    """Where one sample is: its key and, by ending, (offset, size) of the member's data in the tar.

    ``checks``: ending → CRC-32 of the member's header block and of its contents, as far as the index has them.
    ``number``: of the sample in its shard.
    """

    key: str
    members: dict[str, tuple[int, int]]
    checks: Mapping[str, tuple[int | None, int | None]] = field(default_factory=dict, compare=False)
    number: int = field(default=-1, compare=False)


class TarIndex:
    """All samples of one shard, in a few flat arrays (about 50 bytes per sample).

    Attributes:
        tar_bytes: size of the tar this was made from; another size means the index is stale.
        offset, size: [members] of each member's data.
        ending: [members] which of ``endings``.
        first: [samples + 1] the members of sample i are ``first[i] : first[i + 1]``.
        header: [members] CRC-32 of each member's header block; None in an index written by an early version.
        contents: [members] CRC-32 of each member's data; None where only headers were read.
        digest: of all headers together, hexadecimal; empty in an index written by an early version.
    """

    def __init__(self, tar_bytes: int, endings: list[str], arrays: Mapping[str, NDArray[Any]], digest: str) -> None:
        self.tar_bytes = tar_bytes
        self.endings = endings
        self.offset, self.size = arrays["offset"], arrays["size"]
        self.ending, self.first = arrays["ending"], arrays["first"]
        self.key_end, self.keys = arrays["key_end"], arrays["keys"]
        self.header, self.contents = arrays.get("header_crc"), arrays.get("contents_crc")
        self.digest = digest

    def __len__(self) -> int:
        return len(self.first) - 1

    @property
    def nbytes(self) -> int:
        """Memory held."""
        arrays = (self.offset, self.size, self.ending, self.first, self.key_end, self.keys, self.header, self.contents)
        return sum(a.nbytes for a in arrays if a is not None)

    def key(self, i: int) -> str:
        """Key of sample i."""
        start = int(self.key_end[i - 1]) if i else 0
        return self.keys[start : int(self.key_end[i])].tobytes().decode("utf-8", "surrogateescape")

    def sample(self, i: int) -> Sample:
        """Key and members of sample i."""
        a, b = int(self.first[i]), int(self.first[i + 1])
        names = [self.endings[e] for e in self.ending[a:b].tolist()]
        places = zip(self.offset[a:b].tolist(), self.size[a:b].tolist(), strict=True)
        unknown = [None] * (b - a)
        headers = unknown if self.header is None else self.header[a:b].tolist()
        contents = unknown if self.contents is None else self.contents[a:b].tolist()
        checks = zip(headers, contents, strict=True)
        return Sample(self.key(i), dict(zip(names, places, strict=True)), dict(zip(names, checks, strict=True)), i)

    def scattered(self) -> list[str]:
        """Keys whose members are not adjacent, so that they make several incomplete samples.

        A key that is repeated with an ending it already had is a repeated sample and not counted here.
        """
        places: dict[str, list[set[str]]] = {}
        for i in range(len(self)):
            places.setdefault(self.key(i), []).append(
                {self.endings[e] for e in self.ending[int(self.first[i]) : int(self.first[i + 1])].tolist()}
            )
        return [k for k, parts in places.items() if len(parts) > 1 and not set.intersection(*parts)]

    def read_contents(self, read_at: ReadAt) -> None:
        """Compute the CRC-32 of every member's data (reads the whole tar)."""
        crcs = np.zeros(len(self.offset), np.uint32)
        for i, (offset, size) in enumerate(zip(self.offset.tolist(), self.size.tolist(), strict=True)):
            crc = 0
            for at in range(offset, offset + size, _CHUNK):
                crc = zlib.crc32(read_at(at, min(_CHUNK, offset + size - at)), crc)
            crcs[i] = crc
        self.contents = crcs

    def to_bytes(self) -> bytes:
        """As a NumPy ``.npz`` (arrays only, never pickled objects)."""
        out = io.BytesIO()
        more: dict[str, Any] = {"header_crc": self.header, "contents_crc": self.contents}
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
            digest=np.frombuffer(self.digest.encode("ascii"), np.uint8),
            **{k: a for k, a in more.items() if a is not None},
        )
        return out.getvalue()

    @classmethod
    def from_bytes(cls, raw: bytes, where: str) -> TarIndex:
        """Read what :meth:`to_bytes` wrote, also from versions without checksums.

        Raises:
            DataError: if it is damaged or of another format.
        """
        try:
            with np.load(io.BytesIO(raw), allow_pickle=False) as f:
                version, tar_bytes = (int(v) for v in f["header"])
                arrays = {k: f[k] for k in _ARRAYS if k in f or k not in _LATER}
                text = f["endings"].tobytes().decode("utf-8", "surrogateescape")
                digest = f["digest"].tobytes().decode("ascii") if "digest" in f else ""
            endings = text.split("\n") if text else []
            problem = _inconsistent(tar_bytes, endings, arrays) if version == _FORMAT else ""
        except Exception as e:
            # Damaged bytes end in errors of zipfile, zlib, tokenize and NumPy that share no base class below Exception.
            raise DataError(f"{where} is damaged ({type(e).__name__}: {e}); {_ANEW}") from e
        if version != _FORMAT:
            raise DataError(f"{where} has format {version}, this version reads {_FORMAT}: run dualenc shards index")
        if problem:
            raise DataError(f"{where} is damaged ({problem}); {_ANEW}")
        return cls(tar_bytes, endings, arrays, digest)


_LATER = ("header_crc", "contents_crc")
_ARRAYS = ("offset", "size", "ending", "first", "key_end", "keys", *_LATER)


def _inconsistent(tar_bytes: int, endings: list[str], arrays: Mapping[str, NDArray[Any]]) -> str:
    """Why these arrays are not a valid index; empty if they are."""
    if any(a.ndim != 1 or a.dtype.kind not in "iu" for a in arrays.values()):
        return "its arrays are not lists of integers"
    offset, size, first, key_end = (arrays[k].astype(np.int64) for k in ("offset", "size", "first", "key_end"))
    if any(len(arrays[k]) != len(offset) for k in ("size", "ending", *_LATER) if k in arrays):
        return "its arrays differ in length"
    if not len(first) or first[0] != 0 or first[-1] != len(offset) or (np.diff(first) < 1).any():
        return "its samples have no members"
    if len(key_end) != len(first) - 1 or (np.diff(key_end, prepend=0) < 1).any() or key_end[-1:] != len(arrays["keys"]):
        return "its keys do not add up"
    if len(offset) and (int(arrays["ending"].max()) >= len(endings) or int(arrays["ending"].min()) < 0):
        return "it refers to endings that it does not list"
    if len(offset) and (size.min() < 0 or offset.min() < BLOCK or (offset > tar_bytes - size).any()):
        return "it refers to bytes outside the shard"
    return ""


def index_tar(read_at: ReadAt, total: int, where: str) -> TarIndex:
    """Make the index of a tar of ``total`` bytes by reading its headers.

    Raises:
        DataError: if it is not a tar, is cut short, holds data after its end mark, or holds no sample.
    """
    offsets: list[int] = []
    sizes: list[int] = []
    kinds: list[int] = []
    headers: list[int] = []
    first: list[int] = []
    keys: list[bytes] = []
    endings: dict[str, int] = {}
    key: str | None = None
    seen: set[str] = set()
    digest = hashlib.blake2b(digest_size=16)
    for name, offset, size, header in tar_members(read_at, total, where):
        digest.update(f"{offset} {size} {header}\n".encode())
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
        headers.append(header)
        kinds.append(endings.setdefault(ending, len(endings)))
    if not keys:
        raise DataError(f"{where} holds no samples: every shard needs at least one KEY.ENDING member.")
    arrays: dict[str, NDArray[Any]] = {
        "offset": np.array(offsets, np.int64),
        "size": np.array(sizes, np.int64),
        "ending": np.array(kinds, np.uint32),
        "first": np.array([*first, len(offsets)], np.int64),
        "key_end": np.cumsum([len(k) for k in keys], dtype=np.int64),
        "keys": np.frombuffer(b"".join(keys), np.uint8),
        "header_crc": np.array(headers, np.uint32),
    }
    return TarIndex(total, list(endings), arrays, digest.hexdigest())


def tar_members(read_at: ReadAt, total: int, where: str) -> Iterator[Member]:
    """Every regular member in turn (ustar, GNU long names, pax).

    Raises:
        DataError: for a compressed tar, a broken header, a member that reaches beyond the end, or data after the end.
    """
    at = 0
    long_name: str | None = None
    pax: dict[str, str] = {}
    while at < total:
        head = read_at(at, BLOCK)
        if len(head) == BLOCK and not head.strip(b"\0"):
            _nothing_behind(read_at, at, total, where)
            break
        if at == 0:
            _not_compressed(head, where)
        kind, name, size = _parse_header(head, at, where)
        data = at + BLOCK
        if kind in b"LKxgX":
            if size > _MAX_HEADER or data + size > total:
                raise DataError(f"{where} has a broken header at byte {at}: it is not a tar, or damaged.")
            body = read_at(data, size)
            if kind == b"L":
                long_name = _text(body)
            elif kind in b"xX":
                pax = _parse_pax(body, at, where)
            at = data + _padded(size)
            continue
        name = pax.get("path", long_name if long_name is not None else name)
        if "size" in pax:
            if not re.fullmatch(r"[0-9]{1,18}", pax["size"]):
                raise DataError(f"{where} has a broken pax header before byte {at}.")
            size = int(pax["size"])
        if kind == b"S" or "GNU.sparse.major" in pax:
            raise DataError(f"{where}: member {name!r} is a sparse file, which shards cannot hold; pack it again.")
        if kind in b"123456":
            size = 0
        if data + size > total:
            raise DataError(f"{where} is cut short: member {name!r} reaches to byte {data + size} of {total}.")
        if kind in _REGULAR and not (kind == b"\0" and name.endswith("/")):
            yield Member(name, data, size, zlib.crc32(head))
        long_name, pax = None, {}
        at = data + _padded(size)


def ends_properly(read_at: ReadAt, total: int) -> bool:
    """Whether a tar ends with a block of zeros, as a properly closed tar does; one cut between two members does not."""
    return total >= BLOCK and not read_at(total - BLOCK, BLOCK).strip(b"\0")


def _nothing_behind(read_at: ReadAt, end: int, total: int, where: str) -> None:
    """Raise DataError for anything but padding after the end mark: samples hidden by damage, or by joining two tars."""
    for at in range(end, total, _CHUNK):
        chunk = read_at(at, min(_CHUNK, total - at))
        rest = chunk.lstrip(b"\0")
        if rest:
            found = at + len(chunk) - len(rest)
            raise DataError(
                f"{where} holds data after its end mark (the mark is at byte {end}, data at byte {found} of {total}): "
                "a header was overwritten with zeros, or two tars were joined; pack it again from its samples."
            )


def _not_compressed(head: bytes, where: str) -> None:
    for first, (kind, undo) in _PACKED.items():
        if head.startswith(first):
            what = f"unpack it first ({undo} {where})" if " " not in undo else undo
            raise DataError(
                f"{where} is not a plain tar but {kind}-compressed, and single samples are read by seeking: {what}."
            )


def check_member(block: bytes, name: str, size: int, where: str, header: int | None = None) -> bytes:
    """Check that the 512-byte header before a member is that member's; return the data after it.

    Tars are padded to multiples of 10 KiB, so a rewritten shard often has the size of the old one: only the
    header tells that the index still fits. ``header``: its CRC-32 when it was indexed, where that is known; otherwise
    name and size are compared.

    Raises:
        DataError: if the index is stale.
    """
    if len(block) < BLOCK + size:
        raise DataError(
            f"{where} is shorter than its index says: it ends inside {name!r}. Copy the shard again, or {_ANEW}"
        )
    if header is not None:
        fits = zlib.crc32(block[:BLOCK]) == header
    else:
        field_ = block[:100].split(b"\0", 1)[0].decode("utf-8", "surrogateescape").lower()
        full = name.lower()
        digits = block[124:136].strip(b"\0 ")
        octal = digits.isdigit() and not digits.strip(b"01234567")
        same_size = bool(block[124] & 0x80) or (octal and int(digits, 8) in (size, 0))
        # ustar splits a long name into prefix and tail, GNU and pax keep its first 100 bytes; pax writers may replace
        # non-ASCII letters, so such names are not compared.
        fits = same_size and (not full.isascii() or full.endswith(field_) or full.startswith(field_[:90]))
    if not fits:
        raise DataError(
            f"The index of {where} is stale: {name!r} is not where it says, so the shard was changed or replaced after "
            f"it was indexed. If that is intended, {_ANEW}"
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
    """Type, name and size in one header block, after verifying its checksum."""
    try:
        if len(head) < BLOCK:
            raise ValueError("short block")
        stated = _octal(head[148:156])
        actual = sum(head) - sum(head[148:156]) + 8 * 32
        if stated != actual:
            raise ValueError("wrong checksum")
        raw = head[124:136]
        size = int.from_bytes(raw[1:], "big") if raw[0] & 0x80 else _octal(raw)
    except ValueError as e:
        what = "is not a tar" if at == 0 else f"is damaged or cut short at byte {at}"
        raise DataError(f"{where} {what}: no valid header there.") from e
    name = _text(head[:100])
    prefix = _text(head[345:500])
    if prefix and head[257:263] == b"ustar\0":
        name = f"{prefix}/{name}"
    return head[156:157], name, size


def _octal(raw: bytes) -> int:
    """A number in a header; ``int`` also accepts signs and underscores, and a negative size would seek backwards."""
    digits = raw.strip(b"\0 ")
    if digits.strip(b"01234567"):
        raise ValueError("not an octal number")
    return int(digits or b"0", 8)


def _parse_pax(body: bytes, at: int, where: str) -> dict[str, str]:
    """Records ``LENGTH KEY=VALUE\\n`` of a pax header."""
    out: dict[str, str] = {}
    body = body.rstrip(b"\0")
    start = 0
    while start < len(body):
        length, space, _ = body[start : start + 12].partition(b" ")
        stop = start + (int(length) if space and length.isdigit() else 0)
        if not start + len(length) + 1 < stop <= len(body):
            raise DataError(f"{where} has a broken pax header at byte {at}.")
        key, _, value = body[start + len(length) + 1 : stop - 1].partition(b"=")
        out[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        start = stop
    return out
