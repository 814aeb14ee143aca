"""Scores of captions: length, rules that web text breaks, language."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from pydantic import Field

from dualenc.config import Section
from dualenc.config.section import Positive
from dualenc.errors import ConfigError
from dualenc_data_tools.choose.filter import Candidate, Filter, Score, filters

_WORD = re.compile(r"\w+(?:['’]\w+)?")
_URL = re.compile(r"https?://|www\.|\b[\w-]+\.(?:com|net|org|jpe?g|png|gif|webp)\b", re.IGNORECASE)
_BOILERPLATE = re.compile(
    r"^(?:img|dsc|dscn|image|photo|picture|untitled|thumbnail|logo|icon|banner|screenshot)?[\W_\d]*$"
    r"|click (?:here|to)|all rights reserved|free shipping|add to cart|stock (?:photo|image|vector)|image result for"
    r"|lorem ipsum|no description|image may contain|page not found|javascript|©",
    re.IGNORECASE,
)


def words_of(text: str) -> list[str]:
    """The words of a caption."""
    return _WORD.findall(text)


@filters.register("caption_length")
class CaptionLength(Filter):
    """``caption_words`` and ``caption_chars`` of the longest caption, and ``captions``, how many there are."""

    def score(self, rows: Sequence[Candidate]) -> dict[str, list[Score]]:
        return {
            "captions": [float(len(r.captions)) for r in rows],
            "caption_words": [float(max((len(words_of(c)) for c in r.captions), default=0)) for r in rows],
            "caption_chars": [float(max((len(c.strip()) for c in r.captions), default=0)) for r in rows],
        }


class CaptionRulesConfig(Section):
    """Bounds of the caption rules."""

    min_words: Positive = Field(default=1, description="a caption with fewer words is short")
    max_words: Positive = Field(default=256, description="a caption with more words is long")
    max_digits: float = Field(
        default=0.5, gt=0, le=1, description="a larger share of digits among the characters: digits"
    )
    max_repeats: float = Field(
        default=0.5, gt=0, le=1, description="a larger share of words in repeated 3-grams: repeats"
    )


@filters.register("caption_rules")
class CaptionRules(Filter):
    """``caption_rules``: ``ok`` if some caption breaks no rule; else the first rule that the first caption breaks:
    missing, short, long, url, boilerplate, digits, repeats."""

    Config = CaptionRulesConfig

    def score(self, rows: Sequence[Candidate]) -> dict[str, list[Score]]:
        out: list[Score] = []
        for row in rows:
            broken = [self.broken(c) for c in row.captions] or ["missing"]
            out.append("ok" if "ok" in broken else broken[0])
        return {"caption_rules": out}

    def broken(self, caption: str) -> str:
        """The first rule that a caption breaks, or ``ok``."""
        text, c = caption.strip(), self.config
        words = [w.lower() for w in words_of(text)]
        if not text:
            return "missing"
        if _BOILERPLATE.search(text):
            return "boilerplate"
        if len(words) < c.min_words:
            return "short"
        if len(words) > c.max_words:
            return "long"
        if _URL.search(text):
            return "url"
        if sum(ch.isdigit() for ch in text) > c.max_digits * len(text):
            return "digits"
        grams = Counter(zip(words, words[1:], words[2:], strict=False))
        repeated = sum(n for n in grams.values() if n > 1)
        if repeated > c.max_repeats * max(1, len(words) - 2):
            return "repeats"
        return "ok"


class LanguageConfig(Section):
    """Settings of the language filter."""

    languages: list[str] = Field(
        default_factory=list, description="ISO 639-1 codes to choose from (en, de); default: every language it knows"
    )


@filters.register("language")
class Language(Filter):
    """``language``: the ISO 639-1 code of the captions joined, by py3langid (pip install 'dualenc[language]'), and
    ``language_sure``, its probability. Captions of two or three words are often misjudged: ask for both."""

    Config = LanguageConfig

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__(config)
        try:
            from py3langid.langid import MODEL_FILE, LanguageIdentifier
        except ImportError as e:
            raise ConfigError("the filter language needs py3langid: pip install 'dualenc[language]'") from e
        self._judge: Any = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
        if config.languages:
            try:
                self._judge.set_languages(config.languages)
            except ValueError as e:
                raise ConfigError(f"language.languages: {e}; use ISO 639-1 codes such as en, de, zh") from e

    def score(self, rows: Sequence[Candidate]) -> dict[str, list[Score]]:
        texts = [" ".join(r.captions).strip() for r in rows]
        judged: list[Any] = [self._judge.classify(t) if t else (None, None) for t in texts]
        return {
            "language": [None if j[0] is None else str(j[0]) for j in judged],
            "language_sure": [None if j[1] is None else float(j[1]) for j in judged],
        }
