"""What a user has (paths, URLs, bytes, images, arrays) → the raw items that a modality's ``decode`` takes."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from dualenc.data.modalities import DecodeError, FromMemory, ModalityInput
from dualenc.data.shards.remote import ReadFailed, fetch_bytes, is_local, is_pipe, local_path
from dualenc.errors import ConfigError, DataError, did_you_mean

T = TypeVar("T")
_RETRIES = 3
_BYTES = (bytes, bytearray, memoryview)
_ONE = (str, *_BYTES, os.PathLike, Mapping, np.ndarray, Tensor, io.IOBase)


def many(items: Any) -> Iterable[Any]:
    """A list, iterator or generator as it is; anything else, a string or an array too, is a list of one item."""
    return [items] if isinstance(items, _ONE) or not isinstance(items, Iterable) else items


def chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of ``size`` items, the last one shorter."""
    left = iter(items)
    while chunk := list(islice(left, size)):
        yield chunk


class RawItems(Sequence[Any]):
    """Items that are read on demand: by the pool that decodes them, while others are on the device."""

    def __init__(self, source: ModalityInput, items: Sequence[Any], rate: int | None = None) -> None:
        self.source, self.items, self.rate = source, items, rate

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: Any) -> Any:
        return raw_of(self.source, self.items[i], self.rate)


def raw_of(source: ModalityInput, x: Any, rate: int | None = None) -> Any:
    """One item → what ``source.decode`` takes.

    Args:
        x: bytes, an open file, a path or URL, or an object in memory that the modality knows.
        rate: samples per second of waveforms.

    Raises:
        DecodeError: there is no such file, or the modality does not take such an object.
    """
    if isinstance(x, _BYTES):
        return bytes(x)
    if isinstance(x, io.IOBase):
        return x.read()
    if isinstance(source, FromMemory):
        raw = source.as_raw(x, rate)
        if raw is not None:
            return raw
    if isinstance(x, str | os.PathLike):
        return read(os.fspath(x))
    if isinstance(source, FromMemory):
        raise DecodeError(f"cannot read an object of type {type(x).__name__}; give a path, URL, bytes or array")
    return x  # a modality from outside: its decode says what it takes


def read(path: str) -> bytes:
    """The bytes of a file or URL.

    Raises:
        DecodeError: it does not exist or cannot be read.
    """
    if is_pipe(path):
        raise DecodeError(f"{path}: pipe: commands work for shards only; give a path or URL")
    if not is_local(path):
        try:
            return fetch_bytes(path, _RETRIES)
        except FileNotFoundError as e:
            raise DecodeError(f"there is nothing at {path}") from e
        except (ReadFailed, DataError) as e:
            raise DecodeError(str(e)) from e
    file = Path(local_path(path)).expanduser()
    try:
        return file.read_bytes()
    except FileNotFoundError as e:
        beside = [p.name for p in file.parent.iterdir()] if file.parent.is_dir() else []
        raise DecodeError(
            f"there is no file {path}. {did_you_mean(file.name, beside) if beside else ''}".strip()
        ) from e
    except OSError as e:
        raise DecodeError(f"{path} cannot be read: {e.strerror}") from e


def name_of(x: Any, position: int) -> str | int:
    """How results name an item: by its path or text, else by its position."""
    return os.fspath(x) if isinstance(x, str | os.PathLike) else position


# --- folders -----------------------------------------------------------------------------------------------------


def endings(source: ModalityInput) -> list[str]:
    """Extensions of the single files that a modality reads: those of its shard members that are one file each."""
    return [e.lower() for e in source.default_members if "+" not in e and ":" not in e]


def found(places: Iterable[Any], inputs: Mapping[str, ModalityInput], modality: str | None) -> tuple[str, list[Any]]:
    """The modality of some items and the items, with folders replaced by the files below them.

    Args:
        places: folders, and whatever :func:`raw_of` takes.
        inputs: the modalities that are possible.
        modality: the modality of the items; None: by file extension.

    Raises:
        ConfigError: the files are of several modalities, or of one the model does not have.
        DataError: no item, or a folder without a file of these modalities.
    """
    possible = dict(inputs) if modality is None else {modality: inputs[known(modality, inputs)]}
    items: list[Any] = []
    for place in places:
        folder = Path(place).expanduser() if isinstance(place, str | os.PathLike) else None
        if folder is not None and is_local(str(place)) and folder.is_dir():
            items += _below(folder, possible)
        else:
            items.append(place)
    if not items:
        raise DataError("there are no items; give files, URLs or a folder with files")
    if modality is not None or len(possible) == 1:
        return modality or next(iter(possible)), items
    kinds = [_told_by_ending(x, possible) for x in items]
    names = list(dict.fromkeys(k for k in kinds if k is not None))
    if len(names) > 1:
        first = {k: items[kinds.index(k)] for k in names[:2]}
        said = " and ".join(f"{k} ({name_of(x, 0)})" for k, x in first.items())
        raise ConfigError(f"the items are of several modalities, {said}; choose one with modality={names[0]!r}")
    return names[0] if names else next(iter(possible)), items


def known(modality: str, inputs: Mapping[str, Any]) -> str:
    """``modality``, if the model has it.

    Raises:
        ConfigError: naming the nearest that it has.
    """
    if modality not in inputs:
        raise ConfigError(f"There is no modality {modality!r} here. {did_you_mean(modality, inputs)}")
    return modality


def _below(folder: Path, inputs: Mapping[str, ModalityInput]) -> list[str]:
    chosen = []
    for p in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in p.relative_to(folder).parts)
        if not hidden and p.is_file() and _told_by_ending(p, inputs) is not None:
            chosen.append(str(p))
    if not chosen:
        wanted = ", ".join(dict.fromkeys(e for source in inputs.values() for e in endings(source)))
        raise DataError(f"{folder} has no files of {' or '.join(inputs)} ({wanted})")
    return chosen


def _told_by_ending(x: Any, inputs: Mapping[str, ModalityInput]) -> str | None:
    if not isinstance(x, str | os.PathLike):
        return None
    name = os.fspath(x).lower()
    return next((m for m, source in inputs.items() if any(name.endswith("." + e) for e in endings(source))), None)
