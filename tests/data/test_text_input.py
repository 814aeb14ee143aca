"""Token ids: CLIP's own, its prefix vocabularies, tokenizers of other libraries."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _shared import PYTHONPATH
from conftest import read_tar
from hypothesis import given, settings
from hypothesis import strategies as st

from dualenc.config import settings_as
from dualenc.data.modalities import DecodeError
from dualenc.data.modalities.text import TextConfig, TextInput
from dualenc.data.modalities.tokenizing import ClipBPE
from dualenc.errors import ConfigError

os.environ["HF_HUB_OFFLINE"] = "1"
TEXTS = [
    "a photo of a cat",
    "Fried   Shrimp",
    "naïve café – 日本語 🙂",
    "it's 12 o'clock &amp; more",
    "x" * 500,
    "!?",
    "a",
]


def make(**settings: object) -> TextInput:
    return TextInput(settings_as(TextConfig, settings, "input"))


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed))


def batch(part: TextInput, texts: list[str]) -> dict[str, torch.Tensor]:
    return part.collate([part.eval(part.decode(t)) for t in texts])


@pytest.fixture(scope="session")
def captions(quickstart: Path) -> list[str]:
    members = read_tar(quickstart / "train-000000.tar")
    return [raw.decode() for name, raw in members.items() if name.endswith(".txt")]


@pytest.mark.parametrize("name", ["clip", "clip-bpe:49408", "open_clip:ViT-B-32"])
def test_clip_equals_open_clip(name: str, captions: list[str]) -> None:
    open_clip = pytest.importorskip("open_clip")
    part = make(tokenizer=name)
    texts = TEXTS + captions[:300]
    ours = batch(part, texts)
    theirs = open_clip.get_tokenizer("ViT-B-32")(texts)
    length = ours["ids"].shape[1]
    assert torch.equal(ours["ids"], theirs[:, :length])
    assert (theirs[:, length:] == 0).all()
    assert torch.equal(ours["ids"].argmax(1) + 1, ours["mask"].sum(1))
    assert (part.vocab_size, part.context_length, part.pad_id, part.eot_id) == (49408, 77, 0, 49407)


@pytest.mark.parametrize("size", [515, 600, 8192, 49408])
def test_prefix_vocabulary_round_trips(size: int, captions: list[str]) -> None:
    tok = ClipBPE(size, 4000)
    whole = ClipBPE(49408, 4000)
    for text in TEXTS + captions[:200]:
        ids = tok.encode(text)
        assert ids[0] == size - 2
        assert ids[-1] == size - 1
        assert max(ids[1:-1]) < size - 2
        assert tok.decode(ids) == whole.decode(whole.encode(text))
    assert tok.vocab_size == size
    if size >= 8192:
        mean = [np.mean([len(t.encode(c)) for c in captions]) for t in (tok, whole)]
        assert mean[0] < 1.6 * mean[1]


@given(st.text(min_size=1, max_size=60))
@settings(deadline=None, max_examples=50)
def test_any_text_has_ids(text: str) -> None:
    tok = ClipBPE_8192()
    ids = tok.encode(text)
    assert len(ids) <= 16
    assert ids[0] == 8190
    assert ids[-1] == 8191
    assert all(0 <= i < 8192 for i in ids)


_tok: list[ClipBPE] = []


def ClipBPE_8192() -> ClipBPE:  # noqa: N802
    if not _tok:
        _tok.append(ClipBPE(8192, 16))
    return _tok[0]


def test_truncation_keeps_the_end() -> None:
    part = make(tokenizer="clip-bpe:8192", context_length=8)
    long = part.eval(part.decode("one two three four five six seven eight nine"))
    assert len(long) == 8
    assert long[-1] == part.eot_id
    assert long[:3].tolist() == part.eval(part.decode("one two"))[:3].tolist()


def test_padding_is_only_what_the_batch_needs() -> None:
    texts = ["one", "one two three four five", "one two"]
    got = batch(make(tokenizer="clip-bpe:8192"), texts)
    assert got["mask"].sum(1).tolist() == [3, 7, 4]
    assert got["ids"].shape == (3, 7)
    assert got["ids"].dtype == torch.long
    assert (got["ids"][~got["mask"]] == 0).all()
    assert batch(make(tokenizer="clip-bpe:8192", bucket=8), texts)["ids"].shape == (3, 8)
    assert batch(make(tokenizer="clip-bpe:8192", bucket=64, context_length=20), texts)["ids"].shape == (3, 20)
    full = batch(make(tokenizer="clip-bpe:8192", pad="context", context_length=20), texts)
    assert full["ids"].shape == (3, 20)
    assert full["mask"].all()


def test_what_is_no_caption() -> None:
    part = make(tokenizer="clip-bpe:600")
    for raw, message in [
        (b"", "empty"),
        (b" \n\t", "empty"),
        ([], "empty"),
        (["", " "], "empty"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (7, "got int"),
        ([1], "got list"),
        ({"a": 1}, "got dict"),
    ]:
        with pytest.raises(DecodeError, match=message):
            part.decode(raw)
    assert part.decode(b"\xef\xbb\xbfbom ") == ["bom"]


def test_several_captions() -> None:
    part = make(tokenizer="clip-bpe:8192")
    texts = part.decode(["one", " ", "two", "three"])
    rows = [part.train(texts, rng(s)).tolist() for s in range(40)]
    assert len({tuple(r) for r in rows}) == 3
    assert rows == [part.train(texts, rng(s)).tolist() for s in range(40)]
    assert part.eval(texts).tolist() == part.eval(["one"]).tolist()


def test_templates_are_for_training() -> None:
    part = make(tokenizer="clip-bpe:8192", templates=["{}", "a photo of {}."])
    rows = {tuple(part.train(["socks"], rng(s)).tolist()) for s in range(40)}
    assert rows == {tuple(part.eval([t]).tolist()) for t in ("socks", "a photo of socks.")}
    with pytest.raises(ConfigError, match=r"templates: 'a photo' must contain exactly one \{\}"):
        make(templates=["a photo"])


def test_lower() -> None:
    one = lambda lower, text: make(tokenizer="clip-bpe:8192", lower=lower).eval([text]).tolist()
    assert one(None, "CAT") == one(True, "CAT") == one(None, "cat")
    assert one(False, "CAT") != one(False, "cat")


def test_identity() -> None:
    described = make(tokenizer="clip-bpe:8192").describe()
    assert described["config"]["context_length"] == 77
    assert described["tokenizer"]["vocab_size"] == 8192
    digests = {
        make(tokenizer=t, **m).describe()["tokenizer"]["sha256"]
        for t, m in [("clip-bpe:8192", {}), ("clip-bpe:8193", {}), ("clip", {}), ("clip-bpe:8192", {"lower": False})]
    }
    assert len(digests) == 4
    again = settings_as(TextConfig, described["config"], "input")
    assert TextInput(again).describe() == described
    assert copy.deepcopy(make(tokenizer="clip-bpe:600")).describe()["tokenizer"]["vocab_size"] == 600


def test_hf_tokenizer_from_a_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "cat", "dog", "##s", "of", "photo", "[MASK]"]
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok" / "vocab.txt").write_text("\n".join(vocab))
    transformers.BertTokenizerFast(str(tmp_path / "tok" / "vocab.txt"), model_max_length=9).save_pretrained(
        tmp_path / "tok"
    )
    part = make(tokenizer=f"hf:{tmp_path}/tok")
    assert (part.context_length, part.vocab_size, part.pad_id, part.eot_id) == (9, 11, 0, 3)
    got = batch(part, ["a photo of cats", "Dog", "a cat " * 20])
    assert got["ids"][0].tolist() == [2, 4, 9, 8, 5, 7, 3, 0, 0]
    assert got["ids"][1].tolist() == [2, 6, 3, 0, 0, 0, 0, 0, 0]
    assert got["ids"][2].tolist() == [2, 4, 5, 4, 5, 4, 5, 4, 3]
    assert got["mask"].sum(1).tolist() == [7, 3, 9]
    described = part.save(tmp_path / "bundle")
    assert described["config"]["tokenizer"] == "hf:./tokenizer"
    moved = (tmp_path / "bundle").rename(tmp_path / "elsewhere")
    again = TextInput(settings_as(TextConfig, described["config"], "input"), base_dir=moved)
    assert again.describe()["tokenizer"]["sha256"] == described["tokenizer"]["sha256"]
    assert torch.equal(batch(again, ["a photo of cats"])["ids"], batch(part, ["a photo of cats"])["ids"])


def test_wrong_names() -> None:
    for name, message in [
        ("clpi", "write clip, clip-bpe"),
        ("clip-bpe:100", "needs a size in 515"),
        ("clip-bpe:x", "needs a size"),
        ("open_clip:ViT-B-33", "Did you mean 'ViT-B-32'"),
        ("hf:/nowhere/tok", "no folder /nowhere/tok"),
        ("hf:nobody/no-such-tokenizer", "cannot be loaded"),
    ]:
        with pytest.raises(ConfigError, match=message):
            make(tokenizer=name)
    with pytest.raises(ConfigError, match="no room"):
        make(context_length=2)


def test_clip_s_vocabulary_is_read_without_open_clip_and_gives_its_ids() -> None:
    """open_clip imports for seconds; its file of tokenizers alone gives the same ids."""
    code = """
import sys
from dualenc.data.modalities.text import PROBES
from dualenc.data.modalities.tokenizing import ClipBPE
bpe = ClipBPE(49408, 77)
ids = [bpe.encode(t) for t in PROBES]
print("open_clip" in sys.modules, "transformers" in sys.modules, "torchvision" in sys.modules)
import open_clip
theirs = open_clip.get_tokenizer("ViT-B-32")(list(PROBES))
assert [row[: len(i)].tolist() for row, i in zip(theirs, ids, strict=True)] == ids
assert all(not row[len(i) :].any() for row, i in zip(theirs, ids, strict=True))
assert ClipBPE(8192, 77).digest() and [ClipBPE(49408, 77).encode(t) for t in PROBES] == ids
"""
    env = {**os.environ, "PYTHONPATH": PYTHONPATH}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False False False"


ODD = [
    "<start_of_text>",
    "<END_OF_TEXT>",
    "&amp;",
    "&#39;",
    "&amp;lt;",
    "&nbsp;",
    "’",
    "\x1b[31m",
    "\x00",
    "\x7f",
    "\t",
    "\n",
    "\x0b",
    "\x1c",
    "\x85",
    "\u2028",
    "é",
    "e\u0301",
    "ﬁ",
    "ſ",
    "K",
    "İ",
    "ß",
    "猫",
    "👩‍👩‍👧",
    "Â©",
    "â€™",
    "it's",
    "'RE",
    "1234",
    "½",
    "²",
    "٣",
    "_",
    "--",
    "!!!",
    "a" * 70,
    "xyz" * 90,
    "\u200b",
    "\ufeff",
    "ǅ",
    "&",
    "a&b",
    "&lt",
    " ",
    "  ",
    "The",
    "DOG",
    "of",
]
LETTERS = st.characters(blacklist_categories=["Cs"])


@pytest.mark.parametrize("lower", [None, False])
@given(
    words=st.lists(st.one_of(st.sampled_from(ODD), st.text(LETTERS, max_size=9), st.text(max_size=30)), max_size=12),
    by=st.sampled_from(["", " "]),
)
@settings(max_examples=300, deadline=None)
def test_remembered_words_give_open_clip_s_ids(lower: bool | None, words: list[str], by: str) -> None:
    simple, bpe = _both(lower)
    text = by.join(words).encode("utf-8", "ignore").decode("utf-8")
    assert bpe.encode(text) == [bpe.sot_id, *simple.encode(text)[:75], bpe.eot_id]


@cache
def _both(lower: bool | None) -> tuple[Any, ClipBPE]:
    open_clip = pytest.importorskip("open_clip")
    return open_clip.SimpleTokenizer(clean="whitespace" if lower is False else "lower"), ClipBPE(49408, 77, lower)


def test_remembered_words_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dualenc.data.modalities.tokenizing._KNOWN_WORDS", 8)
    bpe, fresh = ClipBPE(49408, 77), ClipBPE(49408, 77)
    for i in range(50):
        text = f"word{i} {chr(97 + i % 26) * (i + 1)}"
        assert bpe.encode(text) == fresh.encode(text)
        assert len(bpe._words) <= 8
