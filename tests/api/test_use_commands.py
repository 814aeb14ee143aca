"""dualenc classify and dualenc search: what they print, and what their exit codes say."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from _fixtures import *  # noqa: F403

import dualenc
from dualenc.cli import main


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run the entry point; exit code, stdout and stderr."""

    def run(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dualenc", *args])
        monkeypatch.setenv("COLUMNS", "300")
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), *capsys.readouterr()

    return run


def test_classify_prints_what_the_model_says(command, clip: Path, photos: Path) -> None:
    found = dualenc.load_model(clip, "cpu").classify(str(photos), ["cat", "dog", "house"])
    code, out, err = command(
        "classify", str(clip), str(photos), "--names", "cat,dog, house", "--device", "cpu", "--json"
    )
    assert code == 0, err
    rows = [json.loads(line) for line in out.splitlines()]
    assert [r["file"] for r in rows] == found.items
    assert [r["name"] for r in rows] == found.best
    for row, p in zip(rows, found.probabilities.tolist(), strict=True):
        assert [row["probabilities"][n] for n in found.names] == pytest.approx(p)
    code, out, err = command("classify", str(clip), str(photos), "--names", "cat,dog,house", "--top", "2")
    assert code == 0
    assert "no. 2" in out
    assert "no. 3" not in out
    assert all(str(f) in out for f in found.items)


def test_templates_and_names_from_files(command, clip: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    (tmp_path / "templates.txt").write_text("a photo of a {}.\n{}\n")
    common = ("classify", str(clip), str(photos / "cat.jpg"), "--json")
    _, listed, _ = command(*common, "--names", "cat,dog", "--templates", "a photo of a {}.", "--templates", "{}")
    _, filed, _ = command(
        *common, "--names", str(tmp_path / "names.txt"), "--templates", str(tmp_path / "templates.txt")
    )
    _, other, _ = command(*common, "--names", "cat,dog", "--templates", "{}")
    assert listed == filed != other


def test_search_prints_the_nearest(command, clip: Path, photos: Path) -> None:
    model = dualenc.load_model(clip, "cpu")
    hits = model.search(model.index(str(photos)), "a red bike", 2)
    code, out, _ = command("search", str(clip), str(photos), "a red bike", "-k", "2", "--json")
    assert code == 0
    assert [json.loads(line)["file"] for line in out.splitlines()] == [h.item for h in hits]
    code, out, _ = command("search", str(clip), str(photos), "a [red] bike", "-k", "2")
    assert code == 0
    assert "a [red] bike: best of 4 image files" in out


def test_a_broken_file_is_named_and_the_others_are_used(command, clip: Path, photos: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no picture")
    code, out, err = command("classify", str(clip), str(photos / "cat.jpg"), str(bad), "--names", "cat,dog", "--json")
    assert code == 3
    assert len(out.splitlines()) == 1
    assert f"not read: {bad}" in err
    code, out, err = command("search", str(clip), str(tmp_path), "x")
    assert code == 3
    assert f"not read: {bad}" in err


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (("classify", "MODEL", "PHOTOS", "--names", "cat"), 2, "'cat' names 1 class(es); give two or more"),
        (("classify", "MODEL", "PHOTOS", "--names", "names.txt"), 2, "there is no file names.txt"),
        (("classify", "MODEL", "PHOTOS", "--names", "a,b", "--templates", "photo"), 2, "needs exactly one {}"),
        (("classify", "MODEL", "PHOTOS", "--names", "a,b", "--modality", "imag"), 2, "Did you mean 'image'?"),
        (("classify", "nowhere", "PHOTOS", "--names", "a,b"), 2, "There is no model 'nowhere'"),
        (("classify", "MODEL", "EMPTY", "--names", "a,b"), 3, "has no files of image"),
        (("search", "MODEL", "nowhere", "x"), 3, "There is no folder nowhere"),
        (("search", "MODEL", "EMPTY", "x"), 3, "has no files of image"),
    ],
)
def test_mistakes(args, code, words, command, clip: Path, photos: Path, tmp_path: Path) -> None:
    places = {"MODEL": str(clip), "PHOTOS": str(photos), "EMPTY": str(tmp_path)}
    ended, _, err = command(*(places.get(a, a) for a in args))
    assert ended == code
    assert words in " ".join(err.split())
    assert "Traceback" not in err
