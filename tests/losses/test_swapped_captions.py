"""The rule by which ``benchmarks.hard_negatives`` swaps two words of a caption."""

from __future__ import annotations

import pytest

from benchmarks.hard_negatives import CLASS_OF, swapped


def test_words_of_one_class_are_swapped_before_others() -> None:
    found = swapped("A black dog chases a brown horse .")
    assert found in (
        ("A brown dog chases a black horse .", True),
        ("A black horse chases a brown dog .", True),
    )
    text, alike = swapped("Dogs bark loudly .") or ("", True)
    assert sorted(text.lower().split()) == sorted(["dogs", "bark", "loudly", "."])
    assert text != "Dogs bark loudly ."
    assert text[0].isupper()
    assert not alike


def test_a_draw_depends_on_the_caption_and_the_seed() -> None:
    caption = "A man in a red shirt and a woman in a blue coat hold a green ball near a white dog"
    assert swapped(caption) == swapped(caption)
    assert len({swapped(caption, seed) for seed in range(30)}) > 3


@pytest.mark.parametrize("caption", ["A dog", "A dog and a dog", "black and white", "A red , blue and white ."])
def test_what_would_still_be_right_is_left_alone(caption: str) -> None:
    assert swapped(caption) is None


def test_every_word_has_one_class() -> None:
    from benchmarks.hard_negatives import CLASSES

    assert sum(len(words.split()) for words in CLASSES.values()) == len(CLASS_OF)
