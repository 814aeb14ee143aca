"""Tasks as data: every shipped file reads, mistakes are one clear sentence, every layout gives the same rows."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import sys
import tarfile
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pytest
import yaml
from PIL import Image

from dualenc.data.shards.index import expand
from dualenc.errors import ConfigError, DataError
from dualenc_evals.catalog import list_tasks, load_task, task_files
from dualenc_evals.harness import definition, evaluate
from dualenc_evals.kinds import Kind, Measured, kinds
from dualenc_evals.kinds.classification import ClassificationTask, classes_of, templates_of
from dualenc_evals.read.shards import read_rows
from dualenc_evals.task import Task, read_lines

sys.path.insert(0, str(Path(__file__).parent))
from _pixels import Pixels


def picture(colour: tuple[int, int, int]) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (12, 9), colour).save(out, "PNG")
    return out.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, raw in members:
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))


def task(tmp: Path, **fields: Any) -> Task:
    path = tmp / "mine.yaml"
    path.write_text(yaml.safe_dump(fields), encoding="utf-8")
    return load_task(path)


RETRIEVAL = {"kind": "retrieval", "source": {"kind": "shards", "path": "./x.tar"}}


@pytest.mark.parametrize("name", sorted(task_files()))
def test_every_shipped_task_reads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUALENC_DATA", "/nowhere")
    got = load_task(name)
    assert got.name == name
    assert got.description
    assert got.wanted()
    if isinstance(got, ClassificationTask) and (got.source.kind != "clip_benchmark" or got.templates is not None):
        assert all(t.count("{}") == 1 for t in templates_of(got))


def test_the_definitions_that_older_results_hold_are_still_those_of_the_shipped_tasks() -> None:
    """``--resume`` compares them. The hash is of the 145 tasks as they were when all kinds shared one set of keys; a
    task that is changed on purpose gets a new ``version`` and this line a new hash."""
    since = {"photos_held_out", "series_motions", "series_vowels", "voc2007_multilabel"}
    since |= {"scene0523_instances", "tuxpaint_groups"}
    since |= {t for t in task_files() if t.startswith(("aro_", "datacomp_"))}
    last = (
        "dsprites_label_orientation",
        "dsprites_label_x_position",
        "smallnorb_label_azimuth",
        "smallnorb_label_elevation",
    )
    since |= {f"{kind}vtab_{t}" for t in last for kind in ("", "probe_")}
    probes = ("mnist", "fer2013", "vtab_svhn", "vtab_dmlab", "vtab_clevr_count_all", "vtab_diabetic_retinopathy")
    probes += ("vtab_clevr_closest_object_distance", "vtab_kitti_closest_vehicle_distance")
    since |= {f"probe_{t}" for t in probes}
    every = {t.name: definition(t) for t in list_tasks() if t.name not in since}
    assert len(every) == 145
    digest = hashlib.sha256(json.dumps(every, sort_keys=True).encode()).hexdigest()
    assert digest == "885613af91773f2cd52753858ff09be8a73f21bb4239acf46bdc1a35baa43c59"


def test_each_kind_has_its_own_keys_and_names_the_owners_of_others(tmp_path: Path) -> None:
    assert {"classification", "compositional", "instances", "multilabel", "probe", "retrieval"} <= set(kinds)
    for key, value, message in (
        ("same", "id", "same: not a key of a classification task, only of retrieval"),
        ("train", {"split": "a"}, "train: not a key of a classification task, only of probe"),
        ("identical", "merge", "identical: not a key of a classification task, only of retrieval"),
    ):
        with pytest.raises(ConfigError, match=message):
            task(
                tmp_path,
                kind="classification",
                source={"kind": "folder", "path": "./x"},
                templates=["{}"],
                **{key: value},
            )
    with pytest.raises(
        ConfigError,
        match="other_labels: not a key of a retrieval task, only of classification, dense, instances, multilabel and",
    ):
        task(tmp_path, other_labels="drop", **RETRIEVAL)
    with pytest.raises(ConfigError, match=r"unknown kind of task 'retreival'.*Did you mean 'retrieval'\?"):
        task(tmp_path, **{**RETRIEVAL, "kind": "retreival"})
    with pytest.raises(ConfigError, match="kind: this key is needed"):
        task(tmp_path, source=RETRIEVAL["source"])
    # What an included file said is taken back with null, whatever the kind.
    assert task(tmp_path, templates=None, **RETRIEVAL).kind == "retrieval"


def test_a_kind_from_elsewhere_is_read_and_run_like_ours(tmp_path: Path) -> None:
    class CountTask(Task):
        kind: Literal["count"]
        above: int = 0

        def known(self) -> tuple[str, ...]:
            return ("share",)

    class Counted(NamedTuple):
        sizes: list[int]
        skipped: list[dict[str, str]]
        asked: int
        notes: list[str]
        data_digest: str

    class Count(Kind[CountTask, Any]):
        Task = CountTask

        def collect(self, task: CountTask, rows: Any, store: Any) -> Counted:
            sizes = [len(r.contents["image"][0].read()) for r in rows.rows]
            return Counted(sizes, [], len(sizes), rows.notes, "d")

        def evaluate(self, task: CountTask, data: Counted, store: Any, seed: int, details: bool) -> Measured:
            share = sum(s > task.above for s in data.sizes) / len(data.sizes)
            return {"metrics": {"share": share}, "ci": {}, "chance": {}, "n": {"image": len(data.sizes)}}

    write_tar(tmp_path / "x.tar", [("a.png", b"12345"), ("a.txt", b"t"), ("b.png", b"1"), ("b.txt", b"t")])
    kinds.register("count")(Count)
    mine = task(tmp_path, kind="count", source=RETRIEVAL["source"], above=3)
    got = evaluate(Pixels(), [mine], progress=False)["tasks"]["mine"]
    assert (got["kind"], got["metrics"], got["n"]) == ("count", {"share": 0.5}, {"image": 2})
    with pytest.raises(ConfigError, match="above: not a key of a retrieval task, only of count"):
        task(tmp_path, above=1, **RETRIEVAL)


def test_the_classes_of_imagenet_are_a_thousand() -> None:
    got = load_task("imagenet1k")
    assert isinstance(got, ClassificationTask)
    assert isinstance(got.classes, str)
    assert len(read_lines(got.classes, got, "classes")) == 1000
    assert len(templates_of(got)) == 80
    assert len(list_tasks()) == len(task_files()) >= 40


def test_typos_are_named_with_the_nearest_right_word(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"There is no task 'flickr9k'. Did you mean 'flickr8k'\?"):
        load_task("flickr9k")
    with pytest.raises(ConfigError, match=r"verison: unknown key .*Did you mean 'version'\?"):
        task(tmp_path, verison=1, **RETRIEVAL)
    with pytest.raises(ConfigError, match=r"source.splitt: unknown key .*Did you mean 'split'\?"):
        task(tmp_path, kind="retrieval", source={"kind": "shards", "path": "./x.tar", "splitt": "a"})
    with pytest.raises(ConfigError, match=r"has no metric 'MMR'. Did you mean 'MRR'\?"):
        task(tmp_path, metrics=["MMR"], **RETRIEVAL)
    with pytest.raises(ConfigError, match=r"needs exactly one \{\} where the class name goes"):
        source = {"kind": "folder", "path": "./x"}
        task(tmp_path, kind="classification", source=source, templates=["a photo"])
    with pytest.raises(ConfigError, match="templates: not a key of a retrieval task"):
        task(tmp_path, templates=["{}"], **RETRIEVAL)
    with pytest.raises(ConfigError, match="label: say where a shards row has its class"):
        task(tmp_path, kind="classification", source=RETRIEVAL["source"], templates=["{}"])


def test_include_gives_a_new_task_its_own_name(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({"name": "base", **RETRIEVAL, "version": 3}))
    got = task(tmp_path, include="base.yaml", description="mine")
    assert (got.name, got.version, got.source.path) == ("mine", 3, str(tmp_path / "x.tar"))


def test_data_of_ones_own_without_the_variable_is_a_clear_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DUALENC_DATA", raising=False)
    with pytest.raises(DataError, match=r"Task flickr8k reads .*set the environment variable DUALENC_DATA.*How to get"):
        read_rows(load_task("flickr8k"))
    monkeypatch.setenv("DUALENC_DATA", "/nowhere")
    with pytest.raises(DataError, match=r"There is no file /nowhere/image_text/flickr8k/captions.jsonl"):
        read_rows(load_task("flickr8k"))
    with pytest.raises(DataError, match=r"there is no folder /nowhere/clip_benchmark/wds_imagenet1k. How to get it"):
        read_rows(load_task("imagenet1k"))


def test_another_variable_is_refused(tmp_path: Path) -> None:
    got = task(tmp_path, kind="retrieval", source={"kind": "shards", "path": "${HOME}/x.tar"})
    with pytest.raises(ConfigError, match=r"only \$\{DUALENC_DATA\} is expanded"):
        read_rows(got)


def test_shards_with_txt_json_captions_and_metadata(tmp_path: Path) -> None:
    red, blue = picture((255, 0, 0)), picture((0, 0, 255))
    write_tar(tmp_path / "x-0.tar", [("a.png", red), ("a.txt", b"red thing")])
    caps = json.dumps({"captions": ["blue", "a blue one"], "kind": "cold"}).encode()
    write_tar(tmp_path / "x-1.tar", [("dir/b.v1.PNG", blue), ("dir/b.json", caps), ("c.png", red), ("c.txt", b"\xff")])
    source = {"kind": "shards", "path": "./x-{0..1}.tar", "members": {"image": ["png", "v1.png"]}}
    rows = read_rows(task(tmp_path, kind="retrieval", source=source)).rows
    assert [r.id for r in rows] == ["x-0/a", "x-1/dir/b", "x-1/c"]
    assert [[c.text for c in r.contents["text"]] for r in rows[:2]] == [["red thing"], ["blue", "a blue one"]]
    assert rows[1].contents["image"][0].read() == blue
    with pytest.raises(DataError, match="not UTF-8"):  # this one caption is skipped and named, not the shard
        rows[2].contents["text"][0].read()


def test_broken_shards_are_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [("a.png", picture((1, 2, 3)) * 40), ("a.txt", b"t")])
    whole = (tmp_path / "x.tar").read_bytes()
    got = task(tmp_path, **RETRIEVAL)
    (tmp_path / "x.tar").write_bytes(whole[:1500])
    with pytest.raises(DataError, match=r"x\.tar is cut short: member 'a\.png' reaches to byte"):
        read_rows(got)
    (tmp_path / "x.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"x\.tar"):
        read_rows(got)
    (tmp_path / "x.tar").unlink()
    (tmp_path / "y.tar").write_bytes(whole)
    with pytest.raises(DataError, match=r"There is no shard .*x\.tar. Did you mean 'y.tar'\?"):
        read_rows(got)


def test_clip_benchmark_layout(tmp_path: Path) -> None:
    root = tmp_path / "wds_two"
    for i, (colour, label) in enumerate([((255, 0, 0), "1"), ((0, 255, 0), "0")]):
        write_tar(root / "test" / f"{i}.tar", [(f"s{i}.png", picture(colour)), (f"s{i}.cls", label.encode())])
    (root / "test" / "nshards.txt").write_text("2")
    (root / "classnames.txt").write_text("green\nred\n")
    (root / "zeroshot_classification_templates.txt").write_text("a photo of {c}.\n{c}\n")
    got = task(tmp_path, kind="classification", source={"kind": "clip_benchmark", "path": "./wds_two"})
    rows = read_rows(got).rows
    assert [r.label for r in rows] == ["1", "0"]
    assert templates_of(got) == ["a photo of {}.", "{}"]
    assert classes_of(got, rows) == (["0", "1"], [["green"], ["red"]])
    write_tar(root / "test" / "0.tar", [("s.png", picture((1, 1, 1))), ("s.txt", b"one\ntwo\n")])
    (root / "test" / "nshards.txt").write_text("1")
    pairs = read_rows(task(tmp_path, kind="retrieval", source={"kind": "clip_benchmark", "path": "./wds_two"})).rows
    assert [c.text for c in pairs[0].contents["text"]] == ["one", "two"]


def test_multilabel_in_clip_benchmark_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """voc2007_multilabel as CLIP_benchmark exports it: a vector of 20 zeros and ones beside each photo."""
    root = tmp_path / "clip_benchmark" / "wds_voc2007_multilabel"
    members = []
    for i, classes in enumerate([[14], [0, 19], []]):
        out = io.BytesIO()
        np.save(out, np.isin(np.arange(20), classes).astype(np.int64))
        members += [(f"s{i}.png", picture((i, 0, 0))), (f"s{i}.npy", out.getvalue())]
    write_tar(root / "test" / "0.tar", members)
    (root / "test" / "nshards.txt").write_text("1")
    (root / "classnames.txt").write_text("".join(f"class {i}\n" for i in range(20)))
    monkeypatch.setenv("DUALENC_DATA", str(tmp_path))
    got = load_task("voc2007_multilabel")
    rows = read_rows(got).rows
    assert [r.labels for r in rows] == [("14",), ("0", "19"), ()]
    assert got.kind == "multilabel"
    assert classes_of(got, rows)[1][19] == ["class 19"]


def test_lists_give_the_same_rows_from_jsonl_and_csv(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "a.png").write_bytes(picture((9, 9, 9)))
    values = [
        {"image": "p/a.png", "caption": "grey", "split": "dev"},
        {"image": "p/b.png", "caption": "x", "split": "t"},
    ]
    (tmp_path / "l.jsonl").write_text("".join(json.dumps(v) + "\n" for v in values))
    with (tmp_path / "l.csv").open("w", newline="") as f:
        writer = csv.DictWriter(f, list(values[0]))
        writer.writeheader()
        writer.writerows(values)
    got = []
    for kind in ("jsonl", "csv"):
        source = {"kind": kind, "path": f"./l.{kind}", "split": "dev"}
        rows = read_rows(task(tmp_path, kind="retrieval", source=source)).rows
        got.append([(r.id, r.contents["image"][0].read(), r.contents["text"][0].text) for r in rows])
    assert got[0] == got[1] == [("p/a.png", picture((9, 9, 9)), "grey")]
    source = {"kind": "jsonl", "path": "./l.jsonl", "where": {"splitt": "dev"}}
    with pytest.raises(ConfigError, match=r"source.where.splitt: there is no column 'splitt'. Did you mean 'split'\?"):
        read_rows(task(tmp_path, kind="retrieval", source=source))
    source = {"kind": "jsonl", "path": "./l.jsonl", "split": "test"}
    with pytest.raises(DataError, match=r"no items in .*with split 'test'"):
        read_rows(task(tmp_path, kind="retrieval", source=source))


@pytest.mark.parametrize("name", ["../secret.png", "/etc/hostname", "p/../../secret.png"])
def test_a_list_cannot_reach_outside_its_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "l.jsonl").write_text(json.dumps({"image": name, "caption": "x"}))
    with pytest.raises(DataError, match="paths must stay inside the list's folder"):
        read_rows(task(tmp_path, kind="retrieval", source={"kind": "jsonl", "path": "./l.jsonl"}))


def test_a_folder_a_class_and_an_empty_one(tmp_path: Path) -> None:
    for name in ("cat", "dog", "eel"):
        (tmp_path / "f" / name).mkdir(parents=True)
    for name in ("cat", "dog"):
        (tmp_path / "f" / name / "1.png").write_bytes(picture((7, 7, 7)))
    got = task(tmp_path, kind="classification", source={"kind": "folder", "path": "./f"}, templates=["{}"])
    rows = read_rows(got)
    assert [(r.id, r.label) for r in rows.rows] == [("cat/1.png", "cat"), ("dog/1.png", "dog")]
    assert rows.notes == ["The class folder 'eel' is empty: the class remains among the candidates, as a wrong answer."]


def test_expand() -> None:
    assert expand("a-{08..10}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert expand("{x,y}-{0..1}") == ["x-0", "x-1", "y-0", "y-1"]
    assert expand("x-{000..004..2}.tar") == ["x-000.tar", "x-002.tar", "x-004.tar"]


def test_a_row_without_a_label_belongs_to_no_class(tmp_path: Path) -> None:
    """Where other labels are dropped; else it is an error, since a label is then missing by mistake."""
    rows = [{"audio": "a.wav", "area": "vm"}, {"audio": "b.wav"}, {"audio": "c.wav", "area": "other"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    fields = {
        "kind": "classification",
        "modalities": ["audio", "text"],
        "source": {"kind": "jsonl", "path": "./rows.jsonl"},
        "label": "area",
        "classes": {"vm": "voicemail"},
        "templates": ["{}"],
    }
    got = read_rows(task(tmp_path, **fields, other_labels="drop"))
    assert [r.label for r in got.rows] == ["vm", None, "other"]
    with pytest.raises(DataError, match="rows:2 has no 'area'"):
        read_rows(task(tmp_path, **fields))
