"""Filters, expressions over their scores, duplicates and contamination, on real and on planted samples."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from dualenc.cli import app
from dualenc.data.shards.selection import read_scores, read_weights, write_scores
from dualenc.errors import ConfigError, DataError
from dualenc_data_tools.choose import filters
from dualenc_data_tools.choose.duplicates import Items, contamination, duplicates, find, occurring
from dualenc_data_tools.choose.expression import evaluate
from dualenc_data_tools.choose.filter import Candidate, Opened, build_filter, run_filters
from dualenc_data_tools.choose.fingerprints import Prints, of_audio, of_image, popcount
from dualenc_data_tools.choose.select import select

Members = dict[str, bytes]


def shard(path: Path, samples: dict[str, Members]) -> Path:
    with tarfile.open(path, "w") as tar:
        for key, members in samples.items():
            for ending, raw in members.items():
                info = tarfile.TarInfo(f"{key}.{ending}")
                info.size = len(raw)
                tar.addfile(info, io.BytesIO(raw))
    return path


def encoded(image: Image.Image, how: str = "PNG", **more: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, how, **more)
    return out.getvalue()


def picture(seed: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    """Smooth random colours: what photos are to a perceptual hash."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


CAPTIONS = [
    "a dog on a beach",
    "IMG_0023",
    "dog dog dog dog dog dog dog",
    "see www.shop.com for it",
    "",
    "0123456 79 a b",
]


@pytest.fixture
def small(tmp_path: Path) -> str:
    samples = {f"k{i}": {"png": encoded(picture(i)), "txt": c.encode()} for i, c in enumerate(CAPTIONS)}
    shard(tmp_path / "s-0.tar", dict(list(samples.items())[:4]))
    shard(tmp_path / "s-1.tar", dict(list(samples.items())[4:]))
    return f"{tmp_path}/s-*.tar"


def test_filters_of_captions_and_headers(small: str, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("dog\nbeach\ncat\n")
    got = run_filters(
        small,
        ["caption_length", "caption_rules", "size", "datacomp_basic", "concept_balance", "usable"],
        {
            "datacomp_basic": {"min_side": 40},
            "concept_balance": {"concepts": str(tmp_path / "words.txt"), "at_most": 1},
        },
    )
    values = {name: v.tolist() for name, (_, v) in got.items()}
    assert values["caption_words"] == [5, 1, 7, 6, 0, 4]
    assert values["captions"] == [1, 1, 1, 1, 1, 1]
    assert values["caption_rules"] == ["ok", "boilerplate", "repeats", "url", "missing", "digits"]
    assert values["width"] == [64] * 6
    assert values["aspect"] == [64 / 48] * 6
    assert values["datacomp_basic"] == ["ok", "words", "ok", "ok", "words", "ok"]
    # Two samples name a dog, of which t = 1 is wanted; one names a beach, which keeps it whole.
    assert values["concept_balance"] == [1.0, 0.0, 0.5, 0.0, 0.0, 0.0]
    assert values["usable"] == ["ok", "ok", "ok", "ok", "no caption", "ok"]
    opened = Opened.of(small)
    assert read_scores("caption_rules", opened.shards).tolist() == values["caption_rules"]
    assert Path(got["size" if "size" in got else "width"][0]).parent == tmp_path
    with pytest.raises(ConfigError, match=r"There is no filter 'caption_lenght'\. Did you mean 'caption_length'"):
        build_filter("caption_lenght")
    with pytest.raises(ConfigError, match="'size' is not run; add --with size"):
        run_filters(small, ["usable"], {"size": {}})
    with pytest.raises(ConfigError, match=r"min_word"):
        build_filter("caption_rules", {"min_word": 3})


def test_language() -> None:
    pytest.importorskip("py3langid")
    rows = [Candidate(str(i), {"text": t.encode()}) for i, t in enumerate(
        ["A man in a red jacket is walking his dog", "Ein Mann geht mit seinem Hund am Strand spazieren", ""]
    )]  # fmt: skip
    got = build_filter("language", {"languages": ["en", "de", "fr"]}).score(rows)
    assert got["language"] == ["en", "de", None]
    assert all(v > 0.9 for v in got["language_sure"][:2])
    with pytest.raises(ConfigError, match="ISO 639-1"):
        build_filter("language", {"languages": ["english"]})


def put(opened: Opened, folder: Path, name: str, values: list[Any]) -> None:
    array = np.array(values, object if any(isinstance(v, str) for v in values) else np.float64)
    write_scores(folder / f"{name}.scores.parquet", opened.shards, opened.index_of, array)


def test_expressions(small: str, tmp_path: Path) -> None:
    opened = Opened.of(small)
    put(opened, tmp_path, "score", [0.5, 0.1, np.nan, 0.4, 0.3, 0.2])
    put(opened, tmp_path, "rules", ["ok", "url", "ok", None, "ok", "short"])
    select(small, "score >= 0.3", "good")

    def picked(text: str) -> list[int]:
        return np.flatnonzero(evaluate(text, opened.shards)).tolist()

    for text, expected in {
        "all": [0, 1, 2, 3, 4, 5],
        "good": [0, 3, 4],
        "score<0.3": [1, 5],
        "score != 0.5": [1, 3, 4, 5],
        "rules": [0, 2, 4],
        "rules in url, short": [1, 5],
        "rules != ok": [1, 5],
        "top 40% by score": [0, 3],
        "top 2 of rules by score": [0, 4],
        "bottom 1 of (rules and score > 0) by score": [4],
        "good and rules": [0, 4],
        "good or rules": [0, 2, 3, 4],
        "rules minus good": [2],
        "all minus (good or rules)": [1, 5],
        "all minus good or rules": [0, 1, 2, 4, 5],
    }.items():
        assert picked(text) == expected, text
    assert evaluate("weigh by score", opened.shards).tolist() == [0.5, 0.1, 0, 0.4, 0.3, 0.2]
    assert evaluate("good and weigh by score", opened.shards).tolist() == [0.5, 0, 0, 0.4, 0.3, 0]
    for text, said in {
        "goood": r"no selection or score 'goood'\. Did you mean 'good'\?",
        "score": "is a number for each sample; compare it",
        "top x by score": "'x' is neither a share such as 30% nor a number",
        "top 130% by score": "not between 0 % and 100 %",
        "good rules": "unexpected 'rules'; join terms with and, or, minus",
        "(good": "expected \\) instead of the end",
        "rules > 3": "holds texts, which > does not compare",
        "top 3 by rules": "holds texts, which have no order",
        "score == high": "'high' is not",
        "and good": "expected a name instead of 'and'",
        "": "expected a name instead of the end",
    }.items():
        with pytest.raises(ConfigError, match=said):
            evaluate(text, opened.shards)
    with pytest.raises(DataError, match="selects none of 6 samples"):
        select(small, "score > 9", "none")


def test_commands(small: str, tmp_path: Path) -> None:
    run = CliRunner().invoke
    out = run(app, ["shards", "filter", small, "--with", "caption_length", "--with", "caption_rules"])
    assert out.exit_code == 0, out.output
    assert "caption_rules: ok 1, boilerplate 1" in out.output
    out = run(app, ["shards", "select", small, "--out", "good", "caption_words", ">=", "5"])
    assert "3 of 6 samples, 3.0 per epoch" in out.output
    out = run(app, ["shards", "view", small, "--select", "good", "--out", str(tmp_path / "v.html")])
    assert out.exit_code == 0, out.output
    page = (tmp_path / "v.html").read_text()
    assert "3 of 3 samples with good, of 6 in" in page
    assert "s-0/k2" in page
    assert "IMG_0023" not in page


def test_a_build_can_be_run_again_from_its_yaml(tmp_path: Path) -> None:
    photos, run = tmp_path / "photos", CliRunner().invoke
    photos.mkdir()
    for i in range(6):
        (photos / f"{i}.png").write_bytes(encoded(picture(i)))
        (photos / f"{i}.txt").write_text(f"picture {i}")
    first, second = tmp_path / "first", tmp_path / "second"
    out = run(app, ["shards", "build", "folder", f"path={photos}", "shuffle_seed=3", "limit=5", "--out", str(first)])
    assert out.exit_code == 0, out.output
    kept = next(first.glob("build-*.yaml"))
    assert "source: folder" in kept.read_text()
    out = run(app, ["shards", "build", str(kept), "--out", str(second)])
    assert out.exit_code == 0, out.output
    assert {p.name: p.read_bytes() for p in first.iterdir()} == {p.name: p.read_bytes() for p in second.iterdir()}
    (tmp_path / "mine.yaml").write_text("build: {source: folder, path: ./photos}\nmore: 1\n")
    out = run(app, ["shards", "build", str(tmp_path / "mine.yaml"), "--out", str(tmp_path / "third")])
    assert isinstance(out.exception, ConfigError)
    assert "write one section" in str(out.exception)


def test_planted_faults_are_found(tmp_path: Path) -> None:
    from benchmarks.planted import SHARES, PlantedSample, found, plant, write

    def photo(key: str, seed: int) -> PlantedSample:
        return PlantedSample(key, encoded(picture(seed, (112, 90)), "JPEG", quality=92), "jpg", [f"caption {seed}"])

    clean, dev = [photo(f"c{i}", i) for i in range(60)], [photo(f"d{i}", 500 + i) for i in range(4)]
    for s in dev:
        (tmp_path / f"{s.key}.jpg").write_bytes(s.image)
    lines = [{"image": f"{s.key}.jpg", "captions": s.captions} for s in dev]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (tmp_path / "mine.yaml").write_text(
        "kind: retrieval\ndescription: d\nlicense: l\ncitation: c\n"
        'source: {kind: jsonl, path: ./rows.jsonl, members: {image: ["file:image"], text: [captions]}}\n'
    )
    faulty = plant(clean, dev, swap=False)
    named = found(write(faulty, tmp_path / "planted"), [str(tmp_path / "mine.yaml")], None)
    for fault in SHARES:
        there = np.array([fault in s.faults for s in faulty])
        assert there.sum() == 2
        assert np.array_equal(named[fault], there), fault
    named = found(write(clean, tmp_path / "clean"), [str(tmp_path / "mine.yaml")], None)
    assert not any(v.any() for v in named.values())


# --- duplicates ------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=20))
def test_popcount(words: list[int]) -> None:
    assert popcount(np.array(words, np.uint64)).tolist() == [w.bit_count() for w in words]


@given(st.integers(0, 2**32), st.sets(st.integers(0, 63), max_size=7))
@settings(deadline=None, max_examples=40)
def test_no_near_pair_is_missed(seed: int, flipped: set[int]) -> None:
    rng = np.random.default_rng(seed)
    prints = Prints(30)
    prints.fine[:, 0] = rng.integers(0, 2**64, 30, np.uint64)
    prints.near[:] = True
    prints.fine[17, 0] = prints.fine[4, 0] ^ np.uint64(sum(1 << b for b in flipped))
    found = {
        (min(i, j), max(i, j)) for a, b in prints.near_pairs() for i, j in zip(a.tolist(), b.tolist(), strict=True)
    }
    assert ((4, 17) in found) == (len(flipped) <= 5)


def test_prints_see_through_formats() -> None:
    image = picture(3, (160, 120))
    png, bmp = of_image(encoded(image)), of_image(encoded(image, "BMP"))
    assert png.exact == bmp.exact
    soundfile = pytest.importorskip("soundfile")
    wave = (np.random.default_rng(0).integers(-9000, 9000, 8000) / 32768).astype(np.float32)
    clips = []
    for form in ("WAV", "FLAC"):
        out = io.BytesIO()
        soundfile.write(out, wave, 8000, format=form, subtype="PCM_16")
        clips.append(out.getvalue())
    assert of_audio(clips[0]).exact == of_audio(clips[1]).exact
    assert of_audio(clips[0]).exact != png.exact


def test_planted_duplicates_and_contamination(tmp_path: Path) -> None:
    originals = {f"o{i}": {"png": encoded(picture(i, (160, 120))), "txt": b"x y z"} for i in range(40)}
    again: dict[str, Members] = {
        "exact": {"bmp": encoded(picture(7, (160, 120)), "BMP"), "txt": b"another"},
        "jpeg": {"jpg": encoded(picture(8, (160, 120)), "JPEG", quality=60), "txt": b"another"},
        "small": {"webp": encoded(picture(9, (160, 120)).resize((100, 75)), "WEBP", quality=80), "txt": b"another"},
        "broken": {"png": encoded(picture(50))[:300], "txt": b"cut short"},
        "text": {"txt": b"no image"},
    }
    shard(tmp_path / "a-0.tar", originals)
    shard(tmp_path / "a-1.tar", again)
    found = duplicates(f"{tmp_path}/a-*.tar")
    assert found.of == "image"
    assert found.kind.tolist() == ["ok"] * 40 + ["exact", "near", "near", "broken", "none"]
    assert ("a-0.tar/o7", "a-1.tar/exact", "exact") in found.examples
    opened = Opened.of(f"{tmp_path}/a-*.tar")
    assert np.flatnonzero(read_weights("distinct", opened.shards)).tolist() == [*range(40), 44]
    assert read_scores("duplicate_of", opened.shards).tolist()[40:] == [
        "a-0.tar/o7",
        "a-0.tar/o8",
        "a-0.tar/o9",
        None,
        None,
    ]
    items = Prints(3)
    for i, image in enumerate((picture(7, (160, 120)), picture(99), picture(20, (160, 120)).resize((120, 90)))):
        items.put(i, "image", encoded(image, "JPEG", quality=75) if i == 2 else encoded(image))
    hits, path, total = contamination(f"{tmp_path}/a-*.tar", [Items("image", ["i7", "i99", "i20"], ["t"] * 3, items)])
    assert {(h.item, h.sample, h.kind) for h in hits} == {
        ("i7", "a-0.tar/o7", "exact"), ("i7", "a-1.tar/exact", "exact"), ("i20", "a-0.tar/o20", "near"),
    }  # fmt: skip
    assert (Path(path).name, total) == ("uncontaminated.selection.parquet", 45)
    assert np.count_nonzero(read_weights("uncontaminated", opened.shards)) == 42


def test_contamination_by_task(tmp_path: Path) -> None:
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(encoded(picture(i, (160, 120))))
    lines = [{"image": f"{i}.png", "captions": ["a b c"]} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (tmp_path / "mine.yaml").write_text(
        "kind: retrieval\ndescription: d\nlicense: l\ncitation: c\n"
        'source: {kind: jsonl, path: ./rows.jsonl, members: {image: ["file:image"], text: [captions]}}\n'
    )
    samples = {f"s{i}": {"jpg": encoded(picture(i, (160, 120)), "JPEG", quality=70), "txt": b"t"} for i in range(2, 30)}
    shard(tmp_path / "t.tar", samples)
    report = tmp_path / "hits.jsonl"
    args = [
        "shards",
        "contamination",
        f"{tmp_path}/t.tar",
        "--tasks",
        str(tmp_path / "mine.yaml"),
        "--report",
        str(report),
    ]
    out = CliRunner().invoke(app, args)
    assert out.exit_code == 0, out.output
    assert "selection without 2 of 28 samples" in out.output
    hits = [json.loads(x) for x in report.read_text().splitlines()]
    assert [(h["task"], h["sample"], h["kind"]) for h in hits] == [("mine", f"t.tar/s{i}", "near") for i in (2, 3)]


def test_blank_items_stay_bounded() -> None:
    prints = Prints(3000)
    prints.near[:] = prints.there[:] = True  # all the same
    assert int((find(prints, np.ones(3000, np.int64), "image").kind == "exact").sum()) == 2999
    assert occurring(Prints(0), Items("image", [], [], Prints(0))) == []


def test_every_filter_says_what_it_does() -> None:
    assert {"clip_score", "caption_rules", "datacomp_basic", "concept_balance", "model_loss", "language"} <= set(
        filters
    )
    for name in filters:
        assert filters[name].__doc__, name
