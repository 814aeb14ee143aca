"""From items to features: every item is embedded once, by one of the ranks, and kept by content.

The cut into batches depends on the items only, never on the number of ranks: of each window of batches, batch k goes
to rank k % W. So one and two ranks embed the very same batches and give the same numbers, and every rank calls
``embed`` equally often (a sharded model needs all of them): a rank without a batch left embeds the last one again and
drops it. Strings are embedded in order of length, as a batch is padded to its longest.

Features are kept in chunks of ``TOGETHER`` batches as they come, each a part of a store of features that grows
(:mod:`dualenc.features.store`): a folder for the model, a part named by the digest of the chunk's contents. A run that
was killed resumes at the first missing chunk.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from dualenc.errors import ConfigError, DataError, DivergenceError
from dualenc.features.store import Description
from dualenc.features.writer import FeatureWriter
from dualenc_evals.ranks import Ranks
from dualenc_evals.read.rows import Content

logger = logging.getLogger(__name__)

TOGETHER = 8
"""Batches handed to ``embed`` at once, so that it can decode the next while one is on the device; and a chunk."""


Seen = dict[tuple[str, bool, Content], tuple[str, str | None]]
"""(modality, checked, content) → its digest and why it cannot be used."""


class EvalModel(Protocol):
    """What is evaluated: any object with these two methods and ``modalities``.

    ``embed`` takes raw items (bytes of an image or audio file, a string) and gives L2-normalised fp32 features [n, D]
    on the CPU, row by row. It raises DataError (or DecodeError) for an item it cannot use. ``describe`` is written into
    the results; if it has a key that begins with ``weights`` (a hash of the weights), features are kept under it
    and reused; without one they are not kept.
    """

    @property
    def modalities(self) -> Sequence[str]: ...

    def embed(self, modality: str, items: Sequence[Any], batch_size: int = 64) -> Tensor: ...

    def describe(self) -> dict[str, Any]: ...


@runtime_checkable
class OnDevice(Protocol):
    """A model that says where it computes; any other is assumed to compute on the CPU."""

    @property
    def device(self) -> torch.device: ...


@dataclass(frozen=True, slots=True)
class Inspected:
    """Digest of every item, and the reason for each one that cannot be used."""

    digests: list[str]
    bad: dict[int, str]


def digest(raw: Any) -> str:
    """128-bit digest of an item: bytes, a string (which differs from its bytes), or a dictionary of joined parts."""
    if isinstance(raw, Mapping):
        parts = sorted((k, digest(v) if isinstance(v, bytes | str) else digest_of(v)) for k, v in raw.items())
        return digest(json.dumps(["joined", parts]))
    data = b"s" + raw.encode("utf-8", "surrogatepass") if isinstance(raw, str) else b"b" + raw
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def digest_of(obj: Any) -> str:
    """Digest of plain data by its JSON."""
    return digest(json.dumps(obj, sort_keys=True, ensure_ascii=False, default=str))


@dataclass
class Store:
    """Embeds contents for one model.

    Attributes:
        check: (modality, raw) → why an item cannot be used, or None. On several ranks it decides before anything is
            embedded, so a broken image on one rank cannot leave the others waiting inside the model.
        kinds: modality → the registered kind of its items, for showing them.
        advance: called with (what, done, total) after each round, for the progress bar.
        seen: what :meth:`inspect` found in files in earlier evaluations of the same data, see ``evaluate``.
    """

    embedder: EvalModel
    ranks: Ranks
    check: Callable[[str, bytes | str], str | None]
    batch_size: int = 64
    cache_dir: Path | None = None
    advance: Callable[[str, int, int], None] | None = None
    kinds: Mapping[str, str] = field(default_factory=dict)
    seen: Seen = field(default_factory=dict)
    strict: bool = field(init=False)
    """Check every item before embedding any: always on several ranks, else once an item turned out to be broken."""
    _keeps: bool | None = field(default=None, init=False)
    _writer: FeatureWriter | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.strict = self.ranks.size > 1

    def inspect(self, modality: str, contents: Sequence[Content]) -> Inspected:
        """Read each content once, its rank's share each: digest it, and find out whether it can be used."""
        mine = self.ranks.agree(lambda: self._inspect(modality, contents))
        found = sorted((x for part in self.ranks.gather(mine) for x in part), key=lambda x: x[0])
        return Inspected([d for _, d, _ in found], {i: reason for i, _, reason in found if reason is not None})

    def _inspect(self, modality: str, contents: Sequence[Content]) -> list[tuple[int, str, str | None]]:
        mine: list[tuple[int, str, str | None]] = []
        for i in range(self.ranks.rank, len(contents), self.ranks.size):
            key = (modality, self.strict, contents[i])
            found = self.seen.get(key) or self._look(modality, contents[i])
            if contents[i].text is None:
                self.seen[key] = found
            mine.append((i, *found))
        return mine

    def _look(self, modality: str, content: Content) -> tuple[str, str | None]:
        """Digest of one content, and why it cannot be used."""
        try:
            raw = content.read()
        except DataError as e:
            return "", str(e)
        empty = "is empty" if not (raw.strip() if isinstance(raw, bytes | str) else raw) else None
        return digest(raw), empty or (self.check(modality, raw) if self.strict else None)

    def require(self, modality: str) -> None:
        """Raises DataError when the model has no such modality."""
        if modality not in self.embedder.modalities:
            known = ", ".join(self.embedder.modalities)
            raise DataError(f"The model has no modality {modality!r} (it has {known}), so it cannot do this task.")

    def features(self, modality: str, contents: Sequence[Content], digests: Sequence[str]) -> Tensor:
        """[n, D] features of ``contents`` on every rank; equal contents are embedded once and get equal features.

        Raises:
            DataError: the model has no such modality, or cannot take an item.
            DivergenceError: features that are not finite.
        """
        self.require(modality)
        first: dict[str, int] = {}
        for i, d in enumerate(digests):
            first.setdefault(d, i)
        order = list(first)
        if all(contents[i].text is not None for i in first.values()):
            order.sort(key=lambda d: len(contents[first[d]].text or ""))
        place = {d: n for n, d in enumerate(order)}
        x = self._chunks(modality, [contents[first[d]] for d in order], order)
        _check_features(x, len(order), modality)
        return x[torch.tensor([place[d] for d in digests], dtype=torch.long)]

    def _chunks(self, modality: str, contents: Sequence[Content], digests: Sequence[str]) -> Tensor:
        """[n, D]: the chunks that are kept are read, the others embedded and kept."""
        size, n = TOGETHER * self.batch_size, len(contents)
        spans = [(s, min(s + size, n)) for s in range(0, n, size)]
        chunks = [digests[s:e] for s, e in spans]
        kept: list[Tensor | None] = [None] * len(spans)
        if self._keeping():  # read by rank 0 (the folder may be on its machine only) and given to all
            kept = self.ranks.share(lambda: [self._read(modality, ids) for ids in chunks])
        missing = [c for c, x in enumerate(kept) if x is None]
        done = n - sum(spans[c][1] - spans[c][0] for c in missing)
        # One chunk per rank at a time: each rank then has a full call of ``embed`` to make.
        for start in range(0, len(missing), self.ranks.size):
            window = missing[start : start + self.ranks.size]
            batches = [
                contents[s : min(s + self.batch_size, spans[c][1])]
                for c in window
                for s in range(*spans[c], self.batch_size)
            ]
            mine = self.ranks.agree(lambda b=batches: self._embed(modality, b))  # type: ignore[misc]
            parts = sorted((p for part in self.ranks.gather(mine) for p in part), key=lambda p: p[0])
            rows = torch.split(torch.cat([f for _, f in parts]), [spans[c][1] - spans[c][0] for c in window])
            for c, x in zip(window, rows, strict=True):
                _check_features(x, len(x), modality)
                kept[c] = x
                self._keep(modality, chunks[c], x)
                done += len(x)
            if self.advance is not None:
                self.advance(modality, done, n)
        return torch.cat([x for x in kept if x is not None])

    def _embed(self, modality: str, batches: Sequence[Sequence[Content]]) -> list[tuple[int, Tensor]]:
        """(batch number, features) of this rank's batches."""
        size, ranks = self.batch_size, self.ranks
        numbers = range(ranks.rank, -(-len(batches) // ranks.size) * ranks.size, ranks.size)
        # Only the very last batch is short, and it can only stand last here: the embedder's own cut into batches is
        # this one.
        items = [c.read() for k in numbers for c in batches[min(k, len(batches) - 1)]]
        with torch.no_grad():
            x = self.embedder.embed(modality, items, batch_size=size).detach().float().cpu()
        if len(x) != len(items):
            raise ValueError(f"embed({modality!r}, …) gave {len(x)} rows for {len(items)} items")
        return [(k, f) for k, f in zip(numbers, torch.split(x, size), strict=True) if k < len(batches)]

    # --- kept features ---

    def _keeping(self) -> bool:
        """Whether features are kept; the same on every rank, and rank 0 then has a writer."""
        if self._keeps is None:
            about = self.embedder.describe()
            # A model in training, or one that does not say which weights it has, cannot be told apart from another.
            weights = [v for k, v in about.items() if k.startswith("weights")]
            known = bool(weights) and all(v and v != "in training" for v in weights)
            self._keeps = known and self.cache_dir is not None
            if self._keeps and self.ranks.is_main:
                self._open(about)
        return self._keeps

    def _open(self, about: dict[str, Any]) -> None:
        assert self.cache_dir is not None
        # The same weights give slightly other features on another kind of device, or in batches of another size.
        device = self.embedder.device.type if isinstance(self.embedder, OnDevice) else "cpu"
        made = {"batch_size": self.batch_size, "device": device, "torch": str(torch.__version__)}
        names = list(self.embedder.modalities)
        description = Description(about, {m: m for m in names}, dict.fromkeys(names, 1), "fp32", made)
        try:
            self._writer = FeatureWriter(self.cache_dir / description.digest, description, growing=True)
        except (ConfigError, DataError) as e:
            logger.warning("Features are not cached: %s", e)

    def _read(self, modality: str, ids: Sequence[str]) -> Tensor | None:
        part = self._writer.part(_chunk_name(modality, ids)) if self._writer is not None else None
        return part.features(modality)[:, 0] if part is not None else None

    def _keep(self, modality: str, ids: Sequence[str], x: Tensor) -> None:
        if self._writer is None:
            return
        rows = {modality: (range(len(ids)), x[:, None])}
        try:
            self._writer.write(_chunk_name(modality, ids), ids, rows)
        except DataError as e:
            logger.warning("Features are no longer cached: %s", e)
            self._writer = None


def _chunk_name(modality: str, ids: Sequence[str]) -> str:
    return digest_of([modality, *ids])


def _check_features(x: Tensor, n: int, modality: str) -> None:
    if x.ndim != 2 or len(x) != n:
        raise ValueError(f"embed({modality!r}, …) gave shape {tuple(x.shape)} for {n} items, expected [{n}, D]")
    finite = torch.isfinite(x).all(1)
    if not bool(finite.all()):
        bad = int((~finite).sum())
        raise DivergenceError(f"{bad} of {n} {modality} features are not finite, so nothing can be ranked.")
    norms = x.norm(dim=1)
    if float((norms - 1).abs().max()) > 1e-3:
        raise ValueError(f"embed({modality!r}, …) must give L2-normalised rows, norms reach {float(norms.max()):.4f}")
