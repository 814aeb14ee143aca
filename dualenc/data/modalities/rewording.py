"""Captions changed in training: stop words left out, words replaced by synonyms, swapped, or left out (EDA, Wei and Zou
2019, arXiv 1901.11196; Fini et al. 2023, arXiv 2305.08675)."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from dualenc.config import Section, Share
from dualenc.data.modalities.word_tables import STOP_WORDS, SYNONYMS
from dualenc.errors import ConfigError

_EDGES = string.punctuation + "…«»“”‘’¿¡"


class TextAugment(Section):
    """First stop words are left out, with the probability ``stop_words``; then at most one of ``synonym``, ``swap`` and
    ``delete`` happens, with the probabilities they have, to a ``words`` share of the words (at least one)."""

    language: Literal["en", "de", "fr", "es", "it"] = Field(default="en", description="of the stop words and synonyms")
    stop_words: Share = Field(default=0.0, description="share of captions that lose all stop words")
    synonym: Share = Field(default=0.0, description="share of captions with words replaced by synonyms")
    swap: Share = Field(default=0.0, description="share of captions in which words change places")
    delete: Share = Field(default=0.0, description="share of captions that lose words")
    words: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.1, description="share of a caption's words that are replaced, swapped or left out; at least one is"
    )
    synonyms: str | None = Field(
        default=None, description="a json file {word: [synonym, …]}; default: a small table of everyday English"
    )

    @model_validator(mode="after")
    def _at_most_one(self) -> TextAugment:
        chosen = self.synonym + self.swap + self.delete
        if chosen > 1 + 1e-9:
            raise ValueError(
                f"augment: at most one of synonym, swap and delete happens, so they may add up to 1, not {chosen:g}"
            )
        if self.synonym and self.synonyms is None and self.language not in SYNONYMS:
            raise ValueError(
                f"augment.synonym: there is no table for language {self.language!r}; name a file in synonyms, or use 0"
            )
        return self


class Rewording:
    """Changes captions as its settings say; everything is drawn from the generator it is given.

    A caption never becomes empty: where only stop words would go, or one word is left, nothing is left out.
    """

    def __init__(self, config: TextAugment, base_dir: str | Path | None = None) -> None:
        self.config = config
        self.stop = STOP_WORDS[config.language]
        if config.synonyms is None:
            self.synonyms: Mapping[str, tuple[str, ...]] = SYNONYMS.get(config.language, {})
        else:
            self.synonyms = read_synonyms(Path(base_dir or ".", config.synonyms))

    def __call__(self, text: str, rng: np.random.Generator) -> str:
        """A caption → the caption in training."""
        c, words = self.config, text.split()
        if c.stop_words and rng.random() < c.stop_words:
            words = [w for w in words if bare(w) not in self.stop] or words
        draw = rng.random()
        if draw < c.synonym:
            words = self._replaced(words, rng)
        elif draw < c.synonym + c.swap:
            words = self._swapped(words, rng)
        elif draw < c.synonym + c.swap + c.delete:
            words = self._shortened(words, rng)
        return " ".join(words)

    def _count(self, words: list[str]) -> int:
        return max(1, round(self.config.words * len(words)))

    def _replaced(self, words: list[str], rng: np.random.Generator) -> list[str]:
        places = [i for i, w in enumerate(words) if bare(w) in self.synonyms]
        out = list(words)
        for i in rng.permutation(len(places))[: self._count(words)]:
            word = words[places[i]]
            known = self.synonyms[bare(word)]
            out[places[i]] = word.lower().replace(bare(word), known[int(rng.integers(len(known)))], 1)
        return out

    def _swapped(self, words: list[str], rng: np.random.Generator) -> list[str]:
        out = list(words)
        for _ in range(self._count(words) if len(words) > 1 else 0):
            i, j = rng.choice(len(out), 2, replace=False)
            out[i], out[j] = out[j], out[i]
        return out

    def _shortened(self, words: list[str], rng: np.random.Generator) -> list[str]:
        gone = set(rng.permutation(len(words))[: min(self._count(words), len(words) - 1)].tolist())
        return [w for i, w in enumerate(words) if i not in gone]


def bare(word: str) -> str:
    """A word in small letters, without punctuation at its ends."""
    return word.lower().strip(_EDGES)


def read_synonyms(path: Path) -> dict[str, tuple[str, ...]]:
    """The json file that ``augment.synonyms`` names.

    Raises:
        ConfigError: it cannot be read, or is not {word: [synonym, …]}.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ConfigError(f"augment.synonyms: {path} cannot be read as json ({e})") from e
    if not isinstance(raw, dict) or not all(
        isinstance(v, list) and v and all(isinstance(x, str) for x in v) for v in raw.values()
    ):
        raise ConfigError(f"augment.synonyms: {path} must hold {{word: [synonym, …]}}")
    return {str(k).lower(): tuple(v) for k, v in raw.items()}
