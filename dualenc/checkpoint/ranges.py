"""Tensors that several ranks write together and any number of ranks can read: flat ranges in safetensors files.

``STEM-00003-of-00008.safetensors`` holds what one of eight ranks wrote: each entry is a flat (1-D) run of elements of
a tensor, and the file's header says of which: name → whole shape, start, end (in elements, row-major). FSDP2's shards
along the first dimension and ZeRO's partitions are such runs, so nothing is collected to write them, and a reader takes
the ranges that it needs from whichever files have them. ``STEM.safetensors`` holds the same tensors whole; the reader
makes no difference. torch's own distributed checkpoints keep a pickle, DeepSpeed's are pickles; here nothing is.
"""

from __future__ import annotations

import bisect
import json
import math
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dualenc.errors import CheckpointError

INDEX = "pieces"
_FILE = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")


class WriteError(OSError):
    """safetensors could not write a file; the reason, usually a full disk, is only in its message."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements ``start`` … ``start + len(data)`` − 1 of the flattened tensor ``name``.

    Attributes:
        name: ``PARAMETER`` for a weight, ``PARAMETER/FIELD`` for optimizer state.
        shape: of the whole tensor.
        data: 1-D, on any device; may share memory with what is being trained.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    data: Tensor

    @property
    def end(self) -> int:
        """One past the last element."""
        return self.start + self.data.numel()


class Stored(Protocol):
    """Named tensors from which ranges are read."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Whole shapes by name."""
        ...

    def read(self, name: str, start: int, end: int) -> Tensor:
        """Elements ``start`` … ``end`` − 1 of the flattened tensor: 1-D, on the CPU."""
        ...


# --- writing -----------------------------------------------------------------------------------------------------


def deal(pieces: Sequence[Piece], rank: int, world_size: int) -> list[Piece]:
    """This rank's share of tensors that all ranks hold: laid end to end and cut into ``world_size`` equal runs."""
    total = sum(p.data.numel() for p in pieces)
    low, high = total * rank // world_size, total * (rank + 1) // world_size
    out, at = [], 0
    for p in pieces:
        size = p.data.numel()
        start, end = max(low - at, 0), min(high - at, size)
        if start < end or (size == 0 and rank == 0):
            out.append(Piece(p.name, p.shape, p.start + start, p.data[start:end]))
        at += size
    return out


def copies(pieces: Iterable[Piece]) -> list[Piece]:
    """The same in CPU memory of their own."""
    return [Piece(p.name, p.shape, p.start, p.data.detach().to("cpu", copy=True)) for p in pieces]


def file_name(stem: str, rank: int, world_size: int) -> str:
    """What rank ``rank`` of ``world_size`` writes; counted from 1, as safetensors shards usually are."""
    return f"{stem}-{rank + 1:05d}-of-{world_size:05d}.safetensors"


def write(path: Path, pieces: Iterable[Piece]) -> None:
    """Write one rank's file; only its own pieces pass through CPU memory.

    Raises:
        OSError: if it cannot be written.
    """
    # copies, because safetensors refuses tensors that share memory, such as views into ZeRO's flat buffers
    tensors, index = {}, {}
    for p in pieces:
        tensors[p.name] = p.data.detach().to("cpu", copy=True)
        index[p.name] = {"shape": list(p.shape), "start": p.start, "end": p.end}
    write_tensors(path, tensors, {INDEX: json.dumps(index)})


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file with the mode that the umask gives (safetensors itself gives 600).

    Raises:
        WriteError: the disk is full or cannot be written to.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        path.touch()
        mode = stat.S_IMODE(path.stat().st_mode)
        save_file(tensors, str(path), metadata=metadata)
        path.chmod(mode)
    except SafetensorError as e:
        raise WriteError(f"{path} cannot be written ({e})") from e


# --- reading -----------------------------------------------------------------------------------------------------


class InMemory:
    """Whole tensors as a :class:`Stored`."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self.shapes = {k: tuple(t.shape) for k, t in tensors.items()}

    def read(self, name: str, start: int, end: int) -> Tensor:
        """See :class:`Stored`."""
        return self._tensors[name].flatten()[start:end]


class Joined:
    """The tensors of ``first``, and those only ``second`` has, as a :class:`Stored`."""

    def __init__(self, first: Stored, second: Stored) -> None:
        self._first, self._second = first, second
        self.shapes = {**second.shapes, **first.shapes}

    def read(self, name: str, start: int, end: int) -> Tensor:
        """See :class:`Stored`."""
        return (self._first if name in self._first.shapes else self._second).read(name, start, end)

    def whole(self, name: str) -> Tensor:
        """A tensor in its shape."""
        return self.read(name, 0, math.prod(self.shapes[name])).view(self.shapes[name])


@dataclass(frozen=True, slots=True, order=True)
class _Run:
    start: int
    end: int
    path: Path


class Files:
    """Tensors of one file that holds them whole, or of the files that ranks wrote together.

    Headers are read at once and every tensor is checked to be there exactly once; values are read when asked for.

    Raises:
        CheckpointError: naming the file that is missing or damaged, or the tensor that has a gap or an overlap.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._runs: dict[str, list[_Run]] = {}
        self._open: dict[Path, Any] = {}
        for path in self.paths:
            for name, (shape, run) in self._header(path).items():
                if self.shapes.setdefault(name, shape) != shape:
                    raise CheckpointError(f"{path} says {name} has shape {list(shape)}, not {list(self.shapes[name])}")
                self._runs.setdefault(name, []).append(run)
        for name, runs in self._runs.items():
            runs.sort()
            _check_coverage(name, math.prod(self.shapes[name]), runs)

    def read(self, name: str, start: int, end: int) -> Tensor:
        """See :class:`Stored`.

        Raises:
            CheckpointError: if there is no such tensor.
        """
        if name not in self._runs:
            raise CheckpointError(f"{self.paths[0].parent} has no tensor {name} in {self.paths[0].name}")
        runs, out = self._runs[name], []
        first = bisect.bisect_right(runs, start, key=lambda r: r.start) - 1
        for run in runs[max(first, 0) :]:
            low, high = max(start, run.start), min(end, run.end)
            if low < high:
                out.append(self._slice(run, name, low, high))
            if run.end >= end:
                break
        if not out:
            return self._slice(runs[0], name, runs[0].start, runs[0].start)
        return torch.cat(out) if len(out) > 1 else out[0]

    def whole(self, name: str) -> Tensor:
        """A tensor in its shape."""
        shape = self.shapes[name]
        return self.read(name, 0, math.prod(shape)).view(shape)

    def all(self) -> dict[str, Tensor]:
        """Every tensor in its shape."""
        return {name: self.whole(name) for name in self.shapes}

    def _file(self, path: Path) -> Any:
        from safetensors import SafetensorError, safe_open

        if path not in self._open:
            try:
                self._open[path] = safe_open(str(path), framework="pt")
            except FileNotFoundError as e:
                raise CheckpointError(f"{path} is missing") from e
            except (SafetensorError, OSError) as e:
                raise CheckpointError(f"{path} is damaged ({e})") from e
        return self._open[path]

    def _header(self, path: Path) -> dict[str, tuple[tuple[int, ...], _Run]]:
        file = self._file(path)
        found = {k: tuple(file.get_slice(k).get_shape()) for k in file.keys()}  # noqa: SIM118 – not a mapping
        text = (file.metadata() or {}).get(INDEX)
        if text is None:
            return {k: (shape, _Run(0, math.prod(shape), path)) for k, shape in found.items()}
        try:
            index = {k: ([int(n) for n in v["shape"]], int(v["start"]), int(v["end"])) for k, v in _json(text).items()}
        except (ValueError, TypeError, KeyError) as e:
            raise CheckpointError(f"{path}: its list of pieces cannot be read ({e})") from e
        for k in found.keys() | index.keys():
            if k not in index or k not in found or found[k] != (index[k][2] - index[k][1],):
                raise CheckpointError(f"{path}: its list of pieces does not fit its tensor {k}")
        return {k: (tuple(shape), _Run(start, end, path)) for k, (shape, start, end) in index.items()}

    def _slice(self, run: _Run, name: str, low: int, high: int) -> Tensor:
        """Elements ``low`` … ``high`` − 1 of the whole tensor, all of them in ``run``."""
        part = self._file(run.path).get_slice(name)
        shape = part.get_shape()
        if not shape:
            scalar: Tensor = self._file(run.path).get_tensor(name)
            return scalar.view(1)[low:high]
        low, high = low - run.start, high - run.start
        row = math.prod(shape[1:])
        if row == 0 or low >= high:
            rows: Tensor = part[0:0]
            return rows.flatten()
        first = low // row
        rows = part[first : -(-high // row)]
        return rows.flatten()[low - first * row : high - first * row]


def find(folder: Path, stem: str) -> list[Path]:
    """The files of ``stem`` in ``folder``: the one that holds it whole, else all that ranks wrote; [] if there is none.

    Raises:
        CheckpointError: naming a file that the others speak of and that is missing.
    """
    whole = folder / f"{stem}.safetensors"
    if whole.is_file():
        return [whole]
    matches = [m for p in folder.glob(f"{stem}-*.safetensors") if (m := _FILE.fullmatch(p.name)) and m["stem"] == stem]
    counts = {int(m["count"]) for m in matches}
    if len(counts) > 1:
        raise CheckpointError(f"{folder} mixes {stem} files written by {' and '.join(map(str, sorted(counts)))} ranks")
    paths = [folder / file_name(stem, r, n) for n in counts for r in range(n)]
    for path in paths:
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
    return paths


def stored(folder: Path, stem: str) -> Files:
    """Open the tensors of ``stem`` in ``folder``, whole or in pieces.

    Raises:
        CheckpointError: as :func:`find` and :class:`Files`, and if there are none.
    """
    paths = find(folder, stem)
    if not paths:
        raise CheckpointError(f"{folder} has neither {stem}.safetensors nor its shards")
    return Files(paths)


def _check_coverage(name: str, size: int, runs: Sequence[_Run]) -> None:
    at = 0
    for run in runs:
        if run.start != at:
            what = f"elements {at} to {run.start - 1} are missing" if run.start > at else "some elements appear twice"
            raise CheckpointError(f"{run.path.parent}: {name}: {what} (seen at {run.path.name})")
        at = run.end
    if at != size:
        raise CheckpointError(f"{runs[-1].path.parent}: {name}: only {at} of its {size} elements are present")


def _json(text: str) -> dict[str, Any]:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError("not a mapping")
    return found
