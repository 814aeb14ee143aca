"""Scores of the shards that a filter has done, so that a stopped run of it goes on after them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dualenc.data.shards.remote import is_local, local_path
from dualenc.data.shards.selection import SCORES, described, file_of
from dualenc.errors import ConfigError
from dualenc_data_tools.choose.filter import Filter, Opened, Score


class KeptScores:
    """``.NAME-DIGEST.scores.jsonl`` beside the first shard: a line for each shard that is done.

    The digest is of the filter's settings; a line names its shard's samples, bytes and headers, and does not count once
    they have changed. What follows the last newline was cut off by a kill. Shards without a folder keep nothing.
    """

    def __init__(self, name: str, filter: Filter, opened: Opened) -> None:
        about = f"{name} {filter.config.model_dump_json()}"
        digest = hashlib.blake2b(about.encode(), digest_size=4).hexdigest()
        self._shards = described(opened.shards)
        self._path: Path | None
        try:
            path = file_of(f".{name}-{digest}", opened.shards, SCORES).removesuffix(".parquet") + ".jsonl"
            self._path = Path(local_path(path)) if is_local(path) else None
        except ConfigError:  # shards of a pipe: command
            self._path = None
        self._done: dict[str, dict[str, list[Score]]] = {}
        if self._path is not None and self._path.is_file():
            self._read(self._path.read_bytes())

    def done(self, shard: int) -> dict[str, list[Score]] | None:
        """The scores of a shard, if it is done."""
        return self._done.get(json.dumps(self._shards[shard]))

    def add(self, shard: int, scores: Mapping[str, Sequence[Score]]) -> None:
        """A shard is done."""
        if self._path is None:
            return
        line = {"shard": self._shards[shard], "scores": {n: [_plain(v) for v in s] for n, s in scores.items()}}
        with self._path.open("ab", buffering=0) as f:
            f.write(json.dumps(line).encode() + b"\n")

    def remove(self) -> None:
        """All are done and written."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _read(self, raw: bytes) -> None:
        lines = raw.split(b"\n")
        for line in lines[:-1]:
            got = json.loads(line)
            self._done[json.dumps(got["shard"])] = got["scores"]
        if lines[-1] and self._path is not None:
            with self._path.open("r+b") as f:
                f.truncate(len(raw) - len(lines[-1]))


def _plain(value: Any) -> Score:
    return value if value is None or isinstance(value, str) else float(value)
