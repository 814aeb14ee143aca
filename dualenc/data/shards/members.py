"""Which members of a sample its modalities are read from: endings, keys of its json, scores, several together."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence

from dualenc.data.shards.tar import Sample

JSON = "json"
JSON_KEY = "json:"
SCORE_KEY = "scores:"
"""A value of NAME.scores.parquet beside the shards, as if it were a member of the sample."""
JOIN = "+"
REFUSED = ("pkl", "pickle", "pyd", "pth", "pt")
"""Endings whose usual decoders run code: never read."""

Wanted = Mapping[str, Sequence[str]]
"""Modality → endings."""


def needed(sample: Sample, wanted: Wanted) -> list[str]:
    """The members that ``Reader.find`` reads of a sample, as far as their names tell.

    A json member may turn out to lack the key: the next ending is then read without having been expected.
    """
    out: dict[str, None] = {}
    for endings in wanted.values():
        for ending in endings:
            names = [n for part in ending.split(JOIN) for n in members_of(sample, part)]
            if all(n in sample.members for n in names) and (names or ending.startswith(SCORE_KEY)):
                out |= dict.fromkeys(names)
                break
    return list(out)


def members_of(sample: Sample, part: str) -> list[str]:
    """The members that one part of an ending names; they need not exist."""
    if part.startswith(JSON_KEY):
        return [JSON]
    if part.startswith(SCORE_KEY):
        return []
    if "*" in part:
        return [m for m in fnmatch.filter(sample.members, part.lower()) if m.rsplit(".", 1)[-1] not in REFUSED]
    return [part.lower()]


def is_joined(ending: str) -> bool:
    """Whether an ending gives a dictionary, of several members or of those that match."""
    return JOIN in ending or "*" in ending
