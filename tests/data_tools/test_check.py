"""dualenc shards check and view on the shipped shards, clean and spoiled."""

from __future__ import annotations

import io
import json
import re
import shutil
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from dualenc.errors import DataError
from dualenc_data_tools.check import check, print_check
from dualenc_data_tools.view import view

SHIPPED = Path(__file__).parents[2] / "recipes" / "quickstart" / "data"
Members = list[tuple[str, bytes]]


def members_of(name: str) -> Members:
    with tarfile.open(SHIPPED / name) as tar:
        return [(m.name, f.read()) for m in tar if (f := tar.extractfile(m)) is not None]


def pack(path: Path, members: Members) -> Path:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, raw in members:
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    return path


@pytest.fixture(scope="module")
def clipart() -> Members:
    return members_of("val-clipart-000000.tar")


def _png_header(side: int) -> bytes:
    """A PNG whose header claims side × side pixels: what a decompression bomb starts with."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = [b"IHDR" + header, b"IDAT" + zlib.compress(bytes(1000)), b"IEND"]
    packed = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def test_the_shipped_shards_are_ok(capsys: pytest.CaptureFixture[str]) -> None:
    report = check([str(SHIPPED / "val-*-000000.tar")], workers=1, progress=False)
    assert report.ok
    assert (report.shards, report.stats.samples, report.total_captions) == (2, 562, 562)
    assert report.stats.pixels == {64: 500, 96: 62}
    assert report.stats.members == {"webp": 562, "txt": 562}
    print_check(report)
    out = capsys.readouterr().out
    assert out.rstrip().endswith("ok")
    assert "65–128" in out


@pytest.mark.dist
def test_workers_give_the_same_report() -> None:
    shards = [str(SHIPPED / f"train-{i:06d}.tar") for i in range(2)]
    one, two = (check(shards, workers=n, progress=False) for n in (1, 2))
    assert one == two
    assert one.ok
    assert one.duplicate_share > 0.1, "noto and twemoji share their names"


Spoil = Callable[[Members], Members]
CASES: dict[str, tuple[Spoil, str, int]] = {
    "cut picture": (lambda m: [(m[0][0], m[0][1][:200]), *m[1:]], "broken image", 1),
    "html": (lambda m: [(m[0][0], b"<html>"), *m[1:]], "broken image", 1),
    "bomb": (lambda m: [("bomb.png", _png_header(30_000)), ("bomb.txt", b"a bomb"), *m], "too large", 1),
    "30 M pixels": (lambda m: [("big.png", _png_header(5_500)), ("big.txt", b"big"), *m], "too large", 1),
    "no text": (lambda m: [m[0], *m[2:]], "missing member", 1),
    "no picture": (lambda m: m[1:], "missing member", 1),
    "empty text": (lambda m: [m[0], (m[1][0], b" \n"), m[2], (m[3][0], b""), *m[4:]], "empty caption", 2),
    "latin-1": (lambda m: [m[0], (m[1][0], b"caf\xe9"), *m[2:]], "broken text", 1),
    "json": (lambda m: [m[0], (m[1][0][:-3] + "json", b"{nope"), *m[2:]], "broken text", 1),
    "no captions": (lambda m: [m[0], (m[1][0][:-3] + "json", b'{"captions": []}'), *m[2:]], "empty caption", 1),
    "twice": (lambda m: [*m, *m[:4]], "duplicate key", 2),
    "climbs": (lambda m: [("../up.webp", m[0][1]), ("../up.txt", b"up"), *m], "unsafe name", 1),
    "absolute": (lambda m: [("/etc/up.webp", m[0][1]), ("/etc/up.txt", b"up"), *m], "unsafe name", 1),
    "pickle": (lambda m: [*m[:2], (m[0][0][:-4] + "pkl", b"cos\nsystem\n(S'x'\ntR."), *m[2:]], "pickled member", 1),
}


@pytest.mark.parametrize("case", CASES)
def test_each_problem_is_counted_and_named(
    clipart: Members, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, what, count = CASES[case]
    path = pack(tmp_path / "a.tar", spoil(clipart))
    report = check(str(path), workers=1, progress=False)
    assert report.stats.problems == {what: count}
    assert not report.ok
    assert len(report.stats.examples[what]) == count
    print_check(report)
    out = capsys.readouterr().out
    assert what in out
    assert f"not ok: {count} problems" in out
    assert not (tmp_path.parent / "up.webp").exists()


def test_broken_shards_are_counted_and_the_others_read(clipart: Members, tmp_path: Path) -> None:
    good = pack(tmp_path / "a.tar", clipart)
    (tmp_path / "b.tar").write_bytes(good.read_bytes()[:50_000])
    (tmp_path / "c.tar").write_bytes(b"no tar at all" * 100)
    (tmp_path / "d.tar").write_bytes(b"")
    report = check(str(tmp_path / "*.tar"), workers=1, progress=False)
    assert report.stats.problems == {"broken shard": 3}
    assert report.stats.samples == 62


def test_the_same_key_in_two_shards_is_counted(clipart: Members, tmp_path: Path) -> None:
    pack(tmp_path / "a.tar", clipart)
    pack(tmp_path / "b.tar", clipart[:6])
    report = check(str(tmp_path / "*.tar"), workers=1, progress=False)
    assert report.stats.problems == {"duplicate key": 3}


def test_a_missing_shard_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no shard"):
        check(str(tmp_path / "a.tar"), progress=False)


def test_the_gallery_needs_no_other_file(tmp_path: Path) -> None:
    out = view(str(SHIPPED / "val-clipart-000000.tar"), tmp_path / "a" / "v.html", n=12, seed=3)
    page = out.read_text()
    assert page.count("<article>") == 12
    assert page.count("src='data:image/webp;base64,") == 12
    assert not re.search(r"(?:src|href)=['\"](?!data:)", page)
    assert "12 of 62 samples" in page
    assert view(str(SHIPPED / "val-clipart-000000.tar"), tmp_path / "w.html", n=12, seed=3).read_text() == page
    other = view(str(SHIPPED / "val-clipart-000000.tar"), tmp_path / "x.html", n=12, seed=4).read_text()
    assert other != page
    everything = view(str(SHIPPED / "val-clipart-000000.tar"), tmp_path / "y.html", n=500).read_text()
    assert everything.count("<article>") == 62


def test_the_gallery_escapes_what_it_shows(clipart: Members, tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    doc = json.dumps({"captions": [evil, "two"], "<b>": evil}).encode()
    members = [("x.webp", clipart[0][1]), ("x.json", doc), ("<i>y.webp", b"broken"), ("<i>y.txt", evil.encode())]
    page = view(str(pack(tmp_path / "a.tar", members)), tmp_path / "v.html").read_text()
    assert "<script" not in page
    assert "<b>" not in page
    assert "<i>" not in page
    assert page.count("&lt;script&gt;") == 3
    assert "<li>two</li>" in page
    assert "class='bad'" in page, "the broken image is shown as broken"


def test_pages_and_checks_read_sets_with_an_index(clipart: Members, tmp_path: Path) -> None:
    shutil.copy(SHIPPED / "val-clipart-000000.tar", tmp_path / "a.tar")
    from dualenc.data.shards.index import build_index

    build_index([str(tmp_path / "a.tar")])
    assert view(str(tmp_path / "a.tar"), tmp_path / "v.html", n=3).read_text().count("<article>") == 3
