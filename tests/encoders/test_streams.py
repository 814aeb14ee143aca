"""A strong stream through a shared tower: its projector, its dropout and drop path, saved, resumed, on ranks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
import _real_towers
import _runs
from _runs import few_samples, losses, newest, rows, segments
from _shared import ROOT
from _spawn import spawn

from dualenc.api.model import Model
from dualenc.compare.study import read_comparison
from dualenc.config import LogitScale, load_recipe
from dualenc.config.stream import Stream
from dualenc.distributed.world import World
from dualenc.encoders import DualEncoder
from dualenc.encoders.streams import BlockNoise, build_projector, dropped
from dualenc.errors import ConfigError
from dualenc.model import load_model
from dualenc.model.bundle import without_streams

torch.set_num_threads(1)
PAIRS = "pairs=[[image, text], [image_strong, text_strong]]"
LOSS = (
    "loss=[{name: info_nce, pairs: [[image, text]], weight: 0.5}, "
    "{name: info_nce, pairs: [[image_strong, text_strong]], weight: 0.5, label_smoothing: %s}]"
)


def streamed(noise: float, projector: str = "mlp", smoothing: float = 0.1, augment: str = "") -> list[str]:
    """Overrides that give the quickstart a strong stream."""
    stream = f"stream: {{projector: {projector}, layers: 2, hidden: 16, dropout: {noise}, drop_path: {noise}}}"
    text = f"tokenizer: 'clip-bpe:8192', context_length: 32{augment}"
    return [
        f"modalities.image_strong={{shares: image, input: {{size: 64, augment: {{scale: [0.8, 1.0]}}}}, {stream}}}",
        f"modalities.text_strong={{shares: text, input: {{{text}}}, {stream}}}",
        PAIRS,
        LOSS % smoothing,
    ]


def test_a_projector_is_linear_layers_with_norms_between() -> None:
    torch.manual_seed(0)
    mlp = build_projector(Stream(layers=3, hidden=7), 5, 4)
    assert isinstance(mlp, torch.nn.Sequential)
    x = torch.randn(6, 5)
    want = x
    for k in (0, 3):
        want = torch.nn.functional.gelu(torch.nn.functional.layer_norm(want @ mlp[k].weight.T + mlp[k].bias, (7,)))
    torch.testing.assert_close(mlp(x), want @ mlp[6].weight.T)
    assert build_projector(Stream(projector="shared"), 5, 4) is None


def test_dropped_rows_are_whole_and_the_mean_is_kept() -> None:
    torch.manual_seed(0)
    branch = torch.ones(4000, 3)
    out = dropped(branch, 0.0, 0.4)
    assert set(out.unique().tolist()) == {0.0, float(torch.tensor(1.0) * (torch.tensor(1.0) / 0.6))}
    assert bool(((out == 0).all(1) | (out != 0).all(1)).all())
    assert float(out.mean()) == pytest.approx(1, abs=0.05)
    both = dropped(branch, 0.5, 0.2)
    assert float(both.mean()) == pytest.approx(1, abs=0.06)
    assert torch.equal(dropped(branch, 0.0, 0.0), branch)


@pytest.mark.parametrize("name", ["own vit", "own convnet", "open_clip ViT", "timm ViT", "HF CLIP"])
def test_noise_is_that_of_a_loop_over_blocks(name: str) -> None:
    """Every block gives x + dropped(y − x) in training inside ``active``, and y in evaluation and outside."""
    tower = _real_towers.build(name, "info_nce").tower("image").train()
    x = _real_towers.batch_of(name, 0).inputs["image"]
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    clean: list[torch.Tensor] = []

    def look(_: Any, given: Any, out: Any) -> None:
        clean.append(out[0] if isinstance(out, tuple) else out)

    def after(_: Any, given: Any, out: Any) -> None:
        seen.append((given[0], out[0] if isinstance(out, tuple) else out))

    plain = tower.encode(x)
    for block in tower.blocks():
        block.register_forward_hook(look)
    noise = BlockNoise(tower, "test")
    for block in tower.blocks():
        block.register_forward_hook(after)
    assert torch.equal(tower.encode(x), plain)
    seen.clear()
    clean.clear()
    torch.manual_seed(3)
    with noise.active(Stream(dropout=0.25, drop_path=0.5)):
        noisy = tower.encode(x)
    assert not torch.equal(noisy, plain)
    torch.manual_seed(3)
    n, changed = len(clean), 0
    for k, (y, (given, got)) in enumerate(zip(clean, seen, strict=True), 1):
        if given.shape != y.shape:
            assert got is y
            continue
        branch = torch.nn.functional.dropout(y - given, 0.25)
        keep = (torch.rand(len(branch)) >= 0.5 * k / n).float() / (1 - 0.5 * k / n)
        torch.testing.assert_close(got, given + branch * keep.view(-1, *[1] * (branch.ndim - 1)))
        changed += 1
    assert changed >= 1
    with noise.active(Stream(dropout=0.25, drop_path=0.5)):
        tower.eval()
        assert torch.equal(tower.encode(x), plain)


def test_a_stream_without_anything_of_its_own_is_the_tower(tmp_path: Path) -> None:
    """Equal views and a shared head: both pairs have CLIP's loss; with a projector only the strong one changes."""
    given = ["data.workers=0", few_samples(tmp_path / "data", (64,)), "budget.steps=1"]
    given += ["modalities.image.input.augment={scale: [1.0, 1.0], ratio: [1.0, 1.0], flip: false}"]
    found: dict[str, dict[str, Any]] = {}
    for projector in ("shared", "linear"):
        more = streamed(0.0, projector, 0.0)
        more[0] = more[0].replace("augment: {scale: [0.8, 1.0]}", "augment: {scale: [1.0, 1.0], ratio: [1.0, 1.0]}")
        segments(World(), [[*given, *more, f"out={tmp_path / projector}"]])
        found[projector] = rows(tmp_path / projector / "metrics.jsonl")[0]
    weak, strong = "loss/info_nce0/image-text", "loss/info_nce1/image_strong-text_strong"
    assert found["shared"][weak] == found["shared"][strong]
    assert found["shared"]["loss"] == pytest.approx(found["shared"][weak], rel=1e-6)
    assert found["linear"][weak] == found["shared"][weak] != found["linear"][strong]


def test_a_strong_stream_is_saved_and_resumed(tmp_path: Path) -> None:
    """With dropout and drop path, bit for bit; the saved model has the projectors, and embeds with them."""
    augment = ", augment: {stop_words: 0.8, synonym: 0.4, swap: 0.4, delete: 0.2}"
    given = [*streamed(0.2, augment=augment), few_samples(tmp_path / "data", (96,)), "data.workers=0"]
    given += ["checkpoint.every_steps=2"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    segments(World(), [[*given, f"out={whole}", "budget.steps=4"]])
    found = segments(World(), [[*given, f"out={cut}", f"budget.steps={n}"] for n in (2, 4)])
    assert [(x["began"], x["ended"]) for x in found] == [(0, 2), (2, 4)]
    assert losses(cut) == losses(whole)
    one, two = ({k: x for p in newest(s).rglob("*.safetensors") for k, x in load_file(p).items()} for s in (whole, cut))
    assert "projectors.image_strong.0.weight" in one
    assert all(torch.equal(one[k], two[k]) for k in one)
    bundle = load_model(str(cut))
    assert bundle.parts["text_strong"].stream == Stream(layers=2, hidden=16, dropout=0.2, drop_path=0.2)
    embedder = bundle.embedder()
    weak, strong = (embedder.embed(m, ["a red star"]) for m in ("text", "text_strong"))
    assert not torch.allclose(weak, strong)
    pooled = bundle.model.tower("text")(bundle.inputs["text"].collate([bundle.inputs["text"].eval(["a red star"])]))[
        "pooled"
    ]
    want = torch.nn.functional.normalize(bundle.model.projectors["text_strong"](pooled), dim=1)
    torch.testing.assert_close(strong, want.detach())
    plain = without_streams(bundle)
    assert plain.modalities == ["image", "text"]
    assert plain.model.pairs == [("image", "text")]
    assert not any(k.startswith("projectors.") for k in plain.for_use())
    assert torch.equal(plain.embedder().embed("text", ["a red star"]), weak)
    assert plain.embedder().logit_scale("image-text") == embedder.logit_scale("image-text")
    raw = Model(bundle).encode(text_strong=["a red star"], normalize=False)
    assert float(raw.norm()) != pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(torch.nn.functional.normalize(raw, dim=1), strong)
    again = bundle.save(tmp_path / "again")
    torch.testing.assert_close(load_model(str(again)).embedder().embed("text_strong", ["a red star"]), strong)


@pytest.mark.dist
def test_two_ranks_with_a_strong_stream_are_one(tmp_path: Path) -> None:
    """Projectors, smoothing and changed captions; micro-batches on one side only; no noise, which ranks draw apart."""
    augment = ", augment: {stop_words: 0.8, synonym: 0.4, swap: 0.4, delete: 0.2}"
    given = [*streamed(0.0, augment=augment), few_samples(tmp_path / "data", (96,)), "data.workers=0"]
    given += ["optim.name=sgd", "budget.steps=3"]
    one, two = tmp_path / "one", tmp_path / "two"
    segments(World(), [[*given, f"out={one}", "batch.micro=8"]])
    spawn(_runs.__file__, "segments", 2, {"parts": [[*given, f"out={two}"]]})
    for a, b in zip(rows(one / "metrics.jsonl"), rows(two / "metrics.jsonl"), strict=True):
        for key in ("loss", "loss/info_nce1/image_strong-text_strong", "loss/info_nce0/image-text"):
            assert a.get(key) == pytest.approx(b.get(key), rel=1e-4), key


def test_a_second_strong_view_takes_the_stream_of_the_first() -> None:
    """A × A pairs of A strong views have one projector; noise with recomputed blocks is refused."""
    second = "modalities.image_strong2={shares: image, stream: image_strong, input: {size: 64}}"
    recipe = load_recipe("quickstart/strong", [second])
    model = DualEncoder(
        {"image": _real_towers.build("own vit", "info_nce").tower("image")},
        [],
        LogitScale(),
        shared={"image_strong": "image", "image_strong2": "image"},
    )
    stream = recipe.modalities["image_strong"].stream
    assert isinstance(stream, Stream)
    x = _real_towers.batch_of("own vit", 0).inputs["image"]
    model.add_streams(dict.fromkeys(("image_strong", "image_strong2"), ("image_strong", stream)), {"image_strong": x})
    model.eval()
    assert [n for n, _ in model.projectors.named_children()] == ["image_strong"]
    out = model({"image": x, "image_strong": x, "image_strong2": x})["features"]
    assert torch.equal(out["image_strong"], out["image_strong2"])
    assert not torch.equal(out["image_strong"], out["image"])
    with pytest.raises(ConfigError, match="stream; set these to 0"):
        model.set_grad_checkpointing()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("modalities.image.stream={}", "stream is for a modality that shares a tower"),
        ("modalities.text_strong.stream=image_strong", "is not a modality with a stream of its own that shares"),
    ],
)
def test_what_a_stream_cannot_be(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(str(ROOT / "recipes" / "quickstart" / "strong.yaml"), [override])


def test_each_method_of_the_parts_study_leaves_out_what_it_says() -> None:
    """Every method is the control's recipe but for the settings of one part."""
    study = read_comparison(ROOT / "benchmarks" / "strong_parts.yaml")
    recipes = {
        name: load_recipe(method.recipe or study.recipe or "", [*study.overrides, *method.overrides])
        for name, method in study.methods.items()
    }
    assert study.control == "strong"
    parts = {name: (r.modalities["image_strong"], r.modalities["text_strong"]) for name, r in recipes.items()}
    image, text = parts["strong"]
    assert image.stream is not None
    assert text.stream is not None
    changed = {
        name: {m for m, now, was in zip("it", p, (image, text), strict=True) if now != was} for name, p in parts.items()
    }
    assert changed == {
        "strong": set(),
        "no_smoothing": set(),
        "no_dropout": {"t"},
        "no_drop_path": {"i", "t"},
        "shared_heads": {"i", "t"},
        "no_text_augment": {"t"},
        "no_strong_crops": {"i"},
        "no_image_augment": {"i"},
    }
    same_loss = {name for name, r in recipes.items() if r.loss == recipes["strong"].loss}
    assert same_loss == set(recipes) - {"no_smoothing"}
