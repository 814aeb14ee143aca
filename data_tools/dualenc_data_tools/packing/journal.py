"""What a build has finished, so that a killed one goes on: a line of ``.build-NAME.jsonl`` for each complete shard.

The first line is the build's settings, then one line a shard (the tar has a hidden name until all are complete), then
one that says that the shards are being given their names. A line is one write, and a torn last line counts as absent.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dualenc.errors import ConfigError
from dualenc.files import write_atomically
from dualenc_data_tools.writer import PATTERN, partial


@dataclass
class ShardLine:
    """One complete shard.

    Attributes:
        first: number of its first record.
        through: every record of its split up to this number is in a complete shard or dropped.
        names: digest of the records up to ``through`` (:class:`dualenc_data_tools.packing.pack.Numbered`).
        drops: number, name, reason, detail, asked of the split's records that were dropped since the shard before.
        digests: number and digest of its samples, where repeats are left out.
    """

    split: str
    shard: int
    first: int = 0
    through: int = -1
    names: str = ""
    samples: int = 0
    captions: int = 0
    bytes: int = 0
    drops: list[tuple[int, str, str, str, bool]] = field(default_factory=list)
    digests: list[tuple[int, str]] = field(default_factory=list)

    @property
    def file(self) -> str:
        """The shard's name."""
        return PATTERN.format(split=self.split, shard=self.shard)


class Journal:
    """The journal of the build ``label`` in a folder.

    Args:
        settings: what the shards depend on; a journal of others is refused, or discarded if ``anew``.

    Raises:
        ConfigError: an unfinished build of other settings is there.
    """

    def __init__(self, folder: Path, label: str, settings: dict[str, Any], anew: bool) -> None:
        self.folder, self.path = folder, folder / f".build-{label}.jsonl"
        self.shards: list[ShardLine] = []
        self.published: dict[str, Any] | None = None
        """Reasons and names of all dropped records, once the shards are being given their names."""
        self._open = False
        lines = self._lines()
        self._head = head = json.loads(json.dumps({"settings": settings}))
        if lines and lines[0] != head:
            changed = sorted(_differing(lines[0].get("settings", {}), head["settings"])) or ["settings"]
            if not anew:
                raise ConfigError(
                    f"{folder} holds an unfinished build with another {changed[0]}: run it again with the settings it "
                    f"had to resume, or pass overwrite=true to discard it"
                )
            self._take(lines[1:])
            self.discard()
            lines = []
        self._take(lines[1:])

    def done(self, split: str) -> list[ShardLine]:
        """The complete shards of a split, in order."""
        return [s for s in self.shards if s.split == split]

    def add(self, shard: ShardLine) -> None:
        """A shard is complete."""
        self._append(asdict(shard))
        self.shards.append(shard)

    def publish(self, drops: list[tuple[int, str, str, str, bool]]) -> None:
        """Every shard is complete; from here on only names change."""
        self.published = {"publish": drops}
        self._append(self.published)

    def remove(self) -> None:
        """The build is complete (or given up): nothing is left to resume."""
        self.path.unlink(missing_ok=True)

    def discard(self) -> None:
        """Delete the journal and the hidden shards that it lists."""
        for shard in self.shards:
            partial(self.folder / shard.file).unlink(missing_ok=True)
        self.shards = []
        self.remove()

    def _take(self, lines: list[dict[str, Any]]) -> None:
        counts: dict[str, int] = {}
        for line in lines:
            if "publish" in line:
                self.published = line
                return
            shard = ShardLine(**line)
            hidden = partial(self.folder / shard.file)
            whole = hidden.is_file() and hidden.stat().st_size == shard.bytes
            if shard.shard == counts.get(shard.split, 0) and (whole or any("publish" in x for x in lines)):
                counts[shard.split] = shard.shard + 1
                self.shards.append(shard)

    def _lines(self) -> list[dict[str, Any]]:
        if not self.path.is_file():
            return []
        out = []
        raw = self.path.read_bytes()
        for line in raw.split(b"\n")[:-1]:  # what follows the last newline was cut off by a kill
            try:
                out.append(json.loads(line))
            except ValueError:
                break
        return out

    def _append(self, line: dict[str, Any]) -> None:
        if not self._open:  # the first line of this process: what a kill left of the last one is cut off
            kept = [json.dumps(x) + "\n" for x in self._lines()] or [json.dumps(self._head) + "\n"]
            write_atomically(self.path, "".join(kept))
            self._open = True
        with self.path.open("ab", buffering=0) as f:
            f.write(json.dumps(line).encode() + b"\n")


def _differing(a: dict[str, Any], b: dict[str, Any]) -> set[str]:
    return {k for k in a.keys() | b.keys() if a.get(k) != b.get(k)}
