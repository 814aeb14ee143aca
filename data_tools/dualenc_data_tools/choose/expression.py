"""The language in which selections are made out of scores and other selections.

    expression  =  term { ("and" | "or" | "minus") term }         from left to right; brackets group
    term        =  "(" expression ")"  |  "all"
                |  "top" SHARE ["of" term] "by" SCORE             SHARE: 30% or a number of samples
                |  "bottom" SHARE ["of" term] "by" SCORE
                |  "weigh" ["of" term] "by" SCORE                 each sample at its score, as weight
                |  SCORE (">=" | ">" | "<=" | "<" | "==" | "!=") VALUE
                |  SCORE "in" VALUE {"," VALUE}
                |  NAME                                           a selection, or a score whose value is "ok"

Every expression is a weight for each sample. ``and`` multiplies weights, ``or`` takes the larger, ``minus`` leaves out
what is in the second. A sample without a score satisfies no comparison (not even !=) and is in no top share.
"""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from dualenc.data.shards.index import ShardSet
from dualenc.data.shards.remote import is_local, local_path
from dualenc.data.shards.selection import SCORES, SELECTION, Floats, Values, file_of, read_scores, read_weights
from dualenc.errors import ConfigError, DataError, did_you_mean

_TOKEN = re.compile(r"\s*(>=|<=|==|!=|[<>(),]|\"[^\"]*\"|'[^']*'|[^\s<>=!(),\"']+)")
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    ">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt, "==": operator.eq, "!=": operator.ne,
}  # fmt: skip
_WORDS = ("and", "or", "minus", "top", "bottom", "weigh", "of", "by", "in", "all")


def evaluate(text: str, shards: ShardSet) -> Floats:
    """The weight that an expression gives every sample, 0: not selected.

    Raises:
        ConfigError: the expression cannot be read, at which word, or names what is not there (with the nearest).
        DataError: a selection or score is damaged or of other shards.
    """
    return evaluate_names(text, OfShards(shards), "--select")


def evaluate_names(text: str, names: Names, where: str) -> Floats:
    """As :func:`evaluate`, with the scores and selections of ``names``; ``where`` is the setting that holds ``text``.

    Raises:
        ConfigError, DataError: as :func:`evaluate`.
    """
    tokens = _TOKEN.findall(text)
    if "".join(tokens) != re.sub(r"\s+", "", text) and not ("'" in text or '"' in text):
        raise ConfigError(f"{where} {text!r}: cannot be read")
    parser = _Parser(f"{where} {text!r}", tokens, names)
    out = parser.expression()
    if parser.at < len(tokens):
        raise ConfigError(f"{where} {text!r}: unexpected {tokens[parser.at]!r}; join terms with and, or, minus")
    return out


class Names:
    """What the names in an expression stand for. ``ranks``: whether samples can be compared with each other."""

    ranks = True
    count: int

    def score(self, name: str) -> Values | None:
        """The value of every sample, or None: there is no such score."""
        raise NotImplementedError

    def selection(self, name: str) -> Floats | None:
        """The weight of every sample, or None: there is no such selection."""
        raise NotImplementedError

    def known(self) -> list[str]:
        """Names to suggest."""
        raise NotImplementedError


class OfRows(Names):
    """Scores of a few samples of a build, which cannot be ranked: the others are not known."""

    ranks = False

    def __init__(self, scores: dict[str, Values], count: int) -> None:
        self._scores, self.count = scores, count

    def score(self, name: str) -> Values | None:
        return self._scores.get(name)

    def selection(self, name: str) -> Floats | None:
        return None

    def known(self) -> list[str]:
        return list(self._scores)


class OfShards(Names):
    """Scores and selections in files beside shards."""

    def __init__(self, shards: ShardSet) -> None:
        self.shards, self.count = shards, sum(shards.counts)
        self._scores: dict[str, Values] = {}

    def score(self, name: str) -> Values | None:
        if name not in self._scores:
            if not self._there(name, SCORES):
                return None
            self._scores[name] = read_scores(name, self.shards)
        return self._scores[name]

    def selection(self, name: str) -> Floats | None:
        if not name.endswith(SCORES) and (name.endswith(".parquet") or self._there(name, SELECTION)):
            return read_weights(name, self.shards)
        return None

    def known(self) -> list[str]:
        folder = os.path.dirname(local_path(file_of("x", self.shards))) or "."
        files = os.listdir(folder) if is_local(folder) and os.path.isdir(folder) else []
        return [f.removesuffix(e) for f in files for e in (SELECTION, SCORES) if f.endswith(e)]

    def _there(self, name: str, ending: str) -> bool:
        path = file_of(name, self.shards, ending)
        if is_local(path):
            return os.path.isfile(local_path(path))
        try:
            (read_weights if ending == SELECTION else read_scores)(name, self.shards)
        except DataError:
            return False
        return True


def top(weight: Floats, score: Floats, share: str, highest: bool, where: str) -> Floats:
    """The selected samples with the highest (or lowest) scores; of equal ones, those that are stored first.

    Args:
        share: ``30%`` of those that have a weight and a score (rounded), or a number of samples.
    """
    there = np.flatnonzero((weight > 0) & ~np.isnan(score))
    try:
        count = round(float(share[:-1]) / 100 * len(there)) if share.endswith("%") else int(share)
    except ValueError as e:
        raise ConfigError(f"{where}: {share!r} is neither a share such as 30% nor a number of samples") from e
    if count < 0 or (share.endswith("%") and count > len(there)):
        raise ConfigError(f"{where}: {share} is not between 0 % and 100 %")
    values = score[there] if not highest else -score[there]
    kept = there[np.argsort(values, kind="stable")[:count]]
    out = np.zeros_like(weight)
    out[kept] = weight[kept]
    return out


@dataclass
class _Parser:
    where: str
    tokens: list[str]
    names: Names
    at: int = 0

    @property
    def next(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self, expected: str | None = None) -> str:
        token = self.next
        if not token or (expected is not None and token != expected):
            said = f"{token!r}" if token else "the end"
            raise ConfigError(f"{self.where}: expected {expected or 'a name'} instead of {said}")
        self.at += 1
        return token

    def expression(self) -> Floats:
        out = self.term()
        while self.next in ("and", "or", "minus"):
            how, other = self.take(), self.term()
            if how == "minus":
                out = np.where(other > 0, 0.0, out)
            else:
                out = out * other if how == "and" else np.maximum(out, other)
        return out

    def term(self) -> Floats:
        word = self.take()
        if word == "(":
            out = self.expression()
            self.take(")")
            return out
        if word == "all":
            return np.ones(self.names.count)
        if word in ("top", "bottom", "weigh"):
            return self._ranked(word)
        if word in _WORDS or not re.match(r"[\w\"'./~]", word):
            raise ConfigError(f"{self.where}: expected a name instead of {word!r}")
        if self.next in _COMPARE or self.next == "in":
            return self._compared(word)
        return self._named(word)

    def _ranked(self, how: str) -> Floats:
        share = self.take() if how != "weigh" else ""
        if not self.names.ranks:
            raise ConfigError(f"{self.where}: {how} needs all samples; here each is judged alone, as in shorter >= 64")
        of = np.ones(self.names.count)
        if self.next == "of":
            self.take()
            of = self.term()
        self.take("by")
        name = self.take()
        score = self.score(name)
        if score.dtype == object:
            raise ConfigError(f"{self.where}: {name} holds texts, which have no order; write {name} == VALUE")
        if how != "weigh":
            return top(of, score, share, how == "top", self.where)
        weight = np.nan_to_num(score, nan=0.0)
        if (weight < 0).any():
            raise ConfigError(f"{self.where}: {name} has negative values, which cannot be weights")
        out: Floats = of * weight
        return out

    def _compared(self, name: str) -> Floats:
        score, how = self.score(name), self.take()
        values = [_unquoted(self.take())]
        while how == "in" and self.next == ",":
            self.take()
            values.append(_unquoted(self.take()))
        if score.dtype == object:
            if how not in ("==", "!=", "in"):
                raise ConfigError(f"{self.where}: {name} holds texts, which {how} does not compare; use ==, != or in")
            inside = np.array([s in values for s in score.tolist()])
            there = np.array([s is not None for s in score.tolist()])
            return _weights(there & (~inside if how == "!=" else inside))
        try:
            numbers = [float(v) for v in values]
        except ValueError as e:
            raise ConfigError(f"{self.where}: {name} is a number; {values[0]!r} is not") from e
        if how == "in":
            return _weights(np.isin(score, numbers))
        return _weights(_COMPARE[how](score, numbers[0]) & ~np.isnan(score))

    def _named(self, name: str) -> Floats:
        selected = self.names.selection(name)
        if selected is not None:
            return selected
        score = self.score(name)
        if score.dtype != object:
            raise ConfigError(f"{self.where}: {name} is a number for each sample; compare it, as in {name} >= 0.3")
        return np.array([s == "ok" for s in score.tolist()], np.float64)

    def score(self, name: str) -> Values:
        found = self.names.score(name)
        if found is None:
            raise ConfigError(f"{self.where}: no selection or score {name!r}. {did_you_mean(name, self.names.known())}")
        return found


def _weights(selected: Any) -> Floats:
    out: Floats = selected.astype(np.float64)
    return out


def _unquoted(word: str) -> str:
    return word[1:-1] if word[:1] in "\"'" and word[-1:] == word[:1] else word
