"""The harness on real data and on small broken sets, alone and on two real processes; the report it feeds."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from dualenc.errors import ConfigError, DataError, DivergenceError
from dualenc_evals.catalog import load_task
from dualenc_evals.harness import evaluate, print_table
from dualenc_evals.pages.run import highlight_yaml, write_report

sys.path.insert(0, str(Path(__file__).parent))
from _pixels import Pixels, from_path, plain, run
from _shared import DATA as SHARED_DATA
from test_eval_tasks import picture, write_tar

ROOT = Path(__file__).parents[2]
SHARED = SHARED_DATA
HELPER = Path(__file__).with_name("_pixels.py")
QUICK = ROOT / "recipes" / "quickstart" / "data" / "val-clipart-000000.tar"

needs_quickstart = pytest.mark.skipif(not QUICK.exists(), reason="recipes/quickstart/data is not here")
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason=f"the real data are not below {SHARED}")


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setenv("DUALENC_DATA", str(SHARED))


def go(tasks: list[str], embedder: Any = None, **options: Any) -> dict[str, Any]:
    return evaluate(embedder or Pixels(), [load_task(t) for t in tasks], progress=False, **options)


def small(tmp: Path, members: list[tuple[str, bytes]], **fields: Any) -> str:
    write_tar(tmp / "x.tar", members)
    path = tmp / "small.yaml"
    path.write_text(yaml.safe_dump({"kind": "retrieval", "source": {"kind": "shards", "path": "./x.tar"}, **fields}))
    return str(path)


def pairs(n: int) -> list[tuple[str, bytes]]:
    out: list[tuple[str, bytes]] = []
    for i in range(n):
        out += [
            (f"{i:03d}.png", picture((i * 7 % 256, i * 31 % 256, i * 53 % 256))),
            (f"{i:03d}.txt", f"word{i}".encode()),
        ]
    return out


@needs_quickstart
def test_quickstart_tasks_run_and_chance_is_chance() -> None:
    got = go(["quickstart_val_clipart", "quickstart_groups"])["tasks"]
    clip = got["quickstart_val_clipart"]
    assert clip["n"] == {"image": 62, "text": 60}  # two captions stand twice and are merged
    assert clip["chance"]["text_to_image_R@1"] == pytest.approx((58 / 62 + 2 * 2 / 62) / 60, abs=1e-6)
    for k, (low, high) in clip["ci"].items():
        assert low <= clip["metrics"][k] <= high
    groups = got["quickstart_groups"]
    assert groups["n"] == {"image": 500, "classes": 8}
    assert groups["chance"]["top1"] == 0.125
    confusion = groups["details"]["confusion"]
    assert sum(map(sum, confusion)) == 500
    assert sum(confusion[i][i] for i in range(8)) / 500 == pytest.approx(groups["metrics"]["top1"])


@needs_shared
@pytest.mark.parametrize(
    ("name", "n"),
    [("coco_cc", {"image": 81, "text": 405}), ("cifar10", {"image": 1000, "classes": 10})],
)
def test_photo_tasks_run(name: str, n: dict[str, int]) -> None:
    task = go([name])["tasks"][name]
    assert task["n"] == n
    assert task["skipped"]["count"] == 0


@needs_shared
def test_retrieval_of_photos_equals_a_naive_count() -> None:
    got = go(["coco_cc"])["tasks"]["coco_cc"]["metrics"]
    rows = [json.loads(line) for line in (SHARED / "image_text/coco_cc/captions.jsonl").open()]
    model = Pixels()
    x = model.embed("image", [(SHARED / "image_text/coco_cc" / r["image"]).read_bytes() for r in rows])
    y = model.embed("text", [c.strip() for r in rows for c in r["captions"]])
    s = (x @ y.T).tolist()
    there = [
        1 + min(sum(v >= s[i][j] for k, v in enumerate(s[i]) if k // 5 != i) for j in range(5 * i, 5 * i + 5))
        for i in range(81)
    ]
    back = [1 + sum(s[k][j] >= s[j // 5][j] for k in range(81) if k != j // 5) for j in range(405)]
    for k in (1, 5, 10):
        assert got[f"image_to_text_R@{k}"] == pytest.approx(sum(r <= k for r in there) / 81, abs=1e-6)
        assert got[f"text_to_image_R@{k}"] == pytest.approx(sum(r <= k for r in back) / 405, abs=1e-6)
    assert got["text_to_image_median_rank"] == sorted(back)[202]


def test_a_perfect_and_a_collapsed_model(tmp_path: Path) -> None:
    class Perfect(Pixels):
        def embed(self, modality: str, items: Any, batch_size: int = 64) -> torch.Tensor:
            if modality == "text":
                items = [picture_of[t] for t in items]
            return super().embed("image", items)

    members = pairs(30)
    picture_of = {members[i + 1][1].decode(): members[i][1] for i in range(0, 60, 2)}
    name = small(tmp_path, members)
    best = go([name], Perfect())["tasks"]["small"]["metrics"]
    assert best["image_to_text_R@1"] == best["text_to_image_R@1"] == 1.0
    assert best["modality_gap"] == pytest.approx(0, abs=1e-6)

    class Collapsed(Pixels):
        def embed(self, modality: str, items: Any, batch_size: int = 64) -> torch.Tensor:
            return torch.nn.functional.normalize(torch.ones(len(items), 8), dim=1)

    worst = go([name], Collapsed())["tasks"]["small"]["metrics"]
    assert worst["image_to_text_R@10"] == 0.0
    assert worst["image_to_text_median_rank"] == 30


def test_broken_items_are_left_out_counted_and_named(tmp_path: Path) -> None:
    members = pairs(40)
    members[6] = ("003.png", members[6][1][:45])
    members[9] = ("004.txt", b"  ")
    got = go([small(tmp_path, members)])["tasks"]["small"]
    assert got["n"] == {"image": 38, "text": 38}
    assert got["skipped"]["count"] == 2
    ids = [s["id"] for s in got["skipped"]["items"]]
    assert "x/003" in ids
    assert "x/004" in ids
    assert any("items were left out" in n for n in got["notes"])


def test_too_many_broken_items_are_an_error(tmp_path: Path) -> None:
    members = pairs(10)
    for i in range(0, 8, 2):
        members[i] = (members[i][0], b"not a picture")
    with pytest.raises(DataError, match=r"task small: .*cannot be used \(max_skipped is 0.1\); the first: x/000"):
        go([small(tmp_path, members)])


def test_a_pair_is_lost_with_either_of_its_sides(tmp_path: Path) -> None:
    """2 of 10 pictures broken: a tenth of the items, a fifth of the pairs."""
    members = pairs(10)
    for i in (0, 2):
        members[i] = (members[i][0], b"no picture")
    with pytest.raises(DataError, match=r"task small: 2 of 10 pairs cannot be used \(max_skipped is 0\.1\); the first"):
        go([small(tmp_path, members)], Pixels())


def test_labels_that_are_no_class_and_classes_without_items(tmp_path: Path) -> None:
    members = [m for i in range(6) for m in ((f"{i}.png", picture((i, i, 9))), (f"{i}.cls", b"cat" if i else b"dgo"))]
    fields = {"kind": "classification", "label": "cls", "classes": ["cat", "dog"], "templates": ["{}"]}
    with pytest.raises(ConfigError, match=r"label 'dgo', which is not a class. Did you mean 'dog'\?"):
        go([small(tmp_path, members, **fields)])
    got = go([small(tmp_path, members, **fields, other_labels="drop")])["tasks"]["small"]
    assert got["notes"][0] == "1 items have a label that is not a class of this task and were left out."
    assert got["notes"][1].startswith("No items of class 'dog'")


def test_what_the_model_cannot_do_is_said(tmp_path: Path) -> None:
    class NoText(Pixels):
        modalities = ("image", "audio")

    class Broken(Pixels):
        def embed(self, modality: str, items: Any, batch_size: int = 64) -> torch.Tensor:
            return torch.full((len(items), 4), torch.nan)

    name = small(tmp_path, pairs(4))
    with pytest.raises(DataError, match="The model has no modality 'text'"):
        go([name], NoText())
    with pytest.raises(DivergenceError, match="4 of 4 image features are not finite"):
        go([name], Broken())
    with pytest.raises(ConfigError, match="'small' is listed twice"):
        go([name, name])


def test_equal_captions_distinct_or_merged(tmp_path: Path) -> None:
    members = pairs(4)
    members[3] = ("001.txt", b"word0")
    distinct = go([small(tmp_path, members)])["tasks"]["small"]
    merged = go([small(tmp_path, members, identical="merge")])["tasks"]["small"]
    assert distinct["n"]["text"] == 4
    assert merged["n"]["text"] == 3
    assert merged["chance"]["text_to_image_R@1"] == pytest.approx((2 / 4 + 1 / 4 + 1 / 4) / 3, abs=1e-6)


def test_the_second_run_finds_its_features(tmp_path: Path) -> None:
    name = small(tmp_path, pairs(20))
    first, second = Pixels(), Pixels()
    a = go([name], first, cache_dir=tmp_path / "cache")
    b = go([name], second, cache_dir=tmp_path / "cache")
    assert sum(first.embedded) == 40
    assert second.embedded == []
    assert plain(a) == plain(b)
    files = [f for f in (tmp_path / "cache").rglob("*") if f.is_file()]
    assert sorted({f.suffix for f in files}) == [".json", ".safetensors"]
    for f in files:
        f.write_bytes(f.read_bytes()[:50])
    third = Pixels()
    assert plain(go([name], third, cache_dir=tmp_path / "cache")) == plain(a)
    assert sum(third.embedded) == 40

    class Other(Pixels):
        def describe(self) -> dict[str, Any]:
            return {"name": "pixels", "weights_sha256": "1" * 64}

    other = Other()
    go([name], other, cache_dir=tmp_path / "cache")
    assert sum(other.embedded) == 40


def test_equal_items_are_embedded_once(tmp_path: Path) -> None:
    members = pairs(10)
    for i in range(1, 20, 2):
        members[i] = (members[i][0], b"the same")
    model = Pixels()
    go([small(tmp_path, members)], model)
    assert model.embedded == [10, 1]


@needs_quickstart
@pytest.mark.dist
@pytest.mark.slow
def test_one_and_two_ranks_give_the_same_file(tmp_path: Path) -> None:
    spawn = from_path("_spawn", ROOT / "tests" / "distributed" / "_spawn.py").spawn
    members = pairs(33)
    members[6] = ("003.png", members[6][1][:45])
    (tmp_path / "more").mkdir()
    more = {"metrics": ["R@1", "mAP@10", "nDCG@5"], "bags": {"by": "neighbours", "sizes": [3]}, "name": "more"}
    tasks = ["quickstart_val_clipart", "quickstart_groups", small(tmp_path, members)]
    tasks.append(small(tmp_path / "more", pairs(33), **more))
    alone = json.loads(run(None, tasks))
    for size in (2, 3):
        out = tmp_path / f"{size}.json"
        ranks = [json.loads(text) for text in spawn(HELPER, "run", size, {"tasks": tasks, "out": str(out)})]
        assert ranks[0] == alone
        written = json.loads(out.read_text())
        del written["run"]
        assert written == alone
        for other in ranks[1:]:
            for name, task in other["tasks"].items():
                assert task == {k: v for k, v in alone["tasks"][name].items() if k != "details"}


@pytest.mark.dist
def test_a_file_missing_on_one_rank_is_an_error_on_all(tmp_path: Path) -> None:
    spawn = from_path("_spawn", ROOT / "tests" / "distributed" / "_spawn.py").spawn
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    here, gone = small(tmp_path / "a", pairs(4)), small(tmp_path / "b", pairs(4))
    (tmp_path / "b" / "x.tar").unlink()
    first, second = spawn(HELPER, "missing_on_one_rank", 2, {"here": here, "gone": gone}, timeout_s=60)
    assert "There is no shard" in second
    assert first == f"rank 1: {second}"


# --- the report ---------------------------------------------------------------------------------------------------


def run_folder(tmp: Path, results: dict[str, Any] | None) -> Path:
    folder = tmp / "my run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(
        "name: tiny <b>\ndescription: a test  # why\nbatch: {size: 16}\noptim: {lr: 1e-3}\n"
    )
    lines = [
        {"step": s, "samples_seen": 16 * s, "loss": 3 / s, "lr": 1e-3, "samples_per_s": 99.0} for s in range(1, 30)
    ]
    lines += [{"step": s, "samples_seen": 16 * s, "eval/small/image_to_text_R@1": s / 100} for s in (0, 10, 20)]
    text = "".join(json.dumps(x) + "\n" for x in lines)
    (folder / "metrics.jsonl").write_text(text + '{"step": 30, "lo')  # cut by a kill
    (folder / "environment.json").write_text(json.dumps({"packages": {"torch": "9.9"}, "world_size": 2}))
    lost = {
        "step": 1,
        "source": "web",
        "shard": "s.tar",
        "key": "k1",
        "member": "jpg",
        "reason": "<script>alert(1)</script>",
    }
    (folder / "quarantine.jsonl").write_text(json.dumps(lost) + "\n")
    if results is not None:
        (folder / "results.json").write_text(json.dumps(results))
    return folder


def test_the_report_holds_what_it_must_and_loads_nothing(tmp_path: Path) -> None:
    members = pairs(30)
    members[3] = ("001.txt", b"<img src=http://evil/x.png> & co")
    tasks = [small(tmp_path, members)]
    classes = tmp_path / "kinds.yaml"
    for kind in ("cat", "dog", "owl"):
        (tmp_path / "f" / kind).mkdir(parents=True)
        for i in range(3):
            (tmp_path / "f" / kind / f"{i}.png").write_bytes(picture((len(kind) * i, i, ord(kind[0]))))
    source = {"kind": "folder", "path": "./f"}
    classes.write_text(yaml.safe_dump({"kind": "classification", "source": source, "templates": ["a {}"]}))
    results = go([*tasks, str(classes)])
    page = write_report(run_folder(tmp_path, results))
    assert page == tmp_path / "my run" / "report.html"
    html = page.read_text(encoding="utf-8")
    for text in (
        "tiny &lt;b&gt;",
        "Training loss",
        "Zero-shot R@1",
        "image → text",
        "✓",
        "✗",
        "Similarity of",
        "Confusion",
    ):
        assert text in html, text
    for text in ("chance", "95 %", "web/s.tar/k1", "9.9", "optim", "cat", "owl", "torch"):
        assert text in html, text
    assert html.count("data:image/webp;base64,") >= 24
    # Nothing is fetched: no address in any attribute that loads, and what data say is text.
    assert not re.findall(r"<(?:link|iframe|object|embed|base)\b|<script[^>]*\bsrc|@import|url\(", html)
    assert all(src.startswith("data:image/") for src in re.findall(r'\bsrc="([^"]*)"', html))
    assert all(href.startswith("#") for href in re.findall(r'\bhref="([^"]*)"', html))
    assert "<script>alert(1)" not in html
    assert "<img src=http" not in html


def test_a_picture_from_outside_is_not_shown(tmp_path: Path) -> None:
    results = go([small(tmp_path, pairs(6))])
    text = json.dumps(results).replace("data:image/webp;base64,", "http://evil/")
    html = write_report(run_folder(tmp_path, json.loads(text))).read_text()
    assert "evil" not in html


def test_a_run_without_results_says_so(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, None)
    html = write_report(folder, tmp_path / "own.html").read_text()
    assert "This run has no results yet" not in html, "its own evaluation is what the page shows"
    metrics = folder / "metrics.jsonl"
    metrics.write_text("".join(x for x in metrics.read_text().splitlines(True) if "eval/" not in x))
    html = write_report(folder, tmp_path / "x" / "r.html").read_text()
    assert "This run has no results yet" in html
    assert "Training loss" in html


def test_folders_that_are_no_run_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is nothing to report on"):
        write_report(tmp_path)
    folder = run_folder(tmp_path, {})
    (folder / "results.json").write_text('{"tasks": ')
    with pytest.raises(DataError, match=r"results\.json is damaged"):
        write_report(folder)
    shutil.rmtree(folder)


def test_yaml_is_shown_as_it_is(tmp_path: Path) -> None:
    text = "a: {b: <x>, lr: 1e-3}  # 50 & more\nshards: './t-{0..3}.tar'\n- name: y\n"
    shown = str(highlight_yaml(text))
    bare = re.sub(r"</?[bi](?: class=\"\w\")?>", "", shown)
    assert bare.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&") == text.rstrip("\n")


def test_the_table_shows_value_interval_and_chance(tmp_path: Path) -> None:
    results = go([small(tmp_path, pairs(20))])
    console = Console(width=100, record=True, file=open("/dev/null", "w"))
    print_table(results, console)
    text = console.export_text()
    metrics = results["tasks"]["small"]
    for part in ("small", "20 × 20", "image → text", "text → image", "R@1 %", "chance", "95 %"):
        assert part in text
    assert f"{100 * metrics['metrics']['image_to_text_R@10']:.1f}" in text
    assert f"{100 * metrics['chance']['image_to_text_R@10']:.1f}" in text
