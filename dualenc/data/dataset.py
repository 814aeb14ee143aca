"""Samples of a step → batch: read from shards, decoded, augmented, collated. Data workers run this."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler, get_worker_info

from dualenc.config import Data
from dualenc.data.batch import ABSENT, WHOLE, BadSample, Batch
from dualenc.data.batches import Composed
from dualenc.data.driving.places import by_slot
from dualenc.data.modalities.modality import (
    DecodeError,
    DrawsTogether,
    Mixes,
    ModalityInput,
    NamesPlaces,
    ReadsBeside,
    of_one_item,
)
from dualenc.data.order import Ints, Plan, Refs
from dualenc.data.selected_order import SelectedOrder
from dualenc.data.shards.index import ShardSet, window_of
from dualenc.data.shards.reader import Found, Reader, SampleError, check_members
from dualenc.data.shards.remote import Bounds, ShardCache
from dualenc.data.shards.tar import Sample, TarIndex
from dualenc.data.values import PREFIX, ValueKind, labels_of, stable_id
from dualenc.errors import ConfigError, DataError, DualencError, did_you_mean

logger = logging.getLogger(__name__)

_HOPELESS = 16
_SHARED_INDEXES = 64
_PARTNERS = 64
"""Samples that are drawn, at most, to find one with the same value to mix with."""
_AHEAD = 4
"""Steps of this process whose remote bytes are fetched while another is decoded."""
_ZEROS = np.zeros(4, np.uint64)
_thread = threading.local()


@dataclass(frozen=True, slots=True)
class Failure:
    """An error passed from a worker to the consumer: the exception without the worker's traceback."""

    error: DualencError


@dataclass(frozen=True, slots=True)
class TeacherView:
    """A second version of a modality's item, as another model takes it: a teacher's image size or tokenizer.

    Attributes:
        modality: the modality whose raw value is used; a view has a row wherever that modality has one.
        input: how it becomes a row. It uses the same random state as the student's row, so an equal augmentation gives
            the same crop, caption, …
        plain: preprocess the item as in evaluation instead.
    """

    modality: str
    input: ModalityInput
    plain: bool = False


class StepDataset(Dataset[Any]):
    """Step number → batch. Each worker has its own and opens files on first use, so that none are shared."""

    def __init__(
        self,
        plan: Plan,
        sets: Sequence[ShardSet],
        inputs: Mapping[str, ModalityInput],
        pairs: Sequence[tuple[str, str]],
        wanted: Sequence[Mapping[str, Sequence[str]]],
        seed: int,
        batch_size: int,
        rank: int,
        world: int,
        cache: ShardCache | None,
        data: Data,
        views: Mapping[str, TeacherView] | None = None,
        redraw: Mapping[str, tuple[int, int]] | None = None,
        kinds: Mapping[str, ValueKind] | None = None,
        order_from: int = 0,
        order_offset: int = 0,
    ) -> None:
        self.views, self.redraw, self.kinds = dict(views or {}), dict(redraw or {}), dict(kinds or {})
        self.order_from, self.order_offset = order_from, order_offset
        self.labels = [labels_of(data, i) for i in range(len(data.sources))]
        self.plan, self.sets, self.inputs, self.pairs, self.wanted = plan, sets, inputs, list(pairs), wanted
        self.seed, self.batch_size, self.rank, self.world = seed, batch_size, rank, world
        self.cache, self.data = cache, data
        self.modalities = list(dict.fromkeys(m for pair in pairs for m in pair))
        # Asked once: isinstance of a protocol looks up every member of it, twice a sample.
        self._placing = {m for m, x in inputs.items() if isinstance(x, NamesPlaces)}
        self._together = {m for m, x in inputs.items() if isinstance(x, DrawsTogether) and x.draws_together()}
        read = [{**w, **labels} for w, labels in zip(wanted, self.labels, strict=True)]
        same = [data.sources[i].same for i in range(len(sets))]
        self._read_of: list[list[Mapping[str, Sequence[str]]]] = [
            [w, {"same": [s]}] if s else [w] for w, s in zip(read, same, strict=True)
        ]
        self._first = first_numbers([s.counts for s in sets])
        self._first = first_numbers([s.counts for s in sets])
        self._reader: Reader | None = None
        self._owner = 0
        self._planned: dict[int, Refs] = {}
        self._indexes: dict[tuple[int, int], TarIndex] = {}
        self._used = [0] * len(sets)
        self._lost = [0] * len(sets)

    def close(self) -> None:
        """Close this process's files."""
        if self._reader is not None and self._owner == os.getpid():
            self._reader.close()
        self._reader = None

    def __getitem__(self, step: int) -> Batch | Failure:
        begin = time.perf_counter()
        try:
            batch = self.make(self._refs(step), step)
        except DualencError as e:
            return Failure(e)
        batch.load_s = time.perf_counter() - begin
        return batch

    def share_indexes(self, first: int, workers: int) -> None:
        """Read the indexes that the first step of each of some workers needs, before they are forked: else each of
        them would ask the server for all of them. Where there are many the workers' shards are different ones."""
        if self.cache is None or _AHEAD < 0 or workers < 2:
            return
        refs = [self.planned(s) for s in range(first, first + workers)]
        shards = sorted({at for r in refs for at in zip(r.source.tolist(), r.shard.tolist(), strict=True)})
        if len(shards) <= _SHARED_INDEXES:
            reader = self._open()
            self._indexes = reader.indexes_of(shards)
            self.close()

    def planned(self, step: int) -> Refs:
        """The samples of this rank in a step."""
        return self.plan.local(step - self.order_from, self.rank, self.world, self.batch_size, self.order_offset)

    def _refs(self, step: int) -> Refs:
        """The samples of a step. Of remote shards, what this process's next steps read is asked for, too."""
        if self.cache is None or _AHEAD < 0:
            return self.planned(step)
        reader, worker = self._open(), get_worker_info()
        stride = worker.num_workers if worker is not None else 1
        self._planned = {s: refs for s, refs in self._planned.items() if s >= step}
        reader.finish(step - stride)
        for s in range(step, step + (_AHEAD + 1) * stride, stride):
            if s not in self._planned:
                refs = self._planned[s] = self.planned(s)
                places = list(zip(refs.source.tolist(), refs.shard.tolist(), refs.sample.tolist(), strict=True))
                reader.expect(s, places, self._read_of)
        reader.settle(step)
        return self._planned.pop(step)

    def make(self, refs: Refs, step: int) -> Batch:
        """Read, decode and collate the samples of ``refs``."""
        reader = self._open()
        made: dict[int, dict[str, Any]] = {}  # slot → its rows, by modality and by view
        said: dict[int, dict[str, Any]] = {}  # slot → its values, by name
        ids, keys, bad = [ABSENT] * len(refs), [], []
        at = zip(refs.source.tolist(), refs.shard.tolist(), refs.sample.tolist(), refs.passes.tolist(), strict=True)
        for slot, (source, shard, i, one) in enumerate(at):
            name = self.sets[source].names[shard]
            key, same = f"#{i}", self.data.sources[source].same
            try:
                sample = reader.locate(source, shard, i)
                key = sample.key
                pair = _pair(reader, source, shard, sample, same) if same else None
                made[slot], said[slot] = self._rows(reader, source, shard, sample, one)
            except SampleError as e:
                bad.append(BadSample(self.sets[source].source, name, key, e.member, e.reason))
                self._lost[source] += 1
            full = f"{self.sets[source].source}/{name}/{key}"
            keys.append(full)
            if slot in made:
                self._used[source] += 1
                ids[slot] = stable_id(full if pair is None else f"{self.sets[source].source}\0{pair}")
        try:
            collated = self._collated(made)
        except Exception:
            spoiled = self._uncollatable(made)
            if not spoiled:  # not a row's fault
                raise
            for slot, (m, reason) in spoiled.items():
                source, shard = int(refs.source[slot]), int(refs.shard[slot])
                name = self.sets[source].names[shard]
                key = keys[slot].removeprefix(f"{self.sets[source].source}/{name}/")
                bad.append(BadSample(self.sets[source].source, name, key, m, reason))
                self._lost[source] += 1
                self._used[source] -= 1
                ids[slot] = ABSENT
                del made[slot]
            collated = self._collated(made)
        self._refuse_hopeless(bad)
        inputs = {m: collated[m] for m in self.modalities}
        places = {m: torch.tensor([s for s, rows in made.items() if m in rows]).long() for m in self.modalities}
        extras: dict[str, dict[str, torch.Tensor]] = {}
        for m, x in inputs.items():
            labels: dict[str, torch.Tensor] = x.pop("labels", {}) if isinstance(x, dict) else {}  # type: ignore[assignment]
            for name, values in by_slot(labels, places[m], len(refs)).items():
                extras.setdefault(name, {})[m] = values
        for name, kind in self.kinds.items():
            of_slots = {slot: said[slot][name] for slot in made if name in said[slot]}
            extras.setdefault(name, {})[WHOLE] = kind.by_slot(of_slots, len(refs))
        return Batch(
            size=len(refs),
            inputs=inputs,
            rows=places,
            ids=torch.tensor(ids, dtype=torch.long),
            keys=keys,
            step=step,
            bad=bad,
            passes=torch.from_numpy(refs.passes.astype(np.int64)),
            numbers=torch.from_numpy(self._numbers(refs)),
            views={n: collated[n] for n in self.views},
            extras=extras,
        )

    def _numbers(self, refs: Refs) -> Ints:
        """The number of each sample among all samples, in the order of sources, shards, and places in a shard."""
        out = np.empty(len(refs), np.int64)
        for i in np.unique(refs.source):
            here = refs.source == i
            out[here] = self._first[i][refs.shard[here]] + refs.sample[here]
        return out

    def _collated(self, made: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
        """The rows of all slots as tensors, by modality and by view; a dummy where no slot has a row."""
        out = {}
        for name, part in self._parts().items():
            rows = [rows[name] for rows in made.values() if name in rows]
            out[name] = part.collate(rows or [part.dummy()])
        return out

    def _uncollatable(self, made: Mapping[int, Mapping[str, Any]]) -> dict[int, tuple[str, str]]:
        """Slots with a row that cannot be collated, alone or with a dummy: modality and reason."""
        out = {}
        for slot, rows in made.items():
            for name, part in self._parts().items():
                try:
                    if name in rows:
                        with of_one_item():
                            part.collate([rows[name]])
                            part.collate([rows[name], part.dummy()])
                except DecodeError as e:
                    out[slot] = (name, f"cannot be collated into a batch: {e}")
        return out

    def _parts(self) -> dict[str, ModalityInput]:
        """The input of each modality and view."""
        return {m: self.inputs[m] for m in self.modalities} | {n: v.input for n, v in self.views.items()}

    def _rows(
        self, reader: Reader, source: int, shard: int, sample: Sample, one: int
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The rows of one sample, by modality and by view, and its values, by name."""
        wanted = self.wanted[source]
        found = reader.find(source, shard, sample, {**wanted, **self.labels[source]})
        values = self._values(source, sample, found)
        if not any(a in found.values and b in found.values for a, b in self.pairs):
            m, looked = next((m, e) for m, e in wanted.items() if m not in found.values)
            there = ", ".join(list(sample.members)[:4])
            raise SampleError("", f"no member for {m} (looked for {', '.join(looked)}); the sample has {there}")
        full = f"{self.sets[source].source}/{self.sets[source].names[shard]}/{sample.key}"
        partner = self._partner(reader, source, shard, full, one, values)
        out: dict[str, Any] = {}
        for m, raw in found.values.items():
            part: Any = self.inputs[m]
            seed, passes = self.redraw.get(m, (self.seed, one + 1))
            try:
                with of_one_item():
                    item = part.decode(raw)
                    if m in self._placing:
                        item = part.placed(item, sample_rng(self.seed, full, one, "places"))
                    if m in self._together:
                        item = part.drawn(item, sample_rng(self.seed, full, one, "together"))
                    rng = sample_rng(seed, full, one % passes, m)
                    if partner.keys() >= found.values.keys():
                        item = part.mix(item, partner[m], rng)
                    out[m] = part.train(item, rng)
                    for name, view in self.views.items():
                        if view.modality == m:
                            item = view.input.decode(_own(part, raw))
                            if m in self._together and not view.plain:
                                item = part.drawn(item, sample_rng(self.seed, full, one, "together"))
                            draw = sample_rng(seed, full, one % passes, m)
                            out[name] = view.input.eval(item) if view.plain else view.input.train(item, draw)
            except DecodeError as e:
                raise SampleError(f"{sample.key}.{found.members[m]}", str(e)) from e
        return out, values

    def _values(self, source: int, sample: Sample, found: Found) -> dict[str, Any]:
        """The values of a sample, taken out of what was found, where modalities remain."""
        out = {}
        for name, value in self.data.sources[source].values.items():
            if PREFIX + name in found.values:
                try:
                    out[name] = self.kinds[name].read(found.values.pop(PREFIX + name))
                except ValueError as e:
                    where = f"data.sources.{source}.values.{name}"
                    raise SampleError(f"{sample.key}.{value.member}", f"{where}: {e}") from e
        return out

    def _partner(
        self, reader: Reader, source: int, shard: int, full: str, one: int, values: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Decoded items of the sample mixed into this one, drawn from the same shard, which is already open; empty for
        no mixing. An unusable partner is skipped here: it is counted when its own turn comes.

        With ``data.mix_label`` samples are drawn until one has the same value as this one (``values``)."""
        label = self.data.mix_label
        if not self.data.mix or (label is not None and label not in values):
            return {}
        rng = sample_rng(self.seed, full, one, "mix")
        if rng.random() >= self.data.mix:
            return {}
        try:
            order = self.plan.sources[source] if self.sets[source].chosen is not None else None
            others = order.in_shard(shard) if isinstance(order, SelectedOrder) else None
            count = self.sets[source].infos[shard].samples if others is None else len(others)
            for _ in range(1 if label is None else _PARTNERS):
                i = int(rng.integers(count))
                other = reader.locate(source, shard, i if others is None else int(others[i]))
                key = f"{self.sets[source].source}/{self.sets[source].names[shard]}/{other.key}"
                if label is None or (key != full and self._value(reader, source, shard, other, label) == values[label]):
                    break
            else:
                return {}
            found = reader.find(source, shard, other, self.wanted[source])
            with of_one_item():
                return {m: self.inputs[m].decode(raw) for m, raw in found.values.items()}
        except (SampleError, DecodeError) as e:
            logger.debug("nothing was mixed into %s: %s", full, e)
            return {}

    def _value(self, reader: Reader, source: int, shard: int, sample: Sample, name: str) -> Any:
        """One value of a sample alone, None where it has none."""
        looked = {PREFIX + name: self.labels[source][PREFIX + name]}
        return self._values(source, sample, reader.find(source, shard, sample, looked)).get(name)

    def _refuse_hopeless(self, bad: list[BadSample]) -> None:
        """A source without a single usable sample so far has a wrong key or ending: fail now, not after an epoch."""
        for source, (used, lost) in enumerate(zip(self._used, self._lost, strict=True)):
            if used == 0 and lost >= _HOPELESS:
                name = self.sets[source].source
                last = next((b for b in reversed(bad) if b.source == name), None)
                why = f": {last.shard}/{last.key}: {last.reason}" if last else ""
                raise DataError(f"None of the first {lost} samples of source {name!r} could be used{why}")

    def _open(self) -> Reader:
        if self._reader is None or self._owner != os.getpid():
            # After a fork, file offsets and connections are the parent's.
            span = window_of(self.data, self.sets) * self.data.lanes
            if isinstance(self.plan, Composed) and self.plan.scattered:
                span = self.plan.total
            bounds, workers = Bounds.of(self.data), self.data.workers
            self._reader = Reader(self.sets, self.cache, self.data.retries, span, bounds, self._indexes, workers)
            self._owner = os.getpid()
            self._planned = {}
        return self._reader


class StepSampler(Sampler[int]):
    """The steps from start to stop, in order; torch gives whole steps to its workers in turn."""

    def __init__(self, start: int, stop: int) -> None:
        self.start, self.stop = start, stop

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.stop))


def first_numbers(counts: Sequence[Sequence[int]]) -> list[Ints]:
    """For each source, the number of the first sample of each shard, when all samples are counted from 0."""
    starts = np.cumsum([0, *(n for source in counts for n in source)])[:-1].astype(np.int64)
    return np.split(starts, np.cumsum([len(source) for source in counts])[:-1])


# --- parts -------------------------------------------------------------------------------------------------------


def members_of(
    data: Data, i: int, inputs: Mapping[str, ModalityInput], pairs: Sequence[tuple[str, str]]
) -> dict[str, list[str]]:
    """Modality → endings of source i.

    A source with ``members`` has only the modalities listed there; one without has every modality of the pairs, with
    the default endings, as far as each sample has it.

    Raises:
        ConfigError: for an unknown modality, a source that cannot make any pair, an ending that holds pickles.
    """
    source = data.sources[i]
    where = f"data.sources.{i}.members"
    paired = list(dict.fromkeys(m for pair in pairs for m in pair))
    if "/" in source.name:
        raise ConfigError(f"data.sources.{i}.name: {source.name!r} must not contain a '/'.")
    for m in source.members:
        if m not in inputs:
            raise ConfigError(f"{where}: there is no modality {m!r}. {did_you_mean(m, inputs)}")
    out = {m: list(source.members.get(m) or inputs[m].default_members) for m in paired}
    if source.members:
        out = {m: e for m, e in out.items() if m in source.members}
    for m, part in inputs.items():
        if m in out and isinstance(part, ReadsBeside) and (other := part.beside()) is not None:
            out[m] = [*(f"{ending}+{other}" for ending in out[m]), *out[m]]
    if not any(a in out and b in out for a, b in pairs):
        raise ConfigError(f"{where}: {sorted(out)} form none of the pairs {[list(p) for p in pairs]}.")
    check_members(out, where)
    if source.same is not None:
        check_members({"same": [source.same]}, f"data.sources.{i}")
    check_members({name: [v.member] for name, v in source.values.items()}, f"data.sources.{i}.values")
    return out


def _own(part: Any, raw: Any) -> Any:
    """What a modality's own member holds, of what was read: a view of it does not look beside it."""
    beside = part.beside() if isinstance(part, ReadsBeside) else None
    return next(iter(raw.values())) if beside is not None and isinstance(raw, dict) and beside in raw else raw


def check_mix(data: Data, inputs: Mapping[str, ModalityInput], pairs: Sequence[tuple[str, str]]) -> None:
    """Refuse ``data.mix`` where a modality cannot be mixed.

    Raises:
        ConfigError: naming it.
    """
    rigid = sorted({m for pair in pairs for m in pair if not isinstance(inputs[m], Mixes)})
    if data.mix and rigid:
        raise ConfigError(
            f"data.mix: {data.mix:g} needs modalities that can be mixed; {rigid[0]!r} cannot: leave it out."
        )


def _pair(reader: Reader, source: int, shard: int, sample: Sample, same: str) -> str:
    """The value that samples of one pair share, as text. Raises SampleError where the sample has none."""
    found = reader.find(source, shard, sample, {"same": [same]}).values
    if "same" not in found:
        raise SampleError(same, f"the sample has no {same}, which data.sources.{source}.same needs")
    value = found["same"]
    return value.decode("utf-8", "replace").strip() if isinstance(value, bytes) else str(value)


def sample_rng(seed: int, key: str, one: int, modality: str) -> np.random.Generator:
    """The generator for one sample's augmentation in one epoch: Philox (Salmon et al. 2011) keyed by blake2b.

    Each thread has one generator that is set to the key, which is several times faster than making one per sample; the
    generator returned by an earlier call must not be used any more.
    """
    text = f"{seed}\0{one}\0{modality}\0{key}".encode("utf-8", "surrogateescape")
    words = np.frombuffer(hashlib.blake2b(text, digest_size=16).digest(), np.dtype("<u8"))
    if not hasattr(_thread, "rng"):
        _thread.rng = np.random.Generator(np.random.Philox(key=0))
    rng: np.random.Generator = _thread.rng
    rng.bit_generator.state = {
        "bit_generator": "Philox",
        "state": {"counter": _ZEROS, "key": words},
        "buffer": _ZEROS,
        "buffer_pos": 4,
        "has_uint32": 0,
        "uinteger": 0,
    }
    return rng
