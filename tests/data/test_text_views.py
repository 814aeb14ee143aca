"""Crops, masked spans and neighbouring sentences: what is drawn, by loops of their own, and alike for a pair."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dualenc.config import Data, Modality, Recipe
from dualenc.data.dataset import TeacherView
from dualenc.data.loader import Loader
from dualenc.data.modalities import build_inputs
from dualenc.data.modalities.text import TextConfig, TextInput
from dualenc.data.modalities.text_views import TextView, changed, chosen, sentences
from dualenc.distill.teachers.cache import as_student_sees, write_cache
from dualenc.errors import ConfigError
from dualenc.model import build_bundle
from dualenc_data_tools.writer import ShardWriter

DOCUMENT = "The dog ran. It saw a cat! Was it 3.5 m high? “Yes.” Then rain came"
PARTS = ["The dog ran.", "It saw a cat!", "Was it 3.5 m high?", "“Yes.", "Then rain came"]


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_sentences() -> None:
    assert sentences(DOCUMENT) == PARTS
    assert sentences("犬が走る。猫を見た。") == ["犬が走る。", "猫を見た。"]
    assert sentences("one line\n\nanother") == ["one line", "another"]
    assert sentences("no end") == ["no end"]
    assert sentences(" . ") == ["."]


def test_a_neighbor_is_beside_the_sentence_of_the_same_draw() -> None:
    seen = set()
    for k in range(300):
        this, beside = (PARTS.index(chosen([DOCUMENT], how, rng(k))) for how in ("sentence", "neighbor"))
        assert abs(this - beside) == 1
        seen.add((this, beside))
    assert len(seen) == 8  # every pair of neighbours, both ways
    assert chosen(["alone"], "neighbor", rng(0)) == "alone"
    texts = [f"text {i}" for i in range(5)]
    assert {chosen(texts, "caption", rng(k)) for k in range(60)} == set(texts)


def test_a_crop_is_a_run_of_words_of_the_share_drawn() -> None:
    words = [f"w{i}" for i in range(40)]
    view = TextView(crop=(0.1, 0.5))
    starts, counts = set(), []
    for k in range(400):
        got = changed(" ".join(words), view, rng(k)).split()
        at = words.index(got[0])
        assert got == words[at : at + len(got)]
        starts.add(at)
        counts.append(len(got))
    assert (min(counts), max(counts)) == (4, 20)
    assert abs(np.mean(counts) - 12) < 1
    assert {0, 30} <= starts
    assert changed("one", view, rng(0)) == "one"
    assert changed(" ".join(words), TextView(crop=(1.0, 1.0)), rng(0)) == " ".join(words)


def test_a_mask_takes_the_letters_drawn_and_not_the_first_that_look_alike() -> None:
    """The release cuts where the drawn letters stand first: of a text that repeats, always the same end."""
    text = "ab" * 20
    view = TextView(mask=4, mask_text="_")
    got = {changed(text, view, rng(k)) for k in range(400)}
    assert got == {text[:i] + "_" + text[i + 4 :] for i in range(len(text) - 3)}
    assert changed("x" * 29, view, rng(0)) == "x" * 29
    assert changed("abcd", TextView(mask=4, mask_from=1), rng(0)) == "abcd"  # nothing would be left


def test_one_caption_of_several_is_drawn_for_both_views_and_alone_they_are_equal() -> None:
    """Without dropout and mask Mirror-BERT's two views are one text, at cosine 1."""
    part = TextInput(TextConfig(view=TextView(choose="caption")))
    texts = part.decode([f"caption {i}" for i in range(5)])
    for k in range(20):
        a, b = (part.train(part.drawn(texts, rng(k)), rng(own)).tolist() for own in (1, 2))
        assert a == b


def test_views_are_for_training_and_are_not_part_of_the_model() -> None:
    plain, viewed = TextInput(TextConfig()), TextInput(TextConfig(view=TextView(crop=(0.2, 0.4))))
    assert viewed.describe() == plain.describe()
    assert "view" not in TextConfig().model_dump()
    assert viewed.eval([DOCUMENT]).tolist() == plain.eval([DOCUMENT]).tolist()
    assert viewed.train([DOCUMENT], rng(1)).tolist() != plain.train([DOCUMENT], rng(1)).tolist()


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"view": {"crop": [0.5, 0.1]}}, r"view.crop: \[0.5, 0.1\] must be"),
        ({"view": {"choose": "sentence"}, "negatives": "json:no"}, "view.choose: sentence and negatives"),
        ({"view": {"choose": "word"}}, "choose"),
    ],
)
def test_what_settings_may_not_say(said: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextConfig.model_validate(said)


def documents(folder: Path, count: int = 24) -> str:
    with ShardWriter(folder, max_samples=count // 2) as writer:
        for i in range(count):
            lines = [f"Document {i} says {k} and more of {k}." for k in range(4)]
            captions = [" ".join(lines), " ".join(reversed(lines))]
            writer.write(f"{i:03d}", {"json": json.dumps({"captions": captions}).encode()})
    return f"{folder}/train-*.tar"


def test_a_pair_sees_neighbours_on_any_ranks_and_after_a_resume(tmp_path: Path) -> None:
    """Through the loader: both modalities read the same member and draw one caption, one place in it."""
    shards = documents(tmp_path)
    parts = {}
    for name, how in (("text", "sentence"), ("next", "neighbor")):
        view = {"choose": how}
        part = {"kind": "text", "input": {"tokenizer": "clip-bpe:2000", "view": view}, "encoder": {"name": "x"}}
        parts[name] = Modality.model_validate(part)
    inputs = build_inputs(parts)
    row = {"name": "s", "shards": shards, "members": {"text": ["json:captions"], "next": ["json:captions"]}}
    data = Data.model_validate({"workers": 0, "sources": [row]})

    def rows(rank: int = 0, world: int = 1, start: int = 0) -> dict[tuple[int, str], list[list[int]]]:
        loader = Loader(data, inputs, [("text", "next")], 3, 8, rank=rank, world=world, start_step=start)
        loader.stop_step = 9
        out = {}
        for step, batch in enumerate(loader, start):
            for i, key in enumerate(batch.keys):
                ids = [batch.inputs[m]["ids"][i][batch.inputs[m]["mask"][i]].tolist() for m in ("text", "next")]
                out[step, key] = ids
        return out

    alone = rows()
    assert rows(0, 2) | rows(1, 2) == alone
    assert rows(start=6) == {k: v for k, v in alone.items() if k[0] >= 6}
    text: Any = inputs["text"]
    known = {}  # ids of a sentence → its document and place
    for i in range(24):
        for k in range(4):
            known[tuple(text.eval([f"Document {i} says {k} and more of {k}."]).tolist())] = (i, k)
    for (_, key), (this, beside) in alone.items():
        (a, k), (b, other) = known[tuple(this)], known[tuple(beside)]
        assert a == b == int(key.rsplit("/", 1)[-1])
        assert abs(k - other) == 1
    assert len({tuple(map(tuple, v)) for v in alone.values()}) > 40  # drawn anew in each epoch


def test_a_teacher_sees_the_text_that_the_student_drew(tmp_path: Path) -> None:
    """Drawn as the student's, crop included; a plain teacher sees the first caption, whole, as in evaluation."""
    view = TextView(choose="neighbor", crop=(0.4, 0.8))
    student = TextInput(TextConfig(tokenizer="clip-bpe:2000", view=view))
    teacher = TextInput(TextConfig(tokenizer="clip-bpe:2000", context_length=90))
    views = {
        "seen": TeacherView("text", as_student_sees(teacher, student), plain=False),
        "plain": TeacherView("text", teacher, plain=True),
    }
    row = {"name": "s", "shards": documents(tmp_path), "members": {m: ["json:captions"] for m in ("text", "next")}}
    data = Data.model_validate({"workers": 0, "sources": [row]})
    inputs: Any = {"text": student, "next": TextInput(TextConfig(tokenizer="clip-bpe:2000"))}
    loader = Loader(data, inputs, [("text", "next")], 3, 8, views=views)
    loader.stop_step = 4

    def ids_of(rows: dict[str, Any]) -> list[list[int]]:
        return [ids[mask].tolist() for ids, mask in zip(rows["ids"], rows["mask"], strict=True)]

    for batch in loader:
        assert ids_of(batch.views["seen"]) == ids_of(batch.inputs["text"])
        for key, ids in zip(batch.keys, ids_of(batch.views["plain"]), strict=True):
            i = int(key.rsplit("/", 1)[-1])
            assert ids == teacher.eval([" ".join(f"Document {i} says {k} and more of {k}." for k in range(4))]).tolist()


def test_views_are_not_cached(tmp_path: Path) -> None:
    raw = {
        "name": "s",
        "modalities": {
            "text": {"input": {"view": {"crop": [0.2, 0.4]}}, "encoder": {"name": "own/transformer", "width": 16}},
            "image": {"input": {"size": 32}, "encoder": {"name": "own/convnet", "widths": [8]}},
        },
        "embed_dim": 16,
        "data": {"sources": [{"name": "s", "shards": "absent.tar"}]},
        "batch": {"size": 8},
        "budget": {"steps": 1},
    }
    recipe = Recipe.model_validate(raw)
    with pytest.raises(ConfigError, match=r"modalities\.text\.input\.view: its views cannot be cached.*--plain text"):
        write_cache(build_bundle(recipe), recipe, tmp_path / "cache")
