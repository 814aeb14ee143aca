"""Do a task's items occur in the shards that the model was trained on?

They are compared by content: an image, sound or sweep occurs if a member of a training shard has its very bytes, under
whatever key. Captions are not compared, as different items may share one; an image that was encoded again is not found.
Sizes, which are in the shards' indexes, rule out nearly all members, and only those of an item's size are read, at most
:data:`READS` of them. Shards that are not on this machine are left out, and the result says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from dualenc.config import Source, load_yaml, settings_as
from dualenc.data.modalities import modalities
from dualenc.data.shards.index import ShardSet, expand, open_source
from dualenc.data.shards.reader import Reader, SampleError
from dualenc.data.shards.remote import is_local
from dualenc.errors import ConfigError, DataError
from dualenc_evals.features import Store, digest
from dualenc_evals.read.rows import Content, Row

READS = 50_000
"""Members of an item's size that are read for one task, in the order of the shards; beyond them N is a lower bound."""
_TEXTS = ("json", "cls", *(e for e in modalities["text"].default_members if ":" not in e))


def training_sources(model: str | Path) -> list[Source]:
    """What the recipe of a run, a checkpoint or the bundle in it names as training data; empty where there is none.

    The recipe is read as data: it may be somebody else's, and nothing that it names is imported or run.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return []
    around = [folder, *list(folder.resolve().parents)[:3]] if (folder / "dualenc.json").is_file() else [folder]
    path = next((p / "recipe.yaml" for p in around if (p / "recipe.yaml").is_file()), None)
    try:
        said = load_yaml(path.read_text(encoding="utf-8")) if path is not None else None
        rows = said["data"]["sources"] if isinstance(said, dict) else []
        return [settings_as(Source, row, f"{path}: data.sources") for row in rows]
    except (yaml.YAMLError, OSError, UnicodeDecodeError, KeyError, TypeError, ConfigError):
        return []  # not a recipe that trained anything


@dataclass
class TrainingShards:
    """The training data that is on this machine; opened when it is first asked for.

    Attributes:
        unread: sources that cannot be compared, and why.
    """

    sources: Sequence[Source]
    unread: dict[str, str] = field(default_factory=dict)
    _reader: Reader | None = field(default=None, init=False)

    def occurring(self, wanted: dict[int, set[str]]) -> tuple[set[str], bool]:
        """Those of the digests, by the size of their items, that training shards hold; whether all members were read
        that could have been among them."""
        reader = self._opened()
        sizes = np.array(sorted(wanted), np.int64)
        found: set[str] = set()
        reads = 0
        for s, shards in enumerate(reader.sets):
            try:
                for shard in range(len(shards.urls)):
                    index = reader.index(s, shard)
                    texts = [i for i, e in enumerate(index.endings) if e in _TEXTS]
                    fits = np.isin(index.size, sizes) & ~np.isin(index.ending, texts)
                    for i in np.flatnonzero(fits).tolist():
                        if reads >= READS:
                            return found, False
                        reads += 1
                        sample = index.sample(int(np.searchsorted(index.first, i, side="right")) - 1)
                        ending = index.endings[int(index.ending[i])]
                        got = digest(reader.read(s, shard, sample, ending))
                        if got in wanted[int(index.size[i])]:
                            found.add(got)
            except (DataError, SampleError) as e:
                self.unread[shards.source] = str(e)
        return found, True

    def _opened(self) -> Reader:
        if self._reader is None:
            sets: list[ShardSet] = []
            for source in self.sources:
                try:
                    if not all(map(is_local, expand(source.shards))):
                        raise DataError("its shards are not on this machine")
                    sets.append(open_source(source))
                except (DataError, ConfigError, OSError) as e:
                    self.unread[source.name] = str(e)
            self._reader = Reader(sets, None, retries=0)
        return self._reader


def overlap(
    rows: Sequence[Row], modalities_read: Sequence[str], store: Store, training: TrainingShards
) -> dict[str, Any]:
    """``{"count", "of", "complete", "unread"}``: how many of the rows have an item that training shards hold.

    Every rank calls it, after the items were inspected, and gets the same; rank 0 reads the training shards.
    """
    places = [
        (r, m, c)
        for m in modalities_read
        for r, row in enumerate(rows)
        for c in row.contents[m]
        if _size(c) is not None
    ]
    digests: list[str] = []
    for m in modalities_read:
        digests += store.inspect(m, [c for _, of, c in places if of == m]).digests

    def compare() -> dict[str, Any]:
        wanted: dict[int, set[str]] = {}
        for (_, _, content), d in zip(places, digests, strict=True):
            size = _size(content)
            if d and size:
                wanted.setdefault(size, set()).add(d)
        found, complete = training.occurring(wanted)
        count = len({r for (r, _, _), d in zip(places, digests, strict=True) if d in found})
        return {"count": count, "of": len({r for r, _, _ in places}), "complete": complete, "unread": training.unread}

    return dict(store.ranks.share(compare))


def sentence(seen: dict[str, Any]) -> str:
    """The result for a person; empty where nothing was found."""
    least = "" if seen["complete"] and not seen["unread"] else "at least "
    return f"{least}{seen['count']} of {seen['of']} items occur in the training shards." if seen["count"] else ""


def _size(content: Content) -> int | None:
    """Bytes of an item that is a file or a member on this machine; None for the others."""
    if content.error or content.text is not None or not content.path:
        return None
    if content.size >= 0:
        return content.size
    try:
        return None if content.load is not None else Path(content.path).stat().st_size
    except OSError:
        return None
