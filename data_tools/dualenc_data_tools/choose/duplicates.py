"""Duplicates within shards, and samples that occur among other items (an evaluation's)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dualenc.data.batches.facts import sample_id
from dualenc.data.order import Ints
from dualenc.data.shards.selection import SCORES, file_of, starts, write_scores
from dualenc.errors import ConfigError, DataError, did_you_mean
from dualenc.features.mining import read_features
from dualenc.features.store import FeatureStore
from dualenc_data_tools.choose.filter import AUDIO, IMAGE, TEXT, Opened
from dualenc_data_tools.choose.fingerprints import PRINTS, EqualGroups, Prints
from dualenc_data_tools.choose.pairs import close_features
from dualenc_data_tools.choose.select import keep
from dualenc_data_tools.choose.sketches import SKETCHES

READS = {"image": IMAGE, "audio": AUDIO, "text": TEXT}


@dataclass
class Duplicates:
    """What was found: ``kind`` of each sample (ok, exact, near, broken, none) and the ``first`` of its group.

    Attributes:
        path: the selection that keeps the first of each group.
        examples: (kept, left out, kind), as shard/key.
    """

    of: str
    kind: np.ndarray[tuple[int], np.dtype[np.object_]]
    first: Ints
    path: str = ""
    examples: list[tuple[str, str, str]] = field(default_factory=list)

    def count(self, kind: str) -> int:
        """Samples of a kind."""
        return int((self.kind == kind).sum())


def empty_prints(n: int, of: str, near: bool) -> Prints:
    """Room for the fingerprints of n items; ``near``: with sketches of texts or clips. Raises ConfigError: no package
    for them."""
    return Prints(n, SKETCHES[of](n) if near and of in SKETCHES else None)


def prints_of(opened: Opened, of: str | None, near: bool = False) -> tuple[str, Prints, Ints]:
    """The fingerprints of every sample, of which modality, and whether each sample has an item of it.

    Args:
        of: image, audio or text; None: the first that some sample of the first 256 of the first shard has.
        near: find near texts and clips, too; near images are always found.

    Raises:
        ConfigError: another modality; DataError: no sample has it.
    """
    if of is None:
        rows = next(iter(opened.rows(0, READS)), [])
        of = next((m for m in READS if any(m in r.values for r in rows)), "image")
    if of not in PRINTS:
        raise ConfigError(f"--of: there is no fingerprint of {of!r}. {did_you_mean(of, PRINTS)}")
    prints, has, line = empty_prints(opened.total, of, near), np.zeros(opened.total, np.int64), 0
    for shard in range(len(opened.shards.names)):
        for rows in opened.rows(shard, {of: READS[of]}):
            for row in rows:
                if of in row.values:
                    has[line] = 1
                    prints.put(line, of, row.values[of])
                line += 1
    if not has.any():
        raise DataError(f"--of {of}: no sample has one (looked for {', '.join(READS[of])})")
    return of, prints, has


def find(prints: Prints, has: Ints, of: str, more: Iterable[tuple[Ints, Ints]] = ()) -> Duplicates:
    """The groups of equal and of near items; ``more``: further near pairs."""
    groups = EqualGroups(len(prints))
    groups.join(prints.equal_pairs())
    equal = groups.first().copy()
    groups.join(itertools.chain(prints.near_pairs(), more))
    first = groups.first()
    line = np.arange(len(prints))
    kind = np.full(len(prints), "ok", object)
    kind[first != line] = "near"
    kind[equal != line] = "exact"
    kind[~prints.there] = "broken"
    kind[has == 0] = "none"
    return Duplicates(of, kind, first)


@dataclass(frozen=True)
class ByFeatures:
    """Features of the samples' images or clips (``dualenc embed``), and the cosine from which two of them are near."""

    folder: Path
    cosine: float = 0.95

    def pairs(self, opened: Opened, of: str) -> Iterator[tuple[Ints, Ints]]:
        """Pairs of near samples, by their numbers among all.

        Raises:
            DataError: the features are not of these shards.
        """
        ids, x = read_features(FeatureStore(self.folder), [of])
        line: dict[int, int] = {}
        begin = starts(opened.shards)
        for shard, name in enumerate(opened.shards.names):
            index = opened.index_of(shard)
            for i in range(int(opened.shards.infos[shard].samples)):
                line[sample_id(name, index.key(i))] = int(begin[shard]) + i
        at = np.array([line.get(i, -1) for i in ids.tolist()], np.int64)
        if not (at >= 0).any():
            raise DataError(f"--features {self.folder}: no feature is of a sample of these shards")
        x, at = x[at >= 0], at[at >= 0]
        for a, b in close_features(x, self.cosine):
            yield at[a], at[b]


def duplicates(
    patterns: str | Sequence[str],
    name: str = "distinct",
    of: str | None = None,
    near: bool = False,
    features: ByFeatures | None = None,
) -> Duplicates:
    """Find duplicates; write the scores ``duplicate`` (ok, exact, near, broken, none) and ``duplicate_of``, and the
    selection ``name`` of the first of each group and of the samples that have no such item.

    Args:
        near: find near texts and clips, too.
        features: samples whose features are close are near, too.

    Raises:
        ConfigError, DataError: as :func:`prints_of` and :meth:`ByFeatures.pairs`.
    """
    opened = Opened.of(patterns)
    try:
        of, prints, has = prints_of(opened, of, near)
        found = find(prints, has, of, features.pairs(opened, of) if features is not None else ())
        repeated = np.flatnonzero(found.first != np.arange(opened.total))
        original = np.full(opened.total, None, object)
        for i in repeated.tolist():
            original[i] = opened.key(int(found.first[i]))
        for score, values in (("duplicate", found.kind), ("duplicate_of", original)):
            path = Path(file_of(score, opened.shards, SCORES))
            write_scores(path, opened.shards, opened.index_of, values, f"duplicates of {of}")
        weight = np.isin(found.kind, ["ok", "none"]).astype(np.float64)
        found.path, _ = keep(opened, weight, f"the first of its duplicates ({of})", name)
        found.examples = [(str(original[i]), opened.key(i), str(found.kind[i])) for i in repeated[:8].tolist()]
        return found
    finally:
        opened.close()


# --- against other items --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Occurrence:
    """One sample that occurs among the items of a task: exact or near."""

    task: str
    item: str
    sample: str
    kind: str


@dataclass
class Items:
    """Fingerprints of items that are not in the shards: ``names`` [n], and which ``task`` each is of [n]."""

    of: str
    names: list[str]
    task: list[str]
    prints: Prints


def occurring(prints: Prints, items: Items) -> list[tuple[int, int, str]]:
    """(sample, item, exact or near) of every sample that is equal or near to an item; memory as of both together."""
    n = len(prints)
    both = Prints.joined([prints, items.prints])
    out: dict[tuple[int, int], str] = {}
    order = np.argsort(prints.exact, kind="stable")
    ranked = prints.exact[order]
    low = np.searchsorted(ranked, items.prints.exact, side="left")
    high = np.searchsorted(ranked, items.prints.exact, side="right")
    for k in np.flatnonzero(items.prints.there & (high > low)).tolist():
        for i in order[int(low[k]) : int(high[k])].tolist():
            if prints.there[i]:
                out[i, k] = "exact"
    for a, b in both.near_pairs():
        across = (a < n) != (b < n)
        x, y = np.minimum(a[across], b[across]), np.maximum(a[across], b[across]) - n
        for i, k in zip(x.tolist(), y.tolist(), strict=True):
            out.setdefault((i, k), "near")
    return [(i, k, kind) for (i, k), kind in sorted(out.items())]


def contamination(
    patterns: str | Sequence[str], items: Sequence[Items], name: str = "uncontaminated"
) -> tuple[list[Occurrence], str, int]:
    """Samples that occur among evaluation items; writes the score ``contaminated`` (ok, or the tasks' names) and the
    selection ``name`` of those that do not.

    Returns:
        The hits by task, the selection's file, and the number of samples.

    Raises:
        DataError: no sample has an item of a modality that is compared.
    """
    opened = Opened.of(patterns)
    try:
        hits: list[Occurrence] = []
        tasks: dict[int, list[str]] = {}
        made: dict[str, Prints] = {}
        for group in items:
            if group.of not in made:
                made[group.of] = prints_of(opened, group.of, group.prints.sketches is not None)[1]
            for i, k, kind in occurring(made[group.of], group):
                hits.append(Occurrence(group.task[k], group.names[k], opened.key(i), kind))
                tasks.setdefault(i, []).append(group.task[k])
        verdict = np.full(opened.total, "ok", object)
        for i, named in tasks.items():
            verdict[i] = ", ".join(dict.fromkeys(named))
        path = Path(file_of("contaminated", opened.shards, SCORES))
        write_scores(path, opened.shards, opened.index_of, verdict, "items of evaluations")
        weight = (verdict == "ok").astype(np.float64)
        selection, _ = keep(opened, weight, "in no evaluation that was compared", name)
        return sorted(hits, key=lambda h: (h.task, h.item, h.sample)), selection, int(starts(opened.shards)[-1])
    finally:
        opened.close()
