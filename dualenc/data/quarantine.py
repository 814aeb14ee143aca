"""Lost samples: counted per source and listed in ``quarantine.jsonl``; too many of them stop the run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dualenc.data.batch import BadSample, Batch
from dualenc.distributed.world import World, all_reduce_sum
from dualenc.errors import DataError

Counts = dict[str, tuple[int, int]]
"""Source → (samples seen, samples lost)."""

_REMEMBERED = 200_000


class Ledger:
    """Counts of one rank; rank 0 writes ``quarantine.jsonl``, rank r ``quarantine.rank<r>.jsonl``.

    Args:
        run_dir: where the files go; None: nothing is written.
        max_bad_share: as in the recipe's ``data`` section.
        rank: this process's rank.
        sources: names of all sources, the same on every rank; needed to sum over ranks.
    """

    def __init__(
        self, run_dir: str | Path | None, max_bad_share: float, rank: int = 0, sources: Sequence[str] = ()
    ) -> None:
        name = "quarantine.jsonl" if rank == 0 else f"quarantine.rank{rank}.jsonl"
        self.path = Path(run_dir) / name if run_dir is not None else None
        self.max_bad_share = max_bad_share
        self._before: Counts = {}  # of all ranks, at the last checkpoint
        self._seen: dict[str, int] = dict.fromkeys(sources, 0)
        self._bad: dict[str, int] = dict.fromkeys(sources, 0)
        self._last: dict[str, BadSample] = {}
        self._written: set[int] = set()

    def add(self, batch: Batch) -> None:
        """Count a batch and record its lost samples (each once, even over several epochs)."""
        for key in batch.keys:
            source = key.split("/", 1)[0]
            self._seen[source] = self._seen.get(source, 0) + 1
        new = []
        for bad in batch.bad:
            self._bad[bad.source] = self._bad.get(bad.source, 0) + 1
            self._last[bad.source] = bad
            if self._is_new(bad.source, bad.shard, bad.key):
                new.append(json.dumps({"step": batch.step, **asdict(bad)}, ensure_ascii=False))
        if new and self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8", errors="backslashreplace") as f:
                f.write("\n".join(new) + "\n")

    def _is_new(self, source: str, shard: str, key: str) -> bool:
        mark = hash((source, shard, key))
        if mark in self._written:
            return False
        if len(self._written) < _REMEMBERED:
            self._written.add(mark)
        return True

    def _read_written(self) -> None:
        """Remember what earlier processes recorded, on any rank; a line cut short by a kill is removed."""
        if self.path is None:
            return
        if self.path.exists():
            raw = self.path.read_bytes()
            self.path.write_bytes(raw[: raw.rfind(b"\n") + 1])
        for path in sorted(self.path.parent.glob("quarantine*.jsonl")):
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
                if line.endswith("\n"):
                    row = json.loads(line)
                    self._is_new(row["source"], row["shard"], row["key"])

    def counts(self) -> Counts:
        """Counts of this rank, added to those it was resumed with."""
        names = sorted({*self._before, *self._seen, *self._bad})
        out: Counts = {}
        for s in names:
            seen, bad = self._before.get(s, (0, 0))
            out[s] = (seen + self._seen.get(s, 0), bad + self._bad.get(s, 0))
        return out

    def sum_over_ranks(self, world: World) -> Counts:
        """Counts of all ranks together; every rank calls it and gets the same."""
        if world.world_size == 1:
            return self.counts()
        names = sorted(self._seen)
        mine = torch.tensor([[self._seen[s], self._bad.get(s, 0)] for s in names], dtype=torch.float64)
        total = all_reduce_sum(mine, world).tolist()
        out = dict(self._before)
        for s, (seen, bad) in zip(names, total, strict=True):
            had = self._before.get(s, (0, 0))
            out[s] = (had[0] + int(seen), had[1] + int(bad))
        return out

    def check(self, counts: Mapping[str, tuple[int, int]] | None = None, final: bool = False) -> None:
        """Stop when a source lost more than its share.

        During a run the excess must be three standard deviations of the count (lost − 3·√lost > share · seen), so that
        bad luck with the first samples stops nothing, while a source that is entirely bad stops at its tenth sample; a
        share of 0 allows none. ``final`` compares the shares as they are.

        Raises:
            DataError: naming the source, its counts and the last reason.
        """
        for source, (seen, bad) in (self.counts() if counts is None else counts).items():
            sure = bad if final or self.max_bad_share == 0 else bad - 3 * math.sqrt(bad)
            if bad and sure > self.max_bad_share * seen:
                last = self._last.get(source)
                why = f" The last one: {last.shard}/{last.key}: {last.reason}." if last else ""
                where = f" All are listed in {self.path}." if self.path is not None else ""
                raise DataError(
                    f"Source {source!r} lost {bad} of {seen} samples, more than data.max_bad_share "
                    f"({self.max_bad_share}) allows.{why}{where}"
                )

    def state_dict(self, world: World | None = None) -> dict[str, Any]:
        """Counts of all ranks, for the checkpoint. With a world of several ranks, every rank calls it."""
        counts = self.counts() if world is None else self.sum_over_ranks(world)
        return {"counts": {s: list(c) for s, c in counts.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from saved counts; an empty state starts at zero. Samples listed before are not listed again."""
        self._read_written()
        self._before = {s: (int(c[0]), int(c[1])) for s, c in state.get("counts", {}).items()}
