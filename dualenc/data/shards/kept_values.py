"""Values of ``NAME.scores.parquet`` as members of samples: ``scores:NAME`` wherever a recipe names a member.

So what a model said of unlabelled samples (``dualenc shards filter --with pseudo_labels``) becomes a caption or a label
without a shard being written again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dualenc.config import Source
from dualenc.data.order import Ints, Plan
from dualenc.data.shards.members import JOIN, SCORE_KEY
from dualenc.data.shards.selection import read_scores, starts
from dualenc.errors import ConfigError

if TYPE_CHECKING:
    from dualenc.data.shards.index import ShardSet


@dataclass(frozen=True, slots=True)
class KeptValues:
    """A value of every sample: 4 bytes for each where they are texts that repeat, 8 where they are numbers.

    Attributes:
        first: [shards + 1] where each shard begins.
        texts: the different texts; None: the values are numbers.
        values: int32 [samples], numbers of ``texts`` or −1; or float64, NaN where there is none.
        digest: of all values.
    """

    first: Ints
    texts: list[str] | None
    values: NDArray[Any]
    digest: str

    @classmethod
    def read(cls, name: str, shards: ShardSet) -> KeptValues:
        """The file beside these shards. Raises as :func:`dualenc.data.shards.selection.read_scores`."""
        raw, texts = read_scores(name, shards), None
        if raw.dtype == object:
            number = {t: i for i, t in enumerate(sorted({t for t in raw.tolist() if t is not None}))}
            texts, raw = list(number), np.array([number.get(t, -1) for t in raw.tolist()], np.int32)
        h = hashlib.blake2b("\0".join(texts or []).encode(), digest_size=16)
        h.update(raw.astype(raw.dtype.newbyteorder("<")).tobytes())
        return cls(starts(shards), texts, raw, h.hexdigest())

    def of(self, shard: int, sample: int) -> str | float | None:
        """The value of a sample, or None."""
        value = self.values[int(self.first[shard]) + sample]
        if self.texts is not None:
            return None if value < 0 else self.texts[int(value)]
        return None if np.isnan(value) else float(value)


def depend_on_scores(plan: object, source: int, scores: Mapping[str, KeptValues]) -> None:
    """Let the plan's digest depend on the values that samples of a source are made of.

    Raises:
        ConfigError: the plan is one of a plugin that derives from no ``Plan``.
    """
    for name, values in scores.items():
        if not isinstance(plan, Plan):
            raise ConfigError(f"data.sources.{source}: scores:{name} needs a plan that derives from dualenc's Plan")
        plan.depend_on(f"{source}:{name}:{values.digest}")


def names_in(source: Source) -> list[str]:
    """The scores that a source's members, values and ``same`` name."""
    endings = [e for some in source.members.values() for e in some]
    endings += [v.member for v in source.values.values()] + ([source.same] if source.same else [])
    parts = [p for e in endings for p in e.split(JOIN) if p.startswith(SCORE_KEY)]
    return list(dict.fromkeys(p.removeprefix(SCORE_KEY) for p in parts))
