"""A glance at the shards of a recipe: do its members' endings occur at all? Indexes are read, no sample is."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from dualenc.config import Data, Recipe
from dualenc.data.shards.index import ShardSet
from dualenc.data.shards.reader import Reader, SampleError
from dualenc.data.shards.remote import Bounds
from dualenc.errors import DataError
from dualenc_data_tools.wanted import advice, of_recipe

SHARDS = 16
SAMPLES = 64
"""Of a source: how many shards are looked at, and how many samples of each, both spread over the whole."""


def glance(recipe: Recipe, sets: Sequence[ShardSet]) -> list[str]:
    """Look at some samples of every source; sentences about modalities that none of them has.

    Args:
        sets: the recipe's sources, opened.

    Raises:
        DataError: none of a source's samples has a pair: which endings there are, and what to write.
    """
    notes = []
    for i, shards in enumerate(sets):
        wanted = of_recipe(recipe, i)
        samples, endings, found, paired = 0, Counter[str](), Counter[str](), False
        for members in _members(shards, recipe.data):
            samples += 1
            endings.update(members)
            there = {m for m, entries in wanted.members.items() if any(_has(members, e) for e in entries)}
            found.update(there)
            paired = paired or wanted.paired(there)
        if samples and not paired:
            raise DataError(
                f"data.sources.{i}: training would use none of the {samples:,} samples of {shards.source!r} that "
                f"were looked at: {advice(endings, wanted)}"
            )
        for m in recipe.data.sources[i].members if samples else ():
            if not found[m]:
                common = ", ".join(f".{e}" for e, _ in endings.most_common(8))
                notes.append(
                    f"data.sources.{i}.members.{m}: none of the {samples:,} samples looked at has "
                    f"{' or '.join(wanted.members[m])}; there are {common}"
                )
    return notes


def _members(shards: ShardSet, data: Data) -> Iterator[list[str]]:
    """Endings of some samples. A remote shard whose places lie in no sidecar is passed over: it would be fetched."""
    reader = Reader([shards], None, data.retries, bounds=Bounds.of(data))
    try:
        for shard in _spread(len(shards.urls), SHARDS):
            for sample in _spread(shards.infos[shard].samples, SAMPLES):
                try:
                    yield list(reader.locate(0, shard, sample).members)
                except SampleError:
                    break
    finally:
        reader.close()


def _spread(n: int, most: int) -> Iterable[int]:
    return sorted({k * n // most for k in range(most)}) if n > most else range(n)


def _has(members: Sequence[str], wanted: str) -> bool:
    """Whether a sample has the members that an entry asks for; one with ``*`` may stand for none."""
    for part in wanted.lower().split("+"):
        name = "json" if part.startswith("json:") else part
        if "*" in name and (fnmatch.filter(members, name) or "+" in wanted):
            continue
        if name not in members:
            return False
    return True
