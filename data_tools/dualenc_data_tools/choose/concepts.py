"""Balanced sampling over concepts (MetaCLIP, Xu et al. 2023): rare concepts are kept whole, frequent ones thinned."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydantic import Field

from dualenc.config import Section
from dualenc.config.section import Positive
from dualenc.data.shards.selection import Values
from dualenc.errors import DataError
from dualenc_data_tools.choose.caption_filters import words_of
from dualenc_data_tools.choose.filter import Candidate, Filter, Score, filters

_MOST_WORDS = 5


class ConceptsConfig(Section):
    """Settings of the balanced sampling."""

    concepts: str = Field(
        description="a text file with one concept (one or a few words) per line, looked for in captions"
    )
    at_most: Positive = Field(
        default=20_000, description="t: concepts with more samples are thinned out to about this many"
    )


@filters.register("concept_balance")
class ConceptBalance(Filter):
    """``concept_balance``: the probability with which MetaCLIP keeps a sample, 1 − Π (1 − min(1, t / samples of the
    concept)) over the concepts in its captions; 0 where there is none. As weights: ``weigh by concept_balance``."""

    Config = ConceptsConfig

    def __init__(self, config: ConceptsConfig) -> None:
        super().__init__(config)
        lines = lines_of(config.concepts, "concept_balance.concepts")
        named = dict.fromkeys(tuple(w.lower() for w in words_of(line)) for line in lines)
        self.number = {c: i for i, c in enumerate(c for c in named if 0 < len(c) <= _MOST_WORDS)}
        if not self.number:
            raise DataError(f"concept_balance.concepts: {config.concepts} lists no concept of 1 to {_MOST_WORDS} words")
        self.longest = max(len(c) for c in self.number)

    def matched(self, caption: str) -> set[int]:
        """Numbers of the concepts that a caption names, as whole words."""
        words = [w.lower() for w in words_of(caption)]
        spans = (tuple(words[i : i + n]) for n in range(1, self.longest + 1) for i in range(len(words) - n + 1))
        return {self.number[s] for s in spans if s in self.number}

    def score(self, rows: Sequence[Candidate]) -> dict[str, list[Score]]:
        found = [sorted(set().union(*(self.matched(c) for c in r.captions))) for r in rows]
        return {"concept_balance": [" ".join(map(str, f)) for f in found]}

    def finish(self, values: dict[str, Values]) -> dict[str, Values]:
        found = [np.array(t.split() if t else [], np.int64) for t in values["concept_balance"].tolist()]
        counts = np.bincount(np.concatenate(found) if found else np.zeros(0, np.int64), minlength=len(self.number))
        left_out = 1 - np.minimum(1.0, self.config.at_most / np.maximum(counts, 1))
        return {"concept_balance": np.array([1 - left_out[f].prod() if len(f) else 0.0 for f in found])}


def lines_of(path: str, setting: str) -> list[str]:
    """The lines of a text file that a filter's setting names.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"{setting}: {path} cannot be read ({e})") from e
