"""Captions changed in training: against a loop of its own, deterministic, never empty, and described as before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualenc.config import settings_as
from dualenc.data.modalities.rewording import Rewording, TextAugment, bare
from dualenc.data.modalities.text import TextConfig, TextInput
from dualenc.data.modalities.word_tables import STOP_WORDS, SYNONYMS
from dualenc.errors import ConfigError

CAPTION = "A big dog is running on the beach, near the water."


def rng(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed))


def change(text: str, seed: int = 0, **said: Any) -> str:
    return Rewording(settings_as(TextAugment, said, "augment"))(text, rng(seed))


def test_each_change_alone_is_what_it_says() -> None:
    words = CAPTION.split()
    assert change(CAPTION) == CAPTION
    assert change(CAPTION, stop_words=1.0) == "big dog running beach, near water."
    swapped = change(CAPTION, 3, swap=1.0).split()
    assert sorted(swapped) == sorted(words)
    assert sum(a != b for a, b in zip(swapped, words, strict=True)) == 2
    short = change(CAPTION, 3, delete=1.0, words=0.3).split()
    assert len(short) == len(words) - 3
    left = iter(words)
    assert all(w in left for w in short)  # in order
    changed = [(a, b) for a, b in zip(words, change(CAPTION, 1, synonym=1.0, words=1.0).split(), strict=True) if a != b]
    assert {bare(a) for a, _ in changed} == {"big", "dog", "running", "beach", "near"}
    assert all(bare(b) in SYNONYMS["en"][bare(a)] for a, b in changed)
    assert dict(changed)["beach,"].endswith(",")


def test_how_often_each_happens() -> None:
    """Over 3,000 draws: stop words 0.8, then synonym 0.4, swap 0.3, delete 0.1, nothing 0.2."""
    part = Rewording(TextAugment(stop_words=0.8, synonym=0.4, swap=0.3, delete=0.1))
    full, bared = CAPTION.split(), change(CAPTION, stop_words=1.0).split()
    counts = dict.fromkeys(["stop", "synonym", "swap", "delete", "nothing"], 0)
    for seed in range(3000):
        out = part(CAPTION, rng(seed)).split()
        base = bared if len(out) <= len(bared) else full
        counts["stop"] += base is bared
        kind = "nothing" if out == base else "delete" if len(out) < len(base) else None
        kind = kind or ("swap" if sorted(out) == sorted(base) else "synonym")
        counts[kind] += 1
    want = {"stop": 0.8, "synonym": 0.4, "swap": 0.3, "delete": 0.1, "nothing": 0.2}
    assert {k: n / 3000 for k, n in counts.items()} == pytest.approx(want, abs=0.03)


@settings(max_examples=60, deadline=None)
@given(text=st.text(min_size=1).filter(lambda t: t.split()), seed=st.integers(0, 2**32))
def test_a_caption_never_becomes_empty_and_draws_alike(text: str, seed: int) -> None:
    said = {"stop_words": 0.9, "synonym": 0.3, "swap": 0.3, "delete": 0.4, "words": 1.0}
    assert change(text, seed, **said).split()
    assert change(text, seed, **said) == change(text, seed, **said)


def test_tables() -> None:
    assert set(STOP_WORDS) == {"en", "de", "fr", "es", "it"}
    assert change("Ein Hund und der Ball", stop_words=1.0, language="de") == "Hund Ball"
    assert change("the of and", stop_words=1.0) == "the of and"
    assert len(SYNONYMS["en"]) > 300
    assert all(w not in others and w == bare(w) for w, others in SYNONYMS["en"].items())
    assert not set(SYNONYMS["en"]) & STOP_WORDS["en"]


def test_a_table_of_one_s_own_and_what_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "words.json"
    file.write_text(json.dumps({"Hund": ["Köter"]}), encoding="utf-8")
    said = {"synonym": 1.0, "language": "de", "synonyms": str(file)}
    assert change("Der Hund bellt", **said) == "Der Köter bellt"
    for bad, message in (
        ({"synonym": 0.7, "delete": 0.4}, "may add up to 1, not 1.1"),
        ({"synonym": 0.5, "language": "fr"}, "there is no table for language 'fr'"),
    ):
        with pytest.raises(ConfigError, match=message):
            change(CAPTION, **bad)
    file.write_text('["a"]')
    with pytest.raises(ConfigError, match="must hold"):
        change(CAPTION, **said)


def test_a_text_input_draws_it_in_training_only() -> None:
    augment = {"stop_words": 0.5, "synonym": 0.4, "swap": 0.4, "delete": 0.2}
    plain, changed = (
        TextInput(settings_as(TextConfig, {"tokenizer": "clip", **more}, "input"))
        for more in ({}, {"augment": augment})
    )
    item = plain.decode(CAPTION)
    rows = [tuple(changed.train(item, rng(k)).tolist()) for k in range(20)]
    assert rows == [tuple(changed.train(item, rng(k)).tolist()) for k in range(20)]
    assert len(set(rows)) > 10
    want = [Rewording(TextAugment(**augment))(CAPTION, rng(k)) for k in range(20)]
    assert rows == [tuple(plain.eval([t]).tolist()) for t in want]
    assert changed.eval(item).tolist() == plain.eval(item).tolist() == plain.train(item, rng(0)).tolist()
    assert changed.describe() == plain.describe()
    assert "augment" not in plain.config.model_dump(mode="json")
