"""Items to features: every item once, on all ranks, kept by content.

The cut into batches depends on the items only, never on the number of ranks: batch k goes to rank k % W. So one
and two ranks embed the very same batches and give the same numbers, and every rank calls ``embed`` equally often
(a sharded model needs all of them): a rank without a batch left embeds the last one again and drops it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dualenc.errors import DataError, DivergenceError
from evals.ranks import Ranks
from evals.rows import Content

logger = logging.getLogger(__name__)

TOGETHER = 8
"""Batches handed to ``embed`` at once, so that it can decode the next while one is on the device."""


class Embedder(Protocol):
    """What is evaluated. ``embed`` gives L2-normalised fp32 features [n, D] on the CPU."""

    @property
    def modalities(self) -> Sequence[str]: ...

    def embed(self, modality: str, items: Sequence[Any], batch_size: int = 64) -> Tensor: ...

    def describe(self) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Inspected:
    """Digest of every content, and why those that cannot be used cannot."""

    digests: list[str]
    bad: dict[int, str]


def digest(raw: bytes | str) -> str:
    """128-bit digest of a content; a string and its bytes differ."""
    data = b"s" + raw.encode("utf-8") if isinstance(raw, str) else b"b" + raw
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def digest_of(obj: Any) -> str:
    """Digest of plain data by its JSON."""
    return digest(json.dumps(obj, sort_keys=True, ensure_ascii=False, default=str))


@dataclass
class Store:
    """Embeds contents for one model.

    Attributes:
        check: (modality, raw) → why an item cannot be used, or None. On several ranks it decides before anything is
            embedded, so a broken picture on one rank cannot leave the others waiting inside the model.
        advance: called with (what, done, total) after each round, for the progress bar.
    """

    embedder: Embedder
    ranks: Ranks
    check: Callable[[str, bytes | str], str | None]
    batch_size: int = 64
    cache_dir: Path | None = None
    advance: Callable[[str, int, int], None] | None = None
    strict: bool = field(init=False)
    """Check every item before embedding any: always on several ranks, else once an item turned out to be broken."""
    _model: str | None = field(default=None, init=False)

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
            try:
                raw = contents[i].read()
            except DataError as e:
                mine.append((i, "", str(e)))
                continue
            empty = "is empty" if not raw.strip() else None
            mine.append((i, digest(raw), empty or (self.check(modality, raw) if self.strict else None)))
        return mine

    def require(self, modality: str) -> None:
        """Raises DataError when the model has no such modality."""
        if modality not in self.embedder.modalities:
            known = ", ".join(self.embedder.modalities)
            raise DataError(f"The model has no modality {modality!r} (it has: {known}): it cannot do this task.")

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
        place = {d: n for n, d in enumerate(first)}
        distinct = [contents[i] for i in first.values()]
        key = digest_of([self._model_key(), modality, list(first), self.batch_size, torch.__version__])
        x = self._cached(key)
        if x is None:
            mine = self.ranks.agree(lambda: self._embed(modality, distinct))
            parts = sorted((p for part in self.ranks.gather(mine) for p in part), key=lambda p: p[0])
            x = torch.cat([f for _, f in parts])
            self._keep(key, x)
        _check_features(x, len(distinct), modality)
        return x[torch.tensor([place[d] for d in digests], dtype=torch.long)]

    def _embed(self, modality: str, contents: Sequence[Content]) -> list[tuple[int, Tensor]]:
        """(batch number, features) of this rank's batches."""
        size, ranks = self.batch_size, self.ranks
        batches = [contents[s : s + size] for s in range(0, len(contents), size)]
        rounds = -(-len(batches) // ranks.size)
        mine: list[tuple[int, Tensor]] = []
        for start in range(0, rounds, TOGETHER):
            numbers = [t * ranks.size + ranks.rank for t in range(start, min(start + TOGETHER, rounds))]
            # Only the very last batch is short, and it can only stand last here: the embedder's own cut into
            # batches is this one.
            items = [c.read() for k in numbers for c in batches[min(k, len(batches) - 1)]]
            with torch.no_grad():
                x = self.embedder.embed(modality, items, batch_size=size).detach().float().cpu()
            mine += [(k, f) for k, f in zip(numbers, torch.split(x, size), strict=True) if k < len(batches)]
            if self.advance is not None:
                done = min((start + len(numbers)) * ranks.size * size, len(contents))
                self.advance(modality, done, len(contents))
        return mine

    # --- kept features ---

    def _model_key(self) -> str:
        """Digest of what the model says of itself."""
        if self._model is None:
            self._model = digest_of(self.embedder.describe())
        return self._model

    def _file(self, key: str) -> Path | None:
        if self.cache_dir is None or not self._weights_known():
            return None
        return self.cache_dir / f"{key}.safetensors"

    def _weights_known(self) -> bool:
        """A model in training, or one that does not say which weights it has, cannot be told from another one."""
        weights = [v for k, v in self.embedder.describe().items() if k.startswith("weights")]
        return bool(weights) and all(v and v != "in training" for v in weights)

    def _cached(self, key: str) -> Tensor | None:
        """Kept features, read by rank 0 (the folder may be on its machine only) and given to all."""
        file = self._file(key)
        return None if file is None else self.ranks.share(lambda: _read_kept(file))

    def _keep(self, key: str, x: Tensor) -> None:
        file = self._file(key)
        if file is None or not self.ranks.is_main:
            return
        from safetensors.torch import save

        file.parent.mkdir(parents=True, exist_ok=True)
        tmp = file.with_name(f"{file.name}.{os.getpid()}.tmp")
        tmp.write_bytes(save({"features": x.contiguous()}))
        tmp.replace(file)


def _read_kept(file: Path) -> Tensor | None:
    from safetensors import SafetensorError
    from safetensors.torch import load

    if not file.is_file():
        return None
    try:
        return load(file.read_bytes())["features"]
    except (SafetensorError, KeyError) as e:
        logger.warning("%s is damaged (%s): embedding again", file, e)
        return None


def _check_features(x: Tensor, n: int, modality: str) -> None:
    if x.ndim != 2 or len(x) != n:
        raise ValueError(f"embed({modality!r}, …) gave shape {tuple(x.shape)} for {n} items, expected [{n}, D]")
    finite = torch.isfinite(x).all(1)
    if not bool(finite.all()):
        bad = int((~finite).sum())
        raise DivergenceError(f"{bad} of {n} {modality} features are not finite: nothing can be ranked by them.")
    norms = x.norm(dim=1)
    if float((norms - 1).abs().max()) > 1e-3:
        raise ValueError(f"embed({modality!r}, …) must give L2-normalised rows, norms reach {float(norms.max()):.4f}")
