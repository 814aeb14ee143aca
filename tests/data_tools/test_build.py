"""Real data sets → shards → read back through dualenc.data."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from _shared import DATA as SHARED_DATA
from PIL import Image

from dualenc.data.shards.index import load_index
from dualenc.data.shards.reader import Found, iter_samples
from dualenc.errors import ConfigError, DataError
from dualenc_data_tools.build import build, print_report

DATA = SHARED_DATA / "image_text"
WANTED = {"image": ["jpg", "jpeg", "png", "webp"], "text": ["txt", "json:captions"]}


def real(name: str) -> Path:
    folder = DATA / name
    if not folder.is_dir():
        pytest.skip(f"the real data set {name} is not at hand ({folder})")
    return folder


def read_back(
    out: Path, pattern: str = "*.tar", wanted: dict[str, list[str]] | None = None
) -> dict[str, dict[str, Any]]:
    got: dict[str, dict[str, Any]] = {}
    for key, found in iter_samples(str(out / pattern), wanted or WANTED):
        assert isinstance(found, Found), found
        got[key.rsplit("/", 1)[-1]] = found.values
    return got


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def digests(out: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(out.glob("*.tar"))}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Sixty real fashion rows with their pictures, to be changed by a test."""
    source = real("fashion")
    folder = tmp_path / "fashion"
    (folder / "images").mkdir(parents=True)
    rows = lines(source / "captions.jsonl")[:60]
    for row in rows:
        (folder / row["image"]).write_bytes((source / row["image"]).read_bytes())
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


def test_flickr8k_every_split_and_caption(tmp_path: Path) -> None:
    source = real("flickr8k")
    report = build("jsonl", tmp_path, {"path": str(source / "captions.jsonl")}, progress=False)
    assert report.written == {"train": 4000, "dev": 500}
    assert (report.captions, report.dropped) == (22_500, {})
    assert load_index(str(tmp_path / "index.json")).total == 4500
    rows = {r["image"]: r for r in lines(source / "captions.jsonl")}
    got = read_back(tmp_path, "dev-*.tar")
    assert len(got) == 500
    for image, row in rows.items():
        if row["split"] == "dev":
            values = got[image.removesuffix(".jpg").replace("/", "_")]
            assert values["text"] == row["captions"]
            assert values["image"] == (source / image).read_bytes()


def test_flickr8k_one_split(tmp_path: Path) -> None:
    source = real("flickr8k")
    report = build("jsonl", tmp_path, path=str(source / "captions.jsonl"), split="dev", verify=False, progress=False)
    assert report.written == {"dev": 500}
    with pytest.raises(ConfigError, match=r"split='deev'. Did you mean 'dev'\?"):
        build("jsonl", tmp_path / "x", path=str(source / "captions.jsonl"), split="deev", verify=False, progress=False)
    assert not list((tmp_path / "x").glob("*.tar"))


def test_fashion_template_fields_and_size(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {
        "path": str(small / "captions.jsonl"),
        "template": "{caption}, {colour} {type}",
        "keep": ["usage"],
        "size": 40,
        "encode": "webp",
        "shard_samples": 25,
    }
    report = build("jsonl", tmp_path / "out", options, progress=False)
    assert [p.name for p in report.shards] == [f"train-{i:06d}.tar" for i in range(3)]
    row = lines(small / "captions.jsonl")[0]
    got = read_back(tmp_path / "out", wanted={"image": ["webp"], "text": ["json:captions"], "usage": ["json:usage"]})
    first = next(iter(got.values()))
    assert first["text"] == [f"{row['caption']}, {row['colour']} {row['type']}"]
    assert first["usage"] == row["usage"]
    with Image.open(io.BytesIO(first["image"])) as picture:
        assert (picture.format, picture.size) == ("WEBP", (30, 40))
    print_report(report)
    assert "60 samples, 60 captions" in capsys.readouterr().out


def test_held_out_rows_are_not_in_the_shards(small: Path, tmp_path: Path) -> None:
    rows = lines(small / "captions.jsonl")
    build("jsonl", tmp_path / "out", path=str(small / "captions.jsonl"), hold_out=6, keep="none", progress=False)
    got = read_back(tmp_path / "out", wanted={"text": ["txt"]})
    captions = [v["text"].decode() for v in got.values()]
    assert captions == [r["caption"] for i, r in enumerate(rows) if i % 6]


def test_tuxpaint_webp_kept(tmp_path: Path) -> None:
    source = real("tuxpaint")
    report = build("jsonl", tmp_path, path=str(source / "captions.jsonl"), limit=100, keep="none", progress=False)
    assert report.written == {"train": 100}
    got = read_back(tmp_path, wanted={"image": ["webp"], "text": ["txt"]})
    for row, values in zip(lines(source / "captions.jsonl"), got.values(), strict=False):
        assert values["text"].decode() == " ".join(row["caption"].split())
        assert values["image"] == (source / row["image"]).read_bytes()


def test_same_input_same_bytes_and_shuffle(small: Path, tmp_path: Path) -> None:
    def run(name: str, **more: Any) -> dict[str, str]:
        out = tmp_path / name
        build("jsonl", out, path=str(small / "captions.jsonl"), encode="jpeg", progress=False, **more)
        return digests(out)

    first = run("a", threads=1)
    assert run("b", threads=4) == first
    assert run("c", shuffle_seed=1) == run("d", shuffle_seed=1)
    assert run("e", shuffle_seed=2) != run("f", shuffle_seed=1) != first
    assert sorted(read_back(tmp_path / "a")) == sorted(read_back(tmp_path / "c"))
    with tarfile.open(tmp_path / "a" / "train-000000.tar") as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in tar} == {(0, 0, 0, "", 0o644)}


def _truncate(p: Path) -> None:
    p.write_bytes(p.read_bytes()[:500])


def _huge(p: Path) -> None:
    Image.new("L", (6000, 6000)).save(p, "PNG")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_truncate, "broken image"),
        (lambda p: p.write_bytes(b"<html>404</html>"), "broken image"),
        (lambda p: p.write_bytes(b""), "broken image"),
        (Path.unlink, "image file missing"),
        (_huge, "too large"),
    ],
    ids=["cut", "html", "empty", "missing", "huge"],
)
def test_bad_pictures_are_dropped_counted_and_named(
    small: Path, tmp_path: Path, spoil: Callable[[Path], Any], reason: str
) -> None:
    rows = lines(small / "captions.jsonl")
    bad = [rows[5]["image"], rows[41]["image"]]
    for name in bad:
        spoil(small / name)
    report = build("jsonl", tmp_path / "out", path=str(small / "captions.jsonl"), progress=False)
    assert (report.samples, report.dropped) == (58, {reason: 2})
    assert report.dropped_file is not None
    assert [d["name"] for d in lines(report.dropped_file)] == bad
    assert len(read_back(tmp_path / "out")) == 58


def test_too_many_dropped_fails_and_leaves_what_was_there(small: Path, tmp_path: Path) -> None:
    path, out = str(small / "captions.jsonl"), tmp_path / "out"
    build("jsonl", out, path=path, progress=False)
    before = digests(out)
    for row in lines(small / "captions.jsonl")[:10]:
        (small / row["image"]).write_bytes(b"no")
    with pytest.raises(DataError, match=r"10 of 60 records were dropped \(10 × broken image\).*max_dropped_share"):
        build("jsonl", out, path=path, overwrite=True, progress=False)
    assert digests(out) == before
    assert not list(out.glob(".*"))
    report = build("jsonl", out, path=path, overwrite=True, max_dropped_share=0.5, progress=False)
    assert report.samples == 50


def test_overwrite_replaces_shards_and_index(small: Path, tmp_path: Path) -> None:
    path, out = str(small / "captions.jsonl"), tmp_path / "out"
    build("jsonl", out, path=path, shard_samples=10, progress=False)
    with pytest.raises(ConfigError, match="overwrite=true"):
        build("jsonl", out, path=path, progress=False)
    build("jsonl", out, path=path, name="other", progress=False)
    build("jsonl", out, path=path, overwrite=True, shard_samples=30, progress=False)
    index = load_index(str(out / "index.json"))
    assert sorted(s.url for s in index.shards) == ["other-000000.tar", "train-000000.tar", "train-000001.tar"]
    assert sorted(p.name for p in out.glob("*.tar")) == ["other-000000.tar", "train-000000.tar", "train-000001.tar"]
    assert index.total == 120
    assert len(read_back(out)) == 60


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("jsnol", {}, r"no source 'jsnol'. Did you mean 'jsonl'\?"),
        ("jsonl", {"captoin": "x"}, r"jsonl.captoin: unknown key .*Did you mean 'caption'\?"),
        ("jsonl", {"image": "imgae"}, r"jsonl.image: the data has no field 'imgae'. Did you mean 'image'\?"),
        ("jsonl", {"caption": "captions"}, r"jsonl.caption: .* 'captions'. Did you mean 'caption'\?"),
        ("jsonl", {"template": "{colur} {type}"}, r"jsonl.template: .* 'colur'. Did you mean 'colour'\?"),
        ("jsonl", {"template": "{caption.__class__}"}, "must be the plain name of a field"),
        ("jsonl", {"template": "{caption"}, "is not a valid template"),
        ("jsonl", {"quality": 0}, "jsonl.quality"),
        ("jsonl", {"keep": ["usge"]}, r"jsonl.keep: .* 'usge'. Did you mean 'usage'\?"),
    ],
)
def test_a_wrong_name_names_the_nearest(
    small: Path, tmp_path: Path, kind: str, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        build(kind, tmp_path / "out", {"path": str(small / "captions.jsonl"), **options}, progress=False)


def test_missing_files_and_broken_lines_are_named(small: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file .*caption.jsonl. Did you mean 'captions.jsonl'\?"):
        build("jsonl", tmp_path / "out", path=str(small / "caption.jsonl"), progress=False)
    with (small / "captions.jsonl").open("a") as f:
        f.write("{nonsense\n")
    with pytest.raises(DataError, match=r"captions.jsonl:61 is not JSON"):
        build("jsonl", tmp_path / "out", path=str(small / "captions.jsonl"), progress=False)
    assert not list((tmp_path / "out").glob("*"))


def test_csv_with_one_row_a_caption_is_grouped(tmp_path: Path) -> None:
    source = real("coco_cc")
    rows = lines(source / "captions.jsonl")
    table = tmp_path / "pairs.tsv"
    with table.open("w", newline="") as f:
        writer = csv.writer(f, delimiter="\t")
        writer.writerow(["file", "sentence", "licence"])
        for number in range(5):
            writer.writerows([r["image"], r["captions"][number], r["license"]] for r in rows)
    options = {"path": str(table), "image": "file", "root": str(source), "group": True}
    report = build("csv", tmp_path / "out", options, progress=False)
    assert (report.written, report.captions) == ({"train": 81}, 405)
    got = read_back(tmp_path / "out", wanted={"text": ["json:captions"], "licence": ["json:licence"]})
    for row, values in zip(rows, got.values(), strict=True):
        assert values["text"] == [" ".join(c.split()) for c in row["captions"]]
        assert values["licence"] == row["license"]
    ungrouped = build("csv", tmp_path / "flat", {**options, "group": False, "limit": 100}, progress=False)
    assert ungrouped.samples == 100
    assert len(set(read_back(tmp_path / "flat"))) == 100, "the same image again must get a key of its own"


def test_folder_with_classes(tmp_path: Path) -> None:
    source = real("cifar10")
    report = build("folder", tmp_path, path=str(source), template="a photo of a {class}", progress=False)
    assert report.samples == 1000
    got = read_back(tmp_path, wanted={"text": ["txt"], "cls": ["cls"], "image": ["jpg"]})
    classes = sorted(p.name for p in source.iterdir() if p.is_dir())
    for key, values in got.items():
        label = key.rsplit("_", 1)[0]
        assert values["text"].decode() == f"a photo of a {label}"
        assert classes[int(values["cls"])] == label


def test_folder_with_texts_beside_the_pictures(tmp_path: Path) -> None:
    source = real("coco_cc")
    folder = tmp_path / "in"
    folder.mkdir()
    rows = lines(source / "captions.jsonl")[:12]
    for i, row in enumerate(rows):
        name = Path(row["image"]).name
        (folder / name).write_bytes((source / row["image"]).read_bytes())
        if i == 0:
            continue
        if i % 2:
            (folder / name).with_suffix(".txt").write_text(row["captions"][0])
        else:
            (folder / name).with_suffix(".json").write_text(json.dumps({"captions": row["captions"], "id": i}))
    report = build("folder", tmp_path / "out", path=str(folder), max_dropped_share=0.1, progress=False)
    assert (report.samples, report.dropped) == (11, {"no caption": 1})
    got = read_back(tmp_path / "out")
    for i, row in enumerate(rows[1:], 1):
        text = got[Path(row["image"]).stem]["text"]
        assert text == (
            row["captions"][0].strip().encode() if i % 2 else [" ".join(c.split()) for c in row["captions"]]
        )


def test_folder_of_texts_alone(tmp_path: Path) -> None:
    pages = sorted((Path(__file__).parents[2] / "docs").glob("*.md"))[:3]
    (tmp_path / "in").mkdir()
    for page in pages:
        (tmp_path / "in" / f"{page.stem}.txt").write_text(page.read_text(encoding="utf-8"), encoding="utf-8")
    members = {"text": ["txt"]}
    assert build("folder", tmp_path / "out", path=str(tmp_path / "in"), members=members, progress=False).samples == 3
    got = read_back(tmp_path / "out", wanted=members)
    assert {k: v["text"].decode() for k, v in got.items()} == {
        p.stem: " ".join(p.read_text(encoding="utf-8").split()) for p in pages
    }
    with pytest.raises(DataError, match=r"has no files of text \(md\)"):
        build("folder", tmp_path / "no", path=str(tmp_path / "in"), members={"text": ["md"]}, progress=False)


def test_parquet_bytes_and_paths(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    source = real("coco_cc")
    rows = lines(source / "captions.jsonl")[:20]
    table = pa.table(
        {
            "image": [{"bytes": (source / r["image"]).read_bytes(), "path": r["image"]} for r in rows],
            "where": [r["image"] for r in rows],
            "captions": [r["captions"] for r in rows],
            "coco_id": [r["coco_id"] for r in rows],
        }
    )
    pq.write_table(table, tmp_path / "part-0.parquet", row_group_size=7)
    expected = {
        r["coco_id"]: ((source / r["image"]).read_bytes(), [" ".join(c.split()) for c in r["captions"]]) for r in rows
    }
    wanted = {"image": ["jpg"], "text": ["json:captions"], "id": ["json:coco_id"]}
    cases: dict[str, dict[str, Any]] = {
        "a": {},
        "b": {"image": "where", "root": str(source), "keep": ["coco_id"]},
        "c": {"shuffle_seed": 3},
    }
    for name, more in cases.items():
        build("parquet", tmp_path / name, {"path": str(tmp_path), **more}, progress=False)
        got = read_back(tmp_path / name, wanted=wanted)
        assert {v["id"]: (v["image"], v["text"]) for v in got.values()} == expected
    assert [v["id"] for v in read_back(tmp_path / "c", wanted=wanted).values()] != list(expected)


def test_hf_data_set_from_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    source = real("coco_cc")
    rows = lines(source / "captions.jsonl")[:16]
    raw = {r["coco_id"]: (source / r["image"]).read_bytes() for r in rows}

    def part(some: list[dict[str, Any]]) -> Any:
        columns = {
            "image": [{"bytes": raw[r["coco_id"]], "path": None} for r in some],
            "text": [r["captions"][0] for r in some],
            "id": [r["coco_id"] for r in some],
        }
        return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())

    datasets.DatasetDict({"train": part(rows[:12]), "test": part(rows[12:])}).save_to_disk(str(tmp_path / "set"))
    report = build("hf", tmp_path / "out", path=str(tmp_path / "set"), progress=False)
    assert report.written == {"train": 12, "test": 4}
    got = read_back(tmp_path / "out", "train-*.tar", {"image": ["jpg"], "text": ["json:captions"], "id": ["json:id"]})
    assert {v["id"]: v["image"] for v in got.values()} == {r["coco_id"]: raw[r["coco_id"]] for r in rows[:12]}
    with pytest.raises(ConfigError, match=r"no split 'tset'. Did you mean 'test'\?"):
        build("hf", tmp_path / "x", path=str(tmp_path / "set"), split="tset", progress=False)
    with pytest.raises(DataError, match="save_to_disk"):
        build("hf", tmp_path / "x", path=str(source), progress=False)
