"""Each shard of ``../shared/faults`` through training, ``shards check``, ``embed`` and ``eval``: what is broken is
counted once, by name, in each of them, and the rest is used."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from _shared import DATA
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "features"))
from _feature_jobs import tiny

from dualenc.config import Data
from dualenc.data.batch import Batch
from dualenc.data.loader import Loader
from dualenc.data.quarantine import Ledger
from dualenc.errors import DualencError
from dualenc.features.arrow import write_parquet
from dualenc.features.of_shards import embed_shards
from dualenc.features.store import FeatureStore
from dualenc.model import Bundle
from dualenc_data_tools.check import check
from dualenc_data_tools.view import view
from dualenc_evals.catalog import load_task
from dualenc_evals.harness import SHOWN_SKIPPED, evaluate

FAULTS = DATA.parent / "faults"
PAIRS = [("image", "text")]
needs_faults = pytest.mark.skipif(not FAULTS.is_dir(), reason=f"the faulty inputs are not below {DATA.parent}")


@dataclass(frozen=True)
class Right:
    """The right outcome: samples in the shard, those that are lost, and what ``shards check`` calls them."""

    samples: int
    lost: frozenset[str] = frozenset()
    problems: tuple[tuple[str, int], ...] = ()


def planted() -> dict[str, list[str]]:
    return json.loads((FAULTS / "planted.json").read_text(encoding="utf-8")) if FAULTS.is_dir() else {}


PLANTED = frozenset(k for keys in planted().values() for k in keys)
CALLED = {"broken image": 21, "empty caption": 9, "missing member": 6, "broken text": 3, "too large": 3}

RIGHT = {
    "exif_text_resolution": Right(40),
    "half_emoji": Right(30),
    "folders_in_keys": Right(30),
    "duplicate_keys": Right(40, problems=(("duplicate key", 10),)),
    "deep_json": Right(41, frozenset({"s00040"}), (("broken text", 1),)),
    "planted": Right(200, PLANTED, tuple(CALLED.items())),
}


@pytest.fixture(scope="module")
def model() -> Bundle:
    return tiny()


def shard(name: str) -> str:
    return str(FAULTS / f"{name}.tar")


def _one_pass(path: str, model: Bundle) -> list[Batch]:
    """A batch of the whole shard."""
    row = {"name": "s", "shards": path}
    data = Data.model_validate({"workers": 0, "max_bad_share": 1.0, "sources": [row]})
    size = check(path, workers=1, progress=False).stats.samples
    loader = Loader(data, model.inputs, PAIRS, seed=0, batch_size=size or 8)
    loader.stop_step = 1
    return list(loader)


def train(name: str, model: Bundle) -> tuple[int, Counter[str]]:
    """One pass: samples that were used, and how often each key was lost."""
    (batch,) = _one_pass(shard(name), model)
    lost = Counter(bad.key for bad in batch.bad)
    return batch.size - lost.total(), lost


def embed(name: str, model: Bundle, out: Path) -> tuple[dict[str, Any], Counter[str]]:
    report = embed_shards(model, shard(name), out)
    part = json.loads((out / f"{name}.tar.json").read_text(encoding="utf-8"))
    return report, Counter(row["id"] for row in part["lost"])


def task_of(name: str, folder: Path) -> Any:
    path = folder / f"{name}_task.yaml"
    path.write_text(
        f"kind: retrieval\nidentical: merge\nmax_skipped: 1.0\nsource: {{kind: shards, path: {shard(name)}}}\n"
    )
    return load_task(path)


@needs_faults
@pytest.mark.parametrize("name", RIGHT)
def test_training(name: str, model: Bundle) -> None:
    right = RIGHT[name]
    used, lost = train(name, model)
    assert lost == Counter(dict.fromkeys(right.lost, 1))
    assert used == right.samples - len(right.lost)


@needs_faults
@pytest.mark.parametrize("name", RIGHT)
def test_check(name: str) -> None:
    right, report = RIGHT[name], check(shard(name), workers=1, progress=False)
    assert report.stats.samples == right.samples
    assert report.stats.problems == Counter(dict(right.problems))
    assert report.ok is not bool(right.problems)


@needs_faults
@pytest.mark.parametrize("name", RIGHT)
def test_embed(name: str, model: Bundle, tmp_path: Path) -> None:
    right = RIGHT[name]
    report, lost = embed(name, model, tmp_path / "out")
    absent = set(planted()["missing_text"] + planted()["missing_image"]) if name == "planted" else set()
    # A sample whose json is broken loses every row: which picture belongs to it is known, but not whether it is whole.
    assert lost == Counter(dict.fromkeys(right.lost - absent, 2 if name == "deep_json" else 1))
    assert sum(report["lost"].values()) == lost.total()
    assert sum(report["absent"].values()) == len(absent)
    assert sum(report["embedded"].values()) == 2 * right.samples - lost.total() - len(absent)
    store = FeatureStore(tmp_path / "out")
    both = Counter(store.read("image")[0]) & Counter(store.read("text")[0])
    assert both.total() == right.samples - len(right.lost)
    assert not set(both) & right.lost


@needs_faults
@pytest.mark.parametrize("name", RIGHT)
def test_eval(name: str, model: Bundle, tmp_path: Path) -> None:
    right = RIGHT[name]
    result = evaluate(model.embedder(), [task_of(name, tmp_path)], progress=False)["tasks"][f"{name}_task"]
    skipped = result["skipped"]
    named = [row["id"].partition("/")[2].partition("#")[0] for row in skipped["items"]]
    assert skipped["count"] == len(right.lost)
    assert len(named) == len(set(named)) == min(len(right.lost), SHOWN_SKIPPED)
    assert set(named) <= right.lost


@needs_faults
def test_each_planted_kind_is_lost_for_its_own_reason(model: Bundle, tmp_path: Path) -> None:
    """By kind of fault: the reason in the part's json, which names the modality too."""
    _, _ = embed("planted", model, tmp_path / "out")
    rows = json.loads((tmp_path / "out" / "planted.tar.json").read_text(encoding="utf-8"))["lost"]
    said = {row["id"]: f"{row['modality']}: {row['reason']}" for row in rows}
    words = {
        "trunc_jpeg": "image: ",
        "trunc_png": "cut short in chunk IDAT",
        "trunc_webp": "image: ",
        "crc_png": "wrong checksum in chunk IDAT",
        "garbage_jpeg": "image: not a JPEG, PNG",
        "zero_image": "image: not a JPEG, PNG",
        "zero_text": "text: the caption is empty",
        "latin1_text": "text: ",
        "html_as_jpg": "image: not a JPEG, PNG",
        "only_nul_text": "text: the caption is empty",
        "bomb_png_header": "image: far too many pixels",
        "txt_spaces": "text: the caption is empty",
    }
    assert words.keys() == planted().keys() - {"missing_text", "missing_image"}
    for kind, word in words.items():
        assert all(word in said[key] for key in planted()[kind]), (kind, said[planted()[kind][0]])


@needs_faults
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("zero_block", "holds data after its end mark"),
        ("dots_version", r"None of the (first|20 samples)|no row has any of jpg"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(name: str, words: str, model: Bundle, tmp_path: Path) -> None:
    for use in (
        lambda: train(name, model),
        lambda: embed(name, model, tmp_path / "out"),
        lambda: evaluate(model.embedder(), [task_of(name, tmp_path)], progress=False),
    ):
        with pytest.raises(DualencError, match=words) as e:
            use()
        assert "\n" not in str(e.value)
    assert not check(shard(name), workers=1, progress=False).ok


def test_names_and_texts_that_are_no_unicode(model: Bundle, tmp_path: Path) -> None:
    """Keys in Latin-1 and half an emoji in a label, in everything that writes them down."""
    pixels = io.BytesIO()
    Image.new("RGB", (40, 40), (200, 30, 9)).save(pixels, "PNG")
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for i in range(12):
            fields = {"caption": f"a cup {i} \ud83c", "label": ("caf\ud83c", "cup")[i % 2]}
            rows = (("png", b"bad" if i == 3 else pixels.getvalue()), ("json", json.dumps(fields).encode()))
            for ending, raw in rows:
                info = tarfile.TarInfo(f"caf\udce9{i}.{ending}")
                info.size = len(raw)
                tar.addfile(info, io.BytesIO(raw))
    classes = "label: 'json:label'\ntemplates: ['a {}']"
    for kind, more in (("retrieval", "identical: merge"), ("classification", classes)):
        task = tmp_path / f"{kind}.yaml"
        task.write_text(f"kind: {kind}\nmax_skipped: 1.0\n{more}\nsource: {{kind: shards, path: {path}}}\n")
        out = tmp_path / f"{kind}.json"
        evaluate(
            model.embedder(), [load_task(task)], progress=False, out=out, cache_dir=tmp_path / "cache", details=True
        )
        (skipped,) = json.loads(out.read_text(encoding="utf-8"))["tasks"][kind]["skipped"]["items"]
        assert skipped["id"].startswith("x/caf\udce93")
    report = embed_shards(model, str(path), tmp_path / "out")
    assert report["embedded"] == {"image": 11, "text": 12}
    write_parquet(FeatureStore(tmp_path / "out"))
    assert b"caf\\udce93" in view([str(path)], tmp_path / "page.html").read_bytes()
    ledger = Ledger(tmp_path / "run", 1.0, 0, ["s"])
    for batch in _one_pass(str(path), model):
        ledger.add(batch)
    (line,) = (tmp_path / "run" / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["key"] == "caf\udce93"
