"""Labels by name: what ``data.sources.N.values`` names in each sample, as numbers that losses get by slot.

A value is a string, a number, a list of either, or a path in a tree. It comes from a member of the sample (``cls``,
``txt``) or from a key of its json member (``json:class``), and reaches ``Loss.forward`` as ``extras.both[NAME]``:

    id     int64 [B]         a 63-bit number of the text: equal texts have equal numbers on every rank, in every run
    int    int64 [B]         the number itself, ≥ 0
    float  float64 [B]
    ids, ints, floats [B, width]   a list, filled up with the marker below
    tree   int64 [B, width]  level l is the id of the path down to l, so two samples agree down to the level at which
                             their numbers last are equal

A slot without the value (its sample has none, or was lost) holds ``ABSENT``, or NaN in floats:
:func:`dualenc.data.batch.present` tells them apart.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dualenc.config import Data
from dualenc.data.batch import ABSENT
from dualenc.data.shards.reader import Reader, SampleError
from dualenc.errors import ConfigError, DataError, did_you_mean

logger = logging.getLogger(__name__)

PREFIX = "values."
"""Of a value's name among what is read of a sample, so that it is not taken for a modality."""
LOOKED_AT = 64
"""Samples of a source that are looked at to find the type of its values."""
Number = Literal["id", "int", "float"]
_LISTS: dict[str, Number] = {"ids": "id", "ints": "int", "floats": "float", "tree": "id"}


@dataclass(frozen=True, slots=True)
class ValueKind:
    """How a value becomes numbers. ``width``: of a list or a path; None: a single one. ``tree``: it is a path."""

    of: Number
    width: int | None = None
    tree: bool = False

    @property
    def name(self) -> str:
        """As ``type`` in a recipe says it."""
        return "tree" if self.tree else self.of if self.width is None else f"{self.of}s"

    def absent(self, size: int) -> Tensor:
        """[size] or [size, width], without any value."""
        shape = (size,) if self.width is None else (size, self.width)
        return torch.full(shape, math.nan, dtype=torch.float64) if self.of == "float" else torch.full(shape, ABSENT)

    def read(self, raw: Any) -> float | int | list[float | int]:
        """The numbers of one sample's value.

        Raises:
            ValueError: it is of another type, or longer than ``width``.
        """
        if isinstance(raw, bytes):
            raw = raw.decode("utf-8", "replace").strip()
        if self.width is None:
            return _number(self.of, raw)
        if self.tree and isinstance(raw, str):
            raw = raw.split("/")
        if not isinstance(raw, list):
            raise ValueError(f"{raw!r:.80} is not a list, as its type {self.name} says")
        if len(raw) > self.width:
            raise ValueError(f"it has {len(raw)} entries, more than its width {self.width}")
        if not self.tree:
            return [_number(self.of, x) for x in raw]
        path = [_text(x) for x in raw]
        return [stable_id("\0".join(path[: k + 1])) for k in range(len(path))]

    def by_slot(self, values: Mapping[int, Any], size: int) -> Tensor:
        """What :meth:`read` gave of some slots → [size] or [size, width]."""
        out = self.absent(size)
        for slot, x in values.items():
            if self.width is None:
                out[slot] = x
            elif x:
                out[slot, : len(x)] = torch.tensor(x, dtype=out.dtype)
        return out


def stable_id(key: str) -> int:
    """A 63-bit number for a sample id, the same on every rank: a sample drawn twice is its own positive."""
    return (
        int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little") >> 1
    )


def _text(x: Any) -> str:
    if not isinstance(x, str | int | float):
        raise ValueError(f"{x!r:.80} is neither text nor a number")
    return str(x)


def _number(of: Number, x: Any) -> int | float:
    if of == "id":
        return stable_id(_text(x))
    try:
        number = float(_text(x))
    except ValueError:
        raise ValueError(f"{x!r:.80} is not a number, as its type {of} says") from None
    if of == "float":
        if not math.isfinite(number):
            raise ValueError(f"{x!r:.80} is not finite")
        return number
    if not number.is_integer() or not 0 <= number < 2**53:
        raise ValueError(f"{x!r:.80} is not a whole number from 0 to 2^53, as its type int says; write type: float")
    return int(number)


# --- the values of a run ------------------------------------------------------------------------------------------


def labels_of(data: Data, source: int) -> dict[str, list[str]]:
    """What is read of a sample for the values of its source, as ``Reader.find`` takes it."""
    return {PREFIX + name: [v.member] for name, v in data.sources[source].values.items()}


def kinds_of(data: Data, reader: Reader) -> dict[str, ValueKind]:
    """Name → kind of every value that the recipe's sources name.

    A type that the recipe leaves out is that of the value in some samples of the first shards, which are read here.

    Raises:
        ConfigError: two sources have one name for different types.
        DataError: the type is left out, and no sample that was looked at has the value.
    """
    out: dict[str, tuple[int, ValueKind]] = {}
    for i, source in enumerate(data.sources):
        seen: dict[str, list[Any]] | None = None
        for name, value in source.values.items():
            where = f"data.sources.{i}.values.{name}"
            if value.type == "auto":
                seen = _look(data, i, reader) if seen is None else seen
                kind = _kind(seen[name], value.width, where, _there(reader, i, value.member))
            elif value.type in _LISTS:
                kind = ValueKind(_LISTS[value.type], value.width, value.type == "tree")
            else:
                kind = ValueKind(value.type)  # type: ignore[arg-type]
            first, other = out.setdefault(name, (i, kind))
            if other != kind:
                raise ConfigError(
                    f"{where} is {_said(kind)}, but data.sources.{first}.values.{name} is {_said(other)}; write the "
                    "same type and width in both, such as {member: json:KEY, type: float}"
                )
    return {name: kind for name, (_, kind) in out.items()}


def _said(kind: ValueKind) -> str:
    return kind.name if kind.width is None else f"{kind.name} of width {kind.width}"


def check_values(data: Data, sets: Sequence[Any]) -> None:
    """Look at some samples of opened sources, as a run does before its first step, if the recipe has values.

    Raises:
        ConfigError, DataError: as :func:`kinds_of`.
    """
    if any(s.values for s in data.sources):
        reader = Reader(sets, None, data.retries)
        try:
            kinds_of(data, reader)
        finally:
            reader.close()


def check_needs(needs: Iterable[str], data: Data) -> None:
    """Refuse a loss that needs a value which no source has.

    Raises:
        ConfigError: naming it, and what to write.
    """
    named = {name for s in data.sources for name in s.values}
    for name in needs:
        if name not in named:
            raise ConfigError(
                f"loss: it needs the value {name!r}, which no source has. {did_you_mean(name, named) if named else ''}"
                f"{' ' if named else ''}Write data.sources.0.values: {{{name}: json:KEY}}, with the key of the "
                "samples' json (or the ending of a member) that holds it"
            )


def _some(n: int, most: int) -> Iterator[int]:
    yield from sorted({k * n // most for k in range(most)}) if n > most else range(n)


def _look(data: Data, i: int, reader: Reader) -> dict[str, list[Any]]:
    """Name → the values of some samples of source i, those that have one."""
    wanted, out = labels_of(data, i), {name: [] for name in data.sources[i].values}  # type: dict[str, list[str]], dict[str, list[Any]]
    for shard in _some(len(reader.sets[i].urls), 4):
        for sample in _some(reader.sets[i].infos[shard].samples, LOOKED_AT // 4):
            try:
                found = reader.find(i, shard, reader.locate(i, shard, sample), wanted).values
            except SampleError as e:
                logger.debug("no value of a sample of %s: %s", reader.sets[i].source, e)
                continue
            for name in out:
                if PREFIX + name in found:
                    out[name].append(found[PREFIX + name])
    return out


def _there(reader: Reader, i: int, member: str) -> str:
    """What a sample of source i has instead of ``member``."""
    try:
        sample = reader.locate(i, 0, 0)
        keys = sorted(reader.document(i, 0, sample)) if member.startswith("json:") and "json" in sample.members else []
    except SampleError as e:
        return f"; its first sample cannot be read: {e}"
    if keys:
        return f"; the json of its first sample has {', '.join(keys[:12])}"
    return f"; its first sample has the members {', '.join(list(sample.members)[:8])}"


def _kind(values: list[Any], width: int, where: str, there: str) -> ValueKind:
    """The kind of values that were looked at."""
    if not values:
        raise DataError(
            f"{where}: no sample that was looked at has it{there}. If other samples do, write its type: "
            f"{where}: {{member: …, type: id}}"
        )
    texts = [v.decode("utf-8", "replace").strip() if isinstance(v, bytes) else v for v in values]
    lists = [v for v in texts if isinstance(v, list)]
    if lists and len(lists) < len(texts):
        raise DataError(f"{where}: some samples have a list and others a single value; write its type")
    flat = [x for v in texts for x in (v if isinstance(v, list) else [v])]
    parsed = isinstance(values[0], bytes)  # a member's bytes say nothing of their type: digits are a number
    return ValueKind(_type_of(flat, parsed), width if lists else None)


def _type_of(values: list[Any], parsed: bool) -> Number:
    for of in ("int", "float"):
        try:
            if not any(isinstance(x, str) and not parsed for x in values):
                for x in values:
                    _number(of, x)  # type: ignore[arg-type]
                return of  # type: ignore[return-value]
        except ValueError:
            continue
    return "id"
