"""``dualenc task new``: from data in every layout a task that ``dualenc eval`` reads as it was written."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dualenc.cli import app
from dualenc.errors import ConfigError, DataError
from dualenc_evals.catalog import load_task
from dualenc_evals.read.shards import read_rows

WORDS = ("cat", "dog", "red_bike")


def image(path: Path, shade: int) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (24, 18), (shade % 256, 2 * shade % 256, 3 * shade % 256)).save(out, "PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(out.getvalue())
    return out.getvalue()


def rows(folder: Path, n: int = 12) -> list[dict[str, Any]]:
    out = []
    for i in range(n):
        image(folder / "img" / f"{i}.png", 20 * i)
        split = "test" if i % 3 == 0 else "train"
        out.append(
            {"file": f"img/{i}.png", "species": WORDS[i % 3], "about": f"a {WORDS[i % 3]} no {i}", "split": split}
        )
    return out


def write_csv(path: Path, table: list[dict[str, Any]], columns: list[str], delimiter: str = ",") -> None:
    with path.open("w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, columns, delimiter=delimiter, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(table)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def made(*arguments: str, out: str = "out/task.yaml") -> Any:
    done = CliRunner().invoke(app, ["task", "new", "--out", out, *arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    task = load_task(out)
    return task, read_rows(task)


def test_a_csv_with_captions_is_a_retrieval_task_on_its_test_split() -> None:
    write_csv(Path("pairs.csv"), rows(Path()), ["file", "about", "split"])
    task, found = made("--data", "pairs.csv")
    assert (task.kind, task.source.split) == ("retrieval", "test")
    assert task.source.members == {"image": ["file"], "text": ["about"]}
    assert len(found.rows) == 4
    assert "# The splits are test, train." in Path("out/task.yaml").read_text(encoding="utf-8")


def test_a_csv_with_classes_a_semicolon_and_a_task_elsewhere() -> None:
    write_csv(Path("labels.csv"), rows(Path()), ["file", "species"], ";")
    task, found = made("--data", "labels.csv")
    assert (task.kind, task.label) == ("classification", "species")
    assert task.classes == {"cat": "cat", "dog": "dog", "red_bike": "red bike"}
    assert [r.label for r in found.rows][:3] == list(WORDS)
    assert task.templates == ["a photo of a {}."]


def test_kind_and_label_decide() -> None:
    write_csv(Path("both.csv"), rows(Path()), ["file", "species", "about"])
    task, _ = made("--data", "both.csv", "--kind", "classification", "--label", "species")
    assert (task.kind, task.label) == ("classification", "species")
    with pytest.raises(ConfigError, match="Did you mean 'species'"):
        made("--data", "both.csv", "--label", "spieces", out="b.yaml")
    with pytest.raises(ConfigError, match="Did you mean 'retrieval'"):
        made("--data", "both.csv", "--kind", "retrival", out="b.yaml")


def test_jsonl_with_lists_of_labels_is_multilabel_and_of_captions_retrieval() -> None:
    table = rows(Path())
    Path("tags.jsonl").write_text("".join(json.dumps({"f": r["file"], "tags": [r["species"]]}) + "\n" for r in table))
    task, found = made("--data", "tags.jsonl")
    assert (task.kind, task.label, len(found.rows)) == ("multilabel", "tags", 12)
    Path("caps.jsonl").write_text(
        "".join(json.dumps({"f": r["file"], "captions": [r["about"], "same"]}) + "\n" for r in table)
    )
    task, found = made("--data", "caps.jsonl", out="c.yaml")
    assert task.source.members["text"] == ["captions"]
    assert len(found.rows[0].contents["text"]) == 2


def test_parquet_with_bytes() -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = [{"picture": image(Path(f"x/{i}.png"), i), "class": WORDS[i % 3]} for i in range(6)]
    pq.write_table(pa.Table.from_pylist(table), "d.parquet")
    task, found = made("--data", "d.parquet")
    assert (task.kind, task.source.members) == ("classification", {"image": ["picture"]})
    assert isinstance(found.rows[0].contents["image"][0].read(), bytes)


def test_folders_by_class_and_with_texts() -> None:
    for i, word in enumerate(WORDS):
        image(Path("animals") / word / "0.png", 50 * i)
        image(Path("pairs") / f"{i}.png", 50 * i)
        (Path("pairs") / f"{i}.txt").write_text(f"one {word}")
    task, found = made("--data", "animals")
    assert (task.kind, sorted(r.label for r in found.rows)) == ("classification", sorted(WORDS))
    task, found = made("--data", "pairs", out="p.yaml")
    assert (task.kind, len(found.rows)) == ("retrieval", 3)


def test_shards_with_texts_and_with_numbers_as_classes() -> None:
    for name, extra in (("t-000000.tar", "txt"), ("c-000000.tar", "cls")):
        with tarfile.open(name, "w") as tar:
            for i in range(6):
                for ending, raw in (("png", image(Path("x.png"), i)), (extra, str(i % 2).encode())):
                    info = tarfile.TarInfo(f"{i}.{ending}")
                    info.size = len(raw)
                    tar.addfile(info, io.BytesIO(raw))
    task, _ = made("--data", "t-000000.tar")
    assert (task.kind, task.identical) == ("retrieval", "merge")
    task, found = made("--data", "c-000000.tar", out="c.yaml")
    assert (task.label, len(found.rows)) == ("cls", 6)
    assert "These are numbers: write the names." in Path("c.yaml").read_text(encoding="utf-8")


def test_damaged_labels_and_missing_tables_are_named() -> None:
    with tarfile.open("d-000000.tar", "w") as tar:
        for i in range(4):
            for ending, raw in (("png", image(Path("x.png"), i)), ("cls", b"\xff\xfe" if i == 3 else b"cat")):
                info = tarfile.TarInfo(f"{i}.{ending}")
                info.size = len(raw)
                tar.addfile(info, io.BytesIO(raw))
    with pytest.raises(DataError, match=r"3\.cls is not UTF-8"):
        made("--data", "d-000000.tar")
    with pytest.raises(DataError, match=r"There is no file missing\.csv"):
        made("--data", "missing.csv")


def test_what_cannot_be_a_task_says_what_to_do() -> None:
    table = rows(Path())
    write_csv(Path("none.csv"), [{"a": 1, "b": 2}], ["a", "b"])
    with pytest.raises(ConfigError, match="the columns are a, b"):
        made("--data", "none.csv")
    write_csv(Path("abs.csv"), [{"f": "/data/1.png", "c": "x"}, {"f": "/data/2.png", "c": "y"}], ["f", "c"])
    with pytest.raises(ConfigError, match="relative to the table"):
        made("--data", "abs.csv")
    write_csv(Path("only.csv"), table, ["file"])
    with pytest.raises(ConfigError, match="--label COLUMN"):
        made("--data", "only.csv")
    with pytest.raises(DataError, match="no file or folder nothing"):
        made("--data", "nothing")
    Path("there.yaml").write_text("kind: retrieval")
    write_csv(Path("pairs.csv"), table, ["file", "about"])
    with pytest.raises(ConfigError, match="exists"):
        made("--data", "pairs.csv", out="there.yaml")


def test_one_grammar_the_short_form_of_packing_in_tasks_and_the_members_of_tasks_in_packing(tmp_path: Path) -> None:
    from dualenc.data.sources import iter_source
    from dualenc_data_tools.build import build
    from dualenc_evals.catalog import parse_task

    write_csv(Path("pairs.csv"), rows(Path()), ["file", "about"])
    short = {"kind": "csv", "path": "pairs.csv", "image": "file", "caption": "about"}
    members = {"kind": "csv", "path": "pairs.csv", "members": {"image": ["file:file"], "text": ["about"]}}
    base = {"name": "x", "kind": "retrieval"}
    a, b = (read_rows(parse_task({**base, "source": s})).rows for s in (short, members))
    assert [r.contents["text"] for r in a] == [r.contents["text"] for r in b]
    assert [r.contents["image"][0].path for r in a] == [r.contents["image"][0].path for r in b]
    with pytest.raises(ConfigError, match=r"members\.image names the column, too"):
        parse_task({**base, "source": {**members, "image": "file"}})
    for i, s in enumerate((short, members, {**short, "image": "file:file"})):
        assert build("csv", tmp_path / f"s{i}", {k: v for k, v in s.items() if k != "kind"}).samples == 12
    x, y = (dict(iter_source("csv", {k: v for k, v in s.items() if k != "kind"})) for s in (short, members))
    assert x == y
