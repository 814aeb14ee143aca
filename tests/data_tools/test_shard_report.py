"""The page about shards: what is on it, on planted samples."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_choose import encoded, picture, put, shard
from typer.testing import CliRunner

from dualenc.cli import app
from dualenc_data_tools.choose.duplicates import duplicates
from dualenc_data_tools.choose.filter import Opened

CAPTIONS = ["a dog on a beach", "IMG_0023", "<script>alert(1)</script> two words", "a dog on a beach at night", ""]


@pytest.fixture
def planted(tmp_path: Path) -> str:
    """Twenty pictures in two shards; the last equals the first, one is broken."""
    samples = {f"k{i}": {"png": encoded(picture(i)), "txt": CAPTIONS[i % 5].encode()} for i in range(20)}
    samples["k19"]["png"] = encoded(picture(0))
    samples["k7"]["png"] = samples["k7"]["png"][:300]
    shard(tmp_path / "s-0.tar", dict(list(samples.items())[:12]))
    shard(tmp_path / "s-1.tar", dict(list(samples.items())[12:]))
    return f"{tmp_path}/s-*.tar"


def section(page: str, name: str) -> str:
    found = re.search(rf"<section id='{name}'>(.*?)</section>", page, re.S)
    assert found is not None
    return found[1]


def test_the_page_shows_samples_scores_filters_and_duplicates(planted: str, tmp_path: Path) -> None:
    opened = Opened.of(planted)
    put(opened, tmp_path, "clip_score", [i / 20 for i in range(20)])
    duplicates(planted)
    out = CliRunner().invoke(app, ["shards", "report", planted, "--out", str(tmp_path / "r.html"), "--sheet", "5"])
    assert out.exit_code == 0, out.output
    page = (tmp_path / "r.html").read_text()
    assert "<script" not in page
    assert not re.search(r"(src|href)='(?!data:|#)", page)
    assert section(page, "sheet").count("<figure>") == 5
    lengths = section(page, "lengths")
    assert "words of the longest caption" in lengths
    assert "48 for every sample" in lengths
    scores = section(page, "scores")
    assert [m.split(" · ") for m in re.findall(r"<b>(.*?)</b>", scores)][0::6] == [["lowest", "0"], ["highest", "0.95"]]
    assert re.findall(r"title='(s-\d/k\d+)'", scores) == [f"s-{i >= 12:d}/k{i}" for i in (0, 1, 5, 10, 14, 18, 19)]
    filters = section(page, "filters")
    assert "caption_rules: 8 of 20 samples" in filters
    assert re.search(r"boilerplate <em>· 4 \(20 %\)", filters)
    pairs = section(page, "duplicates")
    assert "1 exact" in pairs
    assert re.findall(r"title='(s-\d/k\d+)'", pairs) == ["s-0/k0", "s-1/k19"]


def test_a_page_without_scores_says_how_to_make_them(planted: str, tmp_path: Path) -> None:
    out = CliRunner().invoke(app, ["shards", "report", planted, "--out", str(tmp_path / "r.html"), "--looked-at", "7"])
    assert out.exit_code == 0, out.output
    page = (tmp_path / "r.html").read_text()
    assert "Of 7 samples drawn from all 20." in section(page, "lengths")
    assert "dualenc shards filter SHARDS --with clip_score" in section(page, "scores")
    assert "dualenc shards duplicates SHARDS" in section(page, "duplicates")
