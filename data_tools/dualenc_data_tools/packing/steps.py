"""The ``steps:`` of a build: filters that each decide about one sample (or caption) before it is stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dualenc.errors import ConfigError
from dualenc_data_tools.sources.source import Dropped, Record, StepConfig

if TYPE_CHECKING:
    from dualenc_data_tools.choose.filter import Candidate, Filter, Score


@dataclass(frozen=True, slots=True)
class LoadedRecord:
    """A record whose media have been read."""

    record: Record
    media: dict[str, bytes]


class Steps:
    """The steps of a build, in their order.

    Raises:
        ConfigError: no such filter or setting; one that needs other samples than the one it scores.
    """

    def __init__(self, configs: Sequence[StepConfig]) -> None:
        self.steps = [_Step(c, f"steps.{i}") for i, c in enumerate(configs)]

    def run(self, rows: Sequence[LoadedRecord]) -> list[LoadedRecord | Dropped]:
        """Every row as the steps leave it, or why it is dropped."""
        out: list[LoadedRecord | Dropped] = list(rows)
        for step in self.steps:
            left = [(i, r) for i, r in enumerate(out) if isinstance(r, LoadedRecord)]
            for (i, _), judged in zip(left, step.run([r for _, r in left]), strict=True):
                out[i] = judged
        return out


class _Step:
    def __init__(self, config: StepConfig, where: str) -> None:
        from dualenc_data_tools.choose import Filter
        from dualenc_data_tools.choose.filter import build_filter

        self.config, self.where = config, where
        self.filter: Filter = build_filter(config.filter, config.set)
        if self.filter.neighbours or type(self.filter).finish is not Filter.finish:
            raise ConfigError(
                f"{where}.filter: {config.filter} scores a sample by other samples, which a build does not have yet; "
                f"build without it, then run: dualenc shards filter SHARDS --with {config.filter}"
            )

    def run(self, rows: Sequence[LoadedRecord]) -> list[LoadedRecord | Dropped]:
        from dualenc_data_tools.choose.filter import Candidate

        if not rows:
            return []
        if self.config.each == "caption":
            return self._captions(rows)
        candidates = [Candidate(r.record.name, {**r.media, "text": list(r.record.captions)}) for r in rows]
        scores, kept = self._judge(candidates)
        out: list[LoadedRecord | Dropped] = []
        for i, row in enumerate(rows):
            mine = {n: v[i] for n, v in scores.items()}
            if not kept[i]:
                said = ", ".join(
                    f"{n} {v if isinstance(v, str) else f'{v:.6g}'}" for n, v in mine.items() if v is not None
                )
                out.append(Dropped(row.record.name, self._reason(mine), said or "no score", True))
            elif self.config.note:
                fields = {**row.record.fields, **{n: v for n, v in mine.items() if v is not None}}
                out.append(LoadedRecord(replace(row.record, fields=fields), row.media))
            else:
                out.append(row)
        return out

    def _captions(self, rows: Sequence[LoadedRecord]) -> list[LoadedRecord | Dropped]:
        """Each caption alone, with its sample's media; a sample is dropped once it has no caption left."""
        from dualenc_data_tools.choose.filter import Candidate

        each = [(i, c) for i, r in enumerate(rows) for c in r.record.captions]
        candidates = [Candidate(rows[i].record.name, {**rows[i].media, "text": [c]}) for i, c in each]
        scores, kept = self._judge(candidates) if candidates else ({}, [])
        left: list[list[str]] = [[] for _ in rows]
        why = ["no caption"] * len(rows)
        for k, (i, caption) in enumerate(each):
            if kept[k]:
                left[i].append(caption)
            elif why[i] == "no caption":
                why[i] = self._reason({n: v[k] for n, v in scores.items()})
        return [
            LoadedRecord(replace(r.record, captions=tuple(c)), r.media)
            if c
            else Dropped(r.record.name, w, "every caption", True)
            for r, c, w in zip(rows, left, why, strict=True)
        ]

    def _judge(self, candidates: Sequence[Candidate]) -> tuple[dict[str, list[Score]], Sequence[bool]]:
        from dualenc_data_tools.choose.expression import OfRows, evaluate_names
        from dualenc_data_tools.choose.filter import as_values

        scores = self.filter.score(candidates)
        texts = [n for n, v in scores.items() if any(isinstance(x, str) for x in v)]
        if self.config.keep is not None:
            names = OfRows({n: as_values(v) for n, v in scores.items()}, len(candidates))
            return scores, (evaluate_names(self.config.keep, names, f"{self.where}.keep") > 0).tolist()
        if self.config.note:
            return scores, [True] * len(candidates)
        if self.config.filter in scores and (self.config.filter in texts or not any(scores[self.config.filter])):
            return scores, [s == "ok" for s in scores[self.config.filter]]
        raise ConfigError(
            f"{self.where}.keep: {self.config.filter} only measures ({', '.join(scores)}); say which samples to keep, "
            f"such as keep: '{next(iter(scores))} >= 3'"
        )

    def _reason(self, scores: dict[str, Score]) -> str:
        own = scores.get(self.config.filter)
        if self.config.keep is None and isinstance(own, str):
            return f"{self.config.filter}: {own}"
        return f"not {self.config.keep}" if self.config.keep is not None else f"{self.config.filter}: no score"


def uses_model(configs: Sequence[StepConfig]) -> bool:
    """Whether a step loads a model."""
    return any("model" in c.set for c in configs)
