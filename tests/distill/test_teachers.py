"""Teachers on real photos: online and cached are one thing, and what does not fit is refused in a line."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
sys.path.insert(0, str(Path(__file__).parent))
from _distill_runs import loss_rows, modalities, shards_fixture, student_recipe, teacher_fixture  # noqa: F401
from _spawn import spawn

from dualenc.checkpoint import save as ckpt
from dualenc.config import Recipe
from dualenc.distill.teachers.cache import Cache, write_cache
from dualenc.encoders.dual_encoder import heads_of
from dualenc.errors import CheckpointError, ConfigError, DataError
from dualenc.model import build_bundle, load_model
from dualenc.train.loop import train

TERMS = [{"name": "feature", "weight": 0.5}, {"name": "dcd", "candidates": 7}, {"name": "gradient", "weight": 0.1}]


def distill(**teacher: Any) -> dict[str, Any]:
    return {"teachers": [teacher], "terms": TERMS, "hard": 0.5}


@pytest.fixture(scope="module")
def caches(shards: str, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the student's data: fp32 and int8 with two views, fp16 with plain pictures."""
    out = tmp_path_factory.mktemp("caches")
    recipe = student_recipe(shards, out)
    bundle = load_model(str(teacher))
    write_cache(bundle, recipe, out / "fp32", views=2, dtype="fp32")
    write_cache(bundle, recipe, out / "int8", views=2, dtype="int8")
    write_cache(bundle, recipe, out / "plain", views=2, plain=["image"])
    return out


def run(shards: str, out: Path, steps: int = 4, **changes: Any) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    train(student_recipe(shards, out, budget={"steps": steps}, **changes))
    return loss_rows(out), ckpt.trained_weights(ckpt.newest_good(out)).all()  # type: ignore[arg-type]


def test_online_and_cached_give_the_same_run(shards: str, teacher: Path, caches: Path, tmp_path: Path) -> None:
    """4 SGD steps of 20 of 200 photos, crops and captions drawn: the teacher saw the very same ones when it was stored.

    Tokenizer (2,048 and 1,024 entries), picture size (64 and 32) and dimension (24 and 16) differ.
    """
    online, w1 = run(shards, tmp_path / "online", distill=distill(model=str(teacher)))
    cached, w2 = run(shards, tmp_path / "cached", distill=distill(model=str(teacher), cache=str(caches / "fp32")))
    for a, b in zip(online, cached, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
    assert heads_of(w1)
    for name, x in w1.items():
        assert float((w2[name] - x).abs().max()) <= 1e-5 * max(float(x.abs().max()), 1e-3), name
    _, w3 = run(shards, tmp_path / "plain", distill=distill(model=str(teacher), plain=["image"]))
    _, w4 = run(shards, tmp_path / "plain2", distill=distill(cache=str(caches / "plain")))
    assert max(float((w3[n] - x).abs().max()) for n, x in w1.items()) > 1e-4  # another view is another lesson
    for name, x in w3.items():  # stored in fp16
        assert float((w4[name] - x).abs().max()) <= 1e-3 * max(float(x.abs().max()), 1e-2), name


def test_views_come_again(shards: str, caches: Path, tmp_path: Path) -> None:
    """Three passes on two stored views: the third pass draws the first one's crops and captions."""
    from dualenc.distill import Distiller

    recipe = student_recipe(shards, tmp_path, distill=distill(cache=str(caches / "fp32")), batch={"size": 200})
    bundle = build_bundle(recipe)
    distiller = Distiller(recipe, bundle, torch.device("cpu"))
    from dualenc.data.loader import Loader

    loader = Loader(recipe.data, bundle.inputs, recipe.pairs, recipe.seed, 200, redraw=distiller.redraw)
    passes = {}
    for step, batch in zip(range(3), loader, strict=False):
        assert batch.passes is not None
        assert set(batch.passes.tolist()) == {step}
        extras = distiller.prepare(batch, {}.__getitem__, None).teachers["teacher0"].features  # type: ignore[arg-type]
        order = sorted(range(200), key=lambda i: batch.keys[i])
        passes[step] = (batch.inputs["image"][order], extras["image"][order], extras["text"][order])
    loader.close()
    assert all(torch.equal(x, y) for x, y in zip(passes[0], passes[2], strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(passes[0], passes[1], strict=True))


def test_int8_is_near_and_smaller(caches: Path) -> None:
    exact, small = Cache(caches / "fp32"), Cache(caches / "int8")
    part, other = exact.parts[0], small.parts[0]
    keys = [f"flickr8k/{part.data['shard']}/{key}" for key in part.ids]
    x, has = exact.rows("image", keys, [1] * len(keys))
    y, _ = small.rows("image", keys, [1] * len(keys))
    assert bool(has.all())
    assert float((x * y).sum(1).min()) > 0.9999
    assert other.path.stat().st_size < 0.45 * part.path.stat().st_size


def test_only_the_student_is_saved(shards: str, teacher: Path, tmp_path: Path) -> None:
    """model/ is a student like any other; heads are in the training save, and a resumed run is the unbroken one."""
    changes: dict[str, Any] = {"distill": distill(model=str(teacher))}
    _, whole = run(shards, tmp_path / "whole", **changes)
    run(shards, tmp_path / "parts", steps=2, **changes)
    _, resumed = run(shards, tmp_path / "parts", steps=4, **changes)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(x, resumed[n]) for n, x in whole.items())
    saved = load_model(str(tmp_path / "parts"))
    assert not heads_of(saved.model.state_dict())
    plain = build_bundle(student_recipe(shards, tmp_path))
    assert saved.model.state_dict().keys() == plain.model.state_dict().keys()
    other = distill(model=str(teacher))
    other["terms"] = TERMS[:1]
    with pytest.raises(CheckpointError, match=r"distill\.terms"):
        run(shards, tmp_path / "parts", steps=5, distill=other)


def test_two_teachers_and_the_mean_of_their_terms(shards: str, teacher: Path, caches: Path, tmp_path: Path) -> None:
    """The same teacher twice, online and stored, with weights 3 and 1: as once."""
    term = {"terms": [{"name": "soft_labels"}], "hard": 1.0}
    once, w1 = run(shards, tmp_path / "once", distill={"teachers": [{"model": str(teacher)}], **term})
    two = [{"model": str(teacher), "weight": 3.0}, {"cache": str(caches / "fp32"), "weight": 1.0}]
    twice, w2 = run(shards, tmp_path / "twice", distill={"teachers": two, **term})
    assert once[-1]["distill_soft_labels/image-text"] == pytest.approx(
        twice[-1]["distill_soft_labels/image-text"], rel=1e-5
    )
    assert all(float((w2[n] - x).abs().max()) <= 1e-5 for n, x in w1.items())


@pytest.mark.dist
def test_two_ranks_write_the_cache_of_one(teacher: Path, shards: str, caches: Path, tmp_path: Path) -> None:
    """A shard each: the very files that one process wrote."""
    done = spawn(__file__, "write_on_ranks", 2, {"shards": shards, "teacher": str(teacher), "out": str(tmp_path / "a")})
    assert done[0] == done[1]
    assert (done[0]["shards"], done[0]["kept"]) == (2, 0)
    assert done[0]["embedded"] == {"image": 200, "text": 200}
    one, two = (sorted(p for p in folder.iterdir()) for folder in (caches / "int8", tmp_path / "a"))
    assert [(p.name, p.read_bytes()) for p in one] == [(p.name, p.read_bytes()) for p in two]


def write_on_ranks(world: Any, shards: str, teacher: str, out: str) -> dict[str, Any]:
    done = write_cache(
        load_model(teacher), student_recipe(shards, Path(out)), Path(out), views=2, dtype="int8", world=world
    )
    return {k: done[k] for k in ("shards", "kept", "samples", "embedded", "lost")}


# --- what does not fit -------------------------------------------------------------------------------------------


def refused(shards: str, out: Path, error: type[Exception], match: str, **teacher: Any) -> str:
    with pytest.raises(error, match=match) as caught:
        train(student_recipe(shards, out, distill=distill(**teacher)))
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_a_teacher_with_the_wrong_hash(shards: str, teacher: Path, caches: Path, tmp_path: Path) -> None:
    refused(
        shards,
        tmp_path / "a",
        DataError,
        r"distill\.teachers\.0\.weights: expected 0123",
        model=str(teacher),
        weights="0123",
    )
    raw = student_recipe(shards, tmp_path).model_dump(mode="json") | {
        "seed": 9,
        "modalities": modalities(64, "clip-bpe:2048", 32),
    }
    other = build_bundle(Recipe.model_validate(raw)).save(tmp_path / "other")
    refused(
        shards, tmp_path / "b", DataError, "holds features of weights", model=str(other), cache=str(caches / "fp32")
    )


def test_a_cache_that_lacks_one_percent(shards: str, caches: Path, tmp_path: Path) -> None:
    """Two of 200 rows taken out, in a way that leaves a well-formed cache."""
    folder = tmp_path / "cache"
    shutil.copytree(caches / "fp32", folder)
    about = json.loads((folder / "features.json").read_text())
    name = about["parts"][1]["name"]
    said = json.loads((folder / f"{name}.json").read_text())
    gone, said["ids"] = [f"flickr8k/{said['data']['shard']}/{key}" for key in said["ids"][-2:]], said["ids"][:-2]
    tensors = {k: v[:-2].clone() for k, v in load_file(folder / f"{name}.safetensors").items()}
    save_file(tensors, folder / f"{name}.safetensors")
    said |= {
        "rows": {m: n - 2 for m, n in said["rows"].items()},
        "bytes": (folder / f"{name}.safetensors").stat().st_size,
    }
    (folder / f"{name}.json").write_text(json.dumps(said))
    refused(shards, tmp_path / "a", DataError, "was changed after it was written", cache=str(folder))
    about["parts"][1] |= {"ids": len(said["ids"]), "rows": said["rows"]}
    (folder / "features.json").write_text(json.dumps(about))
    refused(shards, tmp_path / "b", DataError, r"lacks 2 of 200 samples \(1\.0 %\)", cache=str(folder))
    assert Cache(folder).missing(gone) == gone
    rows, _ = run(shards, tmp_path / "c", steps=10, distill=distill(cache=str(folder), max_missing=0.02))
    assert len(rows) == 10


def test_a_stale_cache(shards: str, caches: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    shutil.copytree(caches / "fp32", folder)
    about = json.loads((folder / "features.json").read_text())
    part = folder / f"{about['parts'][0]['name']}.json"
    about["parts"][0]["data"]["bytes"] -= 512
    part.write_text(json.dumps(json.loads(part.read_text()) | {"data": about["parts"][0]["data"]}))
    (folder / "features.json").write_text(json.dumps(about))
    refused(shards, tmp_path / "a", DataError, "is stale: shard flickr8k/", cache=str(folder))
    refused(shards, tmp_path / "b", DataError, "holds no features", cache=str(tmp_path))
    recipe = student_recipe(shards, tmp_path / "c", distill=distill(cache=str(caches / "fp32")))
    gentle = recipe.modalities["image"].model_copy(update={"input": {"size": 32}})
    with pytest.raises(DataError, match="the views of image in"):
        train(recipe.model_copy(update={"modalities": {**recipe.modalities, "image": gentle}}))


def test_a_teacher_of_another_modality(shards: str, teacher: Path, tmp_path: Path) -> None:
    recipe = student_recipe(shards, tmp_path / "a", distill=distill(model=str(teacher)))
    photo = recipe.modalities["image"].model_copy(update={"kind": "image"})
    changed = {"modalities": {"thermal": photo, "text": recipe.modalities["text"]}, "pairs": [("thermal", "text")]}
    source = recipe.data.sources[0].model_copy(update={"members": {"thermal": ["jpg"], "text": ["json:captions"]}})
    changed["data"] = recipe.data.model_copy(update={"sources": [source]})
    with pytest.raises(
        ConfigError, match=r"has image, text, which covers none of the student's pairs \['thermal-text'\]"
    ):
        train(recipe.model_copy(update=changed))
    named = recipe.distill.model_copy(  # type: ignore[union-attr]
        update={"teachers": [recipe.distill.teachers[0].model_copy(update={"modalities": {"thermal": "image"}})]}  # type: ignore[union-attr]
    )
    train(recipe.model_copy(update={**changed, "distill": named}))
    assert len(loss_rows(tmp_path / "a")) == 4
