"""(1 − α) A + α B: endpoints bit for bit, the middle by hand, the curve on real photos, and what cannot be mixed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _shared import DATA as SHARED_DATA
from test_bundle import recipe
from test_released_models import SMALL, write_open_clip
from typer.testing import CliRunner

from dualenc.cli import app
from dualenc.errors import ConfigError
from dualenc.model import Bundle, build_bundle, load_model
from dualenc.model.average_weights import Interpolation, between
from dualenc_evals.catalog import load_task
from dualenc_evals.studies.interpolation import charts, interpolate, markdown

Photos = list[tuple[bytes, list[str]]]


def moved(bundle: Bundle, by: float = 0.05) -> Bundle:
    """The model after a step in a random direction."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in bundle.model.parameters():
            p.add_(torch.randn(p.shape, generator=g) * by)
    bundle.weights_hash = None
    return bundle


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A model and what it became."""
    folder = tmp_path_factory.mktemp("two")
    a = build_bundle(recipe()).save(folder / "a")
    return str(a), str(moved(load_model(str(a))).save(folder / "b"))


def test_ends_bit_for_bit_and_the_middle_by_hand(two: tuple[str, str], coco: Photos) -> None:
    a, b = (load_model(x) for x in two)
    ends = [{k: v.clone() for k, v in x.model.state_dict().items()} for x in (a, b)]
    photos = [x for x, _ in coco[:3]]
    features = [x.embedder().embed("image", photos) for x in (a, b)]
    hashes = [a.weights_hash, b.weights_hash]
    line = Interpolation(a, b)
    for alpha, end, feature, digest in zip((0, 1, 0), [*ends, ends[0]], [*features, features[0]], [*hashes, hashes[0]]):  # noqa: B905
        at = line.at(alpha)
        assert all(torch.equal(v, end[k]) for k, v in at.model.state_dict().items())
        assert torch.equal(at.embedder().embed("image", photos), feature)
        assert at.weights_hash == digest
    middle = line.at(0.3).model.state_dict()
    for k, v in middle.items():
        x, y = (e[k].numpy().astype(np.float64) for e in ends)
        assert np.abs(v.numpy() - (0.7 * x + 0.3 * y)).max() <= 1e-7 * max(np.abs(x).max(), 1), k
    scale = line.at(0.3).embedder().logit_scale("image-text")
    logs = [math.log(x.embedder().logit_scale("image-text")) for x in (load_model(two[0]), load_model(two[1]))]
    assert math.log(scale) == pytest.approx(0.7 * logs[0] + 0.3 * logs[1], abs=1e-6)
    assert line.at(0.3).weights_hash not in (hashes[0], hashes[1], line.at(0.31).weights_hash)


def test_whole_numbers_come_from_the_nearer_end() -> None:
    a = {"places": torch.arange(3), "count": torch.tensor(10), "w": torch.tensor([1.0, 3.0])}
    b = {"places": torch.arange(3), "count": torch.tensor(20), "w": torch.tensor([2.0, 3.0])}
    assert [int(between(a, b, x)["count"]) for x in (0, 0.4, 0.6, 1)] == [10, 10, 20, 20]
    assert between(a, b, 0.25)["w"].tolist() == [1.25, 3.0]
    assert between(a, b, 0.5)["places"].dtype == torch.int64
    with pytest.raises(ConfigError, match=r"--alphas: 1.2 is not between"):
        between(a, b, 1.2)


def clip(folder: Path, cfg: dict[str, Any], pre: dict[str, Any]) -> Bundle:
    write_open_clip(folder, cfg, pre)
    return load_model(str(folder))


@pytest.mark.parametrize(
    ("cfg", "pre", "field"),
    [
        ({"quick_gelu": True}, {}, r"modalities.image.encoder.config.quick_gelu: false in the first model, true"),
        ({}, {"mean": [0.5] * 3}, r"modalities.image.input.mean"),
        ({"embed_dim": 16}, {}, r"embed_dim: 32 in the first model, 16"),
        ({"text_cfg": {**SMALL["text_cfg"], "layers": 3}}, {}, r"text.encoder.config.text_cfg.layers: 2 .* 3"),  # type: ignore[dict-item]
        ({"text_cfg": {**SMALL["text_cfg"], "context_length": 40}}, {}, r"modalities.text.input.context_length"),  # type: ignore[dict-item]
    ],
)
def test_another_architecture_or_input_is_refused(
    tmp_path: Path, cfg: dict[str, Any], pre: dict[str, Any], field: str
) -> None:
    one, other = clip(tmp_path / "a", SMALL, {}), clip(tmp_path / "b", {**SMALL, **cfg}, pre)
    with pytest.raises(ConfigError, match=field):
        Interpolation(one, other)


def test_other_families_tokenizers_and_biases_are_refused(two: tuple[str, str]) -> None:
    wider = {"input": {"size": 64}, "encoder": {"name": "own/convnet", "widths": [8, 16, 48]}}
    with pytest.raises(ConfigError, match=r"modalities.image.encoder.widths: \[8, 16, 32\] in the first model"):
        Interpolation(load_model(two[0]), build_bundle(recipe(image=wider)))
    vit = {"input": {"size": 64}, "encoder": {"name": "own/vit", "width": 32, "layers": 1, "heads": 2}}
    with pytest.raises(ConfigError, match=r'modalities.image.encoder.name: "convnet" in the first model, "vit"'):
        Interpolation(load_model(two[0]), build_bundle(recipe(image=vit)))
    words = {"encoder": {"name": "own/transformer", "width": 32, "layers": 1, "heads": 2}}
    others = [{**words, "input": {"tokenizer": f"clip-bpe:{n}", "context_length": 16}} for n in (1024, 2048)]
    with pytest.raises(ConfigError, match=r"modalities.text.input.tokenizer: ids of test texts"):
        Interpolation(*(build_bundle(recipe(text=t)) for t in others))
    with pytest.raises(ConfigError, match=r"tensors.logit_bias.image-text: the second model has it"):
        Interpolation(build_bundle(recipe()), build_bundle(recipe(logit_scale={"bias": -10.0})))
    # what only training looks at is no difference
    dropped = {**vit, "encoder": {**vit["encoder"], "patch_dropout": 0.5}}  # type: ignore[dict-item]
    Interpolation(build_bundle(recipe(image=vit)), build_bundle(recipe(image=dropped)))


@pytest.mark.usefixtures("coco")
def test_the_curve_is_evaluated_kept_and_drawn(
    two: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DUALENC_DATA", str(SHARED_DATA))
    tasks = [load_task("coco_cc"), load_task("quickstart_val_clipart")]
    alphas = [1, 0, 0.5]
    got = interpolate(*two, alphas, tasks, tmp_path / "out", keep=0.5, cache_dir=tmp_path / "cache")
    assert [p["alpha"] for p in got["points"]] == [0, 0.5, 1]
    assert len({p["weights"] for p in got["points"]}) == 3
    plain = interpolate(*two, alphas, tasks, tmp_path / "plain")
    again = interpolate(*two, alphas, tasks, tmp_path / "again", cache_dir=tmp_path / "cache")
    assert got["points"] == plain["points"] == again["points"]  # features of one alpha are not taken for another's
    key = "quickstart_val_clipart/image_to_text_mean_rank"
    assert len({p["metrics"][key] for p in got["points"]}) == 3
    kept = load_model(str(tmp_path / "out"))
    want = Interpolation(*(load_model(x) for x in two)).at(0.5)
    assert all(torch.equal(v, want.model.state_dict()[k]) for k, v in kept.model.state_dict().items())
    assert kept.provenance["interpolated"]["alpha"] == 0.5
    assert (kept.provenance["a"], kept.provenance["b"]) == two
    assert json.loads((tmp_path / "out" / "interpolate.json").read_text())["kept"] == 0.5
    page = (tmp_path / "out" / "interpolate.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 2
    assert "0.5 · saved" in page
    over = charts(got)[1]["svg"]
    assert all(f">{x}</text>" in over for x in ("0", "0.5", "1"))
    assert markdown(got).count("\n") == 4


def test_the_command(two: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUALENC_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out"
    run = CliRunner().invoke
    more = ["--tasks", "quickstart_val_clipart", "--alphas", "0,1", "--keep", "0.25"]
    done = run(app, ["interpolate", *two, "--out", str(out), *more])
    assert done.exit_code == 0, done.output
    assert "| α | quickstart_val_clipart/image_to_text_R@1 |" in done.output
    assert load_model(str(out)).provenance["interpolated"]["alpha"] == 0.25
    for wrong, said in ((["--alphas", "0,x", "--tasks", "coco_cc"], "is not a list of numbers"), ([], "give tasks")):
        failed = run(app, ["interpolate", *two, "--out", str(out), *wrong])
        assert isinstance(failed.exception, ConfigError)
        assert said in str(failed.exception)
