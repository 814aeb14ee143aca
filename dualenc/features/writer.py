"""Writes features to disk: every rank the parts it made, rank 0 the list of all parts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dualenc.distributed.world import World, agree, all_gather_object
from dualenc.errors import ConfigError, DataError
from dualenc.features.store import (
    ABOUT,
    DTYPES,
    FORMAT,
    Description,
    FeaturePart,
    Lost,
    PartInfo,
    digest_of,
    read_about,
    stored,
)
from dualenc.files import write_atomically

PartRows = Mapping[str, tuple[Sequence[int], Tensor]]
"""Modality → the ids its rows belong to [n], and the rows [n, V, D] fp32."""


class FeatureWriter:
    """Writes a :class:`~dualenc.features.store.FeatureStore`. Every rank of ``world`` makes one, and calls finish.

    Args:
        growing: parts are added by name and never finished, and other processes may add to the folder too.
        overwrite: replace features of another description in ``folder``.

    Raises:
        ConfigError: an unknown dtype; the folder cannot be written to, or holds features of another description, naming
            the first field that differs.
        DataError: its description is damaged.
    """

    def __init__(
        self,
        folder: str | Path,
        description: Description,
        world: World | None = None,
        growing: bool = False,
        overwrite: bool = False,
    ) -> None:
        if description.dtype not in DTYPES:
            raise ConfigError(f"unknown dtype {description.dtype!r}; use {', '.join(DTYPES)}")
        self.folder, self.description, self.growing = Path(folder), description, growing
        self.world, self.digest = world or World(), description.digest
        for rank, digest in enumerate(all_gather_object(self.digest, self.world)):
            if digest != self.digest:
                raise DataError(f"rank {rank} has different weights, settings or versions from rank {self.world.rank}")
        agree(lambda: self._begin(overwrite) if self.world.rank == 0 else None, self.world)

    def finished(self, name: str, data: Mapping[str, Any]) -> PartInfo | None:
        """The part of that name, if it is complete, of this description and made from the same data."""
        part = self.part(name)
        return part.info() if part is not None and part.data == dict(data) else None

    def part(self, name: str) -> FeaturePart | None:
        """The part of that name, if it is complete and of this description."""
        return FeaturePart.whole(self.folder, name, self.digest)

    def write(
        self,
        name: str,
        ids: Sequence[str],
        rows: PartRows,
        lost: Sequence[Lost] = (),
        data: Mapping[str, Any] | None = None,
    ) -> PartInfo:
        """Write one part, its json last.

        Raises:
            DataError: the disk is full or the folder read-only.
        """
        from safetensors.torch import save

        tensors: dict[str, Tensor] = {}
        for m, (which, x) in rows.items():
            tensors |= stored(x, self.description.dtype, m)
            tensors[f"{m}.rows"] = torch.as_tensor(which, dtype=torch.int64)
        raw = save(tensors)
        counts = {m: len(which) for m, (which, _) in rows.items()}
        sha = hashlib.sha256(raw).hexdigest()
        record = {
            "format": FORMAT,
            "of": self.digest,
            "data": dict(data or {}),
            "rows": counts,
            "lost": [asdict(x) for x in lost],
            "bytes": len(raw),
            "sha256": sha,
            "ids": list(ids),
        }
        (self.folder / f"{name}.parquet").unlink(missing_ok=True)  # a table of the part that was here before
        self._put(f"{name}.safetensors", raw)
        self._put_json(f"{name}.json", record)
        return FeaturePart(self.folder, name).info()

    def finish(self, mine: Iterable[PartInfo], order: Sequence[str]) -> list[PartInfo]:
        """List the parts of all ranks, in ``order`` of their names; the store is then finished.

        Returns:
            All parts, on every rank.
        """
        found = {i.name: i for part in all_gather_object(list(mine), self.world) for i in part}
        infos = [found[name] for name in order]
        agree(lambda: self._end(infos) if self.world.rank == 0 else None, self.world)
        return infos

    def _begin(self, overwrite: bool) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not self.growing:
                for left in self.folder.glob(".*.tmp"):  # left by a process that was killed while writing
                    left.unlink(missing_ok=True)
        except OSError as e:
            raise ConfigError(f"{self.folder} cannot be written to ({e.strerror or e}); name another folder") from e
        before: list[dict[str, Any]] = []
        if (self.folder / ABOUT).is_file():
            try:
                about = read_about(self.folder)
            except DataError as e:
                if not overwrite and not self.growing:
                    raise DataError(f"{e} (--overwrite replaces what is in the folder)") from e
            else:
                if not overwrite:
                    self._refuse_other(about)
                    if self.growing:
                        return
                before = about["parts"]
        self._put_json(ABOUT, self._about(before, finished=False))

    def _refuse_other(self, about: Mapping[str, Any]) -> None:
        if about["digest"] == self.digest:
            return
        key, old, new = _first_difference(about["description"], self.description.plain())
        raise ConfigError(
            f"{self.folder} holds other features: {key} is {_short(old)} there and {_short(new)} now; name another "
            "folder (--out), or replace them with --overwrite"
        )

    def _end(self, infos: Sequence[PartInfo]) -> None:
        before = {str(x.get("name")) for x in read_about(self.folder)["parts"]}
        self._put_json(ABOUT, self._about([asdict(i) for i in infos], finished=True))
        for name in sorted(before - {i.name for i in infos}):  # of shards that are no longer among the data
            for ending in ("json", "safetensors", "parquet"):
                (self.folder / f"{Path(name).name}.{ending}").unlink(missing_ok=True)

    def _about(self, parts: Sequence[Mapping[str, Any]], finished: bool) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "finished": finished,
            "digest": self.digest,
            "data_digest": digest_of([p["data"] for p in parts]) if finished else None,
            "description": self.description.plain(),
            "parts": list(parts),
        }

    def _put_json(self, name: str, plain: Mapping[str, Any]) -> None:
        try:
            raw = json.dumps(plain, ensure_ascii=False, indent=1).encode()
        except UnicodeEncodeError:  # an id that is not UTF-8 in its shard: escaped, so that the file is
            raw = json.dumps(plain, indent=1).encode()
        self._put(name, raw)

    def _put(self, name: str, raw: bytes) -> None:
        try:
            write_atomically(self.folder / name, raw)
        except OSError as e:
            raise DataError(f"{self.folder / name} cannot be written ({e.strerror or e})") from e


def _first_difference(old: Any, new: Any, where: str = "") -> tuple[str, Any, Any]:
    """Path, old and new value of the first field that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*new, *old]):
            if old.get(key) != new.get(key):
                return _first_difference(old.get(key), new.get(key), f"{where}.{key}" if where else str(key))
    return where, old, new


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}…"
