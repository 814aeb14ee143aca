"""Rebuilding the quickstart's shards: the parts, and the whole where the packages are at hand."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from pathlib import Path

import pytest

from dualenc.data.shards.reader import iter_samples
from dualenc.errors import ConfigError, DataError
from dualenc_data_tools.build import build
from dualenc_data_tools.sources.clipart import clipart_caption
from dualenc_data_tools.sources.quickstart import METADATA, compare_captions, without_selectors

WORK = os.environ.get("DUALENC_QUICKSTART_WORK")

SVG = """<?xml version="1.0"?>
<svg xmlns="http://www.w3.org/2000/svg"><metadata>
<rdf:RDF xmlns:cc="http://web.resource.org/cc/" xmlns:dc="http://purl.org/dc/elements/1.1/"
 xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><cc:Work rdf:about="">
<dc:title>{title}</dc:title><dc:description>{description}</dc:description>
<dc:subject><rdf:Bag>{keywords}</rdf:Bag></dc:subject>
<dc:publisher><cc:Agent><dc:title>Open Clip Art Library</dc:title></cc:Agent></dc:publisher>
</cc:Work></rdf:RDF></metadata></svg>"""


@pytest.mark.parametrize(
    ("title", "description", "keywords", "caption"),
    [
        ("bass-guitar", "A blue bass guitar", "bass guitar electric music", "A blue bass guitar, electric, music"),
        ("Mermaid", "A pretty young mermaid", "mermaid woman fantasy", "A pretty young mermaid, woman, fantasy"),
        (" latvia", "HASH(0x85a0c44)", "europe united_nations_member flag sign", "latvia, europe, flag"),
        ("Bus1", "bus", "transport bus", "Bus, transport"),
        ("Stickyman 001", "Made with inkscape", "stickmen", "Stickyman, stickmen"),
        ("Sea", "", "a1b wave surf boat ship tide", "Sea, a1b, wave, surf, boat, ship"),
    ],
)
def test_clipart_captions(tmp_path: Path, title: str, description: str, keywords: str, caption: str) -> None:
    bag = "".join(f"<rdf:li>{k}</rdf:li>" for k in keywords.split())
    path = tmp_path / "x.svg"
    path.write_text(SVG.format(title=title, description=description, keywords=bag))
    assert clipart_caption(path) == caption


def test_codepoints_are_spelled_one_way() -> None:
    assert without_selectors("2764-FE0F-200D-1F525") == "2764-200d-1f525"
    assert without_selectors("0035-fe0f-20e3") == "0035-20e3"


def test_a_missing_tool_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="needs the command npm: install"):
        build("quickstart", tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_metadata_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "metadata.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps({"key": "a", "source": "photos"}).encode()))
    with pytest.raises(DataError, match="'photos'; known: noto"):
        build("quickstart", tmp_path / "out", metadata=str(path), progress=False)


@pytest.mark.slow
def test_the_shards_come_out_as_shipped(tmp_path: Path) -> None:
    if not WORK:
        pytest.skip("DUALENC_QUICKSTART_WORK names no folder that keeps the packages (180 MB, from npm and Debian)")
    report = build("quickstart", tmp_path, work=WORK, progress=False)
    assert report.written == {"train": 3912, "val-style": 500, "val-clipart": 62}
    same = {p.name for p in report.shards if _digest(p) == _digest(METADATA.parent / p.name)}
    assert {"val-style-000000.tar", "val-clipart-000000.tar"} <= same
    wanted = {"image": ["webp"], "text": ["txt"]}
    equal = total = 0
    for p in report.shards:
        pairs = zip(iter_samples(str(METADATA.parent / p.name), wanted), iter_samples(str(p), wanted), strict=True)
        for (old_key, old), (new_key, new) in pairs:
            assert old_key == new_key
            assert old.values["text"] == new.values["text"]  # type: ignore[union-attr]
            equal += old.values["image"] == new.values["image"]  # type: ignore[union-attr]
            total += 1
    assert total == 4474
    assert equal >= total - 12, "only the twelve drawings that hold text depend on the fonts installed"
    assert all(same == n for same, n in compare_captions(METADATA, Path(WORK)).values())


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
