"""Arrays in files: ``.npy``, ``.npz``, ``.pcd``, ``.bin`` → NumPy, using no more memory than the file justifies.

A header's claim is checked against the length of the file before anything is allocated; pickles are never read.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy_format

from dualenc.errors import DecodeError

Array = npt.NDArray[Any]
MAX_BYTES = 1 << 30
"""Largest array of a sample once it is unpacked: 1 GiB."""
_MAX_HEADER = 1 << 16
_PCD_TYPES = {("F", 4): "<f4", ("F", 8): "<f8", ("I", 1): "<i1", ("I", 2): "<i2", ("I", 4): "<i4", ("I", 8): "<i8"}
_PCD_TYPES |= {("U", size): f"<u{size}" for size in (1, 2, 4, 8)}


def read_npy(raw: bytes) -> Array:
    """The array in the bytes of a ``.npy`` (NumPy's NEP 1 format, versions 1 to 3).

    Raises:
        DecodeError: not a ``.npy``, a damaged header, objects, or fewer bytes than its shape needs.
    """
    stream = io.BytesIO(raw)
    try:
        version = npy_format.read_magic(stream)
        if version not in ((1, 0), (2, 0), (3, 0)):
            raise ValueError(f"version {version[0]}.{version[1]} is unknown")
        length = struct.unpack("<H" if version == (1, 0) else "<I", raw[8 : 10 if version == (1, 0) else 12])[0]
        if length > _MAX_HEADER:
            raise ValueError(f"its header claims {length:,} bytes")
        read = npy_format.read_array_header_1_0 if version == (1, 0) else npy_format.read_array_header_2_0
        shape, fortran, dtype = read(stream, max_header_size=_MAX_HEADER)
    except Exception as e:  # NumPy parses the header as Python: tokenize, ast and struct raise their own errors
        raise DecodeError(f"not a .npy array ({' '.join(str(e).split())[:120]})") from e
    if dtype.hasobject:
        raise DecodeError("the array holds Python objects; store numbers instead")
    if any(not isinstance(n, int) or n < 0 for n in shape):
        raise DecodeError(f"the array's shape {list(shape)} is invalid")
    count, there = math.prod(shape), len(raw) - stream.tell()
    if count * dtype.itemsize > there:
        need = count * dtype.itemsize
        raise DecodeError(f"not a .npy array: its shape {list(shape)} needs {need:,} bytes, but it has {there:,}")
    flat = np.frombuffer(raw, dtype, count, stream.tell()) if count and dtype.itemsize else np.empty(count, dtype)
    return flat.reshape(shape, order="F" if fortran else "C")


def npy_bytes(x: Array) -> bytes:
    """An array as the bytes of a ``.npy``.

    Raises:
        ValueError: it holds Python objects.
    """
    out = io.BytesIO()
    np.save(out, x, allow_pickle=False)
    return out.getvalue()


def read_npz(raw: bytes, name: str | None = None) -> Array:
    """One array of a ``.npz``: ``name``, or its only one.

    Raises:
        DecodeError: not a ``.npz``, not exactly one array, or one that unpacks to more than ``MAX_BYTES``.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as z:
            members = {i.filename.removesuffix(".npy"): i for i in z.infolist() if i.filename.endswith(".npy")}
            if name is None and len(members) != 1:
                raise DecodeError(f"the .npz holds {len(members)} arrays ({', '.join(members)[:80]}); it must hold one")
            info = members.get(name or next(iter(members)))
            if info is None:
                raise DecodeError(f"the .npz has no array {name!r}, only {', '.join(members)[:80]}")
            if info.file_size > MAX_BYTES:
                raise DecodeError(f"the array has {info.file_size:,} bytes, more than {MAX_BYTES:,}")
            with z.open(info) as f:
                body = f.read(info.file_size + 1)
    except DecodeError:
        raise
    except Exception as e:  # zipfile and zlib share no base class
        raise DecodeError(f"not a .npz file ({' '.join(str(e).split())[:120]})") from e
    return read_npy(body)


def read_bin(raw: bytes, columns: int) -> Array:
    """float32 [n, columns] from the bytes of a ``.bin`` as KITTI (4) and nuScenes (5) write it: numbers and no header.

    Raises:
        DecodeError: the bytes are not a whole number of rows.
    """
    if len(raw) % (4 * columns):
        raise DecodeError(f"{len(raw):,} bytes are not a whole number of points of {columns} float32 values")
    return np.frombuffer(raw, "<f4").reshape(-1, columns)


def read_pcd(raw: bytes) -> tuple[Array, list[str]]:
    """Points float32 [n, C] and the columns' names of a ``.pcd`` (Point Cloud Library, version 0.7).

    Raises:
        DecodeError: a damaged header, data that does not match it, or compressed data (``binary_compressed``).
    """
    head: dict[str, list[str]] = {}
    at = 0
    while "DATA" not in head:
        end = raw.find(b"\n", at, at + 4096)
        if end < 0 or at > _MAX_HEADER:
            raise DecodeError("the .pcd has no complete header (no DATA line)")
        words = raw[at:end].decode("ascii", "replace").split()
        at = end + 1
        if words and not words[0].startswith("#"):
            head[words[0]] = words[1:]
    try:
        names = [n.lower() for n in head["FIELDS"]]
        sizes, kinds = [int(s) for s in head["SIZE"]], head["TYPE"]
        counts = [int(c) for c in head.get("COUNT", ["1"] * len(names))]
        points = int(head["POINTS"][0]) if "POINTS" in head else int(head["WIDTH"][0]) * int(head["HEIGHT"][0])
        if not len(names) == len(sizes) == len(kinds) == len(counts) or any(c != 1 for c in counts) or points < 0:
            raise ValueError("FIELDS, SIZE, TYPE and COUNT do not match (only COUNT 1 is supported)")
        dtype = np.dtype([(f"{i}", _PCD_TYPES[k, s]) for i, (k, s) in enumerate(zip(kinds, sizes, strict=True))])
        form = head["DATA"][0]
    except (KeyError, ValueError, IndexError) as e:
        raise DecodeError(f"the .pcd header is damaged ({' '.join(str(e).split())[:120]})") from e
    if form == "binary":
        if points * dtype.itemsize != len(raw) - at:
            raise DecodeError(f"{points:,} points need {points * dtype.itemsize:,} bytes, but it has {len(raw) - at:,}")
        rows = np.frombuffer(raw, dtype, points, at)
        table = np.stack([rows[f"{i}"].astype(np.float32) for i in range(len(names))], 1)
    elif form == "ascii":
        if points * len(names) * 2 - 1 > len(raw) - at:  # at least a digit and a space for each number
            raise DecodeError(f"{points:,} points do not fit into {len(raw) - at:,} bytes")
        try:
            table = np.array(raw[at:].split(), dtype=np.float32).reshape(points, len(names))
        except ValueError as e:
            raise DecodeError(f"the .pcd's values are damaged ({' '.join(str(e).split())[:120]})") from e
    else:
        raise DecodeError(f"DATA {form} of a .pcd is not supported; write it as binary (pcl_convert_pcd_ascii_binary)")
    return table, names
